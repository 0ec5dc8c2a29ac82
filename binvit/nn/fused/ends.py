"""The fused form of what follows a 1-bit product: factor, norm, own input, activation and scale in one pass each way.

Nothing is saved but the inputs and the norms' moments; the backward pass computes the rest again, row by row in the
first-level cache.
"""

from __future__ import annotations

import functools
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

BLOCK = 128  # rows whose gradients of vectors are summed together
TILE = 1024  # numbers that a loop goes over: few enough for the first-level cache, enough to be worth its start
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
def _normalize(hat, size, eps, means, inverses):
    # Every `size` neighbours by themselves, in place.
    for p in range(hat.size // size):
        part = hat[p * size : (p + 1) * size]
        mean, square = ZERO, ZERO
        for j in range(size):
            mean += part[j]
        mean /= np.float32(size)
        for j in range(size):
            square += (part[j] - mean) * (part[j] - mean)
        inverse = ONE / np.sqrt(square / np.float32(size) + eps)
        means[p], inverses[p] = mean, inverse
        for j in range(size):
            part[j] = (part[j] - mean) * inverse


@kernel(reorder=True)
def _normalize_again(hat, size, means, inverses):
    for p in range(hat.size // size):
        part, mean, inverse = hat[p * size : (p + 1) * size], means[p], inverses[p]
        for j in range(size):
            part[j] = (part[j] - mean) * inverse


@kernel(reorder=True)
def _normalize_backward(d, hat, size, inverses):
    for p in range(d.size // size):
        part, h, inverse = d[p * size : (p + 1) * size], hat[p * size : (p + 1) * size], inverses[p]
        mean, along = ZERO, ZERO
        for j in range(size):
            mean += part[j]
            along += part[j] * h[j]
        mean, along = mean / np.float32(size), along / np.float32(size)
        for j in range(size):
            part[j] = (part[j] - mean - h[j] * along) * inverse


@kernel(reorder=True)
def _add_own_input(out, x, n, k):
    # Own inputs of rows of k numbers to rows of n.
    if k > n:
        group = k // n
        share = ONE / np.float32(group)
        if group == 4:  # neighbours at a constant distance become vector code
            for j in range(out.size):
                out[j] += ((x[4 * j] + x[4 * j + 1]) + (x[4 * j + 2] + x[4 * j + 3])) * share
        elif group == 2:
            for j in range(out.size):
                out[j] += (x[2 * j] + x[2 * j + 1]) * share
        else:
            for j in range(out.size):
                total = ZERO
                for i in range(group):
                    total += x[j * group + i]
                out[j] += total * share
    elif k:
        for start in range(0, out.size, k):
            part, own = out[start : start + k], x[start // n * k : start // n * k + k]
            for j in range(k):
                part[j] += own[j]


@kernel(reorder=True)
def _own_input_backward(d, dx, n, k):
    if k > n:
        group = k // n
        share = ONE / np.float32(group)
        if group == 4:
            for j in range(d.size):
                v = d[j] * share
                dx[4 * j] = v
                dx[4 * j + 1] = v
                dx[4 * j + 2] = v
                dx[4 * j + 3] = v
        elif group == 2:
            for j in range(d.size):
                v = d[j] * share
                dx[2 * j] = v
                dx[2 * j + 1] = v
        else:
            for j in range(d.size):
                for i in range(group):
                    dx[j * group + i] = d[j] * share
    elif k:
        dx[:] = ZERO
        for start in range(0, d.size, k):
            part, own = d[start : start + k], dx[start // n * k : start // n * k + k]
            for j in range(k):
                own[j] += part[j]


@elementwise.parallel_kernel(reorder=True)
def end_forward(y, x, vectors, factored, scaled, size, eps, activation, out, moments):
    """Map products (M, N) and own inputs (M, K), K = 0 for none, to (M, N).

    vectors (8, R N) in the order of the module, each R times side by side: for R rows at once. factored, scaled:
    whether there is a factor in front, a scale at the end. size: numbers that are normalized together, 0 for no norm.
    activation: a value of `ACTIVATIONS`. moments (2, M N / size) takes the means and inverse deviations of the norm.
    """
    rows, n = y.shape
    k, tall = x.shape[1], vectors.shape[1] // n
    parts = n // size if size else 0
    for block in prange((rows + BLOCK - 1) // BLOCK):
        last = min(rows, (block + 1) * BLOCK)
        factor, weight, bias = vectors[FACTOR], vectors[WEIGHT], vectors[BIAS]
        shift, slope, shift_out = vectors[SHIFT_IN], vectors[SLOPE], vectors[SHIFT_OUT]
        alpha, beta = vectors[ALPHA], vectors[BETA]
        for r in range(block * BLOCK, last, tall):
            stop = min(last, r + tall)
            given, row = y[r:stop].reshape((stop - r) * n), out[r:stop].reshape((stop - r) * n)
            if factored:
                for j in range(row.size):
                    row[j] = given[j] * factor[j]
            else:
                row[:] = given
            if size:
                _normalize(row, size, eps, moments[0, r * parts : stop * parts], moments[1, r * parts : stop * parts])
                for j in range(row.size):
                    row[j] = row[j] * weight[j] + bias[j]
            _add_own_input(row, x[r:stop].reshape((stop - r) * k), n, k)
            if activation == 1:
                for j in range(row.size):
                    v = row[j]
                    v = ONE if v > ONE else v
                    row[j] = -ONE if v < -ONE else v
            elif activation == 2:
                for j in range(row.size):
                    v = row[j] + shift[j]
                    low = slope[j] * v
                    row[j] = (v if v > ZERO else low) + shift_out[j]
            if scaled:
                for j in range(row.size):
                    row[j] = row[j] * alpha[j] + beta[j]


@elementwise.parallel_kernel(reorder=True)
def end_backward(y, x, g, vectors, factored, scaled, size, activation, moments, dy, dx, dvectors):
    """Write the gradients of `end_forward` for g (M, N): dy (M, N), which may be g, dx (M, K), and dvectors (8, N).

    Every loop touches few arrays: the compiler makes vector code where it can check that they are apart.
    """
    rows, n = y.shape
    k, wide = x.shape[1], vectors.shape[1]
    tall, blocks, parts = wide // n, (rows + BLOCK - 1) // BLOCK, n // size if size else 0
    sums = np.zeros((blocks, 8, n), np.float32)
    for block in prange(blocks):
        last, total = min(rows, (block + 1) * BLOCK), np.zeros_like(vectors)
        hats, inputs, work = np.empty(wide, np.float32), np.empty(wide, np.float32), np.empty(wide, np.float32)
        factor, weight, bias = vectors[FACTOR], vectors[WEIGHT], vectors[BIAS]
        shift, slope, shift_out, alpha = vectors[SHIFT_IN], vectors[SLOPE], vectors[SHIFT_OUT], vectors[ALPHA]
        of_factor, of_weight, of_bias = total[FACTOR], total[WEIGHT], total[BIAS]
        of_shift, of_slope, of_shift_out = total[SHIFT_IN], total[SLOPE], total[SHIFT_OUT]
        of_alpha, of_beta = total[ALPHA], total[BETA]
        for r in range(block * BLOCK, last, tall):
            stop = min(last, r + tall)
            count = (stop - r) * n
            given, up, out = y[r:stop].reshape(count), g[r:stop].reshape(count), dy[r:stop].reshape(count)
            hat, moved, d = hats[:count], inputs[:count], work[:count]
            means, inverses = moments[0, r * parts : stop * parts], moments[1, r * parts : stop * parts]
            if factored:
                for j in range(count):
                    hat[j] = given[j] * factor[j]
            else:
                hat[:] = given
            if size:
                _normalize_again(hat, size, means, inverses)
            if scaled or activation:  # what follows asks for the numbers before it
                for j in range(count):
                    moved[j] = hat[j] * weight[j] + bias[j]
                _add_own_input(moved, x[r:stop].reshape((stop - r) * k), n, k)
            if scaled:
                for j in range(count):
                    of_beta[j] += up[j]
                    d[j] = up[j] * alpha[j]
            else:
                d[:] = up
            if activation == 2:
                for j in range(count):
                    moved[j] += shift[j]
                for j in range(count):
                    of_shift_out[j] += d[j]
                    v = moved[j]
                    of_slope[j] += d[j] * (v if v <= ZERO else ZERO)
                if scaled:
                    for j in range(count):
                        v = moved[j]
                        low = slope[j] * v
                        of_alpha[j] += up[j] * ((v if v > ZERO else low) + shift_out[j])
                for j in range(count):
                    v, high = moved[j], d[j]
                    low = high * slope[j]
                    v = high if v > ZERO else low
                    d[j] = v
                    of_shift[j] += v
            elif activation == 1:
                for j in range(count):
                    v, above = moved[j], d[j]
                    d[j] = above if abs(v) < ONE else ZERO
                if scaled:
                    for j in range(count):
                        v = moved[j]
                        v = ONE if v > ONE else v
                        of_alpha[j] += up[j] * (-ONE if v < -ONE else v)
            elif scaled:
                for j in range(count):
                    of_alpha[j] += up[j] * moved[j]
            _own_input_backward(d, dx[r:stop].reshape((stop - r) * k), n, k)
            if size:
                for j in range(count):
                    of_weight[j] += d[j] * hat[j]
                    of_bias[j] += d[j]
                for j in range(count):
                    d[j] *= weight[j]
                _normalize_backward(d, hat, size, inverses)
            if factored:
                for j in range(count):
                    of_factor[j] += d[j] * given[j]
                    out[j] = d[j] * factor[j]
            else:
                out[:] = d
        for i in range(8):
            for start in range(0, wide, n):
                part, summed = total[i, start : start + n], sums[block, i]
                for j in range(n):
                    summed[j] += part[j]
    dvectors[:] = 0
    for block in range(blocks):
        for i in range(8):
            for j in range(n):
                dvectors[i, j] += sums[block, i, j]


def _table(vectors: Sequence[Tensor | None], width: int) -> np.ndarray:
    """Return the vectors (8, R N), each as many times as fill a tile of a power of two of rows."""
    table = _defaults(width).copy()
    for rows, value in zip(table, vectors, strict=True):
        if value is not None:
            rows[:] = value.detach().numpy()
    return table.reshape(len(table), -1)


@functools.lru_cache(maxsize=64)
def _defaults(width: int) -> np.ndarray:
    table = np.empty((len(_DEFAULTS), 1 << max(0, (TILE // width).bit_length() - 1), width), np.float32)
    table[:] = np.array(_DEFAULTS, np.float32)[:, None, None]
    return table


def _own_rows(x: Tensor | None, rows: int) -> np.ndarray:
    return np.empty((rows, 0), np.float32) if x is None else elementwise.rows_of(x)


class _LayerEnd(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, end: End, y: Tensor, x: Tensor | None, *vectors: Tensor | None) -> Tensor:
        rows, width = elementwise.rows_of(y), y.shape[-1]
        out = y.new_empty(y.shape)
        ctx.table, ctx.given = _table(vectors, width), [value is not None for value in vectors]
        size, activation = width // end.parts if end.parts else 0, ACTIVATIONS[end.activation]
        ctx.moments = np.empty((2, len(rows) * end.parts), np.float32)
        ctx.how = ctx.given[FACTOR], ctx.given[ALPHA], size
        arrays = out.view(rows.shape).numpy(), ctx.moments
        end_forward(rows, _own_rows(x, len(rows)), ctx.table, *ctx.how, np.float32(end.eps), activation, *arrays)
        ctx.how += activation, ctx.moments
        ctx.save_for_backward(y, x)
        return out

    @staticmethod
    @once_differentiable
    @full_precision
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        y, x = ctx.saved_tensors
        rows = elementwise.rows_of(y)
        own, summed = _own_rows(x, len(rows)), y.new_empty(len(_DEFAULTS), y.shape[-1])
        dy, dx = y.new_empty(y.shape), np.empty_like(own)
        up, out = elementwise.rows_of(g), dy.view(rows.shape).numpy()
        end_backward(rows, own, up, ctx.table, *ctx.how, out, dx, summed.numpy())
        dvectors = [d if given else None for given, d in zip(ctx.given, summed.unbind(), strict=True)]
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
