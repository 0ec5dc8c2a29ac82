"""The fused training forms against the rules' own tensor formulas."""

import importlib
import os
import pkgutil
import subprocess
import sys
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.models.vision_transformer import VisionTransformer

import binvit
import binvit.nn.fused
from binvit import jit
from binvit.bits import pack_signs, prepare_weights
from binvit.nn.convert import set_progress
from binvit.nn.fused import autograd, bit_products, elementwise, formed, linear
from binvit.nn.products import binary_product
from binvit.nn.rules import Elastic
from binvit.nn.schemes import WEIGHT_RULES


def trained(scheme: binvit.Scheme, width: int = 48, heads: int = 3) -> VisionTransformer:
    torch.manual_seed(1)
    model = VisionTransformer(img_size=15, patch_size=3, num_classes=5, embed_dim=width, depth=2, num_heads=heads)
    model = binvit.binarize(model, scheme).train()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(3):  # moves scales, shifts and biases off their first values
        optimizer.zero_grad()
        model(torch.randn(4, 3, 15, 15)).square().mean().backward()
        optimizer.step()
    return model


def gradients(model: VisionTransformer, x: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    y = model(x)
    (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
    return y.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


def run_with_two_threads(code: str) -> None:
    """Run a program in a process of its own, since the tests' process may have one thread only."""
    environment = os.environ | {"NUMBA_NUM_THREADS": "2"}
    environment.pop("OMP_NUM_THREADS", None)
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


# Schemes whose query, key, map and value all have rules with a form.
FORMED = "bnn", "xnor++", "bireal", "irnet", "reactnet", "bibert", "bivit", "binaryvit", "bhvit-qd", "bit"


@pytest.mark.parametrize(
    "scheme",
    [
        binvit.scheme("gsb"),
        binvit.scheme("bit", attention_bias="full", attention_shift=True),
        binvit.scheme("gsb", reduce="head", attention="elastic"),
        binvit.scheme("gsb", thresholds=(), attention_bias="none"),
        binvit.scheme("gsb", thresholds=(0.5,), attention_bias="relative", weight="bwn_channel"),
        binvit.scheme("gsb", thresholds=(0.3, 0.6, 0.95), shift=False, weight="bwn_unscaled"),
        *(binvit.scheme(name) for name in binvit.list_schemes() if name not in ("float", "gsb")),
    ],
    ids=lambda s: f"{s.name}-{len(s.thresholds)}-{s.attention_bias}-{s.weight}",
)
def test_fused_step_equals_the_rules(scheme, monkeypatch):
    model = trained(scheme)
    set_progress(model, 0.8)
    x = torch.randn(6, 3, 15, 15)
    used = set()
    for module, name in ((autograd, "attention_core"), (formed, "attention_by_forms")):
        core = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, core=core: used.add(core.__name__) or core(*a))
    y, grads = gradients(model, x)
    forms = {"attention_core": ("gsb", "elastic"), "attention_by_forms": FORMED}
    assert used == {name for name, schemes in forms.items() if scheme.name in schemes}
    monkeypatch.setattr(elementwise, "usable", lambda *tensors: False)
    expected, expected_grads = gradients(model, x)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    assert grads.keys() == expected_grads.keys()
    for name, grad in grads.items():
        size = expected_grads[name].abs().max().item()
        torch.testing.assert_close(grad, expected_grads[name], rtol=1e-3, atol=1e-4 * size + 1e-7, msg=name)


@pytest.mark.parametrize("shape", [(1, 1, 16), (2, 3, 65), (5, 17, 40), (60, 40, 130), (400, 17, 33)])
@pytest.mark.parametrize("unsigned", [False, True])
def test_products_of_every_size_equal_the_rules_in_float64(shape, unsigned):
    torch.manual_seed(0)
    rule_x = binvit.nn.schemes.INPUT_RULES["elastic_unsigned" if unsigned else "elastic"](binvit.scheme("elastic"))
    rule_w = binvit.scheme("elastic").rule("weight")
    leaves = [
        torch.randn(shape),
        torch.randn(77, shape[-1]),
        torch.tensor(0.7),
        torch.randn(shape[-1]),
        torch.randn(77),
    ]
    results = []
    for dtype in (torch.float32, torch.float64):
        x, w, scale, shift, bias = (leaf.to(dtype, copy=True).requires_grad_() for leaf in leaves)
        if dtype == torch.float32:
            y = linear.binary_linear(x, linear.Layer(rule_x, rule_w, [[scale]], [()], w, shift, bias))
        else:
            y = binary_product(x, w, rule_x, rule_w, [scale], (), shift, bias)
        y.square().mean().backward()
        results.append([y.detach(), *(leaf.grad for leaf in (x, w, scale, shift, bias))])
    for fused, exact in zip(*results, strict=True):
        size = exact.abs().max().item()
        torch.testing.assert_close(fused.double(), exact, rtol=1e-5, atol=1e-5 * size)


@settings(max_examples=60)
@given(
    st.tuples(st.integers(1, 60), st.integers(1, 140), st.integers(1, 140)),
    st.sampled_from(["signs", "levels", "rows"]),
    st.integers(0, 3),
    st.integers(0, 2**32 - 1),
)
def test_counted_bits_are_the_integers_of_the_levels(shape, kind, start, seed):
    rows, k, columns = shape
    draw = np.random.default_rng(seed)
    x, shift = draw.standard_normal((rows, k)).astype(np.float32), draw.standard_normal(k).astype(np.float32)
    w = np.where(draw.random((columns, k)) < 0.5, np.float32(-1), np.float32(1))
    scale, bias = (draw.integers(-4, 5, columns).astype(np.float32) for _ in range(2))
    panels = bit_products.prepare_levels(w)
    packed = prepare_weights(pack_signs(w))
    assert panels.shape == packed.shape
    assert np.array_equal(panels.panels, packed.panels)
    v = x + shift
    levels = np.where(v > np.float32(0.3), 1, 0) if kind == "levels" else np.where(v >= 0, 1, -1)
    means = np.empty(rows if kind == "rows" else 0, np.float32)
    sums = packed.sums(k) if kind == "levels" else np.zeros(columns, np.int32)
    out = np.full((rows, columns + 3), np.float32(7))
    form = np.float32(0.3 if kind == "levels" else 0), kind == "levels", np.float32(0)
    bit_products.linear_products(x, shift, *form, panels.panels, sums, scale, bias, start, means, out)
    expected = np.full_like(out, 7)
    product = (levels @ w.T.astype(int)).astype(np.float32)
    if kind == "rows":
        np.testing.assert_allclose(means, np.abs(v).mean(1), rtol=1e-5)
        product *= means[:, None]
    expected[:, start : start + columns] = product * scale + bias
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5 if kind == "rows" else 0)


@settings(max_examples=60)
@given(st.integers(1, 4), st.integers(1, 70), st.integers(1, 140))
def test_products_of_signs_are_exact(heads, n, k):
    a, b = torch.randn(2, heads, n, k).sign(), torch.randn(2, heads, n + 3, k).sign()
    assert torch.equal(bit_products.multiply_signs(a, b), a @ b.mT)


def test_sums_do_not_depend_on_the_number_of_threads():
    run_with_two_threads("""
import numba
import numpy as np
import torch
from binvit.nn.fused import bit_products, elementwise, small_products
from binvit.nn.fused.end_kernels import end_backward, end_forward
from binvit.nn.rules import Form
draw = np.random.default_rng(0).standard_normal
x, g, shift = (draw(shape).astype(np.float32) for shape in ((633, 70), (633, 70), 70))
results = []
torch.set_num_threads(2)  # no kernel has more
for threads in (1, 2):
    numba.set_num_threads(threads)
    dx, dshift, signs, means = g.copy(), np.empty(70, np.float32), np.empty_like(x), np.ones(0, np.float32)
    levels = np.empty_like(x)
    one, form = np.float32(1), elementwise.numbers(Form(low=-0.5, high=0.5))
    sums = elementwise.binary_backward(x, shift, dx, one, *form, one, means, False, dx, dshift, levels)
    vectors = np.stack([shift] * 8)
    ends, dvectors = [np.empty_like(x) for _ in range(3)], np.empty_like(vectors)
    moments = np.empty((2, 2 * 633), np.float32)
    end_forward(x, g, vectors, True, True, 35, np.float32(1e-5), 2, ends[0], moments)
    end_backward(x, g, x, vectors, True, True, 35, 2, moments, *ends[1:], dvectors)
    results.append((dx, dshift, levels, *sums, elementwise.centred_signs(x, signs), signs, *ends, dvectors, moments))
    panels, y, sizes = bit_products.prepare_levels(signs), np.empty((633, 633), np.float32), np.empty(633, np.float32)
    scales = np.tile(shift, 10)[:633]
    zeros = np.zeros(633, np.int32)
    bit_products.linear_products(x, shift, *form[3:], panels.panels, zeros, scales, scales, 0, sizes, y)
    product = small_products.multiply_over_rows(torch.from_numpy(x), torch.from_numpy(g)[:, :64]).numpy()
    results[-1] += y, sizes, product
assert all(np.array_equal(a, b) for a, b in zip(*results, strict=True))
""")


def test_kernels_have_no_more_threads_than_torch():
    run_with_two_threads("""
import numba
import torch
from binvit.nn.fused.elementwise import parallel_kernel
from binvit.threads import get_threads
@parallel_kernel
def count():
    return numba.get_num_threads()
for torch_threads, numba_threads in [(1, 2), (2, 1), (2, 2), (1, 1)]:
    torch.set_num_threads(torch_threads)
    numba.set_num_threads(numba_threads)  # as another program may, at any time
    assert count() == min(torch_threads, numba_threads)
    assert (torch.get_num_threads(), numba.get_num_threads(), get_threads()) == (torch_threads, *[numba_threads] * 2)
""")


def test_every_parallel_kernel_of_a_training_follows_torch():
    names = [name for _, name, _ in pkgutil.iter_modules(binvit.nn.fused.__path__, "binvit.nn.fused.")]
    modules = [importlib.import_module(name) for name in names]
    found = {name: value for module in modules for name, value in vars(module).items()}
    kernels = {name: value for name, value in found.items() if isinstance(value, jit._Kernel)}
    assert len(kernels) > 5
    assert [name for name, kernel in kernels.items() if kernel._entry.targetoptions.get("parallel")] == []
    assert sum(hasattr(value, "__wrapped__") for value in found.values()) > len(kernels)


def test_double_precision_and_exotic_rules_take_the_formulas():
    signed, weight = binvit.scheme("elastic").rule("input"), binvit.scheme("elastic").rule("weight")
    assert linear.takes_linear(signed, weight, torch.zeros(2, 2))
    assert not linear.takes_linear(signed, weight, torch.zeros(2, 2, dtype=torch.float64))
    assert not linear.takes_linear(binvit.scheme("bivit-head").rule("query"), weight)
    assert not linear.takes_linear(signed, binvit.scheme("elastic").rule("head_weight"))
    for gsb in (binvit.scheme("gsb", reduce="batch"), binvit.scheme("gsb", gradient="masked")):
        assert not autograd.takes_attention(*(gsb.rule(p) for p in ("query", "key", "attention", "value")))


GSB = binvit.scheme("gsb")


with mock.patch.object(elementwise, "sums_like_torch", return_value=True):
    TAKEN = [name for name, make in WEIGHT_RULES.items() if linear._takes_signs(make(GSB), torch.zeros(2, 8))]
needs_sums = pytest.mark.skipif(not elementwise.sums_like_torch(), reason="this torch sums in another order")


@needs_sums
@pytest.mark.parametrize("k", [8, 33, 96, 521, 2100])
@pytest.mark.parametrize("weight", TAKEN)
def test_signs_of_weights_are_the_rules_to_the_last_bit(weight, k):
    rule = WEIGHT_RULES[weight](GSB)
    w, g = torch.randn(7, k), torch.randn(7, k)
    w[0, :4] = torch.tensor([torch.nan, 0.0, -0.0, 1.0])
    w[1] = 0
    w[2, :2] = torch.tensor([1.0, -1.0])
    (ours,), (theirs,) = linear._sign_planes(rule, w), rule.planes(w)
    pairs = [(ours.levels, theirs.levels), *zip(ours.kept, theirs.kept, strict=True)]
    pairs.append((linear._sign_gradient(rule, ours.kept, g), rule.backward_from(theirs.kept, g)[0]))
    assert (ours.scale is None) == (theirs.scale is None)
    for one, other in [*pairs, (ours.scale, theirs.scale)]:
        assert one is other or torch.equal(one.view(torch.int32), other.contiguous().view(torch.int32))


@needs_sums
@given(n=st.integers(2, 40), k=st.integers(elementwise.SHORTEST_ROW, 3000), sizes=st.booleans())
def test_rows_are_summed_in_the_order_of_torch(n, k, sizes):
    x, out = torch.randn(n, k), torch.empty(n)
    elementwise.sums_of_rows(x.numpy(), sizes, out.numpy())
    assert torch.equal(out, (x.abs() if sizes else x).sum(-1))


@pytest.mark.parametrize("scheme", ["reactnet", "bireal"])
def test_weights_whose_sums_have_another_order_take_the_formulas(scheme, monkeypatch):
    """What a machine does whose torch sums otherwise: the rule's own steps, to the last bit on this one."""
    model, x = trained(binvit.scheme(scheme)), torch.randn(4, 3, 15, 15)
    (y, grads), rule = gradients(model, x), model.blocks[0].mlp.fc1.weight_binarizer.rule
    monkeypatch.setattr(elementwise, "sums_like_torch", lambda: False)
    assert not linear._takes_signs(rule, model.blocks[0].mlp.fc1.weight)
    other, others = gradients(model, x)
    assert torch.equal(y, other)
    assert all(torch.equal(grads[name], value) for name, value in others.items())


STARTS = {
    "a training step": """
model = VisionTransformer(img_size=8, patch_size=4, embed_dim=16, depth=1, num_heads=1, num_classes=2)
model = binvit.binarize(model, "gsb").train()
for _ in range(2):
    model(torch.rand(2, 3, 8, 8)).sum().backward()
""",
    "a product of bits": """
words = binvit.bits.pack_signs(torch.randn(2000, 70).numpy())
binvit.bits.binary_matmul(words, words, 70)
""",
    "a number of threads for bits": "binvit.bits.set_threads(2)",
}


def test_torch_keeps_its_number_of_threads():
    run_with_two_threads(f"""
import multiprocessing
import torch
from timm.models.vision_transformer import VisionTransformer
import binvit
torch.set_num_threads(1)
assert torch.get_num_threads() == 1  # torch sets its runtime's number when it is first asked: not after the start
def count(start):
    exec(start, globals())
    assert torch.get_num_threads() == 1, torch.get_num_threads()
for name, start in {STARTS}.items():  # each the first in its process
    child = multiprocessing.get_context("fork").Process(target=count, args=(start,))
    child.start()
    child.join()
    assert child.exitcode == 0, name
""")


@pytest.mark.parametrize("shape", [(3, 4, 4), (2, 5, 5), (3, 6, 6)])
def test_a_bias_of_another_shape_is_refused(shape):
    qkv, bias, one = torch.randn(2, 5, 36), torch.zeros(shape), torch.tensor(1.0)
    with pytest.raises(ValueError, match="does not fit 3 heads and 5 tokens"):
        autograd.attention_core(qkv, 3, bias, (None, None, None), (Elastic(lo=0), Elastic()), one, one, [one], [one])
