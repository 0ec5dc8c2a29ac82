"""Binary linear layers on packed tokens: keep bits or floats of what comes out.

All functions are kernels: compiled code may call them, so that a whole forward pass is one compiled function. They
work on the token rows start to stop, and never allocate more than a few kilobytes. Layouts, for T tokens, width D, N
outputs:

* words of tokens: uint64 (T, ceil(D / 64)), as `pack_signs` makes them
* panels of weights: ``prepare_weights(...).panels``; vectors per output are padded with `pad_outputs`
* panels of tokens: uint32 (ceil(T / 64), 2 ceil(D / 64), 64): the words of tokens word-major, for products whose
  columns are the tokens
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from llvmlite import ir
from numba import types

from binvit.bits.emitter import Emitter, check_arrays
from binvit.bits.packing import word_count
from binvit.bits.tile import PANEL, TILE, clamped_rows, emit_tile, steps_of, tile_of_signs
from binvit.jit import kernel, vector_code


class Intervals(NamedTuple):
    """Which integers of each output channel give a bit: those of one interval, or all others.

    Attributes:
        lower: int32 (64 panels,), the interval's first integer.
        span: uint32 (64 panels,), its last integer minus its first.
        flip: uint64 (panels,), 1 where the bit is set outside the interval.
    """

    lower: np.ndarray
    span: np.ndarray
    flip: np.ndarray


def make_intervals(first: np.ndarray, last: np.ndarray, outside: np.ndarray | None = None) -> Intervals:
    """Prepare the bits 1[first <= integer <= last], or their complement, for `linear_to_bits`.

    A threshold is a half-open interval: ``1[integer >= t]`` has first t and last 2**31 - 1.

    Args:
        first: whole numbers (N,), the interval's first integer.
        last: whole numbers (N,), its last integer; below `first` for an empty interval.
        outside: bool (N,), True where the bit is set outside the interval.

    Returns:
        The intervals, padded to whole panels with channels whose bit is never set.

    Raises:
        ValueError: if the shapes differ or a number does not fit into 32 bits.
    """
    first, last = np.asarray(first, np.int64), np.asarray(last, np.int64)
    outside = np.zeros(first.shape, bool) if outside is None else np.asarray(outside, bool)
    if first.ndim != 1 or first.shape != last.shape or first.shape != outside.shape:
        raise ValueError(
            f"Intervals need one first, last and outside per channel, not shapes {first.shape}, {last.shape} and "
            f"{outside.shape}."
        )
    limits = np.iinfo(np.int32)
    if first.size and (min(first.min(), last.min()) < limits.min or max(first.max(), last.max()) > limits.max):
        raise ValueError(f"Interval bounds must lie between {limits.min} and {limits.max}.")
    empty = last < first
    size = word_count(len(first)) * PANEL
    lower, span = np.full(size, limits.min, np.int32), np.full(size, 2**32 - 1, np.uint32)
    flip = np.ones(size, bool)  # outside of everything: never
    lower[: len(first)] = np.where(empty, limits.min, first)
    span[: len(first)] = np.where(empty, 2**32 - 1, last - first)
    flip[: len(first)] = outside ^ empty
    return Intervals(lower, span, np.packbits(flip, bitorder="little").view("<u8").astype(np.uint64))


def pad_outputs(x: np.ndarray, dtype: np.typing.DTypeLike = np.float32) -> np.ndarray:
    """Pad a vector per output channel with zeros to whole panels.

    Args:
        x: (N,).
        dtype: its type in the kernel.

    Returns:
        Array (64 ceil(N / 64),).
    """
    padded = np.zeros(word_count(len(x)) * PANEL, dtype)
    padded[: len(x)] = x
    return padded


@kernel(allocates=False)
def words_to_panels(words, panels, start, stop):
    """Rearrange the words of tokens into panels of tokens, for products whose columns are the tokens.

    Args:
        words: uint64 (T, W).
        panels: uint32 (ceil(T / 64), 2 W, 64), the columns of tokens start to stop are overwritten.
        start: first token.
        stop: one past the last token.
    """
    for i in range(start, stop):
        panel, column = i // 64, i % 64
        for w in range(words.shape[1]):
            panels[panel, 2 * w, column] = np.uint32(words[i, w] & np.uint64(0xFFFFFFFF))
            panels[panel, 2 * w + 1, column] = np.uint32(words[i, w] >> np.uint64(32))


def _tile_to_bits_twin(a, row, last, panels, panel, steps, length, lower, span, flip, out):
    rows = np.minimum(np.arange(row, row + TILE), last)
    differing = np.bitwise_count(a[rows, :steps, None] ^ panels[panel, :steps]).sum(axis=1, dtype=np.int64)
    columns = slice(panel * PANEL, (panel + 1) * PANEL)
    inside = (length - 2 * differing - lower[columns]) % 2**32 <= span[columns]
    out[rows, panel] = np.packbits(inside, axis=-1, bitorder="little").view("<u8")[:, 0] ^ flip[panel]


@vector_code(twin=_tile_to_bits_twin)
def _tile_to_bits(typing_context, a, row, last, panels, panel, steps, length, lower, span, flip, out):
    """Compute a register tile of products of signs and keep the word of each row: which sums lie in the interval."""
    operands = {"a": (a, types.uint32, 2), "w": (panels, types.uint32, 3), "out": (out, types.uint64, 2)}
    bounds = {"lower": (lower, types.int32, 1), "span": (span, types.uint32, 1), "flip": (flip, types.uint64, 1)}
    check_arrays("tile_to_bits", operands | bounds)
    index = types.intp
    signature = types.void(a, index, index, panels, index, index, types.int32, lower, span, flip, out)

    def codegen(context, builder, signature, arguments):
        emit = Emitter(context, builder, signature, arguments)
        _, row, last, _, panel, steps, length, _, _, _, _ = arguments
        lane, lanes = ir.IntType(32), 16
        rows = clamped_rows(emit, row, last)
        page = emit.address(3, panel, 0, 0)
        differing = emit_tile(
            emit, True, PANEL // lanes, [emit.address(0, i, 0) for i in rows], page, steps, follows=True
        )
        flipped = builder.load(emit.address(9, panel))
        words = [ir.IntType(64)(0)] * TILE
        for v in range(PANEL // lanes):
            start = builder.add(builder.mul(panel, ir.IntType(64)(PANEL)), ir.IntType(64)(v * lanes))
            # sum - lower = (K - lower) - 2 differing; one unsigned comparison instead of two.
            most = builder.sub(emit.splat(length, lanes), emit.load(emit.address(7, start), lane, lanes))
            widths = emit.load(emit.address(8, start), lane, lanes)
            for r in range(TILE):
                count = differing[r * (PANEL // lanes) + v]
                distance = builder.sub(most, builder.add(count, count))
                bits = builder.bitcast(builder.icmp_unsigned("<=", distance, widths), ir.IntType(lanes))
                bits = builder.shl(builder.zext(bits, ir.IntType(64)), ir.IntType(64)(v * lanes))
                words[r] = builder.or_(words[r], bits)
        for i, word in zip(rows, words, strict=True):
            builder.store(builder.xor(word, flipped), emit.address(10, i, panel))
        return context.get_dummy_value()

    return signature, codegen


def _tile_to_floats_twin(a, row, last, panels, panel, steps, length, sums, halve, scale, bias, out, residual):
    rows = np.minimum(np.arange(row, row + TILE), last)
    differing = np.bitwise_count(a[rows, :steps, None] ^ panels[panel, :steps]).sum(axis=1, dtype=np.int32)
    columns = slice(panel * PANEL, (panel + 1) * PANEL)
    y = ((length - 2 * differing + sums[columns]) >> halve).astype(np.float32) * scale[columns] + bias[columns]
    out[rows, columns] = out[rows, columns] + y if residual else y


@vector_code(twin=_tile_to_floats_twin)
def _tile_to_floats(
    typing_context, a, row, last, panels, panel, steps, length, sums, halve, scale, bias, out, residual
):
    """Compute a register tile and write ((products + sums) >> halve) * scale + bias, or add it to `out`."""
    operands = {"a": (a, types.uint32, 2), "w": (panels, types.uint32, 3), "sums": (sums, types.int32, 1)}
    floats = {"scale": (scale, types.float32, 1), "bias": (bias, types.float32, 1), "out": (out, types.float32, 2)}
    check_arrays("tile_to_floats", operands | floats)
    index, number = types.intp, types.int32
    signature = types.void(a, index, index, panels, index, index, number, sums, number, scale, bias, out, types.boolean)

    def codegen(context, builder, signature, arguments):
        emit = Emitter(context, builder, signature, arguments)
        _, row, last, _, panel, steps, length, _, halve, _, _, _, residual = arguments
        lane, real, lanes = ir.IntType(32), ir.FloatType(), 16
        vectors = PANEL // lanes
        rows = clamped_rows(emit, row, last)
        page = emit.address(3, panel, 0, 0)
        differing = emit_tile(emit, True, vectors, [emit.address(0, i, 0) for i in rows], page, steps, follows=True)
        starts = [
            builder.add(builder.mul(panel, ir.IntType(64)(PANEL)), ir.IntType(64)(v * lanes)) for v in range(vectors)
        ]
        results = [None] * len(differing)
        for v, start in enumerate(starts):
            most = builder.add(emit.splat(length, lanes), emit.load(emit.address(7, start), lane, lanes))
            factors = emit.load(emit.address(9, start), real, lanes)
            offsets = emit.load(emit.address(10, start), real, lanes)
            for k in range(v, len(differing), vectors):
                products = builder.sub(most, builder.add(differing[k], differing[k]))
                products = builder.ashr(products, emit.splat(halve, lanes))
                # Multiply, add, add: the roundings of the unfused model, in its order.
                results[k] = builder.fadd(builder.fmul(builder.sitofp(products, factors.type), factors), offsets)
        targets = [emit.address(11, i, start) for i in rows for start in starts]
        before = builder.block
        with builder.if_then(residual):
            added = [
                builder.fadd(emit.load(target, real, lanes), y) for target, y in zip(targets, results, strict=True)
            ]
            inside = builder.block
        # All sums come before the first store: a repeated row must not be added to twice.
        chosen = [builder.phi(y.type) for y in results]
        for target, phi, y, total in zip(targets, chosen, results, added, strict=True):
            phi.add_incoming(y, before)
            phi.add_incoming(total, inside)
            emit.store(phi, target)
        return context.get_dummy_value()

    return signature, codegen


@kernel(allocates=False)
def linear_to_bits(words, panels, length, lower, span, flip, out, start, stop):
    """Multiply signs by signs and keep one bit of each sum: whether it lies in its channel's interval.

    Args:
        words: uint64 (T, ceil(length / 64)), signs of the input.
        panels: uint32 panels of the weights (N, length).
        length: number of inputs, at least 1.
        lower: `Intervals.lower`.
        span: `Intervals.span`.
        flip: `Intervals.flip`.
        out: uint64 (T, ceil(N / 64)), rows start to stop are overwritten; padding bits are zero.
        start: first row.
        stop: one past the last row.
    """
    halves = words.view(np.uint32)
    steps = steps_of(length)
    for panel in range(panels.shape[0]):
        for row in range(start, stop, TILE):
            _tile_to_bits(halves, row, stop - 1, panels, panel, steps, length, lower, span, flip, out)


@kernel
def linear_to_floats(words, panels, length, sums, unsigned, scale, bias, out, residual, start, stop):
    """Multiply signs, or levels {0, 1}, by signs, scale each channel, add its bias and maybe the residual stream.

    Args:
        words: uint64 (T, ceil(length / 64)), bits of the input.
        panels: uint32 panels of the weights (N, length).
        length: number of inputs, at least 1.
        sums: int32 (64 panels,), `PreparedWeights.sums` if `unsigned`, else zeros.
        unsigned: whether bits mean {0, 1} instead of {-1, +1}.
        scale: float32 (64 panels,), see `pad_outputs`.
        bias: float32 (64 panels,).
        out: float32 (T, N), rows start to stop are overwritten: integer * scale + bias.
        residual: whether to add to what `out` holds instead.
        start: first row.
        stop: one past the last row.
    """
    halves = words.view(np.uint32)
    steps = steps_of(length)
    halve = np.int32(1) if unsigned else np.int32(0)
    counts = np.empty((TILE, PANEL), np.int32)
    for panel in range(panels.shape[0]):
        column = panel * PANEL
        columns = min(PANEL, out.shape[1] - column)
        for row in range(start, stop, TILE):
            if columns == PANEL:
                _tile_to_floats(
                    halves, row, stop - 1, panels, panel, steps, length, sums, halve, scale, bias, out, residual
                )
                continue
            tile_of_signs(halves, row, stop - 1, panels, panel, steps, length, counts, 0, 0)
            for r in range(min(TILE, stop - row)):
                for c in range(columns):
                    n = column + c
                    y = np.float32((counts[r, c] + sums[n]) >> halve) * scale[n] + bias[n]
                    out[row + r, n] = out[row + r, n] + y if residual else y
