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
from binvit.bits.jit import kernel, vector_code

ROWS = 8
"""Rows whose moments are updated side by side, which hides the latency of the updates."""
LANES = 8
"""Width of torch's vectors in LayerNorm, on AVX2 and AVX-512 alike."""
CHUNK = 16


def _fused_twin(a, b, c):
    return np.float32(np.float64(a) * np.float64(b) + np.float64(c))


@vector_code(twin=_fused_twin)
def fused(typing_context, a, b, c):
    """Returns a * b + c of three float32, rounded once."""
    real = types.float32
    signature = real(real, real, real)

    def codegen(context, builder, signature, arguments):
        return Emitter(context, builder, signature, arguments).call("llvm.fma.f32", ir.FloatType(), *arguments)

    return signature, codegen


def _chunk_twin(x, row, last, first, steps, shares, means, squares):
    for r in range(ROWS):
        mean, square = np.zeros(LANES, np.float32), np.zeros(LANES, np.float32)
        for k in range(steps):
            values = x[min(row + r, last), first + LANES * k : first + LANES * (k + 1)]
            delta = values - mean
            mean = _fused_array(np.float32(shares[k]), delta, mean)
            square = _fused_array(delta, values - mean, square)
        means[r], squares[r] = mean, square


def _fused_array(a, b, c):
    return (np.float64(a) * b.astype(np.float64) + c.astype(np.float64)).astype(np.float32)


@vector_code(twin=_chunk_twin)
def chunk_moments(typing_context, x, row, last, first, steps, shares, means, squares):
    """Writes the running means and squared deviations of `steps` vectors of eight rows, from column `first` on."""
    floats = types.float32
    check_arrays("chunk_moments", {"x": (x, floats, 2), "shares": (shares, floats, 1)})
    check_arrays("chunk_moments", {"means": (means, floats, 2), "squares": (squares, floats, 2)})
    index = types.intp
    signature = types.void(x, index, index, index, index, shares, means, squares)

    def codegen(context, builder, signature, arguments):
        emit = Emitter(context, builder, signature, arguments)
        _, row, last, first, steps, _, _, _ = arguments
        position, real = ir.IntType(64), ir.FloatType()
        vector = ir.VectorType(real, LANES)
        rows = []
        for r in range(ROWS):
            i = builder.add(row, ir.Constant(position, r))
            rows.append(emit.address(0, builder.select(builder.icmp_signed("<", i, last), i, last), first))
        shares = emit.address(5, 0)

        def step(k, sums):
            offset = builder.mul(k, ir.Constant(position, LANES))
            values = [emit.load(builder.gep(pointer, [offset]), real, LANES) for pointer in rows]
            if sums is None:
                return values + [ir.Constant(vector, None)] * ROWS
            share = emit.splat(builder.load(builder.gep(shares, [k])), LANES)
            means, squares = [], []
            for value, mean, square in zip(values, sums[:ROWS], sums[ROWS:], strict=True):
                delta = builder.fsub(value, mean)
                means.append(emit.call(f"llvm.fma.v{LANES}f32", vector, share, delta, mean))
                rest = builder.fsub(value, means[-1])
                squares.append(emit.call(f"llvm.fma.v{LANES}f32", vector, delta, rest, square))
            return means + squares

        results = emit.accumulate(steps, step)
        for r in range(ROWS):
            emit.store(results[r], emit.address(6, r, 0))
            emit.store(results[ROWS + r], emit.address(7, r, 0))
        return context.get_dummy_value()

    return signature, codegen


def _normalized_twin(x, row, start, mean, inverse, gamma, beta, shift):
    lanes = slice(start, start + 64)
    y = _fused_array((x[row, lanes] - mean) * inverse, gamma[lanes], beta[lanes]) + shift[lanes]
    return np.packbits(y >= 0, bitorder="little").view("<u8")[0]


@vector_code(twin=_normalized_twin)
def normalized_signs(typing_context, x, row, start, mean, inverse, gamma, beta, shift):
    """Returns the word of fma((x - mean) * inverse, gamma, beta) + shift >= 0 for 64 floats of a row."""
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


@kernel
def _join(count, mean, square, level, more, more_mean, more_square):
    # Adds the moments of `more` elements to those of count[level].
    total = count[level] + more
    share = np.float32(more) / np.float32(total)
    before = np.float32(count[level])
    for r in range(ROWS):
        for k in range(LANES):
            delta = more_mean[r, k] - mean[level, r, k]
            squares = square[level, r, k] + more_square[r, k]
            step = share * delta
            mean[level, r, k] += step
            square[level, r, k] = fused(delta * before, step, squares)
    count[level] = total


@kernel
def normalize_and_pack(x, gamma, beta, shift, epsilon, words, start, stop):
    """Packs the signs of LayerNorm(x) + shift.

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
    width = x.shape[1]
    vectors = width // LANES
    chunks = (vectors + CHUNK - 1) // CHUNK
    levels = 1
    while (1 << levels) < chunks:
        levels += 1
    shares = np.float32(1) / np.arange(1, CHUNK + 1).astype(np.float32)
    count = np.zeros(levels, np.int64)
    mean, square = np.zeros((levels, ROWS, LANES), np.float32), np.zeros((levels, ROWS, LANES), np.float32)
    new_mean, new_square = np.empty((ROWS, LANES), np.float32), np.empty((ROWS, LANES), np.float32)
    center, spread = np.empty(ROWS, np.float32), np.empty(ROWS, np.float32)
    whole, lowest = width // 64, np.int64(0)
    for row in range(start, stop, ROWS):
        count[:] = 0
        mean[:] = 0
        square[:] = 0
        for chunk in range(chunks):
            size = min(CHUNK, vectors - chunk * CHUNK)
            chunk_moments(x, row, stop - 1, chunk * CHUNK * LANES, size, shares, new_mean, new_square)
            _join(count, mean, square, lowest, size, new_mean, new_square)
            mask, level = chunk + 1, lowest + 1
            while level < levels and mask & 1 == 0:
                _join(count, mean, square, level, count[level - 1], mean[level - 1], square[level - 1])
                count[level - 1] = 0
                mean[level - 1] = 0
                square[level - 1] = 0
                mask >>= 1
                level += 1
        for level in range(1, levels):
            if count[level]:
                _join(count, mean, square, lowest, count[level], mean[level], square[level])
        _finish(x, row, stop - 1, vectors, mean, square, center, spread)
        for r in range(min(ROWS, stop - row)):
            i, middle = row + r, center[r]
            inverse = np.float32(1) / np.sqrt(spread[r] / np.float32(width) + np.float32(epsilon))
            for w in range(whole):
                words[i, w] = normalized_signs(x, i, 64 * w, middle, inverse, gamma, beta, shift)
            if whole < words.shape[1]:
                word = np.uint64(0)
                for k in range(64 * whole, width):
                    if fused((x[i, k] - middle) * inverse, gamma[k], beta[k]) + shift[k] >= 0:
                        word |= np.uint64(1) << np.uint64(k - 64 * whole)
                words[i, whole] = word


@kernel
def _finish(x, row, last, vectors, mean, square, center, spread):
    # The elements of each row that fill no vector, then the lanes, one by one.
    center[:] = 0
    spread[:] = 0
    count = 0
    for k in range(vectors * LANES, x.shape[1]):
        count += 1
        for r in range(ROWS):
            value = x[min(row + r, last), k]
            delta = value - center[r]
            center[r] += delta / np.float32(count)
            spread[r] = fused(delta, value - center[r], spread[r])
    if vectors:
        for k in range(LANES):
            share = np.float32(vectors) / np.float32(count + vectors)
            before = np.float32(count)
            for r in range(ROWS):
                delta = mean[0, r, k] - center[r]
                center[r] = fused(share, delta, center[r])
                spread[r] += fused(delta * delta * share, before, square[0, r, k])
            count += vectors
