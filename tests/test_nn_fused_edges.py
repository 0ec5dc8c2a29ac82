"""The compiled training step on data made of zeros and window edges, against the rules in float64."""

import copy
import itertools

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from nn_helpers import arrays, values

import binvit
from binvit.nn import products, rules
from binvit.nn.block_parts import LayerEnd
from binvit.nn.fused import autograd, elementwise, planes
from binvit.nn.fused.linear import Layer, binary_linear, takes_linear
from binvit.nn.rules import GsbAttention, GsbValue, superpose
from binvit.nn.schemes import INPUT_RULES, PLACES, WEIGHT_RULES

scale = st.sampled_from([0.25, 0.5, 1.0, 2.0])
shifts = st.none() | arrays((3, 1, 4), st.sampled_from([0.0, 0.25, -0.5]))


def leaves(arrays_, dtype):
    return [None if a is None else torch.tensor(a, dtype=dtype, requires_grad=True) for a in arrays_]


def compare(run, arrays_):
    """Run both forms, each with its own leaves, and compare values and gradients."""
    results = []
    for dtype in (torch.float32, torch.float64):
        tensors = leaves(arrays_, dtype)
        y = run(dtype, tensors)
        g = torch.tensor(np.random.default_rng(0).standard_normal(y.shape), dtype=torch.float32)
        y.backward(g.to(dtype))
        grads = [None if t is None or t.grad is None else t.grad.double() for t in tensors]
        results.append([y.detach().double(), *grads])
    for fast, slow in zip(*results, strict=True):
        assert (fast is None) == (slow is None)
        if fast is not None:
            size = max(1.0, slow.abs().max().item())
            torch.testing.assert_close(fast, slow, rtol=1e-5, atol=2e-6 * size)


@pytest.mark.parametrize("weight", [name for name in WEIGHT_RULES if name not in ("float", "int8", "int8_channel")])
@pytest.mark.parametrize("inputs", [name for name in INPUT_RULES if name not in ("float", "int8")])
@settings(max_examples=6)
@given(data=st.data())
def test_linear_layers(inputs, weight, data):
    """One layer and several side by side, against the rules."""
    gsb = binvit.scheme("gsb")
    rule_x, rule_w = INPUT_RULES[inputs](gsb), WEIGHT_RULES[weight](gsb)
    x, k, n, parts = data.draw(arrays((2, 3, 8))), 8, data.draw(st.integers(1, 5)), data.draw(st.integers(1, 3))
    count = len(rule_x.parameters)
    w, bias = data.draw(arrays((parts * n, k))), data.draw(st.none() | arrays((parts * n,)))
    some = st.sampled_from([0.0, 0.25, -0.5])
    shift = data.draw(st.none() | arrays((parts, k) if parts > 1 else (k,), some))
    px = [np.array(data.draw(scale)) for _ in range(parts * count)]
    pw = [
        np.full(rule_w.parameter_shape(channels=n), data.draw(scale)) for _ in range(parts) for _ in rule_w.parameters
    ]

    def run(dtype, tensors):
        x, w, shift, bias, *rest = tensors
        of_x, of_w = rest[: parts * count], rest[parts * count :]
        of_x = [of_x[i * count : (i + 1) * count] for i in range(parts)]
        of_w = [of_w[i * len(rule_w.parameters) : (i + 1) * len(rule_w.parameters)] for i in range(parts)]
        if dtype == torch.float32:
            assert takes_linear(rule_x, rule_w, x, w, shift, bias)
            return binary_linear(x, Layer(rule_x, rule_w, of_x, of_w, w, shift, bias))
        shifts = [shift] * parts if shift is None or parts == 1 else shift.unbind()
        biases = [bias] * parts if bias is None else bias.chunk(parts)
        each = zip(w.chunk(parts), of_x, of_w, shifts, biases, strict=True)
        return torch.cat([products.binary_product(x, w, rule_x, rule_w, a, b, s, c) for w, a, b, s, c in each], -1)

    compare(run, [x, w, shift, bias, *px, *pw])


@pytest.mark.parametrize("own", ["none", "input", "other"])
@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("weight", ["sign_mean_centred", "sign_learned_centred", "bwn"])
def test_a_layer_and_its_end_in_one_pass_are_the_two_one_after_the_other(own, parts, weight):
    gsb = binvit.scheme("gsb")
    torch.manual_seed(0)
    n, k = 6 * parts, 6
    end = LayerEnd(k, n, parts=parts, norm=True, own_input=own != "none", activation="rprelu", scale=True)
    x, other = torch.randn(2, 5, k), torch.randn(2, 5, k)
    w, shift, bias = torch.randn(n, k), torch.randn(parts, k), torch.randn(n)
    rule_x, rule_w = INPUT_RULES["sign_approx"](gsb), WEIGHT_RULES[weight](gsb)
    scales = [torch.rand(rule_w.parameter_shape(channels=n // parts)) for _ in range(parts) for _ in rule_w.parameters]
    results = []
    for at_once in (True, False):
        leaves = [t.clone().requires_grad_() for t in (x, other, w, shift, bias, *scales)]
        x_, other_, w_, shift_, bias_, *scales_ = leaves
        of_w = [scales_[i : i + 1] for i in range(parts)] if scales_ else [()] * parts
        layer = Layer(rule_x, rule_w, [()] * parts, of_w, w_, shift_, bias_)
        added = {"none": None, "input": x_, "other": other_}[own]
        end.zero_grad()
        if at_once:
            assert end.is_compiled(x_, added)
            y = binary_linear(x_, layer, end.kind, added, end.vectors)
        else:
            y = end(binary_linear(x_, layer), added)
        y.backward(torch.linspace(-1, 1, y.numel()).view_as(y))
        results.append([y.detach(), *(t.grad for t in leaves), *(p.grad.clone() for p in end.parameters())])
    for one, two in zip(*results, strict=True):
        assert (one is None and two is None) or torch.equal(one, two)


@pytest.mark.parametrize("activation", ["none", "clip", "rprelu"])
@settings(max_examples=25)
@given(data=st.data())
def test_layer_ends(activation, data):
    """The fused form of what follows a product, NaN included, against the module's own steps in float64."""
    out, ratio, parts = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    out *= parts
    inputs, outputs = (out, out * ratio) if data.draw(st.booleans()) else (out * ratio, out)
    switches = {name: data.draw(st.booleans()) for name in ("factor", "norm", "own_input", "scale")}
    fused = LayerEnd(inputs, outputs, parts=parts, activation=activation, **switches)
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    for parameter in fused.parameters():
        parameter.data = torch.tensor(rng.uniform(0.5, 2, parameter.shape), dtype=torch.float32)
    # No two numbers of a row are close, since the norm of a nearly constant row multiplies every rounding.
    rows = rng.permuted(np.tile(np.arange(outputs), (2, 3, 1)), axis=-1) - outputs // 2
    y = torch.tensor(rows + rng.uniform(-0.4, 0.4, rows.shape), dtype=torch.float32)
    if fused.factor is not None:
        y /= fused.factor.detach()  # which could bring two of them together
    x = torch.tensor(rng.standard_normal((2, 3, inputs)), dtype=torch.float32)
    if data.draw(st.booleans()):
        y[0, 0] = torch.nan
    plain = copy.deepcopy(fused).double()
    assert elementwise.usable(y, x)
    assert not elementwise.usable(y.double())
    results = []
    for module, dtype in ((fused, torch.float32), (plain, torch.float64)):
        y_, x_ = (t.detach().to(dtype, copy=True).requires_grad_() for t in (y, x))
        z = module(y_, x_)
        g = torch.linspace(-1, 1, z.numel(), dtype=dtype).view_as(z)
        torch.where(y.isnan().any(-1, keepdim=True), 0, z * g).sum().backward()
        finite = ~y.isnan()
        tensors = [z, y_.grad[finite], *([] if x_.grad is None else [x_.grad])]
        grads = [p.grad for p in module.parameters()] if finite.all() else []
        results.append([t.detach().double() for t in tensors + grads])
    for fast, slow in zip(*results, strict=True):
        # A norm of nearly equal values has large gradients, and large roundings.
        size = max([1.0, *slow.nan_to_num().abs().flatten().tolist()])
        torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-4 * size, equal_nan=True)


@pytest.mark.parametrize("groups", [1, 2, 3, 4])
@settings(max_examples=20)
@given(data=st.data())
def test_attention(groups, data):
    """Query, key and value lie on edges; the map cannot, since a softmax is no round number.

    The thresholds of the value are no round numbers either: 0.7 of a maximum differs between float32 and float64.
    """
    thresholds = (0.5, 0.7, 0.9)[: groups - 1]
    rule_a, rule_v = GsbAttention(thresholds=thresholds), GsbValue(thresholds=thresholds)
    elastic = rules.Elastic()
    b, n, heads, d = 2, 5, 3, 4
    qkv = data.draw(arrays((b, n, 3 * heads * d), values))
    bias = np.random.default_rng(data.draw(st.integers(0, 9))).uniform(-0.1, 0.4, (heads, n, n))
    scales = [data.draw(scale) for _ in range(2 + groups)] + [0.11, 0.23, 0.17, 0.13][:groups]
    given_shifts = [data.draw(shifts) for _ in range(3)]

    def run(dtype, tensors):
        qkv, bias, *rest = tensors
        shifts, scale_q, scale_k, scales = rest[:3], rest[3], rest[4], rest[5:]
        scales_v, scales_a = scales[:groups], scales[groups:]
        if dtype == torch.float32:
            assert autograd.takes_attention(elastic, elastic, rule_a, rule_v, qkv, bias)
            return autograd.attention_core(
                qkv, heads, bias, tuple(shifts), (rule_a, rule_v), scale_q, scale_k, scales_a, scales_v
            )
        q, k, v = qkv.view(b, n, 3, heads, d).permute(2, 0, 3, 1, 4).unbind(0)
        q, k, v = (x if shift is None else x + shift for x, shift in zip((q, k, v), shifts, strict=True))
        product = products.binary_product(q, k, elastic, elastic, [scale_q], [scale_k])
        a = (product * d**-0.5).softmax(-1) + bias
        top = a.amax(-1, keepdim=True)
        edges = [t * top for t in thresholds] + [0 * top, scales_a[0] / 2, scales_a[0]]
        assume(all((a - edge).abs().min() > 1e-6 for edge in edges))  # else float32 may fall on the other side
        for extreme in (v.amax((-1, -2), keepdim=True), v.amin((-1, -2), keepdim=True)):
            edges = [t * extreme for t in thresholds]
            assume(not any((((v - edge).abs() < 1e-6) & (edge != 0)).any() for edge in edges))
        y = products.binarize(a, rule_a, *scales_a) @ products.binarize(v, rule_v, *scales_v)
        return y.transpose(1, 2).reshape(b, n, heads * d)

    compare(run, [qkv, bias, *given_shifts, *(np.array(s) for s in scales)])


def test_thresholds_are_compared_alike():
    """0.7 of a maximum is rounded the same way by the kernels and by the rules."""
    rng = np.random.default_rng(0)
    n = 64
    v = torch.tensor(rng.integers(-10, 11, (1, n, 1, 8)) / 10, dtype=torch.float32)  # many entries at 0.7 and 0.9
    qkv = torch.zeros(1, n, 3, 1, 8)
    qkv[:, :, 2] = v
    rule_a, rule_v = GsbAttention(thresholds=()), GsbValue()
    one = torch.tensor(1.0)
    for a1, a2, a3 in itertools.product((0.3, 0.7), repeat=3):
        scales_v = [torch.tensor(s) for s in (a1, a2, a3)]
        # With equal scores and a scale far below 1/n the map is a constant: every row sums the binarized value.
        y = autograd.attention_core(
            qkv.view(1, n, 24), 1, None, (None,) * 3, (rule_a, rule_v), one, one, [torch.tensor(1e-3)], scales_v
        )
        want = 1e-3 * products.binarize(v.transpose(1, 2), rule_v, *scales_v).sum(2)
        torch.testing.assert_close(y[0, 0], want[0, 0], rtol=1e-5, atol=1e-6)


FORMED = sorted(
    {
        (place, name)
        for place in ("input", "query", "attention", "value")
        for name, make in PLACES[place].items()
        if make(binvit.scheme("gsb")).form(*make(binvit.scheme("gsb")).default()) is not None
    }
)


@pytest.mark.parametrize(("place", "name"), FORMED, ids=["-".join(pair) for pair in FORMED])
@settings(max_examples=10)
@given(data=st.data())
def test_planes_of_every_rule_with_a_form(place, name, data):
    """Levels and scales to the last bit, gradients against the rule in float64; transposed tensors, too."""
    rule = PLACES[place][name](binvit.scheme("gsb"))
    shape = data.draw(st.sampled_from([(1, 1, 1, 1), (2, 3, 5, 4), (1, 2, 3, 17), (2, 1, 33, 3)]))
    x = torch.tensor(data.draw(arrays(shape)), dtype=torch.float32)
    x = x.mT if data.draw(st.booleans()) else x
    parameters = [torch.tensor(data.draw(scale)) for _ in rule.parameters]
    g = torch.tensor(np.random.default_rng(0).standard_normal(x.shape), dtype=torch.float32)
    for fast, plain in zip(planes.planes(rule, x, *parameters), rule.planes(x, *parameters), strict=True):
        assert torch.equal(fast.levels, plain.levels)
        assert torch.equal(superpose([fast]), superpose([plain]))
    fast = planes.backward(rule, x, g, *parameters)
    slow = rule.backward(x.double(), g.double(), *(p.double() for p in parameters))
    for a, b in zip(fast, slow, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=2e-6 * max(1.0, b.abs().max().item()))
