"""What is binarized alone is alone, measures have their known values, and fitted scales are the best ones."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.models.vision_transformer import VisionTransformer

import binvit
from binvit.lab.analysis import attention, tensor_losses
from binvit.lab.data.datasets import load_data
from binvit.nn.rules import Elastic, GsbAttention, GsbValue, superpose
from binvit.nn.schemes import PLACES


def float_model(**options) -> torch.nn.Module:
    torch.manual_seed(0)
    shape = {"img_size": 8, "patch_size": 2, "num_classes": 10, "embed_dim": 16, "depth": 2, "num_heads": 2} | options
    return binvit.binarize(VisionTransformer(**shape), "float").eval()


def images(count: int = 8) -> torch.Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def positive_map(seed: int = 0) -> torch.Tensor:
    return (3 * torch.randn(2, 2, 9, 9, generator=torch.Generator().manual_seed(seed))).softmax(-1)


@pytest.mark.parametrize("superposed", [False, True])
def test_options_binarize_one_kind_of_tensor(superposed):
    for tensor in tensor_losses.SUPERPOSED if superposed else tensor_losses.TENSORS:
        scheme = binvit.scheme("gsb", **tensor_losses.single_tensor_options(tensor, superposed))
        inner = [place for place in PLACES if not place.startswith(("patch", "head", "mlp_"))]
        binary = {place for place in inner if not scheme.rule(place).is_float}
        assert binary == set(tensor_losses.TENSORS[tensor])
        assert not scheme.binarizes("patch_embed")
        assert not scheme.binarizes("head")


def test_unknown_tensors_are_refused_with_the_valid_ones():
    with pytest.raises(ValueError, match="no tensor 'keys'; valid tensors are query, key, attention map"):
        tensor_losses.single_tensor_options("keys")
    with pytest.raises(ValueError, match="GSB does not binarize 'query'; valid tensors are attention map, value"):
        tensor_losses.single_tensor_options("query", superposed=True)
    with pytest.raises(ValueError, match="'query' came"):
        attention.binarized_views(positive_map(), "query")


def test_nothing_changes_but_the_tensor():
    model, x = float_model(qkv_bias=True), images()
    with torch.no_grad():
        before = model(x)
        untouched = tensor_losses.single_tensor_options("query") | {"query": "float"}
        same = tensor_losses.binarize_tensor(model, binvit.scheme("gsb", **untouched), x)
        torch.testing.assert_close(same(x), before, rtol=1e-5, atol=1e-5)
        for tensor in tensor_losses.TENSORS:
            scheme = binvit.scheme("gsb", **tensor_losses.single_tensor_options(tensor))
            assert not torch.allclose(tensor_losses.binarize_tensor(model, scheme, x)(x), before, atol=1e-4)
        assert torch.equal(model(x), before)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), factor=st.floats(0.3, 3))
def test_no_other_scale_of_a_sign_is_closer(seed, factor):
    x = torch.randn(5, 7, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    rule = Elastic()
    (scale,) = tensor_losses.fit_scales(rule, x)
    assert scale == pytest.approx(float(x.abs().mean()), rel=1e-6)  # the closed form

    def error(a: torch.Tensor) -> float:
        return float((superpose(rule.planes(x, a)) - x).norm())

    assert error(scale) <= error(scale * factor) + 1e-12


@pytest.mark.parametrize("seed", range(5))
def test_fitted_scales_are_closer_than_initial_ones(seed):
    generator = torch.Generator().manual_seed(seed)
    value, hidden = torch.randn(2, 2, 9, 4, generator=generator), torch.randn(30, generator=generator).relu()
    groups = {"thresholds": (0.7, 0.9), "reduce": "row"}
    for rule, x in (
        (Elastic(lo=0), hidden),
        (Elastic(lo=0), positive_map(seed)),
        (GsbAttention(**groups), positive_map(seed)),
        (GsbValue(**groups), value),
    ):
        fitted, initial = tensor_losses.fit_scales(rule, x), rule.initial(x)
        errors = [tensor_losses.relative_error(superpose(rule.planes(x, *a)), x) for a in (fitted, initial)]
        assert errors[0] <= errors[1] + 1e-9
        assert all(a > 0 and a.shape == () for a in fitted)


def test_an_even_map_is_one_level():
    x = 1 / 9 + 0.01 * torch.rand(1, 2, 9, 9)
    for rule in (Elastic(lo=0), GsbAttention(thresholds=(0.7, 0.9))):
        scales = tensor_losses.fit_scales(rule, x)  # the initial scales round all of it to zero
        assert tensor_losses.relative_error(superpose(rule.planes(x, *scales)), x) < 0.05


def test_an_empty_group_is_fitted_without_error():
    x = torch.zeros(1, 1, 3, 3)
    assert all(torch.isfinite(a) for a in tensor_losses.fit_scales(GsbAttention(thresholds=(0.7, 0.9)), x))


def test_scales_are_fitted_to_what_binarized_layers_put_out():
    model, x = float_model(), images()
    scheme = binvit.scheme("gsb", **tensor_losses.single_tensor_options("linear inputs"))
    binary = tensor_losses.binarize_tensor(model, scheme, x)
    for binarizer, seen in tensor_losses._binarized_tensors(binary, x):
        (again,) = tensor_losses.fit_scales(binarizer.rule, seen)
        torch.testing.assert_close(again, binarizer.scale.detach())
    initial = tensor_losses.binarize_tensor(model, scheme, x, least_squares=False)
    first = initial.blocks[0].attn.qkv.input_binarizer
    torch.testing.assert_close(first.scale.detach(), 2 * binary.blocks[0].attn.qkv.input_binarizer.scale.detach())


def test_measures_of_known_tensors():
    x = torch.tensor([3.0, -4.0])
    assert tensor_losses.relative_error(x, x) == 0
    assert tensor_losses.relative_error(torch.zeros(2), x) == 1
    assert tensor_losses.relative_error(torch.tensor([3.0, 0.0]), x) == pytest.approx(0.8)
    assert tensor_losses.cosine_similarity(torch.tensor([1.0, -1.0]), x) == pytest.approx(7 / (5 * math.sqrt(2)))
    assert tensor_losses.cosine_similarity(torch.zeros(2), x) == 0
    assert tensor_losses.entropy(torch.ones(8)) == 0
    assert tensor_losses.entropy(torch.tensor([1.0, -1.0])) == 1
    assert tensor_losses.entropy(torch.arange(8.0)) == 3


@given(st.lists(st.integers(0, 5), min_size=1, max_size=50), st.floats(0.1, 10))
def test_entropy_is_bounded_and_blind_to_scales(values, scale):
    x = torch.tensor(values, dtype=torch.float64)
    assert 0 <= tensor_losses.entropy(x) <= math.log2(len(set(values))) + 1e-9
    assert tensor_losses.entropy(scale * x) == tensor_losses.entropy(x)


def test_table_of_single_tensors():
    data = load_data("digits", samples_per_class=5)
    model = float_model()
    table = tensor_losses.one_tensor_at_a_time(model, data, images=32)
    assert table[table.binarizer == "1-bit"].tensor.tolist() == list(tensor_losses.TENSORS)
    assert table[table.binarizer == "GSB"].tensor.tolist() == list(tensor_losses.SUPERPOSED)
    total = table.test_accuracy + table.accuracy_drop
    np.testing.assert_allclose(total, total.iloc[0])
    assert table.cosine.between(0, 1).all()
    assert (table.relative_error > 0).all()
    signs = table[(table.binarizer == "1-bit") & table.tensor.isin(["query", "key", "value"])]
    np.testing.assert_allclose(signs.entropy, 1, atol=0.1)
    wide = table[(table.tensor == "value") & (table.binarizer == "GSB")].cosine.item()
    assert wide > table[(table.tensor == "value") & (table.binarizer == "1-bit")].cosine.item()


def test_losses_need_a_binarized_tensor():
    with pytest.raises(ValueError, match="No tensor"):
        tensor_losses.tensor_losses(float_model(), images())


def test_attention_tensors_are_those_of_the_float_model():
    model, x = float_model(), images()
    map_, value = attention.attention_tensors(model, x)
    torch.testing.assert_close(map_, attention.attention_weights(model, x)[-1])
    assert value.shape == (8, 2, 17, 8)
    first, _ = attention.attention_tensors(model, x, block=0)
    torch.testing.assert_close(first, attention.attention_weights(model, x)[0])


def test_views_have_the_levels_of_their_groups():
    views = attention.binarized_views(positive_map(), "attention map")
    assert list(views) == ["float", "1-bit", "GSB"]
    assert views["1-bit"].unique().numel() == 2
    assert 2 < views["GSB"].unique().numel() <= 6
    assert tensor_losses.cosine_similarity(views["GSB"], views["float"]) > 0.8
    value = attention.binarized_views(torch.randn(2, 2, 9, 4), "value", thresholds=(0.5,), reduce="batch")
    assert value["1-bit"].unique().numel() == 2
    assert value["GSB"].unique().numel() == 4


@pytest.mark.parametrize("reduce", ["batch", "sample", "head", "row"])
def test_shares_show_thresholds_where_the_rules_put_them(reduce):
    a, v = positive_map(), torch.randn(2, 2, 9, 4, generator=torch.Generator().manual_seed(3))
    (mask,) = GsbAttention(thresholds=(0.7,), reduce=reduce).masks(a)
    assert torch.equal(attention.share_of_extreme(a, reduce) > 0.7, mask)
    (mask,) = GsbValue(thresholds=(0.7,), reduce=reduce).masks(v)
    share = attention.share_of_extreme(v, "head" if reduce == "row" else reduce)
    assert share.abs().max() == 1
    assert torch.equal(share.abs() > 0.7, mask)
