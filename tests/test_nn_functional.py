"""Functional binarizers reproduce the released code's numbers; integer products equal what they are made of."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from nn_helpers import upstream

from binvit.nn import functional as BF
from binvit.nn import products, rules
from binvit.nn.catalogue import scheme
from binvit.nn.rules import GsbAttention, GsbValue
from binvit.nn.schemes import ATTENTION_RULES, INPUT_RULES, VALUE_RULES, WEIGHT_RULES

GOLDEN = np.load(Path(__file__).parent / "golden" / "gsb_quantizers.npz")
GSB = {"thresholds": (0.7, 0.9), "reduce": "batch", "gradient": "official"}
BINARIZERS = {
    "attention_gsb": lambda x, scales: BF.gsb_attention(x, scales, **GSB),
    "value_gsb": lambda x, scales: BF.gsb_value(x, scales, **GSB),
    "elastic_signed1": lambda x, scales: BF.elastic_signed(x, *scales),
    "elastic_unsigned1": lambda x, scales: BF.elastic_unsigned(x, *scales),
    "elastic_signed8": lambda x, scales: products.binarize(x, rules.Elastic(lo=-128, hi=127), *scales),
    "bwn_layer": lambda x, scales: BF.binarize_weight(x),
    "bwn_row": lambda x, scales: BF.binarize_weight(x, scale="channel"),
}
close = {"rtol": 1e-5, "atol": 1e-5}


def test_every_golden_array_is_compared():
    assert {key.split("/")[0] for key in GOLDEN.files} == set(BINARIZERS)
    assert {key.split("/")[1] for key in GOLDEN.files} == {"x", "alpha", "y", "gy", "gx", "galpha"}


@pytest.mark.parametrize("name", BINARIZERS)
def test_golden_values_and_gradients(name):
    golden = {key.split("/")[1]: GOLDEN[key] for key in GOLDEN.files if key.startswith(f"{name}/")}
    x = torch.tensor(golden["x"], requires_grad=True)
    scales = [torch.tensor(a, requires_grad=True) for a in golden.get("alpha", ())]
    y = BINARIZERS[name](x, scales)
    y.backward(torch.tensor(golden["gy"]))
    np.testing.assert_allclose(y.detach(), golden["y"], **close)
    np.testing.assert_allclose(x.grad, golden["gx"], **close)
    np.testing.assert_allclose([s.grad.item() for s in scales], golden.get("galpha", ()), **close)


def test_arguments_of_another_type_are_named():
    x = torch.tensor(upstream((2, 3, 4, 4), 0))
    scale = x.new_tensor(0.5)
    assert torch.equal(BF.elastic_signed(x, 0.5), BF.elastic_signed(x, scale))
    assert torch.equal(
        BF.gsb_attention(x, [0.5, 1, scale]), BF.gsb_attention(x, torch.stack([scale, 2 * scale, scale]))
    )
    for call, sentence in (
        (lambda: BF.elastic_signed(x, "a"), "scale must be a tensor or a number, got str"),
        (lambda: BF.elastic_unsigned(x.numpy(), scale), "x must be a tensor, got ndarray"),
        (lambda: BF.binarize_weight(5), "w must be a tensor, got int"),
        (lambda: BF.gsb_attention(x.numpy(), [scale] * 3), "a must be a tensor, got ndarray"),
        (lambda: BF.gsb_value([1.0], [scale] * 3), "v must be a tensor, got list"),
        (lambda: BF.gsb_value(x, 0.5), "scales must be a list of scales, got float"),
        (lambda: BF.gsb_value(x, [scale, scale, None]), r"scales\[2\] must be a tensor or a number, got NoneType"),
    ):
        with pytest.raises(ValueError, match=sentence):
            call()


def test_the_public_names_are_the_rules():
    x = torch.tensor(upstream((2, 3, 4, 4), 0))
    scale = torch.tensor(0.7, dtype=x.dtype)
    assert torch.equal(BF.elastic_signed(x, scale), products.binarize(x, rules.Elastic(), scale))
    assert torch.equal(BF.elastic_unsigned(x, scale), products.binarize(x, rules.Elastic(lo=0), scale))
    for reduce in ("batch", "sample", "head", "row"):
        scales = [scale, scale / 2]
        for public, rule in ((BF.gsb_attention, GsbAttention), (BF.gsb_value, GsbValue)):
            want = products.binarize(x, rule(thresholds=(0.4,), reduce=reduce), *scales)
            assert torch.equal(public(x, scales, thresholds=(0.4,), reduce=reduce), want)
    w = x.flatten(1)
    for center, where in ((True, "tensor"), (False, "none"), ("channel", "channel")):
        for factor in ("none", "tensor", "channel"):
            want = products.binarize(w, rules.Bwn(scale=factor, center=where))
            assert torch.equal(BF.binarize_weight(w, scale=factor, center=center), want)


ONE = torch.tensor(1.0)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda x: BF.binarize_weight(x, scale="row"), "scale must be one of none, tensor, channel, got 'row'"),
        (
            lambda x: BF.binarize_weight(x, center="head"),
            "center must be one of none, tensor, channel, True, False, got 'head'",
        ),
        (
            lambda x: BF.gsb_value(x, [ONE] * 3, reduce="all"),
            "reduce must be one of batch, sample, head, row, got 'all'",
        ),
        (lambda x: BF.gsb_value(x, [ONE] * 3, gradient="bit"), "gradient must be one of official, masked, got 'bit'"),
        (lambda x: BF.gsb_attention(x, [ONE] * 2), "2 thresholds need 3 scales, got 2"),
        (lambda x: BF.gsb_attention(x, [ONE] * 3, (0.9, 0.7)), r"must increase strictly .* got \(0.9, 0.7\)"),
        (lambda x: BF.gsb_attention(x, [ONE] * 3, (0.7, 0.7)), "must increase strictly"),
        (lambda x: BF.gsb_attention(x, [ONE] * 2, (1.0,)), "between 0 and 1"),
        (lambda x: BF.gsb_attention(x, [ONE] * 2, (0.0,)), "between 0 and 1"),
        (lambda x: BF.gsb_attention(x, [ONE] * 2, 0.7), "must be a list of numbers, got 0.7"),
        (lambda x: BF.gsb_attention(x, [ONE] * 2, ("0.7",)), "must be a list of numbers"),
        (lambda x: BF.gsb_attention(x[0], [ONE] * 3), r"takes a tensor \(B, H, N, M\) .* got \(3, 4, 4\)"),
        (lambda x: BF.gsb_value(x, [torch.ones(3)] * 3), r"scales of one number, got .* \[\(3,\), \(3,\), \(3,\)\]"),
        (lambda x: BF.binarize_weight(x, center=["x"]), "True, False, got"),
    ],
)
def test_a_wrong_choice_is_one_sentence(call, sentence):
    with pytest.raises(ValueError, match=sentence) as caught:
        call(torch.randn(2, 3, 4, 4))
    assert str(caught.value).endswith(".")
    assert "\n" not in str(caught.value)


def test_scales_may_be_vectors_of_one_number():
    scales = [torch.full((1,), 0.1, requires_grad=True) for _ in range(3)]
    BF.gsb_attention(torch.rand(1, 2, 3, 3), scales).sum().backward()
    assert all(scale.grad.shape == (1,) and scale.grad.item() != 0 for scale in scales)


def test_exact_products_have_gradients_of_the_scales_alone():
    rule_a, rule_v = GsbAttention(thresholds=(0.7,)), GsbValue(thresholds=(0.7,))
    scales = [torch.tensor(0.1, requires_grad=True) for _ in range(4)]
    a, v = torch.rand(1, 2, 3, 3), torch.randn(1, 2, 3, 4)
    products.attention_product(a, v, rule_a, rule_v, scales[:2], scales[2:], exact=True).sum().backward()
    assert all(scale.grad is not None for scale in scales)


def leaf(shape, seed, dtype=torch.float64):
    return torch.tensor(upstream(shape, seed), dtype=dtype).requires_grad_()


def parameters(rule, seed, **sizes):
    rng = np.random.default_rng(seed)
    shape = rule.parameter_shape(**sizes)
    return [torch.tensor(rng.uniform(0.3, 0.9, shape)).requires_grad_(rule.learned) for _ in rule.parameters]


def gradients(y, leaves):
    g = torch.tensor(upstream(tuple(y.shape), 9))
    y.backward(g)
    grads = [None if leaf.grad is None else leaf.grad.clone() for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    return grads


@pytest.mark.parametrize("weight", WEIGHT_RULES)
@pytest.mark.parametrize("input", INPUT_RULES)
def test_a_linear_product_has_the_gradients_of_its_parts(input, weight):
    rule_x, rule_w = INPUT_RULES[input](scheme("gsb")), WEIGHT_RULES[weight](scheme("gsb"))
    x, w, shift, bias = leaf((2, 3, 9), 0), leaf((5, 9), 1), leaf((9,), 2), leaf((5,), 3)
    px, pw = parameters(rule_x, 4), parameters(rule_w, 5, channels=5)
    leaves = [x, w, shift, bias, *px, *pw]
    y = products.binary_product(x, w, rule_x, rule_w, px, pw, shift, bias)
    want = products.binarize(x + shift, rule_x, *px) @ products.binarize(w, rule_w, *pw).mT + bias
    torch.testing.assert_close(y, want)
    for mine, theirs in zip(gradients(y, leaves), gradients(want, leaves), strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("rule", INPUT_RULES)
def test_query_times_key_has_the_gradients_of_its_parts(rule):
    rule = INPUT_RULES[rule](scheme("gsb"))
    q, k = leaf((2, 3, 5, 4), 0), leaf((2, 3, 5, 4), 1)
    pq, pk = parameters(rule, 2), parameters(rule, 3)
    leaves = [q, k, *pq, *pk]
    y = products.binary_product(q, k, rule, rule, pq, pk)
    want = products.binarize(q, rule, *pq) @ products.binarize(k, rule, *pk).mT
    torch.testing.assert_close(y, want)
    for mine, theirs in zip(gradients(y, leaves), gradients(want, leaves), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_a_product_gives_no_gradient_to_what_asks_for_none():
    rule = rules.Elastic()
    x, w, scale = leaf((3, 4), 0).detach(), leaf((5, 4), 1), torch.tensor(0.5, dtype=torch.float64)
    products.binary_product(x, w, rule, rules.Bwn(), [scale]).sum().backward()
    assert x.grad is None
    assert scale.grad is None
    assert torch.isfinite(w.grad).all()


@pytest.mark.parametrize("value", VALUE_RULES)
@pytest.mark.parametrize("attention", ATTENTION_RULES)
def test_the_integer_form_of_map_times_value_equals_the_float_form(attention, value):
    rule_a, rule_v = ATTENTION_RULES[attention](scheme("gsb")), VALUE_RULES[value](scheme("gsb"))
    a = torch.tensor(upstream((2, 3, 5, 5), 0)).softmax(-1).requires_grad_()
    v = leaf((2, 3, 5, 4), 1)
    pa, pv = parameters(rule_a, 2, heads=3), parameters(rule_v, 3, heads=3)
    leaves = [a, v, *pa, *pv]
    want = products.attention_product(a, v, rule_a, rule_v, pa, pv)
    got = products.attention_product(a, v, rule_a, rule_v, pa, pv, exact=True)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(want, products.binarize(a, rule_a, *pa) @ products.binarize(v, rule_v, *pv))
    for mine, theirs in zip(gradients(got, leaves), gradients(want, leaves), strict=True):
        torch.testing.assert_close(mine, theirs)
    with torch.no_grad():
        assert torch.equal(products.attention_product(a, v, rule_a, rule_v, pa, pv, exact=True), got)


@given(st.integers(1, 300), st.integers(0, 9))
def test_products_of_signs_are_exact_integers(k, seed):
    rng = np.random.default_rng(seed)
    x, w = rng.choice([-1, 1], (3, k)), rng.choice([-1, 1], (4, k))
    got = products.integer_product(torch.tensor(x, dtype=torch.float32), torch.tensor(w, dtype=torch.float32))
    np.testing.assert_array_equal(got.numpy(), x @ w.T)


def test_products_of_bytes_are_exact_however_long():
    int8, signs = rules.Elastic(lo=-128, hi=127), rules.Sign()
    assert products.exact_in_float32(1000, int8, int8)
    assert products.exact_in_float32(2**24 - 1, signs, signs)
    assert not products.exact_in_float32(2**24, signs, signs)
    k = 4001
    assert not products.exact_in_float32(k, int8, int8)
    rng = np.random.default_rng(0)
    x, w = rng.integers(100, 128, (3, k)), rng.integers(100, 128, (4, k))
    floats = [torch.tensor(t, dtype=torch.float32) for t in (x, w)]
    scale = torch.tensor(1.0)
    y = products.scaled_product(rules.Plane(floats[0], scale), rules.Plane(floats[1], scale), int8, int8)
    np.testing.assert_array_equal(y.numpy(), (x @ w.T).astype(np.float32))


@pytest.mark.parametrize("sx", [None, (), (2, 3, 1), (2, 1, 1)])
@pytest.mark.parametrize("sw", [None, (), (4, 1), (1, 1)])
def test_scales_multiply_rows_and_columns(sx, sw):
    product = torch.tensor(upstream((2, 3, 4), 0))
    sx, sw = (None if s is None else torch.rand(s, dtype=torch.float64) + 0.5 for s in (sx, sw))
    want = product.clone()
    if sx is not None:
        want = want * sx
    if sw is not None:
        want = want * (sw.mT if sw.dim() else sw)
    torch.testing.assert_close(products.apply_scales(product.clone(), sx, sw), want)


def test_a_float_rule_leaves_the_tensor_alone():
    x = torch.randn(3, 4)
    assert products.binarize(x, rules.Float()) is x
