"""One block of a packed model -> thresholds, tables and planes for `binvit.packed.fast.forward`.

A threshold on a float becomes one on the integer before it: the model's own torch operations are evaluated once for
every integer that a product of signs can take, so that a folded bit is exactly the model's bit.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from timm.models.vision_transformer import Block, LayerScale
from torch import Tensor, nn

from binvit import bits
from binvit.bits.attention.bias import Bias, full_bias, no_bias, relative_bias
from binvit.bits.attention.scores import MAX_HEAD_WIDTH
from binvit.bits.linear import Intervals, make_intervals, pad_outputs
from binvit.nn.block_parts import LayerEnd
from binvit.nn.layer_parts import AttentionBias, Binarizer
from binvit.nn.layers import BinaryMlp
from binvit.nn.rules import (
    Ede,
    Elastic,
    Gsb,
    GsbAttention,
    GsbValue,
    LearnedOutput,
    MapThreshold,
    Rule,
    ScoreSign,
    Sign,
    ThreeMaps,
)
from binvit.packed.exact import PackedAttention, PackedLinear
from binvit.packed.fast.layout import HEAD, ROW, SAMPLE
from binvit.packed.fast.softmax import score_table


class NotFoldable(Exception):
    """A block has a step that the kernels do not know; the message says which."""


def fold_block(block: Block, grid: tuple[int, int], prefix: int) -> dict[str, Any]:
    """Return the entries of `binvit.packed.fast.layout.Layers` for one block, without the leading axis.

    Args:
        block: a block of what `binvit.packed.exact.build_exact` returned.
        grid: patches along height and width.
        prefix: number of tokens before the patches.

    Raises:
        NotFoldable: if the block has a step that the kernels do not know.
    """
    attention, mlp = block.attn, block.mlp
    _require(isinstance(attention, PackedAttention), "attention is float")
    _require(isinstance(mlp, BinaryMlp), "the MLP is float")
    _require(attention.context_end is None, "query, key and value are added to the context")
    _require(mlp.branches is None, "there are branches beside the MLP")
    for linear in (attention.qkv, attention.proj, mlp.fc1, mlp.fc2):
        _require(linear.parts == 1, "query, key and value are layers of their own")
        _require(linear.norm is None, "there are norms before linear layers")
        _require_simple(linear.post)
    for name, module in (("query", attention.q_norm), ("attention", attention.norm), ("hidden", mlp.norm)):
        _require(isinstance(module, nn.Identity), f"there is a norm of the {name}")
    norms = [_fold_norm(block.norm1, attention.qkv.shift), _fold_norm(block.norm2, mlp.fc1.shift)]
    posts = [_fold_post(attention.proj, block.ls1), _fold_post(mlp.fc2, block.ls2)]
    return (
        _fold_qkv(attention)
        | _fold_map_and_value(attention)
        | _fold_projection(attention)
        | _fold_mlp(mlp)
        | {
            "bias": _fold_bias(attention.bias, grid, prefix),
            "norms": np.stack([norm for norm, _ in norms]),
            "epsilons": np.array([epsilon for _, epsilon in norms]),
            "posts": np.stack([post for post, _ in posts]),
            "post": any(used for _, used in posts),
            "heads": attention.num_heads,
            "width": attention.head_dim,
        }
    )


def _require(holds: bool, reason: str) -> None:
    if not holds:
        raise NotFoldable(reason)


def _require_simple(post: LayerEnd | None) -> None:
    if post is not None:
        _require(post.norm is None, "there are norms after linear layers")
        _require(not post.own_input, "the inputs of linear layers are added to their outputs")
        _require(post.factor is None and post.scale is None, "there are scales after linear layers")
        _require(not post.clips, "the outputs of linear layers are clipped")


def _constant_scale(place: str, binarizer: Binarizer, unsigned: bool = False) -> Tensor | None:
    """Return the scale of a plain sign (or, if allowed, of the levels 0 and 1); it must not depend on the data."""
    rule = binarizer.rule
    _require(isinstance(rule, Elastic | LearnedOutput | Ede | Sign), f"the {place} is {rule}")
    _require(rule.highest == 1 and (rule.lowest == -1 or unsigned), f"the {place} has more than two levels")
    if isinstance(rule, Sign):
        _require(rule.scale == "none", f"the {place} has a scale per token")
    return binarizer.planes(torch.zeros(1, dtype=torch.float32))[0].scale


def _vector(x: Tensor | None, size: int, default: float = 0.0) -> np.ndarray:
    x = torch.tensor(default, dtype=torch.float32) if x is None else x.detach()
    return np.ascontiguousarray(x.float().flatten().expand(size).numpy())


def _fold_norm(norm: Any, shift: Tensor | None) -> tuple[np.ndarray, float]:
    _require(isinstance(norm, nn.LayerNorm), f"the norm is {type(norm).__name__}")
    (size,) = norm.normalized_shape
    return np.stack([_vector(norm.weight, size, 1.0), _vector(norm.bias, size), _vector(shift, size)]), norm.eps


def _fold_post(linear: PackedLinear, scale: LayerScale) -> tuple[np.ndarray, bool]:
    size, post = linear.out_features, linear.post
    gain = scale.gamma if isinstance(scale, LayerScale) else None
    rows = [_vector(None, size), _vector(None, size, 1.0), _vector(None, size)] if post is None else _rprelu(post)
    return np.stack([*rows, _vector(gain, size, 1.0)]), post is not None or gain is not None


def _rprelu(post: LayerEnd) -> list[np.ndarray]:
    activation: Any = post.activation
    return [_vector(x, len(x)) for x in (-activation.shift_in, activation.slope, activation.shift_out)]


def fold_affine(linear: PackedLinear, input_scale: Tensor | None) -> np.ndarray:
    """Return the scale and bias per output channel, float32 (2, N).

    Args:
        linear: the layer.
        input_scale: the scale of its input, None for 1.
    """
    scales = [s for s in (input_scale, linear.scale) if s is not None]
    scale = scales[0] * scales[1] if len(scales) == 2 else scales[0] if scales else None
    return np.stack([_vector(scale, linear.out_features, 1.0), _vector(linear.bias, linear.out_features)])


def _padded(affine: np.ndarray) -> np.ndarray:
    return np.stack([pad_outputs(row) for row in affine])


def _outputs(linear: PackedLinear, input_scale: Tensor | None) -> Tensor:
    """Return the layer's output for every integer that in_features signs can sum up to, (in_features + 1, N)."""
    length = linear.in_features
    numbers = torch.arange(-length, length + 1, 2, dtype=torch.float32)
    return linear.finish(numbers[:, None].repeat(1, linear.out_features), input_scale)


def _intervals(is_set: Tensor) -> Intervals:
    """Find the intervals of integers -K, -K + 2, ..., K for which a bit is set, bool (K + 1, N)."""
    table = is_set.numpy()
    length = len(table) - 1
    outside = table[0]  # set for the lowest integer: the complement of an interval
    inside = table ^ outside
    first, last = inside.argmax(0), length - inside[::-1].argmax(0)
    empty = ~inside.any(0)
    _require(bool((inside.sum(0) == last - first + 1)[~empty].all()), "a bit is set in several intervals")
    first, last = 2 * first - length, 2 * last - length
    return make_intervals(first, np.where(empty, first - 1, last), outside)


def _pad_heads(x: np.ndarray, width: int) -> np.ndarray:
    """Pad every head along the first axis (heads * width, ...) with zeros to whole words."""
    heads, words = len(x) // width, bits.word_count(width)
    padded = np.zeros((heads, 64 * words, *x.shape[1:]), x.dtype)
    padded[:, :width] = x.reshape(heads, width, *x.shape[1:])
    return padded.reshape(-1, *x.shape[1:])


def _panels(words: np.ndarray) -> np.ndarray:
    return bits.prepare_weights(words).panels


def _on_bits(linear: PackedLinear, place: str) -> None:
    _require(linear.on_bits, f"the weights or inputs of {place} have more than one bit")


def _fold_qkv(attention: PackedAttention) -> dict[str, Any]:
    qkv, heads, width = attention.qkv, attention.num_heads, attention.head_dim
    _on_bits(qkv, "qkv")
    scale = _constant_scale("input", qkv.input_binarizer)
    size = heads * width
    outputs, tables = _outputs(qkv, scale), []
    score = None
    for i, place in enumerate(("query", "key")):
        shift, binarizer = getattr(attention, f"{place}_shift"), getattr(attention, f"{place}_binarizer")
        own = _constant_scale(place, binarizer)
        score = own if score is None else score if own is None else score * own
        y = outputs[:, i * size : (i + 1) * size]
        y = y if shift is None else y + shift.flatten()
        tables.append(binarizer.planes(y)[0].levels > 0)
    _require(score is None or float(score) > 0, "the scale of the scores is not positive")
    _require(width <= MAX_HEAD_WIDTH, f"a head is wider than {MAX_HEAD_WIDTH} channels")
    # Padding channels come from integers that set no bit.
    intervals = _intervals(torch.from_numpy(_pad_heads(torch.cat(tables, 1).numpy().T, width).T.copy()))
    affine, post = fold_affine(qkv, scale)[:, 2 * size :], qkv.post
    shift = _vector(attention.value_shift, size)
    zeros = np.zeros_like(shift)
    after = [shift, zeros] if post is None else [zeros, shift]
    slopes = [np.zeros(3 * size, np.float32)] * 3 if post is None else _rprelu(post)
    return {
        "qk_panels": _panels(_pad_heads(qkv.words[: 2 * size], width)),
        "qk_lower": intervals.lower,
        "qk_span": intervals.span,
        "qk_flip": intervals.flip,
        "v_words": np.ascontiguousarray(qkv.words[2 * size :]),
        "v_affine": np.stack([*affine, *after]),
        "value_post": np.stack(slopes)[:, 2 * size :],
        "rprelu": post is not None,
        "tables": score_table(score, attention.factor, width),
    }


def _fold_map_and_value(attention: PackedAttention) -> dict[str, Any]:
    heads = attention.num_heads
    map_, value = attention.attention_binarizer, attention.value_binarizer
    _require(attention.bias is None or attention.softmax, "there is a bias without a softmax")
    cuts, shares, map_scales = _fold_map(map_, heads)
    _require(
        not getattr(map_.rule, "mean_scale", False) or attention.proj.shift is None,
        "the map has a scale per row before a shift",
    )
    value_scales, value_shares, value_mean = _fold_value(value, heads)
    return {
        "cuts": cuts,
        "shares": shares,
        "inclusive": np.full(len(shares), isinstance(map_.rule, MapThreshold)),
        "value_shares": value_shares,
        "coefficients": map_scales[:, :, None] * value_scales[:, None, :],
        "value_mean": value_mean,
        "softmax": attention.softmax,
        "map_reduce": _reduction(map_.rule, ROW),
        "value_reduce": _reduction(value.rule, HEAD),
    }


def _fold_bias(bias: AttentionBias | None, grid: tuple[int, int], prefix: int) -> Bias:
    if bias is None:
        return no_bias()
    values = bias.values.detach().numpy()
    return full_bias(values) if bias.kind == "full" else relative_bias(values, grid, prefix)


def _reduction(rule: Rule, smallest: int) -> int:
    if not isinstance(rule, Gsb) or not rule.thresholds or rule.reduce == "row":
        return smallest
    return HEAD if rule.reduce == "head" else SAMPLE


def over_batch(block: Block) -> bool:
    """Tell whether a maximum of the block runs over all images of the batch."""
    rules = [getattr(block.attn, f"{place}_binarizer").rule for place in ("attention", "value")]
    return any(isinstance(rule, Gsb) and rule.thresholds and rule.reduce == "batch" for rule in rules)


def _fold_map(binarizer: Binarizer, heads: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return constant thresholds (H, G), thresholds as shares of the maximum (G,), scales (H, G)."""
    rule: Any = binarizer.rule
    if isinstance(rule, ThreeMaps):
        scale, offset = (getattr(binarizer, name).flatten() for name in ("scale", "offset"))
        _require(bool((scale > 0).all()), "a scale of the map is not positive")
        levels = [[_largest_unset(rule, a, z, s) for s in (1, 2, 3)] for a, z in zip(scale, offset, strict=True)]
        return np.array(levels, np.float32), np.zeros(3, np.float32), np.tile(scale.numpy()[:, None], 3)
    _require(rule.per == "tensor", f"the attention map is {rule}")
    scales = [_vector(getattr(binarizer, name), 1)[0] for name in rule.parameters if rule.learned] or [1.0]
    shares = [0.0]
    if isinstance(rule, GsbAttention):
        cuts, shares = [0.5 * scales[0], *(0.0 for _ in rule.thresholds)], [0.0, *rule.thresholds]
    elif isinstance(rule, MapThreshold):
        cuts, shares = [0.0], [rule.share]
    elif isinstance(rule, ScoreSign):
        cuts = [0.0]
    elif isinstance(rule, Elastic) and (rule.lowest, rule.highest) == (0, 1):
        cuts = [0.5 * scales[0]]
    else:
        raise NotFoldable(f"the attention map is {rule}")
    rows = [np.tile(np.array(x, np.float32), (heads, 1)) for x in (cuts, scales)]
    return rows[0], np.array(shares, np.float32), rows[1]


def _largest_unset(rule: ThreeMaps, scale: Tensor, offset: Tensor, level: int) -> float:
    """Bisect all finite float32 numbers for the largest entry of the map below a level."""
    largest = int(np.float32(1e30).view(np.int32))
    low, high = -largest, largest
    while high - low > 1:
        middle = (low + high) // 2
        number = torch.tensor([_ordered(middle)], dtype=torch.float32)
        low, high = (low, middle) if bool(rule.rounded(number, scale, offset) >= level) else (middle, high)
    return _ordered(low)


def _ordered(place: int) -> float:
    """Return the float32 number at a place in their order, 0 at 0."""
    size = float(np.int32(abs(place)).view(np.float32))
    return size if place >= 0 else -size


def _fold_value(binarizer: Binarizer, heads: int) -> tuple[np.ndarray, np.ndarray, bool]:
    """Return scales (H, G), thresholds of the higher groups (G - 1,), and whether a scale is its head's mean size."""
    rule = binarizer.rule
    if isinstance(rule, GsbValue):
        scales = [_vector(getattr(binarizer, name), 1)[0] for name in rule.parameters]
        return np.tile(np.array(scales, np.float32), (heads, 1)), np.array(rule.thresholds, np.float32), False
    none = np.zeros(0, np.float32)
    if isinstance(rule, Sign) and rule.scale == "head":
        return np.ones((heads, 1), np.float32), none, True
    return np.full((heads, 1), _vector(_constant_scale("value", binarizer), 1, 1.0)[0]), none, False


def _fold_projection(attention: PackedAttention) -> dict[str, Any]:
    proj, width = attention.proj, attention.head_dim
    _on_bits(proj, "proj")
    scale = _constant_scale("input", proj.input_binarizer)
    padded = _pad_heads(bits.unpack_levels(proj.words, proj.in_features).T, width).T
    excess = padded.shape[1] - proj.in_features  # padding agrees everywhere and counts as so many products of +1
    return {
        "proj_shift": _vector(proj.shift, proj.in_features),
        "proj_panels": _panels(bits.pack_levels(padded)),
        "proj_affine": _padded(fold_affine(proj, scale)),
        "proj_sums": np.full(64 * bits.word_count(proj.out_features), -excess, np.int32),
    }


def _fold_mlp(mlp: BinaryMlp) -> dict[str, Any]:
    fc1, fc2 = mlp.fc1, mlp.fc2
    _on_bits(fc1, "fc1")
    _on_bits(fc2, "fc2")
    hidden_scale = _constant_scale("hidden layer", fc2.input_binarizer, unsigned=True)
    hidden = mlp.activate(_outputs(fc1, _constant_scale("input", fc1.input_binarizer)))
    hidden = hidden if fc2.shift is None else hidden + fc2.shift
    intervals = _intervals(fc2.input_binarizer.planes(hidden)[0].levels > 0)
    prepared, unsigned = bits.prepare_weights(fc2.words), fc2.input_binarizer.rule.lowest == 0
    sums = prepared.sums(fc2.in_features)
    return {
        "fc1_panels": _panels(fc1.words),
        "fc1_lower": intervals.lower,
        "fc1_span": intervals.span,
        "fc1_flip": intervals.flip,
        "fc2_panels": prepared.panels,
        "fc2_affine": _padded(fold_affine(fc2, hidden_scale)),
        "fc2_sums": sums if unsigned else np.zeros_like(sums),
        "hidden": fc2.in_features,
        "hidden_unsigned": unsigned,
    }
