"""The classification heads of eight bits as one kernel: shift, levels, integer product, scales, bias."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from binvit.jit import JIT, kernel
from binvit.nn.products import exact_in_float32
from binvit.nn.rules import Elastic
from binvit.packed.exact import PackedLinear
from binvit.packed.fast.fold import fold_affine
from binvit.packed.products import multiply_integers


class Head(NamedTuple):
    """One head, folded; D inputs, N classes.

    Attributes:
        shift: float32 (D,), added to the input.
        step: the input's step between two levels.
        lowest: the lowest level.
        highest: the highest level.
        levels: int8 (N, D), the weights.
        affine: float32 (2, N), scale and bias of each class.
    """

    shift: np.ndarray
    step: np.float32
    lowest: np.float32
    highest: np.float32
    levels: np.ndarray
    affine: np.ndarray


def fold_heads(model: VisionTransformer) -> list[Head]:
    """Fold the heads of a model that reads them from its first tokens, as `run_heads` needs them.

    Args:
        model: what `binvit.packed.exact.build_exact` returned.

    Returns:
        The head, or those of class and distillation token; none, and so left to the model, if one has another form or
        there is no compiler.
    """
    if (
        not JIT
        or model.global_pool != "token"
        or model.attn_pool is not None
        or not isinstance(model.fc_norm, nn.Identity)
    ):
        return []
    layers = [model.head, model.head_dist] if isinstance(model, VisionTransformerDistilled) else [model.head]
    return [_fold(layer) for layer in layers] if all(map(_is_simple, layers)) else []


def run_heads(heads: list[Head], tokens: Tensor) -> Tensor:
    """Turn normed tokens into logits, with the roundings of the model's own operations.

    Args:
        heads: from `fold_heads`, at least one.
        tokens: float32 (B, tokens, D), the first one of each head.

    Returns:
        float32 (B, N).
    """
    x = tokens.contiguous().numpy()
    logits = [np.empty((len(x), len(head.levels)), np.float32) for head in heads]
    levels = np.empty((len(x), x.shape[2]), np.float32)
    for i, (head, out) in enumerate(zip(heads, logits, strict=True)):
        _run_head(x, i, head, levels, out)
    if len(logits) == 2:
        logits[0] += logits[1]
        logits[0] /= 2
    return torch.from_numpy(logits[0])


def _is_simple(layer: Any) -> bool:
    if not isinstance(layer, PackedLinear) or layer.on_bits or layer.parts != 1:
        return False
    rule = layer.input_rule
    many_levels = isinstance(rule, Elastic) and rule.per == "tensor" and (rule.lo, rule.hi) not in ((-1, 1), (0, 1))
    plain = layer.norm is None and layer.post is None and layer.levels.dtype == torch.int8
    return many_levels and plain and exact_in_float32(layer.in_features, rule, layer.weight_rule)


def _fold(layer: PackedLinear) -> Head:
    rule: Any = layer.input_rule
    shift = torch.zeros(1) if layer.shift is None else layer.shift
    (step,) = layer.input_binarizer.limited()
    return Head(
        shift=shift.float().expand(layer.in_features).contiguous().numpy(),
        step=np.float32(step),
        lowest=np.float32(rule.lo),
        highest=np.float32(rule.hi),
        levels=layer.levels.numpy(),
        affine=fold_affine(layer, step),
    )


@kernel
def _run_head(x, token, head, levels, out):
    for i in range(x.shape[0]):
        for k in range(x.shape[2]):
            level = (x[i, token, k] + head.shift[k]) / head.step
            levels[i, k] = np.rint(min(max(level, head.lowest), head.highest))
    multiply_integers(levels, head.levels, out)
    for i in range(out.shape[0]):
        for n in range(out.shape[1]):
            out[i, n] = out[i, n] * head.affine[0, n] + head.affine[1, n]
