"""Every rule agrees with its closed form, forward and backward, on data with exact zeros and window edges."""

import math

import numpy as np
import pytest
import reference_nn as reference
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from nn_helpers import agree, arrays, outcome, parameters_of, upstream

from binvit.nn import products, rules
from binvit.nn.catalogue import scheme
from binvit.nn.rules import SMALLEST_SCALE
from binvit.nn.schemes import INPUT_RULES, PLACES, WEIGHT_RULES


@pytest.mark.parametrize("place", PLACES)
def test_every_rule_has_an_oracle(place):
    assert set(PLACES[place]) == set(reference.PLACES[place])


@pytest.mark.parametrize("name", WEIGHT_RULES)
@settings(max_examples=30)
@given(data=st.data())
def test_weight_rules(name, data):
    w = data.draw(arrays((4, 7)), label="w")
    if name == "standardized":
        centred = w - w.mean(1, keepdims=True)
        hat = np.abs(centred).mean(1) / np.maximum(w.std(1, ddof=1), 1e-12)
        exponent = np.log2(hat[hat > 0])
        assume((np.abs(exponent - np.floor(exponent) - 0.5) > 1e-6).all())  # either power of two would be right
    rule = WEIGHT_RULES[name](scheme("gsb"))
    g = upstream(w.shape, data.draw(st.integers(0, 99)))
    parameters = parameters_of(rule, data, channels=4)
    agree(outcome(rule, w, g, parameters), reference.WEIGHT[name](w, g, *parameters))


@pytest.mark.parametrize("name", INPUT_RULES)
@settings(max_examples=30)
@given(data=st.data())
def test_input_rules(name, data):
    x = data.draw(arrays((2, 3, 5)), label="x")
    rule = INPUT_RULES[name](scheme("gsb"))
    g = upstream(x.shape, data.draw(st.integers(0, 99)))
    parameters = parameters_of(rule, data)
    agree(outcome(rule, x, g, parameters), reference.INPUT[name](x, g, *parameters))


@pytest.mark.parametrize("center", ["none", "tensor", "channel"])
@pytest.mark.parametrize("scale", ["none", "tensor", "channel"])
def test_every_mean_and_factor_of_bwn(scale, center):
    w, g = upstream((5, 8), 0), upstream((5, 8), 1)
    agree(outcome(rules.Bwn(scale=scale, center=center), w, g, []), reference.bwn(scale, center)(w, g))


@pytest.mark.parametrize(("table", "shape"), [(WEIGHT_RULES, (4, 7)), (INPUT_RULES, (2, 3, 5))])
def test_planes_are_small_integers_and_their_sum_is_the_value(table, shape):
    x = torch.tensor(upstream(shape, 3) * 2)
    for name, make in table.items():
        rule = make(scheme("gsb"))
        if rule.is_float:
            continue
        parameters = [torch.full(rule.parameter_shape(channels=shape[0]), 0.5, dtype=x.dtype) for _ in rule.parameters]
        planes = rule.planes(x, *parameters)
        for levels, scale, *_ in planes:
            assert levels.shape == x.shape, name
            assert torch.equal(levels, levels.round()), name
            assert levels.min() >= rule.lowest, name
            assert levels.max() <= rule.highest, name
            if scale is not None:
                assert torch.broadcast_shapes(scale.shape, x.shape) == x.shape, name
        torch.testing.assert_close(rules.superpose(planes), products.binarize(x, rule, *parameters), msg=name)


def test_the_sign_of_zero_is_plus_one():
    zeros = torch.tensor([0.0, -0.0, 1e-30, -1e-30])
    assert rules.sign(zeros).tolist() == [1.0, 1.0, 1.0, -1.0]
    assert rules.sign(zeros.half()).dtype == torch.float16


@pytest.mark.parametrize(
    ("rule", "factor"),
    [
        (rules.Elastic(), 2.0),
        (rules.Elastic(lo=0), 4.0),
        (rules.Elastic(lo=-128, hi=127), 2 / math.sqrt(127)),
    ],
)
def test_initial_scale_of_a_tensor(rule, factor):
    x = upstream((2, 3, 5), 4)
    (scale,) = rule.initial(torch.tensor(x))
    assert scale.shape == ()
    assert scale.item() == pytest.approx(factor * np.abs(x).mean(), rel=1e-12)


def test_a_scale_can_start_from_a_constant():
    (scale,) = rules.Elastic(lo=0, start=0.005).initial(torch.randn(3, 4))
    assert scale.shape == ()
    assert scale.item() == pytest.approx(0.005)


@pytest.mark.parametrize(
    ("rule", "factor"),
    [(rules.Elastic(per="channel"), 2.0), (rules.Elastic(per="channel", lo=-128, hi=127), 2 / math.sqrt(127))],
)
def test_initial_scale_of_each_channel(rule, factor):
    w = upstream((4, 7), 5)
    (scale,) = rule.initial(torch.tensor(w))
    np.testing.assert_allclose(scale.numpy(), factor * np.abs(w).mean(1, keepdims=True), rtol=1e-12)


@pytest.mark.parametrize("name", ["int8", "int8_channel"])
def test_a_tensor_of_zeros_gives_the_smallest_scale_and_finite_gradients(name):
    rule = WEIGHT_RULES[name](scheme("gsb"))
    w = torch.zeros(4, 7)
    parameters = rule.initial(w)
    assert all((p >= SMALLEST_SCALE).all() for p in parameters)
    got = outcome(rule, w.double().numpy(), np.ones((4, 7)), [p.double().numpy() for p in parameters])
    assert all(np.isfinite(part).all() for part in (got.y, got.dx, *got.dparameters))


def test_factors_of_xnor_plus_plus_start_at_one():
    (scale,) = WEIGHT_RULES["sign_learned"](scheme("xnor++")).initial(torch.randn(4, 7))
    assert scale.shape == (4, 1)
    assert (scale == 1).all()


def test_sharpness_of_irnet_grows_from_a_thousandth_to_ten_on_a_log_scale():
    assert rules.Ede.progress(0.0) == pytest.approx(1e-3)
    assert rules.Ede.progress(0.5) == pytest.approx(0.1)
    assert rules.Ede.progress(1.0) == pytest.approx(10.0)


@pytest.mark.parametrize("sharpness", [1e-3, 10.0])
def test_a_row_of_equal_weights_keeps_irnet_finite(sharpness):
    w = np.full((2, 6), 0.3)
    got = outcome(rules.Ede(standardize=True), w, np.ones_like(w), [np.array(sharpness)])
    assert np.isfinite(got.y).all()
    assert np.isfinite(got.dx).all()


CENTRED = ("sign_mean_centred", "sign_mean_centred_open", "sign_mean_exact")


@pytest.mark.parametrize(
    "name", [n for n, make in WEIGHT_RULES.items() if not make(scheme("gsb")).parameters and n not in CENTRED]
)
def test_means_are_constants_for_the_gradient(name):
    """The gradient of one output reaches its own weight alone, although mean and factor hang on all of them."""
    rule = WEIGHT_RULES[name](scheme("gsb"))
    w = upstream((3, 8), 6) * 0.2
    g = np.zeros_like(w)
    g[1, 2] = 1.0
    dx = outcome(rule, w, g, []).dx
    assert dx[1, 2] > 0
    dx[1, 2] = 0
    assert (dx == 0).all()


def test_what_planes_keep_gives_the_same_gradients():
    w, g = torch.tensor(upstream((4, 7), 5)), torch.tensor(upstream((4, 7), 6))
    keepers = set()
    for name, make in WEIGHT_RULES.items():
        rule = make(scheme("gsb"))
        parameters = [torch.full(rule.parameter_shape(channels=4), 0.5, dtype=w.dtype) for _ in rule.parameters]
        (plane,) = rule.planes(w, *parameters)
        if plane.kept:
            keepers.add(name)
            ways = rule.backward(w, g, *parameters), rule.backward_from(plane.kept, g, *parameters)
            for direct, kept in zip(*ways, strict=True):
                assert (direct is None and kept is None) or torch.equal(direct, kept), name
    assert "standardized" in keepers
