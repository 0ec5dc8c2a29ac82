"""Softmax of binary scores by a table, with or without a bias.

A row of scores of d channels has at most d + 1 different exponentials. Two look-ups exist because numba neither
vectorizes `exp` nor can prove that a table and the output do not overlap: AVX-512 permutes table entries in registers,
other CPUs read them one by one. Layouts as in `binvit.bits.attention`.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import types

from binvit.bits.emitter import Emitter, check_arrays
from binvit.bits.extrema import largest_of_rows
from binvit.bits.jit import BYTE_PERMUTE, FLOAT_PERMUTE, kernel, vector_code

MAX_HEAD_WIDTH = 254
"""Widest head whose popcounts, and the bound above all of them, fit into a byte."""


def exponential_table(scale: float, width: int) -> np.ndarray:
    """Tabulates the exponentials of a softmax over scores scale * (width - 2 p), relative to the row's maximum.

    Args:
        scale: what the integer q.k is multiplied by; positive.
        width: d, number of channels of the head.

    Returns:
        float32 (max(width + 1, 64),): exp(-2 scale p), computed in double precision; zeros behind p = width.

    Raises:
        ValueError: if the scale is not positive or the width is not between 1 and 254.
    """
    if not scale > 0:
        raise ValueError(f"The scale of binary scores must be positive, not {scale}.")
    if not 1 <= width <= MAX_HEAD_WIDTH:
        raise ValueError(f"A head must be 1 to {MAX_HEAD_WIDTH} channels wide for popcounts in bytes, not {width}.")
    table = np.zeros(max(width + 1, 64), np.float32)
    table[: width + 1] = np.exp(-2.0 * float(scale) * np.arange(width + 1))
    return table


def fixed_point_planes(table: np.ndarray) -> np.ndarray:
    """Splits the first 64 entries of an exponential table into the bytes of 32-bit fractions.

    Args:
        table: from `exponential_table`.

    Returns:
        uint8 (4, 64), lowest byte first.
    """
    fractions = np.minimum(np.round(table[:64].astype(np.float64) * 2.0**32), 2.0**32 - 1)
    return np.ascontiguousarray(fractions.astype("<u4").view(np.uint8).reshape(64, 4).T)


@vector_code(twin=None)
def _sum_by_permutation(typing_context, counts, row, panels, least, planes):
    """Sums 32-bit fractions looked up at counts[row] - least, those below 64, one byte of the fraction at a time."""
    check_arrays("sum_by_permutation", {"counts": (counts, types.uint8, 2), "planes": (planes, types.uint8, 2)})
    signature = types.uint64(counts, types.intp, types.intp, types.uint8, planes)

    def codegen(context, builder, signature, arguments):
        emit = Emitter(context, builder, signature, arguments)
        _, row, panels, least, _ = arguments
        position, octet = ir.IntType(64), ir.IntType(8)
        octets, sums = ir.VectorType(octet, 64), ir.VectorType(position, 8)
        zeros = ir.Constant(octets, None)
        tables = [emit.load(emit.address(4, p, 0), octet) for p in range(4)]

        def step(k, totals):
            lanes = emit.load(emit.address(0, row, builder.mul(k, ir.Constant(position, 64))), octet)
            levels = builder.sub(lanes, emit.splat(least))
            known = builder.icmp_unsigned("<", levels, ir.Constant(octets, [64] * 64))
            result = []
            for p, table in enumerate(tables):
                found = emit.call("llvm.x86.avx512.permvar.qi.512", octets, table, levels)
                found = builder.select(known, found, zeros)
                total = emit.call("llvm.x86.avx512.psad.bw.512", sums, found, zeros)
                result.append(total if totals is None else builder.add(totals[p], total))
            return result

        weighted = [
            builder.shl(total, ir.Constant(sums, [8 * p] * 8)) for p, total in enumerate(emit.accumulate(panels, step))
        ]
        total = builder.add(builder.add(weighted[0], weighted[1]), builder.add(weighted[2], weighted[3]))
        return emit.reduce("add", total)

    return signature, codegen


@kernel(reorder=True)
def _sums_by_gather(counts, smallest, table, planes, sums, start, stop):
    tokens = sums.shape[0]
    for row in range(start, stop):
        total = np.float64(0)
        least = np.int64(smallest[row])
        for j in range(tokens):
            total += table[np.int64(counts[row, j]) - least]
        sums[row] = total


@kernel(reorder=True)
def _sums_by_permutation(counts, smallest, table, planes, sums, start, stop):
    tokens, levels = sums.shape[0], table.shape[0]
    panels = counts.shape[1] // 64
    for row in range(start, stop):
        least = np.int64(smallest[row])
        if levels - least <= 64:
            sums[row] = _sum_by_permutation(counts, row, panels, smallest[row], planes) * 2.0**-32
        else:
            total = np.float64(0)
            for j in range(tokens):
                total += table[np.int64(counts[row, j]) - least]
            sums[row] = total


softmax_sums = _sums_by_permutation if BYTE_PERMUTE else _sums_by_gather
"""Sums the exponentials of each row, relative to its largest: the softmax of popcount p is table[p - least] / sum.

``(counts, smallest, table, planes, sums, start, stop)`` with counts and smallest from `score_counts`, table from
`exponential_table`, planes from `fixed_point_planes` of it; sums float32 (T,), entries start to stop are overwritten. A
gather of floats takes 10 microseconds for 197 x 197; permuted bytes, exact sums of 32-bit fractions, take 3.
"""


@vector_code(twin=None)
def _largest_byte(typing_context, counts, row, length):
    """Returns the largest of the first `length` >= 64 bytes of a row."""
    check_arrays("largest_byte", {"counts": (counts, types.uint8, 2)})
    signature = types.uint8(counts, types.intp, types.intp)

    def codegen(context, builder, signature, arguments):
        emit = Emitter(context, builder, signature, arguments)
        _, row, length = arguments
        position, octet = ir.IntType(64), ir.IntType(8)
        last = builder.sub(length, ir.Constant(position, 64))

        def step(k, largest):
            start = builder.mul(k, ir.Constant(position, 64))
            start = builder.select(builder.icmp_signed("<", start, last), start, last)
            lanes = emit.load(emit.address(0, row, start), octet)
            if largest is None:
                return [lanes]
            return [builder.select(builder.icmp_unsigned(">", lanes, largest[0]), lanes, largest[0])]

        steps = builder.udiv(builder.add(length, ir.Constant(position, 63)), ir.Constant(position, 64))
        return emit.reduce("umax", emit.accumulate(steps, step)[0])

    return signature, codegen


def _make_biased_row(levels: int):
    """Makes the intrinsic that computes a row of a biased map whose scores span less than 32 or 64 levels."""

    @vector_code(twin=None)
    def biased_row(typing_context, counts, row, length, least, table, total, bias, bias_row, attention):
        check_arrays("biased_row", {"counts": (counts, types.uint8, 2), "table": (table, types.float32, 1)})
        check_arrays("biased_row", {"bias": (bias, types.float32, 2), "attention": (attention, types.float32, 2)})
        index, real = types.intp, types.float32
        signature = types.float32(counts, index, index, types.uint8, table, real, bias, index, attention)

        def codegen(context, builder, signature, arguments):
            emit = Emitter(context, builder, signature, arguments)
            _, row, length, least, _, total, _, bias_row, _ = arguments
            position, lane, real = ir.IntType(64), ir.IntType(32), ir.FloatType()
            integers, floats = ir.VectorType(lane, 16), ir.VectorType(real, 16)
            totals = emit.splat(total, 16)
            tables = [
                builder.fdiv(emit.load(emit.address(4, first), real, 16), totals) for first in range(0, levels, 16)
            ]
            lowest = emit.splat(builder.zext(least, lane), 16)
            last = builder.sub(length, ir.Constant(position, 16))

            def look_up(first, second, where):
                return emit.call("llvm.x86.avx512.vpermi2var.ps.512", floats, first, where, second)

            def step(k, largest):
                # The last vector overlaps the one before it, so that no padding is looked up.
                start = builder.mul(k, ir.Constant(position, 16))
                start = builder.select(builder.icmp_signed("<", start, last), start, last)
                where = builder.zext(emit.load(emit.address(0, row, start), ir.IntType(8), 16), integers)
                where = builder.sub(where, lowest)
                values = look_up(*tables[:2], where)
                if levels > 32:
                    is_low = builder.icmp_unsigned("<", where, ir.Constant(integers, [32] * 16))
                    values = builder.select(is_low, values, look_up(*tables[2:], where))
                values = builder.fadd(values, emit.load(emit.address(6, bias_row, start), real, 16))
                emit.store(values, emit.address(8, row, start))
                if largest is None:
                    return [values]
                return [builder.select(builder.fcmp_ordered(">", values, largest[0]), values, largest[0])]

            steps = builder.udiv(builder.add(length, ir.Constant(position, 15)), ir.Constant(position, 16))
            return emit.extremum(">", emit.accumulate(steps, step)[0])

        return signature, codegen

    return biased_row


_biased_row_of_32, _biased_row_of_64 = _make_biased_row(32), _make_biased_row(64)


@kernel
def _fill_biased_row(counts, row, tokens, least, table, total, bias, bias_row, attention):
    for j in range(tokens):
        attention[row, j] = table[np.int64(counts[row, j]) - np.int64(least)] / total + bias[bias_row, j]
    return largest_of_rows(attention, row, 1, tokens)


@kernel
def _map_by_loop(counts, smallest, table, sums, bias, bias_start, attention, largest, start, stop):
    tokens = sums.shape[0]
    for row in range(start, stop):
        total, bias_row = sums[row], row - bias_start
        largest[row] = _fill_biased_row(counts, row, tokens, smallest[row], table, total, bias, bias_row, attention)


@kernel
def _map_by_permutation(counts, smallest, table, sums, bias, bias_start, attention, largest, start, stop):
    tokens = sums.shape[0]
    for row in range(start, stop):
        least, total, bias_row = smallest[row], sums[row], row - bias_start
        span = _largest_byte(counts, row, tokens) - least if tokens >= 64 else 255
        if span < 32:
            largest[row] = _biased_row_of_32(counts, row, tokens, least, table, total, bias, bias_row, attention)
        elif span < 64:
            largest[row] = _biased_row_of_64(counts, row, tokens, least, table, total, bias, bias_row, attention)
        else:
            largest[row] = _fill_biased_row(counts, row, tokens, least, table, total, bias, bias_row, attention)


biased_map = _map_by_permutation if FLOAT_PERMUTE else _map_by_loop
"""Computes the attention map with a bias, softmax(scores) + bias, as floats, and the maximum of each row.

``(counts, smallest, table, sums, bias, bias_start, attention, largest, start, stop)`` with the first four as for
`softmax_sums`; bias float32 (rows, at least 64 P), whose row 0 belongs to query bias_start; attention float32
(T, 64 P), of which the first T columns of rows start to stop are overwritten; largest float32 (T,).
"""
