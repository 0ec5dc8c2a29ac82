"""pack(): a trained binary vision transformer -> its bits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from binvit import bits
from binvit.nn.convert import VECTORS
from binvit.nn.modules import Binarizer, BinaryLinear
from binvit.packed.blueprint import Blueprint, check_same, describe
from binvit.packed.exact import is_binary
from binvit.packed.vit import PackedViT


@torch.no_grad()
def pack(
    model: VisionTransformer,
    exact: bool = False,
    *,
    classes: Sequence[str] = (),
    mean: Sequence[float] = (),
    std: Sequence[float] = (),
    images: Tensor | None = None,
) -> PackedViT:
    """Fold a trained binarized model into bits; the model itself is left untouched.

    1-bit weights become words of 64 signs, 8-bit weights int8, everything else stays float32. The attention bias, the
    position embedding and other vectors (`binvit.nn.convert.VECTORS`) are stored as float16 where that loses nothing,
    or where `images` show that it changes no prediction.

    Args:
        model: What `binvit.binarize` returned, trained or calibrated.
        exact: Do every float step as the evaluation-mode model does, so that logits are equal bit for bit, instead of
            the fast path's fused steps.
        classes: Class names.
        mean: Channel means that the images were normalized with; timm's pretrained configuration by default.
        std: Channel standard deviations, likewise.
        images: float32 (B, C, H, W), normalized; all must keep their prediction when one kind of vector after the other
            is rounded to float16. Without them, and for `exact`, only what are float16 numbers already become float16.

    Returns:
        The packed model.

    Raises:
        ValueError: If the model is not binarized, has never seen a batch (so that its scales have no values), or has
            a part without a packed form.
    """
    scheme = getattr(model, "scheme", None)
    if not isinstance(model, VisionTransformer) or scheme is None:
        raise ValueError(f"pack() takes a model made by binvit.binarize(), got {type(model).__name__}.")
    _check_classes(model, classes)
    for name, module in model.named_modules():
        if isinstance(module, Binarizer) and not getattr(module, "initialized", torch.tensor(True)):
            raise ValueError(
                f"The scale of {name} has no value yet: run one batch in training mode or use binvit.calibrate()."
            )
    config = getattr(model, "pretrained_cfg", None) or {}
    mean, std = mean or config.get("mean", ()), std or config.get("std", ())
    numbers = [tuple(float(value) for value in values) for values in (mean, std)]
    blueprint = Blueprint(scheme, describe(model), tuple(map(str, classes)), *numbers)
    check_same(model, blueprint.build())
    tensors = _fold_tensors(model)
    halves = _halves(tensors)
    if images is not None and not exact:
        expected = PackedViT(blueprint, tensors).predict(images)
        for some in halves:
            if torch.equal(PackedViT(blueprint, tensors | some).predict(images), expected):
                tensors |= some
    for some in halves:
        tensors |= {name: half for name, half in some.items() if torch.equal(half.float(), tensors[name].float())}
    return PackedViT(blueprint, tensors, exact=exact)


def _halves(tensors: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """Tensors rounded to float16, one dictionary for each kind; those beyond its range are left out."""
    rounded = [{name: t.half() for name, t in tensors.items() if name.endswith(ends)} for ends in VECTORS]
    return [{name: half for name, half in some.items() if half.isfinite().all()} for some in rounded]


def _fold_tensors(model: VisionTransformer) -> dict[str, Tensor]:
    folded = {name: t.detach().cpu().contiguous().clone() for name, t in model.state_dict().items()}
    for name in [name for name in folded if name.endswith(".initialized")]:
        del folded[name]
    for name, module in model.named_modules():
        if not isinstance(module, BinaryLinear):
            continue
        for parameter in module.weight_binarizer.rule.parameters:
            del folded[f"{name}.weight_binarizer.{parameter}"]
        (plane,) = module.weight_binarizer.planes(module.matrix)
        levels = plane.levels.detach().cpu()
        rule = module.weight_binarizer.rule
        if is_binary(rule):
            folded[f"{name}.weight"] = torch.from_numpy(bits.pack_signs(levels.numpy()))
        elif rule.is_float:
            folded[f"{name}.weight"] = levels.contiguous().clone()
        else:
            folded[f"{name}.weight"] = levels.to(torch.int8)
        if plane.scale is not None:
            folded[f"{name}.weight_scale"] = plane.scale.detach().cpu().clone()
    return folded


def _check_classes(model: VisionTransformer, classes: Sequence[str]) -> None:
    if isinstance(classes, str) or (classes and len(classes) != model.num_classes):
        raise ValueError(f"The model has {model.num_classes} classes, but {len(classes)} class names came.")
