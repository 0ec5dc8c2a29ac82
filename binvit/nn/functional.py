"""The public binarizers as differentiable functions."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real

from torch import Tensor

from binvit.config import check_type, show
from binvit.nn.products import binarize
from binvit.nn.rules import REDUCTIONS, Bwn, Elastic, GsbAttention, GsbValue, check_thresholds


def elastic_signed(x: Tensor, scale: Tensor | float) -> Tensor:
    """Binarize x to a sign(x) with a learned scale; see `binvit.nn.rules.Elastic` for the gradients.

    Args:
        x: any shape.
        scale: one positive value, shape () or a number.

    Raises:
        ValueError: if an argument is of another type.
    """
    check_type("x", x, Tensor, "a tensor")
    return binarize(x, Elastic(), _scale("scale", scale, x))


def elastic_unsigned(x: Tensor, scale: Tensor | float) -> Tensor:
    """Binarize x to a round(clip(x/a, 0, 1)) with a learned scale; see `binvit.nn.rules.Elastic` for the gradients.

    Args:
        x: any shape.
        scale: one positive value, shape () or a number.

    Raises:
        ValueError: if an argument is of another type.
    """
    check_type("x", x, Tensor, "a tensor")
    return binarize(x, Elastic(lo=0), _scale("scale", scale, x))


def binarize_weight(w: Tensor, scale: str = "tensor", center: bool | str = True) -> Tensor:
    """Binarize weights to mean|W| sign(W - mean W) with the gradient passed through; see `binvit.nn.rules.Bwn`.

    Args:
        w: (out, in).
        scale: factor: "none", one per "tensor" or one per "channel" (output row).
        center: mean to subtract before the sign: False or "none", True or "tensor" (as released), or "channel".

    Raises:
        ValueError: if `scale` or `center` is unknown, or w is no tensor.
    """
    check_type("w", w, Tensor, "a tensor")
    _choice("scale", scale, ("none", "tensor", "channel"))
    if isinstance(center, bool):
        center = "tensor" if center else "none"
    _choice("center", center, ("none", "tensor", "channel", True, False))
    return binarize(w, Bwn(scale=scale, center=center))


def gsb_attention(
    a: Tensor,
    scales: Sequence[Tensor | float],
    thresholds: Sequence[float] = (0.7, 0.9),
    reduce: str = "row",
    gradient: str = "official",
) -> Tensor:
    """Binarize an attention map by GSB; see `binvit.nn.rules.GsbAttention`.

    Args:
        a: attention map after the softmax and its bias, (B, H, N, N).
        scales: one scale per group, each of shape () or a number.
        thresholds: one share of the maximum per group after the first, increasing, in (0, 1).
        reduce: the set of the maximum: "batch", "sample", "head" or "row".
        gradient: "official" or "masked".

    Raises:
        ValueError: if a choice is unknown, the numbers of scales and thresholds, a shape or a type do not fit.
    """
    return _binarize_gsb(GsbAttention, a, scales, thresholds, reduce, gradient)


def gsb_value(
    v: Tensor,
    scales: Sequence[Tensor | float],
    thresholds: Sequence[float] = (0.7, 0.9),
    reduce: str = "row",
    gradient: str = "official",
) -> Tensor:
    """Binarize a value tensor by GSB; see `binvit.nn.rules.GsbValue`.

    Args:
        v: value, (B, H, N, d).
        scales: one scale per group, each of shape () or a number.
        thresholds: one share of the maximum (and of the minimum) per group after the first, increasing, in (0, 1).
        reduce: the set of the maximum: "batch", "sample", "head" or "row" (for the value the same as "head").
        gradient: "official" or "masked".

    Raises:
        ValueError: if a choice is unknown, the numbers of scales and thresholds, a shape or a type do not fit.
    """
    return _binarize_gsb(GsbValue, v, scales, thresholds, reduce, gradient)


def _scale(what: str, scale: Tensor | float, x: Tensor) -> Tensor:
    """Return a scale as a tensor; a number becomes one like x."""
    check_type(what, scale, Tensor | Real, "a tensor or a number")
    return scale if isinstance(scale, Tensor) else x.new_tensor(scale)


def _choice(what: str, value: str, valid: Sequence[object]) -> None:
    if value not in valid:
        raise ValueError(f"{what} must be one of {', '.join(map(str, valid))}, got {show(value)}.")


def _binarize_gsb(
    kind: type[GsbAttention] | type[GsbValue],
    x: Tensor,
    scales: Sequence[Tensor | float],
    thresholds: Sequence[float],
    reduce: str,
    gradient: str,
) -> Tensor:
    check_type("a" if kind is GsbAttention else "v", x, Tensor, "a tensor")
    check_type("scales", scales, list | tuple | Tensor, "a list of scales")
    check_thresholds(thresholds)
    _choice("reduce", reduce, REDUCTIONS)
    _choice("gradient", gradient, ("official", "masked"))
    parts = scales.reshape(-1) if isinstance(scales, Tensor) else scales
    given = [_scale(f"scales[{i}]", scale, x) for i, scale in enumerate(parts)]
    if len(given) != len(thresholds) + 1:
        raise ValueError(f"{len(thresholds)} thresholds need {len(thresholds) + 1} scales, got {len(given)}.")
    if x.dim() != 4 or any(scale.numel() != 1 for scale in given):
        shapes = [tuple(scale.shape) for scale in given]
        raise ValueError(
            f"GSB takes a tensor (B, H, N, M) and scales of one number, got {tuple(x.shape)} and {shapes}."
        )
    rule = kind(thresholds=tuple(thresholds), reduce=reduce, gradient=gradient)
    return binarize(x, rule, *(scale.reshape(()) for scale in given))
