"""How the exact integers of attention groups and value groups become floats, for 64 queries of a channel at once.

An entry of a listed value group is 2 token + sign. Each intrinsic has a numpy twin that runs without JIT.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import types

from binvit.bits.emitter import LANES, Emitter, check_arrays
from binvit.jit import vector_code

_INDEX, _LANE = ir.IntType(64), ir.IntType(32)
_INTEGERS, _FLOATS = ir.VectorType(_LANE, LANES), ir.VectorType(ir.FloatType(), LANES)


def _term(emit: Emitter, twice: ir.Value, once: ir.Value, factor: ir.Value) -> ir.Value:
    builder = emit.builder
    twice = emit.load(twice, _LANE)
    counts = builder.sub(builder.add(twice, twice), emit.load(once, _LANE))
    return builder.fmul(builder.sitofp(counts, _FLOATS), emit.splat(factor))


def _listed(
    emit: Emitter, entries: int, panels: int, group: int, start: ir.Value, length: ir.Value, page: ir.Value
) -> ir.Value:
    """Sum the signs of some entries over those of 64 queries in whose group their tokens are."""
    builder, zeros = emit.builder, ir.Constant(_INTEGERS, None)

    def add_entry(k, sums):
        entry = builder.load(emit.address(entries, group, builder.add(start, k)))
        sign = builder.sub(builder.shl(builder.and_(entry, _LANE(1)), _LANE(1)), _LANE(1))
        bit = builder.and_(builder.lshr(entry, _LANE(1)), _LANE(31))
        columns = emit.load(emit.address(panels, page, builder.zext(builder.lshr(entry, _LANE(6)), _INDEX), 0), _LANE)
        found = builder.and_(columns, emit.splat(builder.shl(_LANE(1), bit)))
        is_set = builder.icmp_unsigned("!=", found, zeros)
        return builder.add(sums, builder.select(is_set, emit.splat(sign), zeros))

    return emit.fold(0, length, zeros, add_entry)


def _listed_twin(entries, panels, page):
    counts = np.zeros(LANES, np.int32)
    for entry in entries:
        bits = panels[page, entry >> 6] >> np.uint32(entry >> 1 & 31) & np.uint32(1)
        counts += np.int32(2 * (entry & 1) - 1) * bits.astype(np.int32)
    return counts


def _add_counts_twin(total, row, twice, twice_row, once, once_row, once_start, factor, first):
    counts = 2 * twice[twice_row, :LANES] - once[once_row, once_start : once_start + LANES]
    term = counts.astype(np.float32) * np.float32(factor)
    total[row, :LANES] = term if first else total[row, :LANES] + term


@vector_code(twin=_add_counts_twin)
def add_counts(typing_context, total, row, twice, twice_row, once, once_row, once_start, factor, first):
    """Add factor * (2 twice - once) to 64 floats of `total`; the first sets them."""
    integers = {"twice": (twice, types.int32, 2), "once": (once, types.int32, 2)}
    check_arrays("add_counts", {"total": (total, types.float32, 2), **integers})
    index = types.intp
    signature = types.void(total, index, twice, index, once, index, index, types.float32, types.boolean)

    def codegen(context, builder, signature, arguments):
        emit = Emitter(context, builder, signature, arguments)
        _, row, _, twice_row, _, once_row, once_start, factor, first = arguments
        counts = emit.address(2, twice_row, 0), emit.address(4, once_row, once_start)
        term = _term(emit, *counts, factor)
        target = emit.address(0, row, 0)
        added = builder.fadd(emit.load(target, ir.FloatType()), term)
        emit.store(builder.select(first, term, added), target)
        return context.get_dummy_value()

    return signature, codegen


def _count_entries_twin(counts, row, panels, page, entries, group, start, stop):
    counts[row, :LANES] = _listed_twin(entries[group, start:stop], panels, page)


@vector_code(twin=_count_entries_twin)
def count_entries(typing_context, counts, row, panels, page, entries, group, start, stop):
    """Write the signs of some entries, summed over the queries in whose group their tokens are, for 64 queries."""
    integers = {"counts": (counts, types.int32, 2), "entries": (entries, types.int32, 2)}
    check_arrays("count_entries", {"panels": (panels, types.uint32, 3), **integers})
    index = types.intp
    signature = types.void(counts, index, panels, index, entries, index, index, index)

    def codegen(context, builder, signature, arguments):
        emit = Emitter(context, builder, signature, arguments)
        _, row, _, page, _, group, start, stop = arguments
        counts = _listed(emit, 4, 2, group, start, builder.sub(stop, start), page)
        emit.store(counts, emit.address(0, row, 0))
        return context.get_dummy_value()

    return signature, codegen


def _combine_row_twin(
    twice, row, stride, sizes, start, factors, starts, channel, entries, panels, panel, pages, total, total_row
):
    result = np.zeros(LANES, np.float32)
    for i in range(factors.shape[0]):
        counts = 2 * twice[row + i * stride, :LANES] - sizes[i, start : start + LANES]
        result = result + counts.astype(np.float32) * factors[i, 0]
        for j in range(1, factors.shape[1]):
            counts = _listed_twin(entries[j, starts[j, channel] : starts[j, channel + 1]], panels, panel + i * pages)
            result = result + counts.astype(np.float32) * factors[i, j]
    total[total_row, :LANES] = result


@vector_code(twin=_combine_row_twin)
def combine_row(
    typing_context,
    twice,
    row,
    stride,
    sizes,
    start,
    factors,
    starts,
    channel,
    entries,
    panels,
    panel,
    pages,
    total,
    total_row,
):
    """Combine one channel and 64 queries if the first value group is everything and the others are listed.

    Writes the sum over i of factors[i, 0] * (2 twice[row + i stride] - sizes[i]) + the sum over j > 0 of factors[i, j]
    times the signs of the entries of group j whose tokens are in group i, in this order.
    """
    integers = {"twice": (twice, types.int32, 2), "sizes": (sizes, types.int32, 2)}
    lists = {"starts": (starts, types.int32, 2), "entries": (entries, types.int32, 2)}
    floats = {"factors": (factors, types.float32, 2), "total": (total, types.float32, 2)}
    check_arrays("combine_row", {"panels": (panels, types.uint32, 3), **integers, **lists, **floats})
    index = types.intp
    signature = types.void(
        twice, index, index, sizes, index, factors, starts, index, entries, panels, index, index, total, index
    )

    def codegen(context, builder, signature, arguments):
        emit = Emitter(context, builder, signature, arguments)
        _, row, stride, _, start, _, _, channel, _, _, panel, pages, _, total_row = arguments

        def add_group(i, total):
            counts = emit.address(0, builder.add(row, builder.mul(i, stride)), 0), emit.address(3, i, start)
            total = builder.fadd(total, _term(emit, *counts, builder.load(emit.address(5, i, 0))))
            page = builder.add(panel, builder.mul(i, pages))

            def add_list(j, total):
                begin = builder.sext(builder.load(emit.address(6, j, channel)), _INDEX)
                end = builder.load(emit.address(6, j, builder.add(channel, ir.Constant(_INDEX, 1))))
                length = builder.sub(builder.sext(end, _INDEX), begin)

                with builder.if_else(builder.icmp_signed(">", length, ir.Constant(_INDEX, 0))) as (then, otherwise):
                    with then:
                        counts = builder.sitofp(_listed(emit, 8, 9, j, begin, length, page), _FLOATS)
                        term = builder.fmul(counts, emit.splat(builder.load(emit.address(5, i, j))))
                        added, then_block = builder.fadd(total, term), builder.block
                    with otherwise:
                        else_block = builder.block
                result = builder.phi(_FLOATS)
                result.add_incoming(added, then_block)
                result.add_incoming(total, else_block)
                return result

            return emit.fold(1, emit.length(5, 1), total, add_list)

        combined = emit.fold(0, emit.length(5, 0), ir.Constant(_FLOATS, None), add_group)
        emit.store(combined, emit.address(12, total_row, 0))
        return context.get_dummy_value()

    return signature, codegen
