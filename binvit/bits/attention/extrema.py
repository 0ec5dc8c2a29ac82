"""The least and the largest of rows of floats, of which neither numba nor LLVM's own reduction makes vector code."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from llvmlite import ir
from numba import types

from binvit.bits.emitter import LANES, Emitter, check_arrays
from binvit.jit import kernel, vector_code

_INDEX = ir.IntType(64)


def _make_extremum(predicate: str, lanes: int, twin: Callable) -> Callable:
    """Make the intrinsic that returns the least or largest of the first `length` >= `lanes` floats of some rows."""

    @vector_code(twin=lambda array, row, rows, length: twin(array[row : row + rows, :length]))
    def extremum(typing_context, array, row, rows, length):
        check_arrays("an extremum", {"its operand": (array, types.float32, 2)})
        signature = types.float32(array, types.intp, types.intp, types.intp)

        def codegen(context, builder, signature, arguments):
            emit = Emitter(context, builder, signature, arguments)
            _, first, rows, length = arguments
            size = ir.Constant(_INDEX, lanes)
            last = builder.sub(length, size)
            steps = builder.udiv(builder.add(length, ir.Constant(_INDEX, lanes - 1)), size)

            def row_step(r, best):
                row = builder.add(first, r)

                def step(k, inner):
                    # The last vector overlaps the one before it instead of reading past the end.
                    start = builder.mul(k, size)
                    start = builder.select(builder.icmp_signed("<", start, last), start, last)
                    numbers = emit.load(emit.address(0, row, start), ir.FloatType(), lanes)
                    before = best if inner is None else inner
                    if before is None:
                        return [numbers]
                    return [builder.select(builder.fcmp_ordered(predicate, numbers, before[0]), numbers, before[0])]

                return emit.accumulate(steps, step)

            return emit.extremum(predicate, emit.accumulate(rows, row_step)[0])

        return signature, codegen

    return extremum


_least, _largest = _make_extremum("<", 16, np.min), _make_extremum(">", 16, np.max)
_least_of_many, _largest_of_many = _make_extremum("<", LANES, np.min), _make_extremum(">", LANES, np.max)


@kernel
def least_of_rows(array, row, rows, length):
    """Return the least of the first `length` numbers of some rows of a float32 array.

    Args:
        array: float32 (all rows, at least length).
        row: the first row.
        rows: how many rows, at least 1.
        length: at least 1.

    Returns:
        float32.
    """
    if length >= LANES:  # four vectors at a time do not wait for each other
        return _least_of_many(array, row, rows, length)
    if length >= 16:
        return _least(array, row, rows, length)
    least = array[row, 0]
    for r in range(row, row + rows):
        for k in range(length):
            least = min(least, array[r, k])
    return least


@kernel
def largest_of_rows(array, row, rows, length):
    """Return the largest of the first `length` numbers of some rows of a float32 array.

    Args:
        array: float32 (all rows, at least length).
        row: the first row.
        rows: how many rows, at least 1.
        length: at least 1.

    Returns:
        float32.
    """
    if length >= LANES:  # four vectors at a time do not wait for each other
        return _largest_of_many(array, row, rows, length)
    if length >= 16:
        return _largest(array, row, rows, length)
    largest = array[row, 0]
    for r in range(row, row + rows):
        for k in range(length):
            largest = max(largest, array[r, k])
    return largest
