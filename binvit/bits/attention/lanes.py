"""Vector steps of the fused kernels: 64 lanes of a row at once, in LLVM vector types that every CPU lowers its own way.

Each is an intrinsic for use inside kernels and has a numpy twin that runs without JIT. Arrays are given with the
indices of their first lane; their last axis is contiguous.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from llvmlite import ir
from numba import types

from binvit.bits.emitter import LANES, Emitter, check_arrays
from binvit.bits.tile import TILE, TILE_LANES, clamped_rows, emit_tile
from binvit.jit import vector_code

_INDEX, _STEP = ir.IntType(64), 32


def _word(mask: np.ndarray) -> np.uint64:
    return np.packbits(mask, bitorder="little").view("<u8")[0]


def _floats_not_below_twin(array, row, start, number):
    return _word(array[row, start : start + LANES] >= number)


@vector_code(twin=_floats_not_below_twin)
def floats_not_below(typing_context, array, row, start, number):
    """Return the word of array[row, start + i] >= number for 64 lanes i; false for NaN."""
    check_arrays("floats_not_below", {"its operand": (array, types.float32, 2)})
    signature = types.uint64(array, types.intp, types.intp, types.float32)

    def codegen(context, builder, signature, arguments):
        emit = Emitter(context, builder, signature, arguments)
        _, row, start, number = arguments
        lanes = emit.load(emit.address(0, row, start), number.type)
        return emit.word(builder.fcmp_ordered(">=", lanes, emit.splat(number)))

    return signature, codegen


def _make_plane_writer(dtype: types.Type, predicate: str, compare: Callable) -> Callable:
    """Make the intrinsic that writes the bits ``array[row] <predicate> number`` down one column of a panel."""

    def twin(array, row, number, panels, panel, column, steps):
        octets = np.packbits(compare(array[row, : 32 * steps], number), bitorder="little")
        panels[panel, :steps, column] = octets.view("<u4")

    @vector_code(twin=twin)
    def write_column(typing_context, array, row, number, panels, panel, column, steps):
        check_arrays("write_column", {"its operand": (array, dtype, 2), "panels": (panels, types.uint32, 3)})
        index = types.intp
        signature = types.void(array, index, dtype, panels, index, index, index)

        def codegen(context, builder, signature, arguments):
            emit = Emitter(context, builder, signature, arguments)
            _, row, number, _, panel, column, steps = arguments
            limits = emit.splat(number, _STEP)
            function = builder.fcmp_ordered if isinstance(dtype, types.Float) else builder.icmp_unsigned

            def step(k, _):
                start = builder.mul(k, ir.Constant(_INDEX, _STEP))
                numbers = emit.load(emit.address(0, row, start), number.type, _STEP)
                bits = builder.bitcast(function(predicate, numbers, limits), ir.IntType(_STEP))
                builder.store(bits, emit.address(3, panel, k, column))
                return []

            emit.accumulate(steps, step)
            return context.get_dummy_value()

        return signature, codegen

    return write_column


write_floats_above = _make_plane_writer(types.float32, ">", np.greater)
"""``(array, row, number, panels, panel, column, steps)``: the bits float32 > number of a row into a column."""
write_bytes_below = _make_plane_writer(types.uint8, "<", np.less)
"""``(array, row, number, panels, panel, column, steps)``: the bits uint8 < number of a row into a column."""


def _outside_twin(array, row, start, lower, upper):
    lanes = array[row, start : start + LANES]
    return _word((lanes < lower) | (lanes > upper))


@vector_code(twin=_outside_twin)
def floats_outside(typing_context, array, row, start, lower, upper):
    """Return the word of array[row, start + i] < lower or > upper for 64 lanes i."""
    check_arrays("floats_outside", {"its operand": (array, types.float32, 2)})
    signature = types.uint64(array, types.intp, types.intp, types.float32, types.float32)

    def codegen(context, builder, signature, arguments):
        emit = Emitter(context, builder, signature, arguments)
        _, row, start, lower, upper = arguments
        lanes = emit.load(emit.address(0, row, start), lower.type)
        below = builder.fcmp_ordered("<", lanes, emit.splat(lower))
        return emit.word(builder.or_(below, builder.fcmp_ordered(">", lanes, emit.splat(upper))))

    return signature, codegen


def _column_sizes_twin(panels, panel, steps, sizes):
    sizes[0] = np.bitwise_count(panels[panel, :steps]).sum(axis=0)


@vector_code(twin=_column_sizes_twin)
def column_sizes(typing_context, panels, panel, steps, sizes):
    """Count the bits of the 64 columns of a panel into the first row of `sizes`."""
    check_arrays("column_sizes", {"panels": (panels, types.uint32, 3), "sizes": (sizes, types.int32, 2)})
    signature = types.void(panels, types.intp, types.intp, sizes)

    def codegen(context, builder, signature, arguments):
        emit = Emitter(context, builder, signature, arguments)
        _, panel, steps, _ = arguments

        def step(k, counts):
            count = emit.popcount(emit.load(emit.address(0, panel, k, 0), ir.IntType(32)))
            return [count if counts is None else builder.add(counts[0], count)]

        emit.store(emit.accumulate(steps, step)[0], emit.address(3, 0, 0))
        return context.get_dummy_value()

    return signature, codegen


def _values_twin(vectors: int) -> Callable:
    lanes = TILE_LANES * vectors

    def tile(weights, row, last, panels, panel, steps, length, scale, bias, shift, out, out_row, start):
        for r in range(row, min(row + TILE, last + 1)):
            counts = np.bitwise_count(weights[r, :steps, None] ^ panels[panel, :steps, :lanes]).sum(
                axis=0, dtype=np.int32
            )
            y = (np.int32(length) - 2 * counts).astype(np.float32) * scale[r] + bias[r]
            out[out_row + r - row, start : start + lanes] = y + shift[r]

    return tile


def _make_tile_of_values(vectors: int) -> Callable:
    @vector_code(twin=_values_twin(vectors))
    def tile(typing_context, weights, row, last, panels, panel, steps, length, scale, bias, shift, out, out_row, start):
        check_arrays("a tile of values", {"w": (weights, types.uint32, 2), "panels": (panels, types.uint32, 3)})
        numbers = {"scale": scale, "bias": bias, "shift": shift}
        check_arrays("a tile of values", {name: (array, types.float32, 1) for name, array in numbers.items()})
        check_arrays("a tile of values", {"out": (out, types.float32, 2)})
        n = types.intp
        signature = types.void(weights, n, n, panels, n, n, types.int32, scale, bias, shift, out, n, n)

        def codegen(context, builder, signature, arguments):
            emit = Emitter(context, builder, signature, arguments)
            _, row, last, _, panel, steps, length, _, _, _, _, out_row, start = arguments
            floats = ir.VectorType(ir.FloatType(), TILE_LANES)
            indices = clamped_rows(emit, row, last)
            counts = emit_tile(
                emit, True, vectors, [emit.address(0, i, 0) for i in indices], emit.address(3, panel, 0, 0), steps
            )
            length = emit.splat(length, TILE_LANES)
            for r, index in enumerate(indices):
                scale, bias, shift = (
                    emit.splat(builder.load(emit.address(position, index)), TILE_LANES) for position in (7, 8, 9)
                )
                target_row = builder.add(out_row, builder.sub(index, row))
                for v in range(vectors):
                    twice = builder.add(counts[r * vectors + v], counts[r * vectors + v])
                    y = builder.fmul(builder.sitofp(builder.sub(length, twice), floats), scale)
                    y = builder.fadd(builder.fadd(y, bias), shift)
                    place = builder.add(start, ir.Constant(_INDEX, TILE_LANES * v))
                    emit.store(y, emit.address(10, target_row, place))
            return context.get_dummy_value()

        return signature, codegen

    return tile


tile_of_values = _make_tile_of_values(LANES // TILE_LANES)
"""Writes ((K - 2 popcount(w xor a)) * scale + bias) + shift of six rows (at most to the last) and 64 columns."""
narrow_tile_of_values = _make_tile_of_values(1)
"""The same for the first 16 columns of a panel."""


def _popcount_twin(word):
    return int(np.bitwise_count(np.uint64(word)))


@vector_code(twin=_popcount_twin)
def popcount(typing_context, word):
    """Count the bits of a uint64 word."""
    signature = types.int64(types.uint64)

    def codegen(context, builder, signature, arguments):
        return Emitter(context, builder, signature, arguments).popcount(arguments[0])

    return signature, codegen


def _lowest_bit_twin(word):
    return int(word & -word).bit_length() - 1 if isinstance(word, int) else _lowest_bit_twin(int(word))


@vector_code(twin=_lowest_bit_twin)
def lowest_bit(typing_context, word):
    """Return the index of the lowest set bit of a uint64 word that is not zero."""
    signature = types.int64(types.uint64)

    def codegen(context, builder, signature, arguments):
        return builder.cttz(arguments[0], ir.Constant(ir.IntType(1), 1))

    return signature, codegen
