"""Layers: scales start from the first batch, and every scheme's layers compute what loops over its rules compute."""

import copy

import numpy as np
import pytest
import reference_nn as reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nn_helpers import upstream
from timm.layers import Mlp
from timm.layers.attention import Attention
from torch import nn

import binvit
from binvit.nn import AttentionBias, Binarizer, BinaryAttention, BinaryLinear, BinaryMlp, BinaryPatchConv, rules
from binvit.nn.block_parts import LayerEnd, RPReLU
from binvit.nn.fused import autograd, formed
from binvit.nn.rules import GsbAttention, HeadSign
from binvit.nn.schemes import PLACES

SCHEMES = binvit.list_schemes()
GRID, PREFIX = (2, 2), 1  # five tokens


def tokens(seed=0, n=2, width=12):
    return torch.tensor(upstream((n, 5, width), seed))


def attention_layer(scheme, width=12, heads=3, **options):
    torch.manual_seed(0)
    layer = Attention(width, heads, qkv_bias=True, norm_layer=nn.LayerNorm, **options)
    return BinaryAttention(layer, scheme, GRID, PREFIX)


def mlp_layer(scheme, width=12, **options):
    torch.manual_seed(0)
    return BinaryMlp(Mlp(width, 2 * width, **options), scheme)


def disturb(module, seed=0):
    """Move every parameter a little, so that shifts, biases and offsets are not at their neutral start; scales grow."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype) * 0.05
            parameter.add_(noise.abs() if name.endswith("binarizer.scale") else noise)
    return module


# --- Binarizer


def test_scales_come_from_the_first_training_batch_alone():
    binarizer = Binarizer(rules.Elastic())
    x = torch.randn(4, 6)
    assert binarizer.eval().values(x) == (1,)
    assert not binarizer.initialized
    binarizer.train().values(x)
    assert binarizer.scale.item() == pytest.approx(2 * x.abs().mean().item())
    assert binarizer.initialized
    binarizer.values(100 * x)
    assert binarizer.scale.item() == pytest.approx(2 * x.abs().mean().item())


def test_the_shift_counts_for_the_first_scale():
    binarizer, x, shift = Binarizer(rules.Elastic()), torch.randn(4, 6), torch.full((6,), 3.0)
    binarizer.values(x, shift)
    assert binarizer.scale.item() == pytest.approx(2 * (x + shift).abs().mean().item())


def test_loaded_and_copied_scales_are_not_set_again():
    first = Binarizer(rules.Elastic())
    first.values(torch.randn(4, 6))
    loaded = Binarizer(rules.Elastic())
    loaded.load_state_dict(first.state_dict())
    for other in (loaded, copy.deepcopy(first)):
        other.values(100 * torch.ones(4, 6))
        assert torch.equal(other.scale, first.scale)


def test_scales_stay_positive_where_the_released_code_keeps_them_so():
    floored, free = Binarizer(rules.Elastic()), Binarizer(HeadSign(), heads=2)
    x = torch.randn(3, 2, 4, 4)
    for binarizer in (floored, free):
        binarizer.values(x)
        with torch.no_grad():
            binarizer.scale.fill_(-1.0)
    assert floored.values(x)[0] == rules.SMALLEST_SCALE
    assert (free.values(x)[0] == -1).all()


@pytest.mark.parametrize("rule", [rules.Elastic(), rules.Elastic(per="channel", lo=-128, hi=127)])
def test_evaluation_takes_no_smaller_scale_than_training_does(rule):
    binarizer, w = Binarizer(rule, channels=3), torch.randn(3, 4)
    binarizer.values(w)
    with torch.no_grad():
        binarizer.scale.fill_(-1.0)
    (scale,) = binarizer.eval().values(w)
    assert (scale == rules.SMALLEST_SCALE).all()
    assert (binarizer.scale == -1).all()
    (plane,) = binarizer.planes(w)
    assert (plane.scale == rules.SMALLEST_SCALE).all()
    scale.sum().backward()
    assert (binarizer.scale.grad == 1).all()
    (scale,) = binarizer.train().values(w)
    assert (scale == rules.SMALLEST_SCALE).all()
    assert (binarizer.scale == rules.SMALLEST_SCALE).all()


def test_loading_a_state_without_scales_has_them_set_again():
    binarizer = Binarizer(rules.Elastic())
    start = copy.deepcopy(binarizer.state_dict())
    binarizer.values(torch.ones(4, 6))
    first = binarizer.scale.item()
    binarizer.load_state_dict(start)
    assert not binarizer.is_set
    binarizer.values(torch.ones(4, 6))
    assert binarizer.scale.item() == first != 1


def test_official_initialization_subtracts_in_the_first_forward_pass_only():
    a = torch.tensor(upstream((4, 2, 9, 9), 0)).float().mul(2).softmax(-1)
    rule = GsbAttention(init="official")
    binarizer = Binarizer(rule)
    levels = reference.gsb_attention_levels(a.double().numpy(), rule.thresholds, rule.reduce)
    first, second = ([s.item() for s in binarizer.values(a)] for _ in range(2))
    np.testing.assert_allclose(first, reference.stacked(levels), rtol=1e-4)
    np.testing.assert_allclose(second, levels, rtol=1e-4)


def test_first_scales_receive_a_gradient_at_once():
    binarizer = Binarizer(GsbAttention(init="official"))
    scales = binarizer.values(torch.rand(2, 2, 4, 4))
    sum(scales).backward()
    assert all(p.grad == 1 for p in binarizer.parameters())


def test_schedules_are_buffers_that_progress_moves():
    binarizer = Binarizer(rules.Ede())
    assert not list(binarizer.parameters())
    assert binarizer.sharpness.item() == pytest.approx(1e-3)
    binarizer.set_progress(1.0)
    assert binarizer.sharpness.item() == pytest.approx(10)
    binarizer.values(torch.randn(3, 4))
    assert binarizer.sharpness.item() == pytest.approx(10)
    plain = Binarizer(rules.Elastic())
    plain.set_progress(1.0)
    assert plain.limited() == (1,)


def test_names_show_what_is_binarized():
    text = repr(attention_layer(binvit.scheme("gsb")))
    for part in ("GsbAttention", "GsbValue", "Bwn", "Elastic", "BinaryLinear", "12, 36"):
        assert part in text


# --- RPReLU


def test_rprelu_is_a_shifted_prelu_per_channel():
    layer = disturb(RPReLU(6).double(), 1)
    x = tokens(0, width=6)
    y = layer(x)
    for i in np.ndindex(x.shape):
        c = i[-1]
        moved = x[i] + layer.shift_in[c]
        want = (moved if moved >= 0 else layer.slope[c] * moved) + layer.shift_out[c]
        assert y[i].item() == pytest.approx(want.item())
    assert torch.autograd.gradcheck(layer, x.requires_grad_())


# --- linear layers


def test_a_linear_layer_keeps_its_weights_and_copies_them():
    linear = nn.Linear(8, 5)
    layer = BinaryLinear(linear, rules.Bwn(), rules.Elastic(), shift=True)
    assert torch.equal(layer.weight, linear.weight)
    assert torch.equal(layer.bias, linear.bias)
    assert layer.weight is not linear.weight
    assert layer.shift.shape == (8,)
    assert BinaryLinear(nn.Linear(8, 5, bias=False), rules.Bwn(), rules.Elastic()).bias is None


def test_nothing_is_shifted_that_is_not_binarized():
    assert BinaryLinear(nn.Linear(8, 5), rules.Bwn(), rules.Float(), shift=True).shift is None


def test_float_rules_make_the_plain_linear_layer():
    linear = nn.Linear(8, 5).double()
    x = tokens(width=8)
    layer = BinaryLinear(linear, rules.Float(), rules.Float())
    torch.testing.assert_close(layer(x), linear(x))


@pytest.mark.parametrize(("kernel", "size"), [((4, 4), (8, 12)), ((2, 4), (6, 8)), ((3, 3), (9, 9))])
def test_a_patch_convolution_is_a_convolution(kernel, size):
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 7, kernel, stride=kernel).double()
    x = torch.tensor(upstream((2, 3, *size), 0))
    plain = BinaryPatchConv(conv, rules.Float(), rules.Float())
    torch.testing.assert_close(plain(x), conv(x))

    layer = BinaryPatchConv(conv, rules.Elastic(per="channel", lo=-128, hi=127), rules.Float()).train()
    y = layer(x)
    step = layer.weight_binarizer.scale.view(-1, 1, 1, 1)
    quantized = torch.clamp((layer.weight / step).round(), -128, 127) * step
    assert len(quantized[0].unique()) > 2
    torch.testing.assert_close(y, nn.functional.conv2d(x, quantized, conv.bias, conv.stride))
    torch.testing.assert_close(layer.eval()(x), y)


def test_patches_of_an_image_do_not_depend_on_its_batch():
    torch.manual_seed(0)
    layer = BinaryPatchConv(nn.Conv2d(3, 7, 4, stride=4), rules.Bwn(), rules.Sign(scale="row")).eval()
    x = torch.randn(5, 3, 8, 8)
    assert torch.equal(layer(x)[:1], layer(x[:1]))


def test_the_input_factor_of_a_patch_is_its_box_filtered_mean():
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 7, 4, stride=4, bias=False)
    x = torch.randn(2, 3, 8, 8)
    y = BinaryPatchConv(conv, rules.Sign(scale="row"), rules.Sign(scale="row"))(x)
    box = nn.functional.avg_pool2d(x.abs().mean(1, keepdim=True), 4)  # K of XNOR-Net
    factor = conv.weight.abs().mean((1, 2, 3), keepdim=True)
    want = nn.functional.conv2d(rules.sign(x), factor * rules.sign(conv.weight), stride=4) * box
    torch.testing.assert_close(y, want)


def test_an_own_input_needs_widths_that_divide():
    with pytest.raises(ValueError, match="one of its widths divides the other, got 8 and 5"):
        LayerEnd(8, 5, own_input=True)


# --- attention bias


@settings(max_examples=20)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 3))
def test_a_relative_bias_hangs_on_the_offset_between_patches(h, w, prefix):
    index = AttentionBias.relative_index((h, w), prefix)
    n = prefix + h * w
    assert index.shape == (n, n)
    meaning = {}
    for i in range(n):
        for j in range(n):
            if i < prefix:
                key = ("pair", i, j)
            elif j < prefix:
                key = ("key", j)
            else:
                (a, b), (c, d) = divmod(i - prefix, w), divmod(j - prefix, w)
                key = ("offset", a - c, b - d)
            assert meaning.setdefault(index[i, j].item(), key) == key
    assert len(set(meaning.values())) == len(meaning)  # one place per meaning
    assert sorted(meaning) == list(range(AttentionBias.table_size((h, w), prefix)))


def test_both_kinds_of_bias_start_at_zero_and_count_what_they_hold():
    full, relative = (AttentionBias(kind, 3, (4, 4), 2) for kind in ("full", "relative"))
    assert full.values.numel() == 3 * 18 * 18
    assert relative.values.numel() == 3 * (7 * 7 + 2 * 18 + 2)
    for bias in (full, relative):
        assert bias().shape == (3, 18, 18)
        assert (bias() == 0).all()
    assert list(relative.state_dict()) == ["values"]  # the index follows from the shape


# --- whole layers against loops over the rules


def binarized(binarizer, place, scheme, x):
    """Binarize x by the oracle of the scheme's rule for that place."""
    name = getattr(scheme, place)
    name = scheme.weight if name == "as_weight" else name
    oracle = reference.PLACES[place][name]
    if name == "gsb":
        kind = reference.gsb_attention if place == "attention" else reference.gsb_value
        oracle = kind(scheme.thresholds, scheme.reduce)
    parameters = [getattr(binarizer, p).detach().numpy() for p in binarizer.rule.parameters]
    return oracle(x, np.zeros_like(x), *parameters).y


def layer_norm_oracle(weight, bias, eps, x):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps) * weight.numpy() + bias.numpy()


def norm_oracle(norm, x, parts=1):
    pieces = zip(*(np.split(t, parts, -1) for t in (norm.weight.detach(), norm.bias.detach(), x)), strict=True)
    return np.concatenate([layer_norm_oracle(w, b, norm.eps, piece) for w, b, piece in pieces], -1)


def linear_oracle(layer, places, scheme, x, parts=1):
    weight, input = places
    original = x
    if layer.norm is not None:
        x = norm_oracle(layer.norm, x)
    w = layer.matrix.detach().numpy()
    if scheme.latent == "centred":
        w = w - w.mean(1, keepdims=True)
    w = w if scheme.latent == "free" else np.clip(w, -1, 1)
    outputs = []
    shifts = np.zeros(layer.in_features) if layer.shift is None else layer.shift.detach().numpy()
    for i, rows in enumerate(np.split(w, layer.parts)):
        xb = binarized(layer.input_binarizers[i], input, scheme, x + (shifts[i] if shifts.ndim == 2 else shifts))
        outputs.append(xb @ binarized(layer.weight_binarizers[i], weight, scheme, rows).T)
    y = np.concatenate(outputs, -1)
    if layer.bias is not None:
        y = y + layer.bias.detach().numpy()
    return y if layer.post is None else end_oracle(layer.post, scheme, y, original, parts)


def rprelu_oracle(layer, x):
    first, second, slope = (t.detach().numpy() for t in (layer.shift_in, layer.shift_out, layer.slope))
    return np.where(x >= -first, x + first, slope * (x + first)) + second


def end_oracle(end, scheme, y, x, parts=1):
    if end.factor is not None:
        y = y * end.factor.detach().numpy()
    if end.norm is not None:
        y = norm_oracle(end.norm, y, parts)
    if end.own_input:
        short = np.zeros_like(y)
        for c in range(y.shape[-1]):
            ratio = x.shape[-1] // y.shape[-1]
            short[..., c] = x[..., c * ratio : (c + 1) * ratio].mean(-1) if ratio else x[..., c % x.shape[-1]]
        y = y + short
    y = {
        "none": lambda y: y,
        "clip": lambda y: np.clip(y, -1, 1),
        "rprelu": lambda y: rprelu_oracle(end.activation, y),
    }[scheme.layer_activation](y)
    return y if end.scale is None else y * end.scale.alpha.detach().numpy() + end.scale.beta.detach().numpy()


def attention_oracle(layer, scheme, x):
    b, n, width = x.shape
    heads, d = layer.num_heads, layer.head_dim
    qkv = linear_oracle(layer.qkv, ("weight", "input"), scheme, x, parts=3)
    parts, unshifted = {}, 0
    for i, place in enumerate(("query", "key", "value")):
        part = np.zeros((b, heads, n, d))
        for h in range(heads):
            start = i * width + h * d
            part[:, h] = qkv[:, :, start : start + d]
        if place != "value":
            norm = layer.q_norm if place == "query" else layer.k_norm
            part = norm(torch.tensor(part)).detach().numpy()
        unshifted = unshifted + part
        shift = getattr(layer, f"{place}_shift")
        parts[place] = part if shift is None else part + shift.detach().numpy()
    q = binarized(layer.query_binarizer, "query", scheme, parts["query"])
    k = binarized(layer.key_binarizer, "key", scheme, parts["key"])
    v = binarized(layer.value_binarizer, "value", scheme, parts["value"])
    a = np.einsum("bhid,bhjd->bhij", q, k) / np.sqrt(d)
    if scheme.attention != "scores":
        a = np.exp(a) / np.exp(a).sum(-1, keepdims=True)
    if layer.bias is not None:
        a = a + layer.bias().detach().numpy()
    y = np.einsum("bhij,bhjd->bihd", binarized(layer.attention_binarizer, "attention", scheme, a), v)
    y = y.reshape(b, n, width)
    if scheme.context_norm or scheme.context_residual:
        y = end_oracle(layer.context_end, scheme, y, unshifted.transpose(0, 2, 1, 3).reshape(b, n, width))
    return linear_oracle(layer.proj, ("weight", "input"), scheme, y)


def mlp_oracle(layer, scheme, x):
    hidden = torch.tensor(linear_oracle(layer.fc1, ("mlp_weight", "input"), scheme, x))
    hidden = {"keep": nn.functional.gelu, "relu": torch.relu, "none": lambda x: x}[scheme.activation](hidden).numpy()
    if scheme.activation_limit is not None:
        hidden = np.clip(hidden, -scheme.activation_limit, scheme.activation_limit)
    return linear_oracle(layer.fc2, ("mlp_weight", "hidden"), scheme, hidden)


def odd_width(name):
    # Without a bias an even number of signs can sum up to 0, whose sign would hang on the loops' rounding.
    return 15 if name == "bivit-head" else 12


@pytest.mark.parametrize("name", SCHEMES)
def test_attention_of_every_scheme_against_loops(name):
    scheme = binvit.scheme(name)
    width = odd_width(name)
    layer = attention_layer(scheme, width).double()
    x = tokens(width=width)
    layer(x)  # sets the scales
    disturb(layer)
    want = attention_oracle(layer, scheme, x.numpy())
    for mode in (True, False):
        np.testing.assert_allclose(layer.train(mode)(x).detach(), want, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", SCHEMES)
def test_mlp_of_every_scheme_against_loops(name):
    scheme = binvit.scheme(name)
    width = odd_width(name)
    layer = mlp_layer(scheme, width).double()
    x = tokens(width=width)
    layer(x)
    disturb(layer)
    want = mlp_oracle(layer, scheme, x.numpy())
    for mode in (True, False):
        np.testing.assert_allclose(layer.train(mode)(x).detach(), want, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("make", [attention_layer, mlp_layer])
@pytest.mark.parametrize("name", SCHEMES)
def test_evaluation_gives_training_up_to_rounding(name, make):
    """Evaluation multiplies integers and scales once, training may take faster ways: values and gradients agree."""
    layer = make(binvit.scheme(name), width=24)
    x = tokens(0, 3, 24).float()
    layer(x)
    disturb(layer, 2)
    results = []
    for mode in (True, False):
        layer.train(mode).zero_grad()
        leaf = x.clone().requires_grad_()
        y = layer(leaf)
        y.backward(tokens(1, 3, 24).float())
        results.append([y.detach(), leaf.grad, *(p.grad for p in layer.parameters())])
    for training, evaluation in zip(*results, strict=True):
        torch.testing.assert_close(training, evaluation, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("options", [{}, {"qk_norm": True}, {"scale_norm": True}])
def test_float_rules_make_timms_attention(options):
    torch.manual_seed(0)
    timms = Attention(12, 3, qkv_bias=True, norm_layer=nn.LayerNorm, **options).double()
    scheme = binvit.scheme("float", components=("mhsa",))
    layer = BinaryAttention(timms, scheme, GRID, PREFIX)
    torch.testing.assert_close(layer(tokens()), timms(tokens()))


def test_float_rules_make_timms_mlp():
    torch.manual_seed(0)
    timms = Mlp(12, 24, norm_layer=nn.LayerNorm).double()
    layer = BinaryMlp(timms, binvit.scheme("float", components=("mlp",)))
    torch.testing.assert_close(layer(tokens()), timms(tokens()))


def test_the_activation_is_limited_where_the_scheme_says_so():
    layer = mlp_layer(binvit.scheme("gsb", activation_limit=0.5))
    x = torch.linspace(-20, 20, 101)
    assert layer.activate(x).max() == 0.5
    assert mlp_layer(binvit.scheme("bibert")).activate(x).max() == 20


@pytest.mark.parametrize("name", [n for n in SCHEMES if n != "float"])
def test_recorded_tensors_are_the_ones_multiplied(name):
    scheme = binvit.scheme(name)
    layer = attention_layer(scheme).double()
    x = tokens()
    layer(x)
    disturb(layer)
    assert layer.last_attention == {}
    layer.eval().record = True
    y = layer(x)
    kept = layer.last_attention
    assert set(kept) == {"scores", "map", "binary", "query", "key", "value", "value_binary"}
    assert not any(t.requires_grad for t in kept.values())
    context = kept["binary"] @ kept["value_binary"]
    context = context.transpose(1, 2).reshape(2, 5, 12)
    if scheme.context_norm and not scheme.context_residual:
        context = layer.context_end(context)
    if scheme.context_residual:
        shifts = layer.query_shift, layer.key_shift, layer.value_shift
        parts = [kept[place] - shift for place, shift in zip(("query", "key", "value"), shifts, strict=True)]
        context = layer.context_end(context, sum(parts).transpose(1, 2).reshape(2, 5, 12))
    torch.testing.assert_close(layer.proj(context), y)
    for place in ("query", "key", "value"):
        assert kept[place].shape == (2, 3, 5, 4)
    for place in ("scores", "map", "binary"):
        assert kept[place].shape == (2, 3, 5, 5)
    bias = 0 if layer.bias is None else layer.bias()
    want = kept["scores"] if scheme.attention == "scores" else kept["scores"].softmax(-1) + bias
    torch.testing.assert_close(kept["map"], want)
    layer.record = False
    layer(2 * x)
    assert layer.last_attention is kept


@pytest.mark.parametrize("mode", [True, False])
def test_recording_in_either_mode_changes_nothing(mode):
    layer = attention_layer(binvit.scheme("gsb"))
    x = tokens().float()
    layer(x)
    layer.train(mode)
    before = layer(x)
    layer.record = True
    torch.testing.assert_close(layer(x), before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", ["full", "relative"])
@pytest.mark.parametrize("n", [3, 17])
def test_a_bias_for_another_number_of_tokens_is_refused(training, kind, n):
    layer = attention_layer(binvit.scheme("gsb", attention_bias=kind))
    layer(tokens().float())
    with pytest.raises(ValueError, match=f"attention bias is for 5 tokens, got {n}"):
        layer.train(training)(torch.randn(2, n, 12))


@pytest.mark.parametrize("options", [{"attn_drop": 0.5}, {"qk_norm": True}])
@pytest.mark.parametrize("scheme", ["gsb", "bit"])
def test_what_the_fused_core_does_not_know_goes_step_by_step(options, scheme, monkeypatch):
    used = []
    for module, name in ((autograd, "attention_core"), (formed, "attention_by_forms")):
        core = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, core=core: used.append(1) or core(*a))
    layer = attention_layer(binvit.scheme(scheme), **options)
    x = tokens().float()
    for _ in range(2):
        layer(x)
    assert not used
    plain = attention_layer(binvit.scheme(scheme))
    plain(x)
    assert not used  # the first batch sets scales
    plain(x)
    assert used


@pytest.mark.parametrize("mask", [{"attn_mask": torch.zeros(5, 5)}, {"is_causal": True}])
def test_attention_refuses_masks(mask):
    layer = attention_layer(binvit.scheme("gsb"))
    with pytest.raises(ValueError, match="takes no attention mask"):
        layer(tokens().float(), **mask)


def test_every_place_has_one_binarizer_per_rule():
    layer = attention_layer(binvit.scheme("bivit-head"))
    for place in ("attention", "value"):
        assert getattr(layer, f"{place}_binarizer").scale.shape == (3, 1, 1)
    assert attention_layer(binvit.scheme("bivit")).qkv.weight_binarizer.scale.shape == (36, 1)
    assert not mlp_layer(binvit.scheme("bivit")).fc1.weight_binarizer.rule.parameters
    assert set(PLACES) == set(reference.PLACES)
