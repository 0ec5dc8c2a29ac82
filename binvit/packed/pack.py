"""pack(): a trained binary vision transformer -> its bits."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from binvit import bits
from binvit.config import show
from binvit.nn.convert import VECTORS
from binvit.nn.layer_parts import Binarizer
from binvit.nn.linear import BinaryLinear
from binvit.nn.precision import on_cpu
from binvit.packed.blueprint import Blueprint, Interpolation, check_same, describe
from binvit.packed.exact import fold_weight, weight_dtype
from binvit.packed.header import Card, Vit
from binvit.packed.vit import PackedViT, as_tensor


@on_cpu()
def pack(
    model: VisionTransformer,
    exact: bool = False,
    *,
    classes: Sequence[str] = (),
    mean: Sequence[float] | np.ndarray = (),
    std: Sequence[float] | np.ndarray = (),
    resize: int | None = None,
    interpolation: Interpolation | None = None,
    card: Card | Mapping[str, Any] | None = None,
    images: Tensor | np.ndarray | None = None,
) -> PackedViT:
    """Fold a trained binarized model into bits; the model itself is left untouched.

    1-bit weights become words of 64 signs, 8-bit weights int8, everything else stays float32. The attention bias, the
    position embedding and other vectors (`binvit.nn.convert.VECTORS`) are stored as float16 where that loses nothing,
    or where `images` show that it changes no prediction.

    Args:
        model: what `binvit.binarize` returned, trained or calibrated.
        exact: do every float step as the evaluation-mode model does, so that logits are equal bit for bit, instead of
            the fast path's fused steps.
        classes: class names.
        mean: channel means that the images were normalized with; by default mean and standard deviations of timm's
            pretrained configuration, if it has them for the model's channels.
        std: channel standard deviations; required with the means.
        resize: pixels of an image's short side before its centre is cut out; by default that of timm's pretrained
            configuration if the means come from there, else the short side of what the model reads.
        interpolation: how images are resized, "bilinear" or "bicubic"; by default as timm's pretrained configuration
            says if the means come from there, else "bicubic".
        card: what people want to know of the model, a `Card` or its fields: data, recipe, accuracy, seeds, licence.
        images: float32 (B, C, H, W), normalized; all must keep their prediction when one kind of vector after the other
            is rounded to float16. Without them, and for `exact`, only what are float16 numbers already become float16.

    Returns:
        The packed model.

    Raises:
        ValueError: if the model is not binarized, has never seen a batch (so that its scales have no values), has a
            part without a packed form or weights that are not finite float32 numbers, or if class names, means and
            standard deviations, sizes or the card do not fit it.
    """
    scheme = getattr(model, "scheme", None)
    if not isinstance(model, VisionTransformer) or scheme is None:
        raise ValueError(f"pack() takes a model made by binvit.binarize(), got {type(model).__name__}.")
    _check_numbers(model)
    for name, module in model.named_modules():
        if isinstance(module, Binarizer) and not getattr(module, "initialized", torch.tensor(True)):
            raise ValueError(
                f"The scale of {name} has no value yet: run one batch in training mode or use binvit.calibrate()."
            )
    vit = describe(model)
    classes, mean, std = _tuple(classes, str, "classes"), _tuple(mean, float, "mean"), _tuple(std, float, "std")
    if not mean and not std:
        mean, std = _pretrained_normalization(model, vit["in_chans"])
        if mean:
            size, mode = _pretrained_resize(model, min(vit["img_size"]))
            resize, interpolation = size if resize is None else resize, mode if interpolation is None else interpolation
    interpolation = "bicubic" if interpolation is None else interpolation
    card = card if isinstance(card, Card) else Card.from_dict(card or {})
    blueprint = Blueprint(scheme, Vit(**vit), classes, mean, std, resize, interpolation, card)
    check_same(model, built := blueprint.build())
    tensors = _fold_tensors(model)
    halves = _halves(tensors)
    if images is not None and not exact:
        images = as_tensor(images)
        if not len(images) or not images.isfinite().all():  # on these, everything rounded predicts the same
            raise ValueError("Images to compare predictions on must be at least one, and their pixels finite.")
        expected = PackedViT(blueprint, tensors)(images).argmax(-1)
        for some in halves:
            if torch.equal(PackedViT(blueprint, tensors | some)(images).argmax(-1), expected):
                tensors |= some
    for some in halves:
        tensors |= {name: half for name, half in some.items() if torch.equal(half.float(), tensors[name].float())}
    return PackedViT(blueprint, tensors, exact, built)


def _halves(tensors: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """Return the tensors rounded to float16, one dictionary for each kind; those beyond its range are left out."""
    rounded = [{name: t.half() for name, t in tensors.items() if name.endswith(ends)} for ends in VECTORS]
    return [{name: half for name, half in some.items() if half.isfinite().all()} for some in rounded]


def _fold_tensors(model: VisionTransformer) -> dict[str, Tensor]:
    folded = {name: t.detach().cpu().contiguous().clone() for name, t in model.state_dict().items()}
    for name in [name for name in folded if name.endswith(".initialized")]:
        del folded[name]
    for name, module in model.named_modules():
        if isinstance(module, Binarizer):  # a step may have taken a scale below what evaluation clamps it to
            parameters = zip(module.rule.parameters, module.limited(), strict=True)
            folded |= {f"{name}.{parameter}": value.detach().cpu().clone() for parameter, value in parameters}
    for name, module in model.named_modules():
        if not isinstance(module, BinaryLinear):
            continue
        for key in [key for key in folded if key.startswith(f"{name}.weight_binarizer.")]:
            del folded[key]
        plane = fold_weight(module)
        levels = plane.levels.detach().cpu()
        dtype = weight_dtype(module.weight_binarizers[0].rule)
        words = dtype == torch.uint64
        folded[f"{name}.weight"] = (
            torch.from_numpy(bits.pack_signs(levels.numpy())) if words else levels.to(dtype, copy=True).contiguous()
        )
        if plane.scale is not None:
            folded[f"{name}.weight_scale"] = plane.scale.detach().cpu().clone()
    return folded


def _check_numbers(model: VisionTransformer) -> None:
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and tensor.dtype != torch.float32:
            raise ValueError(f"pack() takes models in float32, but {name} is {tensor.dtype}; use model.float().")
        if not tensor.isfinite().all():
            raise ValueError(f"The model cannot be packed: {name} holds numbers that are not finite.")


def _tuple(values: Iterable[Any], kind: Callable[[Any], Any], name: str) -> tuple[Any, ...]:
    """Turn a list, an array or a tensor into a tuple of strings or floats."""
    try:
        if isinstance(values, str):
            raise TypeError
        return tuple(map(kind, values))
    except (TypeError, ValueError):
        raise ValueError(f"The argument {name} of pack() must be a list, got {show(values)}.") from None


def _pretrained_normalization(model: VisionTransformer, channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the mean and std of timm's pretrained configuration, empty unless it has both for every channel."""
    config = getattr(model, "pretrained_cfg", None) or {}
    mean, std = (_tuple(config.get(name) or (), float, name) for name in ("mean", "std"))
    return (mean, std) if len(mean) == len(std) == channels else ((), ())


def _pretrained_resize(model: VisionTransformer, side: int) -> tuple[int | None, Interpolation | None]:
    """Return the resizing of timm's pretrained configuration, which cuts out the centre of what it resizes."""
    config = getattr(model, "pretrained_cfg", None) or {}
    share, mode = config.get("crop_pct") or 1.0, config.get("interpolation")
    if config.get("crop_mode", "center") != "center" or mode not in ("bilinear", "bicubic"):
        return None, None
    return math.floor(side / share), mode
