"""Vector steps of the fused kernels: 64 lanes of a row at once, in LLVM vector types that every CPU lowers its own way.

Each is an intrinsic for use inside kernels and has a numpy twin that runs without JIT. Arrays are given with the
indices of their first lane; their last axis is contiguous.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils

from binvit.bits.emitter import LANES, Emitter, check_arrays
from binvit.jit import vector_code

_INDEX = ir.IntType(64)


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
            lanes = 16 if isinstance(dtype, types.Float) else 32  # what one comparison of 512 bits has, or a step needs
            limits = emit.splat(number, lanes)
            function = builder.fcmp_ordered if isinstance(dtype, types.Float) else builder.icmp_unsigned

            def step(k, _):
                target = emit.address(3, panel, k, column)
                for part in range(0, 32, lanes):
                    start = builder.add(builder.mul(k, ir.Constant(_INDEX, 32)), ir.Constant(_INDEX, part))
                    numbers = emit.load(emit.address(0, row, start), number.type, lanes)
                    bits = builder.bitcast(function(predicate, numbers, limits), ir.IntType(lanes))
                    place = cgutils.pointer_add(builder, target, ir.Constant(_INDEX, part // 8))
                    builder.store(bits, builder.bitcast(place, bits.type.as_pointer()), align=1)
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


def _affine_twin(numbers, row, factor, offset, shift, out, out_row, start):
    y = numbers[row, :LANES].astype(np.float32) * np.float32(factor) + np.float32(offset)
    out[out_row, start : start + LANES] = y + np.float32(shift)


@vector_code(twin=_affine_twin)
def affine(typing_context, numbers, row, factor, offset, shift, out, out_row, start):
    """Write (numbers * factor + offset) + shift for 64 columns of one channel."""
    check_arrays("affine", {"numbers": (numbers, types.int32, 2), "out": (out, types.float32, 2)})
    index, real = types.intp, types.float32
    signature = types.void(numbers, index, real, real, real, out, index, index)

    def codegen(context, builder, signature, arguments):
        emit = Emitter(context, builder, signature, arguments)
        _, row, factor, offset, shift, _, out_row, start = arguments
        numbers = emit.load(emit.address(0, row, 0), ir.IntType(32))
        y = builder.fmul(builder.sitofp(numbers, ir.VectorType(ir.FloatType(), LANES)), emit.splat(factor))
        y = builder.fadd(builder.fadd(y, emit.splat(offset)), emit.splat(shift))
        emit.store(y, emit.address(5, out_row, start))
        return context.get_dummy_value()

    return signature, codegen


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
