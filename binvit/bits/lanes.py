"""Vector steps of the fused kernels: 64 lanes of a row at once, in LLVM vector types that every CPU lowers its own way.

Each is an intrinsic for use inside kernels and has a numpy twin that runs without JIT. Arrays are given with the
indices of their first lane; their last axis is contiguous.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import types

from binvit.bits.emitter import LANES, Emitter, check_arrays
from binvit.bits.jit import kernel, vector_code

_INDEX = ir.IntType(64)


def _word(mask: np.ndarray) -> np.uint64:
    return np.packbits(mask, bitorder="little").view("<u8")[0]


def _make_comparison(dtype: types.Type, predicate: str, compare):
    """Makes the intrinsic that returns the word of ``array[row, start + i] <predicate> number`` for 64 lanes i."""

    def twin(array, row, start, number):
        return _word(compare(array[row, start : start + LANES], number))

    @vector_code(twin=twin)
    def comparison(typing_context, array, row, start, number):
        check_arrays("a comparison", {"its operand": (array, dtype, 2)})
        signature = types.uint64(array, types.intp, types.intp, dtype)

        def codegen(context, builder, signature, arguments):
            emit = Emitter(context, builder, signature, arguments)
            _, row, start, number = arguments
            lanes = emit.load(emit.address(0, row, start), number.type)
            function = builder.fcmp_ordered if isinstance(dtype, types.Float) else builder.icmp_unsigned
            return emit.word(function(predicate, lanes, emit.splat(number)))

        return signature, codegen

    return comparison


floats_above = _make_comparison(types.float32, ">", np.greater)
"""``(array, row, start, number)``: the word of 64 comparisons float32 > number; false for NaN."""
floats_below = _make_comparison(types.float32, "<", np.less)
"""``(array, row, start, number)``: the word of 64 comparisons float32 < number; false for NaN."""
floats_not_below = _make_comparison(types.float32, ">=", np.greater_equal)
"""``(array, row, start, number)``: the word of 64 comparisons float32 >= number; false for NaN."""
bytes_below = _make_comparison(types.uint8, "<", np.less)
"""``(array, row, start, number)``: the word of 64 comparisons uint8 < number."""


def _normalized_signs_twin(x, row, start, mean, inverse, gamma, beta, shift):
    lanes = slice(start, start + LANES)
    return _word(((x[row, lanes] - mean) * inverse * gamma[lanes] + beta[lanes]) + shift[lanes] >= 0)


@vector_code(twin=_normalized_signs_twin)
def normalized_signs(typing_context, x, row, start, mean, inverse, gamma, beta, shift):
    """Returns the word of ((x[row, start + i] - mean) * inverse * gamma + beta) + shift >= 0 for 64 lanes i."""
    vectors = {"gamma": (gamma, types.float32, 1), "beta": (beta, types.float32, 1), "shift": (shift, types.float32, 1)}
    check_arrays("normalized_signs", {"x": (x, types.float32, 2), **vectors})
    real, index = types.float32, types.intp
    signature = types.uint64(x, index, index, real, real, gamma, beta, shift)

    def codegen(context, builder, signature, arguments):
        emit = Emitter(context, builder, signature, arguments)
        _, row, start, mean, inverse, _, _, _ = arguments
        lane = ir.FloatType()
        y = builder.fsub(emit.load(emit.address(0, row, start), lane), emit.splat(mean))
        y = builder.fmul(builder.fmul(y, emit.splat(inverse)), emit.load(emit.address(5, start), lane))
        y = builder.fadd(y, emit.load(emit.address(6, start), lane))
        y = builder.fadd(y, emit.load(emit.address(7, start), lane))
        return emit.word(builder.fcmp_ordered(">=", y, ir.Constant(y.type, None)))

    return signature, codegen


def _make_extremum(predicate: str, reduction: str, twin):
    """Makes the intrinsic that returns the least or largest of the first `length` >= 16 floats of a row."""

    @vector_code(twin=lambda array, row, length: twin(array[row, :length]))
    def extremum(typing_context, array, row, length):
        check_arrays("an extremum", {"its operand": (array, types.float32, 2)})
        signature = types.float32(array, types.intp, types.intp)

        def codegen(context, builder, signature, arguments):
            emit = Emitter(context, builder, signature, arguments)
            _, row, length = arguments
            sixteen = ir.Constant(_INDEX, 16)
            last = builder.sub(length, sixteen)

            def step(k, best):
                # The last vector overlaps the one before it instead of reading past the end.
                start = builder.mul(k, sixteen)
                start = builder.select(builder.icmp_signed("<", start, last), start, last)
                lanes = emit.load(emit.address(0, row, start), ir.FloatType(), 16)
                if best is None:
                    return [lanes]
                return [builder.select(builder.fcmp_ordered(predicate, lanes, best[0]), lanes, best[0])]

            steps = builder.udiv(builder.add(length, ir.Constant(_INDEX, 15)), sixteen)
            return emit.reduce(reduction, emit.accumulate(steps, step)[0])

        return signature, codegen

    return extremum


_least_of_row = _make_extremum("<", "fmin", np.min)
_largest_of_row = _make_extremum(">", "fmax", np.max)


@kernel
def least_of_row(array, row, length):
    """Returns the least of the first `length` numbers of a row of a float32 array.

    Args:
        array: float32 (rows, at least length).
        row: which row.
        length: at least 1.

    Returns:
        float32.
    """
    if length >= 16:
        return _least_of_row(array, row, length)
    least = array[row, 0]
    for k in range(1, length):
        least = min(least, array[row, k])
    return least


@kernel
def largest_of_row(array, row, length):
    """Returns the largest of the first `length` numbers of a row of a float32 array.

    Args:
        array: float32 (rows, at least length).
        row: which row.
        length: at least 1.

    Returns:
        float32.
    """
    if length >= 16:
        return _largest_of_row(array, row, length)
    largest = array[row, 0]
    for k in range(1, length):
        largest = max(largest, array[row, k])
    return largest


def _in_interval_twin(numbers, row, lower, span, start):
    distance = (numbers[row, :LANES] - lower[start : start + LANES].astype(np.int64)) % 2**32
    return _word(distance <= span[start : start + LANES])


@vector_code(twin=_in_interval_twin)
def in_interval(typing_context, numbers, row, lower, span, start):
    """Returns the word of lower <= numbers[row, i] <= lower + span for 64 lanes i and bounds from `start` on."""
    check_arrays(
        "in_interval",
        {"numbers": (numbers, types.int32, 2), "lower": (lower, types.int32, 1), "span": (span, types.uint32, 1)},
    )
    signature = types.uint64(numbers, types.intp, lower, span, types.intp)

    def codegen(context, builder, signature, arguments):
        emit = Emitter(context, builder, signature, arguments)
        _, row, _, _, start = arguments
        lane = ir.IntType(32)
        numbers = emit.load(emit.address(0, row, 0), lane)
        # One subtraction and one unsigned comparison instead of two comparisons.
        distance = builder.sub(numbers, emit.load(emit.address(2, start), lane))
        return emit.word(builder.icmp_unsigned("<=", distance, emit.load(emit.address(3, start), lane)))

    return signature, codegen


def _scale_and_add_twin(numbers, row, sums, halve, scale, bias, start, out, out_row, residual):
    column = slice(start, start + LANES)
    integers = (numbers[row, :LANES] + sums[column]) >> halve
    y = integers.astype(np.float32) * scale[column] + bias[column]
    out[out_row, column] = out[out_row, column] + y if residual else y


@vector_code(twin=_scale_and_add_twin)
def scale_and_add(typing_context, numbers, row, sums, halve, scale, bias, start, out, out_row, residual):
    """Writes ((numbers + sums) >> halve) * scale + bias, plus the old content if `residual`, for 64 columns."""
    vectors = {"scale": (scale, types.float32, 1), "bias": (bias, types.float32, 1), "sums": (sums, types.int32, 1)}
    check_arrays("scale_and_add", {"numbers": (numbers, types.int32, 2), "out": (out, types.float32, 2), **vectors})
    index = types.intp
    signature = types.void(numbers, index, sums, types.int32, scale, bias, index, out, index, types.boolean)

    def codegen(context, builder, signature, arguments):
        emit = Emitter(context, builder, signature, arguments)
        _, row, _, halve, _, _, start, _, out_row, residual = arguments
        lane, real = ir.IntType(32), ir.FloatType()
        vector = ir.VectorType(real, LANES)
        numbers = builder.add(emit.load(emit.address(0, row, 0), lane), emit.load(emit.address(2, start), lane))
        numbers = builder.sitofp(builder.ashr(numbers, emit.splat(halve)), vector)
        # Multiply, add, add: the roundings of the unfused model, in its order.
        y = builder.fadd(
            builder.fmul(numbers, emit.load(emit.address(4, start), real)), emit.load(emit.address(5, start), real)
        )
        target = emit.address(7, out_row, start)
        with builder.if_else(residual) as (then, otherwise):
            with then:
                added, then_block = builder.fadd(emit.load(target, real), y), builder.block
            with otherwise:
                else_block = builder.block
        result = builder.phi(vector)
        result.add_incoming(added, then_block)
        result.add_incoming(y, else_block)
        emit.store(result, target)
        return context.get_dummy_value()

    return signature, codegen


def _add_counts_twin(total, row, twice, twice_row, once, once_row, once_start, factor):
    counts = 2 * twice[twice_row, :LANES] - once[once_row, once_start : once_start + LANES]
    total[row, :LANES] = total[row, :LANES] + counts.astype(np.float32) * np.float32(factor)


@vector_code(twin=_add_counts_twin)
def add_counts(typing_context, total, row, twice, twice_row, once, once_row, once_start, factor):
    """Adds factor * (2 twice - once) to 64 floats of `total`."""
    check_arrays(
        "add_counts",
        {"total": (total, types.float32, 2), "twice": (twice, types.int32, 2), "once": (once, types.int32, 2)},
    )
    index = types.intp
    signature = types.void(total, index, twice, index, once, index, index, types.float32)

    def codegen(context, builder, signature, arguments):
        emit = Emitter(context, builder, signature, arguments)
        _, row, _, twice_row, _, once_row, once_start, factor = arguments
        lane, real = ir.IntType(32), ir.FloatType()
        twice = emit.load(emit.address(2, twice_row, 0), lane)
        counts = builder.sub(builder.add(twice, twice), emit.load(emit.address(4, once_row, once_start), lane))
        term = builder.fmul(builder.sitofp(counts, ir.VectorType(real, LANES)), emit.splat(factor))
        target = emit.address(0, row, 0)
        emit.store(builder.fadd(emit.load(target, real), term), target)
        return context.get_dummy_value()

    return signature, codegen


def _add_bits_twin(counts, row, panels, panel, step, bit, number):
    counts[row, :LANES] += np.int32(number) * (panels[panel, step] >> np.uint32(bit) & np.uint32(1)).astype(np.int32)


@vector_code(twin=_add_bits_twin)
def add_bits(typing_context, counts, row, panels, panel, step, bit, number):
    """Adds a number to those of 64 counts whose column has a bit set in one step of a panel."""
    check_arrays("add_bits", {"counts": (counts, types.int32, 2), "panels": (panels, types.uint32, 3)})
    index = types.intp
    signature = types.void(counts, index, panels, index, index, types.uint32, types.int32)

    def codegen(context, builder, signature, arguments):
        emit = Emitter(context, builder, signature, arguments)
        _, row, _, panel, step, bit, number = arguments
        lane = ir.IntType(32)
        zeros = ir.Constant(ir.VectorType(lane, LANES), None)
        selector = emit.splat(builder.shl(ir.Constant(lane, 1), bit))
        is_set = builder.icmp_unsigned(
            "!=", builder.and_(emit.load(emit.address(2, panel, step, 0), lane), selector), zeros
        )
        target = emit.address(0, row, 0)
        emit.store(builder.add(emit.load(target, lane), builder.select(is_set, emit.splat(number), zeros)), target)
        return context.get_dummy_value()

    return signature, codegen


def _popcount_twin(word):
    return int(np.bitwise_count(np.uint64(word)))


@vector_code(twin=_popcount_twin)
def popcount(typing_context, word):
    """Counts the bits of a uint64 word."""
    signature = types.int64(types.uint64)

    def codegen(context, builder, signature, arguments):
        return Emitter(context, builder, signature, arguments).popcount(arguments[0])

    return signature, codegen


def _lowest_bit_twin(word):
    return int(word & -word).bit_length() - 1 if isinstance(word, int) else _lowest_bit_twin(int(word))


@vector_code(twin=_lowest_bit_twin)
def lowest_bit(typing_context, word):
    """Returns the index of the lowest set bit of a uint64 word that is not zero."""
    signature = types.int64(types.uint64)

    def codegen(context, builder, signature, arguments):
        return builder.cttz(arguments[0], ir.Constant(ir.IntType(1), 1))

    return signature, codegen
