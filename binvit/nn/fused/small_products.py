"""Float products of few numbers, as those of small models' gradients with signs are, in register tiles.

Every number is a chain of fused multiply-adds along the sum, begun anew after `CHAIN` terms and added up: the order of
MKL's kernels for processors of other makers, whose numbers these are to the last bit, in wider vectors and without a
library's preparations.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from llvmlite import ir
from numba import prange, types
from torch import Tensor

from binvit.bits.emitter import Emitter, check_arrays
from binvit.jit import WIDE_VECTORS, kernel, vector_code
from binvit.nn.fused.elementwise import parallel_kernel

LANES = 16
"""Columns of a vector; the right factor has a multiple of so many."""
CHAIN = 192
"""Terms that are summed one after the other."""
_ROWS = 8


def _twin(vectors: int) -> Callable:
    def tile(a, row, last, across, along, b, width, column, first, steps, out, add):
        rows = np.minimum(np.arange(row, row + _ROWS), last)
        terms = np.arange(first, first + steps)
        left = a[rows[:, None] * across + terms * along]
        right = b[terms[:, None] * width + np.arange(column, column + vectors * LANES)]
        sums = np.zeros((_ROWS, vectors * LANES), np.float32)
        for k in range(steps):
            sums = (sums + left[:, k, None].astype(np.float64) * right[k]).astype(np.float32)
        target = out[rows, column : column + vectors * LANES]
        out[rows, column : column + vectors * LANES] = target + sums if add else sums

    return tile


def _make_tile(vectors: int) -> Callable:
    @vector_code(twin=_twin(vectors))
    def tile(typing_context, a, row, last, across, along, b, width, column, first, steps, out, add):
        check_arrays("a tile of floats", {"a": (a, types.float32, 1), "b": (b, types.float32, 1)})
        check_arrays("a tile of floats", {"out": (out, types.float32, 2)})
        index = types.intp
        signature = types.void(a, index, index, index, index, b, index, index, index, index, out, types.boolean)

        def codegen(context, builder, signature, arguments):
            emit, constant, lane = Emitter(context, builder, signature, arguments), ir.IntType(64), ir.FloatType()
            _, row, last, across, along, _, width, column, first, steps, _, add = arguments
            rows = [builder.add(row, constant(r)) for r in range(_ROWS)]
            rows = [builder.select(builder.icmp_signed("<", r, last), r, last) for r in rows]
            start = builder.mul(first, along)
            left = [emit.address(0, builder.add(builder.mul(r, across), start)) for r in rows]
            right = emit.address(5, builder.add(builder.mul(first, width), column))
            kind = ir.VectorType(lane, LANES)

            def step(k, sums):
                base, offset = builder.gep(right, [builder.mul(k, width)]), builder.mul(k, along)
                columns = [emit.load(builder.gep(base, [constant(v * LANES)]), lane, LANES) for v in range(vectors)]
                result = []
                for r, address in enumerate(left):
                    number = emit.splat(builder.load(builder.gep(address, [offset])), LANES)
                    for v in range(vectors):
                        sum_ = ir.Constant(kind, None) if sums is None else sums[r * vectors + v]
                        result.append(emit.call("llvm.fma.v16f32", kind, number, columns[v], sum_))
                return result

            sums = emit.accumulate(steps, step)
            targets = [
                builder.gep(emit.address(10, r, column), [constant(v * LANES)]) for r in rows for v in range(vectors)
            ]
            with builder.if_else(add) as (more, anew):
                with more:  # all are read before any is written: a short tile repeats its last row
                    totals = [builder.fadd(emit.load(t, lane, LANES), s) for t, s in zip(targets, sums, strict=True)]
                    for total, target in zip(totals, targets, strict=True):
                        emit.store(total, target)
                with anew:
                    for total, target in zip(sums, targets, strict=True):
                        emit.store(total, target)
            return context.get_dummy_value()

        return signature, codegen

    return tile


_one, _two, _three = (_make_tile(vectors) for vectors in (1, 2, 3))


@kernel(allocates=False)
def _columns(row, last, a, across, along, b, width, depth, out):
    # The rows of a tile, over all columns.
    column, first = np.int64(0), np.int64(0)
    while column < out.shape[1]:
        left = (out.shape[1] - column) // LANES
        vectors = left if left < 3 else 2 if left == 4 else 3
        for first in range(0, depth, CHAIN):
            steps = min(depth - first, CHAIN)
            if vectors == 1:
                _one(a, row, last, across, along, b, width, column, first, steps, out, first > 0)
            elif vectors == 2:
                _two(a, row, last, across, along, b, width, column, first, steps, out, first > 0)
            else:
                _three(a, row, last, across, along, b, width, column, first, steps, out, first > 0)
        column += LANES * vectors


@parallel_kernel
def _multiply(a, across, along, b, width, depth, out):
    """Write the product of a and b (K, N) into out (M, N); N is a multiple of `LANES`.

    a and b are numbers in memory, float32 (size,): number (i, k) of a lies at i * across + k * along, number (k, j) of
    b at k * width + j; depth is K.
    """
    rows = out.shape[0]
    for tile in prange((rows + _ROWS - 1) // _ROWS):
        _columns(tile * _ROWS, rows - 1, a, across, along, b, width, depth, out)


@kernel(allocates=False)
def _matrix(a, across, along, b, width, depth, out):
    for row in range(0, out.shape[0], _ROWS):
        _columns(row, out.shape[0] - 1, a, across, along, b, width, depth, out)


@parallel_kernel
def _multiply_each(a, across, along, b, depth, out):
    """Write the products of a (B, M K) and b (B, K N), matrices in memory as for `_multiply`, into out (B, M, N)."""
    for i in prange(out.shape[0]):
        _matrix(a[i], across, along, b[i], out.shape[2], depth, out[i])


def takes(a: Tensor, b: Tensor) -> bool:
    """Tell whether tiles pay for two matrices of float32: whole vectors, as wide as this machine's, side by side."""
    return WIDE_VECTORS and b.shape[1] % LANES == 0 and a.stride(1) == b.stride(1) == 1 and a.numel() > 0


def multiply(a: Tensor, b: Tensor) -> Tensor:
    """Multiply a (M, K) and b (K, N) that `takes` accepts, outside autograd: (M, N)."""
    out = a.new_empty(len(a), b.shape[1])
    _multiply(_memory(a), a.stride(0), 1, _memory(b), b.stride(0), len(b), out.numpy())
    return out


def multiply_over_rows(a: Tensor, b: Tensor) -> Tensor:
    """Multiply the transpose of a (K, M) by b (K, N), both accepted by `takes`, outside autograd: (M, N)."""
    out = a.new_empty(a.shape[1], b.shape[1])
    _multiply(_memory(a), 1, a.stride(0), _memory(b), b.stride(0), len(b), out.numpy())
    return out


def takes_each(a: Tensor, b: Tensor) -> bool:
    """Tell whether tiles pay for matrices (..., M, K) and (..., K, N): in memory one behind the other, one chain."""
    fits = WIDE_VECTORS and b.shape[-1] % LANES == 0 and b.shape[-2] <= CHAIN and a.numel() > 0
    return fits and b.is_contiguous() and (a.is_contiguous() or a.mT.is_contiguous())


def multiply_each(a: Tensor, b: Tensor) -> Tensor:
    """Multiply matrices a (..., M, K) and b (..., K, N) that `takes_each` accepts, outside autograd: (..., M, N)."""
    (m, k), n = a.shape[-2:], b.shape[-1]
    out, memory, (across, along) = a.new_empty(*a.shape[:-1], n), a, (k, 1)
    if not a.is_contiguous():
        memory, (across, along) = a.mT, (1, m)
    parts = memory.numpy().reshape(-1, m * k), across, along, b.numpy().reshape(-1, k * n)
    _multiply_each(*parts, k, out.numpy().reshape(-1, m, n))
    return out


def _memory(x: Tensor) -> np.ndarray:
    return x.as_strided((x.stride(0) * (len(x) - 1) + x.shape[1],), (1,)).numpy()
