"""Attention of trained models: weights, tensors as they are multiplied, and their levels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from timm.layers.attention import Attention
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import binvit
from binvit.lab.analysis.tensor_losses import fit_scales, single_tensor_options
from binvit.nn.layer_parts import BiasedAttention
from binvit.nn.layers import BinaryAttention
from binvit.nn.rules import Elastic, GsbAttention, GsbValue, largest, superpose


@torch.no_grad()
def attention_weights(model: VisionTransformer, images: Tensor) -> Tensor:
    """Return what each block of a model multiplies the value with.

    Args:
        model: a timm vision transformer, binarized or not, in evaluation mode.
        images: the model's input, (B, 3, H, W).

    Returns:
        (blocks, B, heads, N, N): the map of a float block, the binarized and scaled map of a binary one.
    """
    layers = [block.attn for block in model.blocks]
    found: dict[int, Tensor] = {}

    def keep(index: int, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        found[index] = _softmax_map(layer, inputs[0])

    hooks = []
    for index, layer in enumerate(layers):
        if isinstance(layer, BinaryAttention):
            layer.record = True
        else:
            hooks.append(layer.register_forward_pre_hook(lambda layer, inputs, i=index: keep(i, layer, inputs)))
    try:
        model(images)
        for index, layer in enumerate(layers):
            if isinstance(layer, BinaryAttention):
                found[index] = layer.last_attention["binary"]
    finally:
        for hook in hooks:
            hook.remove()
        for layer in layers:
            if isinstance(layer, BinaryAttention):
                layer.record, layer.last_attention = False, {}
    return torch.stack([found[index] for index in range(len(layers))])


def _softmax_map(layer: Attention, x: Tensor) -> Tensor:
    """Return the map of float attention, which does not show it, with its learned bias if it has one."""
    b, n, _ = x.shape
    q, k, _ = layer.qkv(x).view(b, n, 3, layer.num_heads, layer.head_dim).permute(2, 0, 3, 1, 4)
    map_ = (layer.q_norm(q) @ layer.k_norm(k).mT * layer.scale).softmax(dim=-1)
    return map_ + layer.bias() if isinstance(layer, BiasedAttention) else map_


def levels(weights: Tensor) -> int:
    """Return how many different numbers occur at most in one block's attention weights.

    Args:
        weights: the result of `attention_weights`, (blocks, B, heads, N, N).

    Returns:
        At most 2 for 1-bit maps and at most 2 G for maps of G superposed groups, whose thresholds are nested.
    """
    return max(block.unique().numel() for block in weights)


def query_rows(maps: Tensor, grid: tuple[int, int]) -> np.ndarray:
    """Return one query's row of each attention map as a picture over the patches.

    It is the class token's row, or the middle patch's where there is no class token; a mean over rows would show more
    levels than a binary map has.

    Args:
        maps: (B, N, N), N tokens are the patches with any number of other tokens before them.
        grid: rows and columns of patches, (h, w).

    Returns:
        (B, h, w).
    """
    rows, columns = grid
    extra = maps.shape[-1] - rows * columns
    query = 0 if extra else (rows // 2) * columns + columns // 2
    return maps[:, query, extra:].reshape(-1, rows, columns).numpy()


@torch.no_grad()
def attention_tensors(model: VisionTransformer, images: Tensor, block: int = -1) -> tuple[Tensor, Tensor]:
    """Return the attention map and the value of one block of a float model.

    Args:
        model: a float timm vision transformer.
        images: the model's input, (B, 3, H, W).
        block: which block; -1 is the last.

    Returns:
        map (B, heads, N, N) and value (B, heads, N, d).
    """
    options = single_tensor_options("attention map") | {"attention": "float"}  # layers that record, nothing binarized
    shown = binvit.binarize(model, binvit.scheme("gsb", **options)).eval()
    layer = shown.blocks[block].attn
    layer.record = True
    shown(images)
    return layer.last_attention["map"], layer.last_attention["value"]


def binarized_views(
    x: Tensor, tensor: str, thresholds: Sequence[float] = (0.7, 0.9), reduce: str = "row"
) -> dict[str, Tensor]:
    """Return a float attention map or value beside its two binarized forms, with scales fitted by least squares.

    Args:
        x: (B, heads, N, N) or (B, heads, N, d).
        tensor: "attention map" or "value".
        thresholds: of GSB's groups.
        reduce: the set over which GSB's maxima run.

    Returns:
        "float", "1-bit" and "GSB" -> a tensor of the same shape.

    Raises:
        ValueError: `tensor` is neither.
    """
    groups: dict[str, Any] = {"thresholds": tuple(thresholds), "reduce": reduce}
    rules = {
        "attention map": {"1-bit": Elastic(lo=0), "GSB": GsbAttention(**groups)},
        "value": {"1-bit": Elastic(), "GSB": GsbValue(**groups)},
    }
    if tensor not in rules:
        raise ValueError(f"There are two binarizers of 'attention map' and 'value' only, and {tensor!r} came.")
    found = {name: superpose(rule.planes(x, *fit_scales(rule, x))) for name, rule in rules[tensor].items()}
    return {"float": x} | found


def share_of_extreme(x: Tensor, reduce: str = "row") -> Tensor:
    """Return every element as a share of the maximum that GSB compares it with, negative ones of the minimum.

    Args:
        x: an attention map (B, heads, N, N) or a value (B, heads, N, d).
        reduce: the set over which maximum and minimum run, "batch", "sample", "head" or "row".

    Returns:
        Numbers from -1 to 1 of the same shape; the thresholds lie at the same places for every image.
    """
    top, bottom = largest(x, reduce).clamp(min=1e-30), largest(-x, reduce).clamp(min=1e-30)
    return torch.where(x >= 0, x / top, x / bottom)
