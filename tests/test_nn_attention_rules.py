"""Rules of the attention map and the value agree with their closed forms; empty groups stay finite."""

import itertools

import numpy as np
import pytest
import reference_nn as reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nn_helpers import agree, arrays, outcome, parameters_of, upstream, values

from binvit.nn import functional as BF
from binvit.nn import products
from binvit.nn.catalogue import scheme
from binvit.nn.rules import REDUCTIONS, SMALLEST_SCALE, GsbAttention, GsbValue, HeadSign, MapThreshold, largest
from binvit.nn.schemes import ATTENTION_RULES, VALUE_RULES

MAP, VALUE = (2, 2, 3, 3), (2, 2, 3, 4)  # (B, H, N, N) and (B, H, N, d)
GRADIENTS = ("official", "masked")
# A softmax with a learned bias: mostly in [0, 1], sometimes beyond on either side.
entries = st.one_of(
    st.sampled_from([0.0, 0.125, 0.25, 0.5, 1.0, 1.5, -0.25]), st.integers(-16, 80).map(lambda i: i / 64)
)
# With 0.25, 0.5 and 0.75 an entry can equal a share of the maximum exactly.
thresholds = st.lists(st.sampled_from([0.25, 0.5, 0.7, 0.75, 0.9]), max_size=3, unique=True).map(
    lambda ts: tuple(sorted(ts))
)


@pytest.mark.parametrize("name", ATTENTION_RULES)
@settings(max_examples=25)
@given(data=st.data())
def test_attention_rules(name, data):
    a = data.draw(arrays(MAP, values if name == "scores" else entries), label="a")
    rule = ATTENTION_RULES[name](scheme("gsb"))
    g = upstream(MAP, data.draw(st.integers(0, 99)))
    parameters = parameters_of(rule, data, heads=2)
    agree(outcome(rule, a, g, parameters), reference.ATTENTION[name](a, g, *parameters))


@pytest.mark.parametrize("name", VALUE_RULES)
@settings(max_examples=25)
@given(data=st.data())
def test_value_rules(name, data):
    v = data.draw(arrays(VALUE, values), label="v")
    rule = VALUE_RULES[name](scheme("gsb"))
    g = upstream(VALUE, data.draw(st.integers(0, 99)))
    parameters = parameters_of(rule, data, heads=2)
    agree(outcome(rule, v, g, parameters), reference.VALUE[name](v, g, *parameters))


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("reduce", REDUCTIONS)
@settings(max_examples=12)
@given(data=st.data(), thresholds=thresholds)
def test_gsb_attention_for_any_number_of_groups(reduce, gradient, data, thresholds):
    a = data.draw(arrays(MAP, entries), label="a")
    rule = GsbAttention(thresholds=thresholds, reduce=reduce, gradient=gradient)
    g = upstream(MAP, data.draw(st.integers(0, 99)))
    parameters = parameters_of(rule, data)
    assert len(parameters) == 1 + len(thresholds)
    agree(outcome(rule, a, g, parameters), reference.gsb_attention(thresholds, reduce, gradient)(a, g, *parameters))


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("reduce", REDUCTIONS)
@settings(max_examples=12)
@given(data=st.data(), thresholds=thresholds)
def test_gsb_value_for_any_number_of_groups(reduce, gradient, data, thresholds):
    v = data.draw(arrays(VALUE, values), label="v")
    rule = GsbValue(thresholds=thresholds, reduce=reduce, gradient=gradient)
    g = upstream(VALUE, data.draw(st.integers(0, 99)))
    parameters = parameters_of(rule, data)
    agree(outcome(rule, v, g, parameters), reference.gsb_value(thresholds, reduce, gradient)(v, g, *parameters))


@pytest.mark.parametrize("kind", ["attention", "value"])
def test_one_group_is_the_elastic_baseline(kind):
    x, g, scale = upstream(MAP, 0), upstream(MAP, 1), np.array(0.7)
    rule, elastic = {
        "attention": (GsbAttention(thresholds=()), reference.elastic(0, 1)),
        "value": (GsbValue(thresholds=()), reference.elastic()),
    }[kind]
    agree(outcome(rule, x, g, [scale]), elastic(x, g, scale))


@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_largest_runs_over_the_set_the_reduction_names(reduce):
    x = upstream((3, 2, 4, 5), 2)
    top = largest(torch.tensor(x), reduce)
    want = [x[index[: REDUCTIONS.index(reduce)]].max() for index in np.ndindex(x.shape)]
    np.testing.assert_array_equal(top.expand(x.shape).numpy().ravel(), want)


@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("thresholds", [(), (0.5,), (0.7, 0.9), (0.3, 0.5, 0.8)])
def test_initial_levels_stack_up(reduce, thresholds):
    rng = np.random.default_rng(3)
    a = torch.tensor(rng.standard_normal((4, 3, 9, 9))).mul(2).softmax(-1).numpy()
    v = rng.standard_normal((4, 3, 9, 8))
    for kind, x, levels in (
        (GsbAttention, a, reference.gsb_attention_levels(a, thresholds, reduce)),
        (GsbValue, v, reference.gsb_value_levels(v, thresholds, reduce)),
    ):
        assert min(np.diff(levels), default=1) > 0  # every group adds something on such data
        stacked = kind(thresholds=thresholds, reduce=reduce)
        initial = stacked.initial(torch.tensor(x))
        np.testing.assert_allclose([s.item() for s in initial], reference.stacked(levels), rtol=1e-10)
        assert stacked.first_forward(initial) == initial

        official = kind(thresholds=thresholds, reduce=reduce, init="official")
        initial = official.initial(torch.tensor(x))
        np.testing.assert_allclose([s.item() for s in initial], levels, rtol=1e-10)
        first = official.first_forward(initial)
        np.testing.assert_allclose([s.item() for s in first], reference.stacked(levels), rtol=1e-10)


DEGENERATE = {
    "all equal": lambda shape: torch.full(shape, 0.25),
    "all zero": torch.zeros,
    "all negative": lambda shape: -torch.rand(shape, generator=torch.Generator().manual_seed(0)) - 0.1,
    "maximum zero": lambda shape: -torch.rand(shape, generator=torch.Generator().manual_seed(0)).round(),
    "one image large": lambda shape: torch.cat(
        [torch.full((1, *shape[1:]), 1e4), torch.zeros(shape[0] - 1, *shape[1:])]
    ),
    "tiny": lambda shape: torch.full(shape, 1e-30),
}


@pytest.mark.parametrize("init", ["stacked", "official"])
@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("kind", DEGENERATE)
@pytest.mark.parametrize("rule_of", [GsbAttention, GsbValue])
def test_empty_groups_stay_finite(rule_of, kind, reduce, init):
    x = DEGENERATE[kind]((2, 3, 4, 4))
    for thresholds in ((), (0.7,), (0.7, 0.9), (0.5, 0.7, 0.9)):
        rule = rule_of(thresholds=thresholds, reduce=reduce, init=init)
        initial = rule.initial(x)
        for scales in (initial, rule.first_forward(initial)):
            assert all(torch.isfinite(s) and s >= SMALLEST_SCALE for s in scales)
            got = outcome(rule, x.numpy(), np.ones(x.shape, np.float32), [s.numpy() for s in scales])
            assert all(np.isfinite(part).all() for part in (got.y, got.dx, *got.dparameters))


@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 3, 0, 0), (2, 0, 4, 4)])
@pytest.mark.parametrize("binarize", [BF.gsb_attention, BF.gsb_value])
def test_no_images_heads_or_tokens_are_binarized_to_none(binarize, shape, reduce):
    assert largest(torch.zeros(shape), reduce).broadcast_to(shape).shape == shape
    for gradient in GRADIENTS:
        x = torch.zeros(shape, requires_grad=True)
        scales = [torch.tensor(0.5, requires_grad=True) for _ in range(3)]
        y = binarize(x, scales, reduce=reduce, gradient=gradient)
        y.sum().backward()
        assert y.shape == x.grad.shape == shape
        assert [scale.grad.item() for scale in scales] == [0.0] * 3


@pytest.mark.parametrize("rule_of", [GsbAttention, GsbValue])
def test_masks_are_nested(rule_of):
    x = torch.tensor(upstream((2, 3, 9, 9), 4))
    masks = rule_of(thresholds=(0.3, 0.5, 0.7, 0.9)).masks(x)
    for lower, higher in itertools.pairwise(masks):
        assert (lower | ~higher).all()
        assert higher.sum() < lower.sum()


def test_small_values_receive_the_official_gradient_once_per_group():
    """A documented quirk of the released code: masked-out zeros fall inside the straight-through window."""
    v = torch.tensor([[[[0.01, 1.0], [-0.02, -1.0]]]]).double().numpy()
    scales = [np.array(0.5), np.array(0.5), np.array(0.5)]
    official = outcome(GsbValue(gradient="official"), v, np.ones_like(v), scales)
    masked = outcome(GsbValue(gradient="masked"), v, np.ones_like(v), scales)
    np.testing.assert_array_equal(official.dx, [[[[3, 0], [3, 0]]]])
    np.testing.assert_array_equal(masked.dx, [[[[1, 0], [1, 0]]]])


@pytest.mark.parametrize("share", [0.25, 0.5])
def test_the_row_maximum_is_always_kept(share):
    a = torch.tensor(upstream((2, 3, 9, 9), 5)).softmax(-1)
    kept = products.binarize(a, MapThreshold(share=share))
    assert set(kept.unique().tolist()) == {0.0, 1.0}
    assert (kept.gather(-1, a.argmax(-1, keepdim=True)) == 1).all()


def test_a_head_tells_keys_apart_once_its_offset_has_fallen_below_minus_a_half():
    a = torch.tensor(upstream((2, 3, 9, 9), 6)).softmax(-1)
    rule = HeadSign()
    scale, offset = rule.initial(a)
    assert scale.shape == offset.shape == (3, 1, 1)
    assert len(products.binarize(a, rule, scale, offset).unique()) == 1
    offset = torch.tensor([-0.4, -0.6, -1.4], dtype=a.dtype).view(3, 1, 1)
    assert [len(head.unique()) for head in products.binarize(a, rule, scale, offset).unbind(1)] == [1, 2, 2]
