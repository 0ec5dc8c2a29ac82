"""LayerNorm with the very roundings of torch's CPU kernel, so that no bit of the fast path differs.

torch updates means and squared deviations of vectors of eight floats, joins chunks of 16 vectors pairwise, then the
lanes one by one, all with fused multiply-adds. The sums here follow it, operation by operation.

References:
    Welford, Note on a method for calculating corrected sums of squares and products, 1962, as in torch's
    `native/cpu/moments_utils.h`.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import types

from binvit.bits.emitter import Emitter, check_arrays
from binvit.jit import WIDE_VECTORS, kernel, vector_code

LANES = 8
"""Width of torch's vectors in LayerNorm, on AVX2 and AVX-512 alike."""
_TOGETHER = 2 if WIDE_VECTORS else 1  # rows in one vector of the machine
ROWS = 8 * _TOGETHER
"""Rows whose moments are updated side by side, which hides the latency of the updates."""
CHUNK = 16


def _fused_twin(a, b, c):
    return np.float32(np.float64(a) * np.float64(b) + np.float64(c))


@vector_code(twin=_fused_twin)
def fused(typing_context, a, b, c):
    """Return a * b + c of three float32, rounded once."""
    real = types.float32
    signature = real(real, real, real)

    def codegen(context, builder, signature, arguments):
        return Emitter(context, builder, signature, arguments).call("llvm.fma.f32", ir.FloatType(), *arguments)

    return signature, codegen


def _chunk_twin(x, row, last, first, steps, shares, means, squares, level):
    for r in range(ROWS):
        mean, square = np.zeros(LANES, np.float32), np.zeros(LANES, np.float32)
        for k in range(steps):
            values = x[min(row + r, last), first + LANES * k : first + LANES * (k + 1)]
            delta = values - mean
            mean = _fused_array(np.float32(shares[k]), delta, mean)
            square = _fused_array(delta, values - mean, square)
        means[level, r], squares[level, r] = mean, square


def _fused_array(a, b, c):
    return (np.float64(a) * b.astype(np.float64) + c.astype(np.float64)).astype(np.float32)


@vector_code(twin=_chunk_twin)
def chunk_moments(typing_context, x, row, last, first, steps, shares, means, squares, level):
    """Write the running means and squared deviations of `steps` vectors of `ROWS` rows, from column `first` on."""
    floats = types.float32
    check_arrays("chunk_moments", {"x": (x, floats, 2), "shares": (shares, floats, 1)})
    check_arrays("chunk_moments", {"means": (means, floats, 3), "squares": (squares, floats, 3)})
    index = types.intp
    signature = types.void(x, index, index, index, index, shares, means, squares, index)

    def codegen(context, builder, signature, arguments):
        emit = Emitter(context, builder, signature, arguments)
        _, row, last, first, steps, _, _, _, level = arguments
        position, real = ir.IntType(64), ir.FloatType()
        lanes, rows = LANES * _TOGETHER, []
        vector, both = ir.VectorType(real, lanes), ir.VectorType(ir.IntType(32), lanes)(list(range(lanes)))
        for r in range(ROWS):
            i = builder.add(row, ir.Constant(position, r))
            rows.append(emit.address(0, builder.select(builder.icmp_signed("<", i, last), i, last), first))
        shares = emit.address(5, 0)

        def step(k, sums):
            offset = builder.mul(k, ir.Constant(position, LANES))
            values = [emit.load(builder.gep(pointer, [offset]), real, LANES) for pointer in rows]
            if _TOGETHER == 2:
                pairs = zip(values[::2], values[1::2], strict=True)
                values = [builder.shuffle_vector(low, high, both) for low, high in pairs]
            if sums is None:
                return values + [ir.Constant(vector, None)] * len(values)
            share = emit.splat(builder.load(builder.gep(shares, [k])), lanes)
            means, squares = [], []
            for value, mean, square in zip(values, sums[: len(values)], sums[len(values) :], strict=True):
                delta = builder.fsub(value, mean)
                means.append(emit.call(f"llvm.fma.v{lanes}f32", vector, share, delta, mean))
                rest = builder.fsub(value, means[-1])
                squares.append(emit.call(f"llvm.fma.v{lanes}f32", vector, delta, rest, square))
            return means + squares

        results, groups = emit.accumulate(steps, step), ROWS // _TOGETHER
        for i in range(groups):
            emit.store(results[i], emit.address(6, level, i * _TOGETHER, 0))
            emit.store(results[groups + i], emit.address(7, level, i * _TOGETHER, 0))
        return context.get_dummy_value()

    return signature, codegen


def _normalized_twin(x, row, start, mean, inverse, gamma, beta, shift):
    lanes = slice(start, start + 64)
    y = _fused_array((x[row, lanes] - mean) * inverse, gamma[lanes], beta[lanes]) + shift[lanes]
    return np.packbits(y >= 0, bitorder="little").view("<u8")[0]


@vector_code(twin=_normalized_twin)
def normalized_signs(typing_context, x, row, start, mean, inverse, gamma, beta, shift):
    """Return the word of fma((x - mean) * inverse, gamma, beta) + shift >= 0 for 64 floats of a row."""
    floats = types.float32
    vectors = {"gamma": (gamma, floats, 1), "beta": (beta, floats, 1), "shift": (shift, floats, 1)}
    check_arrays("normalized_signs", {"x": (x, floats, 2), **vectors})
    index = types.intp
    signature = types.uint64(x, index, index, floats, floats, gamma, beta, shift)

    def codegen(context, builder, signature, arguments):
        emit = Emitter(context, builder, signature, arguments)
        _, row, start, mean, inverse, _, _, _ = arguments
        lane = ir.FloatType()
        y = builder.fsub(emit.load(emit.address(0, row, start), lane), emit.splat(mean))
        y = builder.fmul(y, emit.splat(inverse))
        gamma, beta = emit.load(emit.address(5, start), lane), emit.load(emit.address(6, start), lane)
        y = emit.call("llvm.fma.v64f32", y.type, y, gamma, beta)
        y = builder.fadd(y, emit.load(emit.address(7, start), lane))
        return emit.word(builder.fcmp_ordered(">=", y, ir.Constant(y.type, None)))

    return signature, codegen


def _join_twin(means, squares, level, other, share, before):
    delta = means[other] - means[level]
    step, sums = share * delta, squares[level] + squares[other]
    means[level] += step
    squares[level] = _fused_array(delta * before, step, sums)


@vector_code(twin=_join_twin)
def join_moments(typing_context, means, squares, level, other, share, before):
    """Add the moments of one level to those of another, of which `before` elements have been seen."""
    floats, index = types.float32, types.intp
    check_arrays("join_moments", {"means": (means, floats, 3), "squares": (squares, floats, 3)})
    signature = types.void(means, squares, index, index, floats, floats)

    def codegen(context, builder, signature, arguments):
        emit = Emitter(context, builder, signature, arguments)
        _, _, level, other, share, before = arguments
        count, real = ROWS * LANES, ir.FloatType()
        mean, square = emit.address(0, level, 0, 0), emit.address(1, level, 0, 0)
        more, more_square = emit.address(0, other, 0, 0), emit.address(1, other, 0, 0)
        center = emit.load(mean, real, count)
        delta = builder.fsub(emit.load(more, real, count), center)
        step = builder.fmul(emit.splat(share, count), delta)
        sums = builder.fadd(emit.load(square, real, count), emit.load(more_square, real, count))
        emit.store(builder.fadd(center, step), mean)
        weighted = builder.fmul(delta, emit.splat(before, count))
        emit.store(emit.call(f"llvm.fma.v{count}f32", delta.type, weighted, step, sums), square)
        return context.get_dummy_value()

    return signature, codegen


def _join_lanes_twin(means, squares, shares, before, center, spread):
    for k in range(LANES):
        delta = means[0, :, k] - center
        center[:] = _fused_array(shares[k], delta, center)
        spread += _fused_array(delta * delta * shares[k], before[k], squares[0, :, k])


@vector_code(twin=_join_lanes_twin)
def join_lanes(typing_context, means, squares, shares, before, center, spread):
    """Add the moments of level 0, one lane after the other, to those of each row."""
    floats = types.float32
    vectors = {"shares": shares, "before": before, "center": center, "spread": spread}
    check_arrays("join_lanes", {"means": (means, floats, 3), "squares": (squares, floats, 3)})
    check_arrays("join_lanes", {name: (array, floats, 1) for name, array in vectors.items()})
    signature = types.void(means, squares, shares, before, center, spread)

    def codegen(context, builder, signature, arguments):
        emit = Emitter(context, builder, signature, arguments)
        real, zero = ir.FloatType(), ir.Constant(ir.IntType(64), 0)
        rows = ir.VectorType(ir.IntType(32), ROWS)
        all_means, all_squares = (emit.load(emit.address(i, 0, 0, 0), real, ROWS * LANES) for i in (0, 1))
        center, spread = (emit.load(emit.address(i, zero), real, ROWS) for i in (4, 5))
        for k in range(LANES):
            lane = ir.Constant(rows, [LANES * r + k for r in range(ROWS)])
            mean, square = (builder.shuffle_vector(v, v, lane) for v in (all_means, all_squares))
            share, before = (emit.splat(builder.load(emit.address(i, k)), ROWS) for i in (2, 3))
            delta = builder.fsub(mean, center)
            center = emit.call(f"llvm.fma.v{ROWS}f32", delta.type, share, delta, center)
            weighted = builder.fmul(builder.fmul(delta, delta), share)
            spread = builder.fadd(spread, emit.call(f"llvm.fma.v{ROWS}f32", delta.type, weighted, before, square))
        emit.store(center, emit.address(4, zero))
        emit.store(spread, emit.address(5, zero))
        return context.get_dummy_value()

    return signature, codegen


@kernel
def normalize_and_pack(x, gamma, beta, shift, epsilon, words, start, stop):
    """Pack the signs of LayerNorm(x) + shift.

    Args:
        x: float32 (T, D), the residual stream.
        gamma: float32 (D,), LayerNorm's weight.
        beta: float32 (D,), LayerNorm's bias.
        shift: float32 (D,), added before the sign.
        epsilon: LayerNorm's epsilon.
        words: uint64 (T, ceil(D / 64)), rows start to stop are overwritten.
        start: first row.
        stop: one past the last row.
    """
    # No calls with arrays inside the loop: counting their references would take longer than a row itself.
    width = x.shape[1]
    vectors, whole = width // LANES, width // 64
    rest = width - vectors * LANES
    chunks = (vectors + CHUNK - 1) // CHUNK
    levels = np.int64(1)
    while (1 << levels) < chunks:
        levels += 1
    shares = np.float32(1) / np.arange(1, CHUNK + 1).astype(np.float32)
    before = np.float32(rest) + np.arange(LANES).astype(np.float32) * np.float32(vectors)
    lane_shares = np.float32(vectors) / np.maximum(before + np.float32(vectors), np.float32(1))
    count = np.zeros(levels, np.int64)
    means, squares = np.empty((levels + 1, ROWS, LANES), np.float32), np.empty((levels + 1, ROWS, LANES), np.float32)
    center, spread, inverse = np.empty(ROWS, np.float32), np.empty(ROWS, np.float32), np.empty(ROWS, np.float32)
    lowest = np.int64(0)
    for row in range(start, stop, ROWS):
        count[:] = 0
        means[:] = 0
        squares[:] = 0
        for chunk in range(chunks):
            size = min(CHUNK, vectors - chunk * CHUNK)
            chunk_moments(x, row, stop - 1, chunk * CHUNK * LANES, size, shares, means, squares, levels)
            total = count[0] + size
            part = np.float32(size) / np.float32(total)
            join_moments(means, squares, lowest, levels, part, np.float32(count[0]))
            count[0] = total
            mask, level = chunk + 1, lowest + 1
            while level < levels and mask & 1 == 0:
                total = count[level] + count[level - 1]
                part = np.float32(count[level - 1]) / np.float32(total)
                join_moments(means, squares, level, level - 1, part, np.float32(count[level]))
                count[level], count[level - 1] = total, 0
                means[level - 1] = 0
                squares[level - 1] = 0
                mask >>= 1
                level += 1
        for level in range(1, levels):
            if count[level]:
                total = count[0] + count[level]
                part = np.float32(count[level]) / np.float32(total)
                join_moments(means, squares, lowest, level, part, np.float32(count[0]))
                count[0] = total
        center[:] = 0
        spread[:] = 0
        for k in range(vectors * LANES, width):  # the elements that fill no vector
            for r in range(ROWS):
                value = x[min(row + r, stop - 1), k]
                delta = value - center[r]
                center[r] += delta / np.float32(k - vectors * LANES + 1)
                spread[r] = fused(delta, value - center[r], spread[r])
        if vectors:
            join_lanes(means, squares, lane_shares, before, center, spread)
        for r in range(ROWS):
            inverse[r] = np.float32(1) / np.sqrt(spread[r] / np.float32(width) + np.float32(epsilon))
        for r in range(min(ROWS, stop - row)):
            i, middle = row + r, center[r]
            for w in range(whole):
                words[i, w] = normalized_signs(x, i, 64 * w, middle, inverse[r], gamma, beta, shift)
            if whole < words.shape[1]:
                word = np.uint64(0)
                for k in range(64 * whole, width):
                    if fused((x[i, k] - middle) * inverse[r], gamma[k], beta[k]) + shift[k] >= 0:
                        word |= np.uint64(1) << np.uint64(k - 64 * whole)
                words[i, whole] = word
