"""The patch embedding of the fast path: float32 images times 8-bit weights, with the roundings of torch's product.

BLAS adds the products of an output element one after the other, fused, in blocks along K whose sums it then adds.
Folding finds the block length that reproduces torch's result on this machine, with torch's threads or, where these
share the work along K, with one; where no length does, torch itself is asked.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from binvit import bits
from binvit.bits.emitter import Emitter, check_arrays
from binvit.jit import kernel, vector_code
from binvit.packed.exact import PackedPatchConv
from binvit.packed.fast.threads import ONE_TORCH_THREAD

TILE = 6
PANEL = 64
BLOCKS = (384, 256, 192, 320, 336, 512)
_LANES = 16
_GROUP = 4 * TILE  # patches that meet a block of weights one after the other: all weights are too many for a near cache
_LARGEST_TRIAL = 2**24  # numbers of the image that is tried; a small file may be for images of gigabytes


class Patches(NamedTuple):
    """A folded patch embedding; K inputs of a patch, D channels, P tokens before the patches, L patches.

    Attributes:
        weights: float32 (ceil(D / 64), K, 64): input k of 64 channels side by side.
        affine: float32 (2, D): scale and bias.
        positions: float32 (L, D), added to the patches' tokens.
        prefix: float32 (P, D), the tokens before them, positions included.
        size: int64 (2,), height and width of a patch.
        block: length of the blocks along K that are summed by themselves.
    """

    weights: np.ndarray
    affine: np.ndarray
    positions: np.ndarray
    prefix: np.ndarray
    size: np.ndarray
    block: int


def fold_patches(model: VisionTransformer) -> Patches:
    """Fold the patch embedding and the position embedding.

    Args:
        model: what `binvit.packed.exact.build_exact` returned.

    Returns:
        The folded embedding; without weights if it is not made of float inputs and 8-bit weights, or if its product
        cannot be reproduced to the last bit.
    """
    embed, conv = model.patch_embed, model.patch_embed.proj
    plain = isinstance(embed.norm, nn.Identity) and isinstance(model.norm_pre, nn.Identity)
    if not (plain and isinstance(conv, PackedPatchConv) and conv.input_binarizer.rule.is_float) or conv.on_bits:
        return _nothing()
    levels, width = conv.levels.float(), conv.out_features
    tokens = model._pos_embed(levels.new_zeros(1, embed.num_patches, width))[0]
    padded = np.zeros((bits.word_count(width) * PANEL, levels.shape[1]), np.float32)
    padded[:width] = levels.numpy()
    weights = bits.aligned_empty((len(padded) // PANEL, levels.shape[1], PANEL), np.float32)
    weights[...] = padded.reshape(-1, PANEL, levels.shape[1]).transpose(0, 2, 1)
    scale = levels.new_ones(1) if conv.scale is None else conv.scale.flatten()
    bias = levels.new_zeros(width) if conv.bias is None else conv.bias
    folded = Patches(
        weights=weights,
        affine=np.stack([scale.expand(width).numpy(), bias.detach().numpy()]),
        positions=tokens[model.num_prefix_tokens :].detach().numpy().copy(),
        prefix=tokens[: model.num_prefix_tokens].detach().numpy().copy(),
        size=np.array(conv.patch_size, np.int64),
        block=0,
    )
    return _with_block(folded, model)


def _nothing() -> Patches:
    flat = np.zeros((0, 0), np.float32)
    return Patches(np.zeros((0, 0, 0), np.float32), flat, flat, flat, np.ones(2, np.int64), 1)


def _with_block(folded: Patches, model: VisionTransformer) -> Patches:
    """Find the block length that gives torch's numbers for a random image, with its own threads or with one."""
    conv, length = model.patch_embed.proj, folded.weights.shape[1]
    shape = (1, conv.in_chans, *model.patch_embed.img_size)
    if math.prod(shape) > _LARGEST_TRIAL:
        return _nothing()
    image = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    expected = [model._pos_embed(model.patch_embed(image))[0].numpy()]
    with ONE_TORCH_THREAD:
        expected.append(model._pos_embed(model.patch_embed(image))[0].numpy())
    x, found = np.zeros_like(expected[0]), dict[int, Patches]()
    for block in dict.fromkeys((length, *BLOCKS, math.ceil(length / 2))):
        folded = folded._replace(block=block)
        embed_patches(folded, image[0].numpy(), x, 0, len(folded.positions))
        for threads, result in enumerate(expected):
            if np.array_equal(x, result):
                found.setdefault(threads, folded)
        if 0 in found:
            break
    return found[min(found)] if found else _nothing()


def _tile_twin(patches, row, weights, panel, first, steps, out):
    total, rows = np.zeros((TILE, PANEL), np.float32), slice(row, row + TILE)
    for k in range(first, first + steps):
        exact = patches[rows, k, None].astype(np.float64) * weights[panel, k].astype(np.float64) + total
        total = exact.astype(np.float32)
    out[rows] += total


@vector_code(twin=_tile_twin)
def _tile_of_floats(typing_context, patches, row, weights, panel, first, steps, out):
    """Add the product of six rows and 64 columns over some inputs to the same rows of `out`; sums stay in registers."""
    floats = types.float32
    check_arrays("tile_of_floats", {"patches": (patches, floats, 2), "weights": (weights, floats, 3)})
    check_arrays("tile_of_floats", {"out": (out, floats, 2)})
    index = types.intp
    signature = types.void(patches, index, weights, index, index, index, out)

    def codegen(context, builder, signature, arguments):
        emit = Emitter(context, builder, signature, arguments)
        _, row, _, panel, first, steps, _ = arguments
        position, real = ir.IntType(64), ir.FloatType()
        vector, vectors = ir.VectorType(real, _LANES), PANEL // _LANES
        indices = [builder.add(row, ir.Constant(position, r)) for r in range(TILE)]
        rows = [emit.address(0, i, first) for i in indices]
        page = emit.address(2, panel, first, ir.Constant(position, 0))

        def step(k, sums):
            base = builder.mul(k, ir.Constant(position, PANEL))
            columns = [
                emit.load(builder.gep(page, [builder.add(base, ir.Constant(position, v * _LANES))]), real, _LANES)
                for v in range(vectors)
            ]
            result = []
            for r in range(TILE):
                value = emit.splat(builder.load(builder.gep(rows[r], [k])), _LANES)
                for v in range(vectors):
                    before = ir.Constant(vector, None) if sums is None else sums[r * vectors + v]
                    result.append(emit.call(f"llvm.fma.v{_LANES}f32", vector, value, columns[v], before))
            return result

        totals = emit.accumulate(steps, step)
        for r in range(TILE):
            for v in range(vectors):
                target = emit.address(6, indices[r], ir.Constant(position, v * _LANES))
                emit.store(builder.fadd(emit.load(target, real, _LANES), totals[r * vectors + v]), target)
        return context.get_dummy_value()

    return signature, codegen


def _copy_floats_twin(image, channel, row, column, patches, patch, start, count):
    patches[patch, start : start + count] = image[channel, row, column : column + count]


@vector_code(twin=_copy_floats_twin)
def _copy_floats(typing_context, image, channel, row, column, patches, patch, start, count):
    """Copy a row of pixels of a patch; LLVM makes gathers of a loop whose indices might be negative."""
    check_arrays("copy_floats", {"image": (image, types.float32, 3), "patches": (patches, types.float32, 2)})
    index = types.intp
    signature = types.void(image, index, index, index, patches, index, index, index)

    def codegen(context, builder, signature, arguments):
        emit = Emitter(context, builder, signature, arguments)
        _, channel, row, column, _, patch, start, count = arguments
        source, target = emit.address(0, channel, row, column), emit.address(4, patch, start)
        lanes = ir.IntType(64)(_LANES)
        whole = builder.udiv(count, lanes)

        def copy(size, position):
            values = emit.load(builder.gep(source, [position]), ir.FloatType(), size)
            emit.store(values, builder.gep(target, [position]))

        with cgutils.for_range(builder, whole) as loop:
            copy(_LANES, builder.mul(loop.index, lanes))
        with cgutils.for_range(builder, count, builder.mul(whole, lanes), intp=count.type) as loop:
            copy(1, loop.index)
        return context.get_dummy_value()

    return signature, codegen


@kernel
def embed_patches(p, image, x, start, stop):
    """Turn some patches of an image into tokens; who does patch 0 writes the tokens before the patches, too.

    Args:
        p: `Patches`.
        image: float32 (C, H, W).
        x: float32 (P + L, D), overwritten.
        start: first patch.
        stop: one past the last patch.
    """
    prefix, width, length = p.prefix.shape[0], x.shape[1], p.weights.shape[1]
    height, wide = p.size[0], p.size[1]
    columns = image.shape[2] // wide
    patches, out = np.zeros((_GROUP, length), np.float32), np.empty((_GROUP, PANEL), np.float32)
    if start == 0:
        for t in range(prefix):  # assigning a slice compiles the text of numba's error about shapes: three seconds
            for n in range(width):
                x[t, n] = p.prefix[t, n]
    for first in range(start, stop, _GROUP):
        rows = min(_GROUP, stop - first)
        k = 0
        for channel in range(image.shape[0]):  # along rows of the image, which neighbouring patches share
            for i in range(height):
                for r in range(rows):
                    top, left = (first + r) // columns * height, (first + r) % columns * wide
                    _copy_floats(image, channel, top + i, left, patches, r, k, wide)
                k += wide
        for panel in range(p.weights.shape[0]):
            out[:] = 0
            for k in range(0, length, p.block):
                for row in range(0, rows, TILE):
                    _tile_of_floats(patches, row, p.weights, panel, k, min(p.block, length - k), out)
            column = panel * PANEL
            for r in range(rows):
                patch = first + r
                for n in range(min(PANEL, width - column)):
                    y = out[r, n] * p.affine[0, column + n] + p.affine[1, column + n]
                    x[prefix + patch, column + n] = y + p.positions[patch, column + n]
