"""The fused form of what follows a 1-bit product: factor, norm, own input, activation and scale in one pass each way.

Nothing is saved but the inputs; the backward pass computes the rest again, row by row in the first-level cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numba import prange
from torch import Tensor
from torch.autograd.function import once_differentiable

from binvit.jit import kernel
from binvit.nn.fused import elementwise
from binvit.nn.precision import full_precision

BLOCK = 64  # rows whose gradients of vectors are summed together
ZERO, ONE = np.float32(0), np.float32(1)
FACTOR, WEIGHT, BIAS, SHIFT_IN, SLOPE, SHIFT_OUT, ALPHA, BETA = range(8)
_DEFAULTS = (1.0, 1.0, 0.0, 0.0, 1.0, 0.0, 1.0, 0.0)
ACTIVATIONS = {"none": 0, "clip": 1, "rprelu": 2}


class End(NamedTuple):
    """What follows a product; see `binvit.nn.block_parts.LayerEnd`."""

    parts: int  # of the norm; 0 for none
    eps: float
    activation: str


@kernel(reorder=True)
def _normalized(y, factor, parts, eps, hat, deviations):
    # y times the factor, normalized part by part if there are parts.
    n = y.size
    for j in range(n):
        hat[j] = y[j] * factor[j]
    if parts:
        size = n // parts
        for p in range(parts):
            part = hat[p * size : (p + 1) * size]
            mean = ZERO
            for j in range(size):
                mean += part[j]
            mean /= np.float32(size)
            square = ZERO
            for j in range(size):
                square += (part[j] - mean) * (part[j] - mean)
            inverse = ONE / np.sqrt(square / np.float32(size) + eps)
            deviations[p] = inverse
            for j in range(size):
                part[j] = (part[j] - mean) * inverse


@kernel(reorder=True)
def _with_own_input(hat, x, weight, bias, out):
    # The norm's weight and bias, and the own input brought to the width.
    n, k = out.size, x.size
    for j in range(n):
        out[j] = hat[j] * weight[j] + bias[j]
    if k > n:
        group = k // n
        share = ONE / np.float32(group)
        for j in range(n):
            total = ZERO
            for i in range(group):
                total += x[j * group + i]
            out[j] += total * share
    elif k:
        for start in range(0, n, k):
            for j in range(k):
                out[start + j] += x[j]


@kernel(parallel=True, reorder=True)
def end_forward(y, x, vectors, parts, eps, activation, out):
    """Map products (M, N) and own inputs (M, K), K = 0 for none, to (M, N); vectors (8, N) in the order of the module.

    activation: a value of `ACTIVATIONS`.
    """
    rows, n = y.shape
    for block in prange((rows + BLOCK - 1) // BLOCK):
        hat, deviations = np.empty(n, np.float32), np.empty(max(parts, 1), np.float32)
        for r in range(block * BLOCK, min(rows, (block + 1) * BLOCK)):
            row = out[r]
            _normalized(y[r], vectors[FACTOR], parts, eps, hat, deviations)
            _with_own_input(hat, x[r], vectors[WEIGHT], vectors[BIAS], row)
            if activation == 1:
                for j in range(n):
                    v = row[j]
                    v = ONE if v > ONE else v
                    row[j] = -ONE if v < -ONE else v
            elif activation == 2:
                for j in range(n):
                    v = row[j] + vectors[SHIFT_IN, j]
                    row[j] = (v if v > 0 else vectors[SLOPE, j] * v) + vectors[SHIFT_OUT, j]
            for j in range(n):
                row[j] = row[j] * vectors[ALPHA, j] + vectors[BETA, j]


@kernel(parallel=True, reorder=True)
def end_backward(y, x, g, vectors, parts, eps, activation, dy, dx, dvectors):
    """Write the gradients of `end_forward` for g (M, N): dy (M, N), which may be g, dx (M, K), and dvectors (8, N)."""
    rows, n = y.shape
    k = x.shape[1]
    blocks = (rows + BLOCK - 1) // BLOCK
    sums = np.zeros((blocks, 8, n), np.float32)
    for block in prange(blocks):
        hat, moved, d = np.empty(n, np.float32), np.empty(n, np.float32), np.empty(n, np.float32)
        deviations, total = np.empty(max(parts, 1), np.float32), sums[block]
        for r in range(block * BLOCK, min(rows, (block + 1) * BLOCK)):
            _normalized(y[r], vectors[FACTOR], parts, eps, hat, deviations)
            _with_own_input(hat, x[r], vectors[WEIGHT], vectors[BIAS], moved)
            for j in range(n):
                total[BETA, j] += g[r, j]
                d[j] = g[r, j] * vectors[ALPHA, j]
            if activation == 2:
                for j in range(n):
                    v = moved[j] + vectors[SHIFT_IN, j]
                    low = v if v <= ZERO else ZERO
                    z = (v if v > ZERO else vectors[SLOPE, j] * v) + vectors[SHIFT_OUT, j]
                    total[ALPHA, j] += g[r, j] * z
                    total[SHIFT_OUT, j] += d[j]
                    total[SLOPE, j] += d[j] * low
                    d[j] = d[j] if v > ZERO else d[j] * vectors[SLOPE, j]
                    total[SHIFT_IN, j] += d[j]
            elif activation == 1:
                for j in range(n):
                    v = moved[j]
                    z = ONE if v > ONE else v
                    total[ALPHA, j] += g[r, j] * (-ONE if z < -ONE else z)
                    d[j] = d[j] if abs(v) < ONE else ZERO
            else:
                for j in range(n):
                    total[ALPHA, j] += g[r, j] * moved[j]
            if k > n:
                group = k // n
                share = ONE / np.float32(group)
                for j in range(n):
                    for i in range(group):
                        dx[r, j * group + i] = d[j] * share
            elif k:
                for j in range(k):
                    dx[r, j] = d[j]
                for start in range(k, n, k):
                    for j in range(k):
                        dx[r, j] += d[start + j]
            if parts:
                size = n // parts
                for j in range(n):
                    total[WEIGHT, j] += d[j] * hat[j]
                    total[BIAS, j] += d[j]
                    d[j] *= vectors[WEIGHT, j]
                for p in range(parts):
                    part, h = d[p * size : (p + 1) * size], hat[p * size : (p + 1) * size]
                    mean, along = ZERO, ZERO
                    for j in range(size):
                        mean += part[j]
                        along += part[j] * h[j]
                    mean, along = mean / np.float32(size), along / np.float32(size)
                    for j in range(size):
                        part[j] = (part[j] - mean - h[j] * along) * deviations[p]
            for j in range(n):
                total[FACTOR, j] += d[j] * y[r, j]
                dy[r, j] = d[j] * vectors[FACTOR, j]
    dvectors[:] = 0
    for block in range(blocks):
        for i in range(8):
            for j in range(n):
                dvectors[i, j] += sums[block, i, j]


def _table(vectors: Sequence[Tensor | None], width: int) -> np.ndarray:
    table = np.empty((len(_DEFAULTS), width), np.float32)
    for row, value, default in zip(table, vectors, _DEFAULTS, strict=True):
        row[:] = default if value is None else value.detach().numpy()
    return table


def _own_rows(x: Tensor | None, rows: int) -> np.ndarray:
    return np.empty((rows, 0), np.float32) if x is None else elementwise.rows_of(x)


class _LayerEnd(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, end: End, y: Tensor, x: Tensor | None, *vectors: Tensor | None) -> Tensor:
        rows = elementwise.rows_of(y)
        out = y.new_empty(y.shape)
        kind, eps = ACTIVATIONS[end.activation], np.float32(end.eps)
        own, table = _own_rows(x, len(rows)), _table(vectors, y.shape[-1])
        end_forward(rows, own, table, end.parts, eps, kind, out.view(rows.shape).numpy())
        ctx.end = end
        ctx.save_for_backward(y, x, *vectors)
        return out

    @staticmethod
    @once_differentiable
    @full_precision
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        y, x, *vectors = ctx.saved_tensors
        end, rows = ctx.end, elementwise.rows_of(y)
        own, table = _own_rows(x, len(rows)), _table(vectors, y.shape[-1])
        dy, dx, dtable = y.new_empty(y.shape), np.empty_like(own), np.empty_like(table)
        kind, eps, up = ACTIVATIONS[end.activation], np.float32(end.eps), elementwise.rows_of(g)
        end_backward(rows, own, up, table, end.parts, eps, kind, dy.view(rows.shape).numpy(), dx, dtable)
        summed = torch.from_numpy(dtable).unbind()
        dvectors = [None if value is None else d for value, d in zip(vectors, summed, strict=True)]
        return None, dy, None if x is None else torch.from_numpy(dx).view(x.shape), *dvectors


@torch.compiler.disable  # compiled by numba
@full_precision
def layer_end(y: Tensor, x: Tensor | None, end: End, vectors: Sequence[Tensor | None]) -> Tensor:
    """Compute `binvit.nn.block_parts.LayerEnd`.

    Args:
        y: products (..., N), float32 on the CPU.
        x: the layer's own input (..., K), or None; one of the widths divides the other.
        end: the parts without parameters.
        vectors: factor, weight and bias of the norm, the activation's inner shift, slope and outer shift, factor and
            offset of the channels' scale; each (N,) or None.

    Returns:
        (..., N).
    """
    return _LayerEnd.apply(end, y, x, *vectors)
