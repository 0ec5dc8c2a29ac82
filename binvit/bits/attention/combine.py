"""How the exact integers of attention groups and value groups become floats, for 64 queries of a channel at once.

An entry of a listed value group is 2 token + sign, with its channel in the bits above. Each intrinsic has a numpy twin
that runs without JIT.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from llvmlite import ir
from numba import types

from binvit.bits.emitter import LANES, Emitter, check_arrays
from binvit.bits.tile import TILE, TILE_LANES, clamped_rows, emit_tile
from binvit.jit import vector_code

CHANNEL = 20
"""Where an entry's channel begins; the bits below it are 2 token + sign."""
_INDEX, _LANE = ir.IntType(64), ir.IntType(32)
_FLOATS = ir.VectorType(ir.FloatType(), LANES)


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
        twice = emit.load(emit.address(2, twice_row, 0), _LANE)
        counts = builder.sub(builder.add(twice, twice), emit.load(emit.address(4, once_row, once_start), _LANE))
        term = builder.fmul(builder.sitofp(counts, _FLOATS), emit.splat(factor))
        target = emit.address(0, row, 0)
        added = builder.fadd(emit.load(target, ir.FloatType()), term)
        emit.store(builder.select(first, term, added), target)
        return context.get_dummy_value()

    return signature, codegen


def _lists_twin(lanes: int) -> Callable:
    def add_lists(total, channel, panels, page, entries, group, start, stop, factor):
        some = entries[group, start:stop]
        for owner in np.unique(some >> CHANNEL):
            counts = np.zeros(lanes, np.int32)
            for entry in some[some >> CHANNEL == owner] & ((1 << CHANNEL) - 1):
                bits = panels[page, entry >> 6, :lanes] >> np.uint32(entry >> 1 & 31) & np.uint32(1)
                counts += np.int32(2 * (entry & 1) - 1) * bits.astype(np.int32)
            total[owner - channel, :lanes] += counts.astype(np.float32) * np.float32(factor)

    return add_lists


def _make_add_lists(lanes: int) -> Callable:
    @vector_code(twin=_lists_twin(lanes))
    def add_lists(typing_context, total, channel, panels, page, entries, group, start, stop, factor):
        arrays = {"panels": (panels, types.uint32, 3), "entries": (entries, types.int32, 2)}
        check_arrays("add_lists", {"total": (total, types.float32, 2), **arrays})
        index = types.intp
        signature = types.void(total, index, panels, index, entries, index, index, index, types.float32)

        def codegen(context, builder, signature, arguments):
            emit = Emitter(context, builder, signature, arguments)
            _, channel, _, page, _, group, start, stop, factor = arguments
            integers, floats = (ir.VectorType(kind, lanes) for kind in (_LANE, ir.FloatType()))
            zeros = ir.Constant(integers, None)

            def add_entry(k, sums):
                # No branch hangs on whose entry it is, which nobody could foresee: unless it is a channel's last,
                # the sum so far is added times zero and kept.
                entry = builder.load(emit.address(4, group, k))
                owner = builder.lshr(entry, _LANE(CHANNEL))
                following = builder.load(emit.address(4, group, builder.add(k, ir.Constant(_INDEX, 1))))
                is_last = builder.icmp_unsigned("!=", owner, builder.lshr(following, _LANE(CHANNEL)))
                sign = builder.sub(builder.shl(builder.and_(entry, _LANE(1)), _LANE(1)), _LANE(1))
                bit = builder.shl(_LANE(1), builder.and_(builder.lshr(entry, _LANE(1)), _LANE(31)))
                step = builder.lshr(builder.and_(entry, _LANE((1 << CHANNEL) - 1)), _LANE(6))
                columns = emit.load(emit.address(2, page, builder.zext(step, _INDEX), 0), _LANE, lanes)
                is_set = builder.icmp_unsigned("!=", builder.and_(columns, emit.splat(bit, lanes)), zeros)
                sums = builder.add(sums, builder.select(is_set, emit.splat(sign, lanes), zeros))
                used = builder.select(is_last, factor, ir.Constant(ir.FloatType(), 0.0))
                term = builder.fmul(builder.sitofp(sums, floats), emit.splat(used, lanes))
                target = emit.address(0, builder.sub(builder.zext(owner, _INDEX), channel), 0)
                emit.store(builder.fadd(emit.load(target, ir.FloatType(), lanes), term), target)
                kept = builder.sub(builder.zext(is_last, _LANE), _LANE(1))
                return builder.and_(sums, emit.splat(kept, lanes))

            emit.fold(start, stop, zeros, add_entry)
            return context.get_dummy_value()

        return signature, codegen

    return add_lists


add_lists = _make_add_lists(LANES)
"""Adds factor * the signs of each channel's entries, summed over the queries in whose group their tokens are.

``(total, channel, panels, page, entries, group, start, stop, factor)``: 64 floats of each row of total, which begins
with that channel; the entry behind the last is read, too.
"""
narrow_add_lists = _make_add_lists(TILE_LANES)
"""The same for the first 16 queries of a panel."""


def _terms_twin(vectors: int) -> Callable:
    lanes = TILE_LANES * vectors

    def tile(planes, row, last, panels, panel, steps, sizes, group, query, factor, first, total):
        rows = np.minimum(np.arange(row, row + TILE), last)
        columns = panels[panel, :steps, :lanes]
        common = np.bitwise_count(planes[rows, :steps, None] & columns).sum(axis=1, dtype=np.int32)
        terms = (2 * common - sizes[group, query : query + lanes]).astype(np.float32) * np.float32(factor)
        total[:TILE, :lanes] = terms if first else total[:TILE, :lanes] + terms

    return tile


def _make_tile_of_terms(vectors: int) -> Callable:
    @vector_code(twin=_terms_twin(vectors))
    def tile(typing_context, planes, row, last, panels, panel, steps, sizes, group, query, factor, first, total):
        operands = {"planes": (planes, types.uint32, 2), "panels": (panels, types.uint32, 3)}
        check_arrays("a tile of terms", {"sizes": (sizes, types.int32, 2), **operands})
        check_arrays("a tile of terms", {"total": (total, types.float32, 2)})
        index, real = types.intp, types.float32
        signature = types.void(
            planes, index, index, panels, index, index, sizes, index, index, real, types.boolean, total
        )

        def codegen(context, builder, signature, arguments):
            emit = Emitter(context, builder, signature, arguments)
            _, row, last, _, panel, steps, _, group, query, factor, first, _ = arguments
            rows = [emit.address(0, i, 0) for i in clamped_rows(emit, row, last)]
            counts = emit_tile(emit, False, vectors, rows, emit.address(3, panel, 0, 0), steps)
            floats, factor = ir.VectorType(ir.FloatType(), TILE_LANES), emit.splat(factor, TILE_LANES)
            for v in range(vectors):
                place = ir.Constant(_INDEX, TILE_LANES * v)
                size = emit.load(emit.address(6, group, builder.add(query, place)), _LANE, TILE_LANES)
                for r in range(TILE):
                    twice = builder.add(counts[r * vectors + v], counts[r * vectors + v])
                    term = builder.fmul(builder.sitofp(builder.sub(twice, size), floats), factor)
                    target = emit.address(11, r, place)
                    added = builder.fadd(emit.load(target, ir.FloatType(), TILE_LANES), term)
                    emit.store(builder.select(first, term, added), target)
            return context.get_dummy_value()

        return signature, codegen

    return tile


tile_of_terms = _make_tile_of_terms(LANES // TILE_LANES)
"""Adds factor * (2 popcount(plane and panel) - size) of six channels (repeating the last) and 64 queries to `total`."""
narrow_tile_of_terms = _make_tile_of_terms(1)
"""The same for the first 16 queries of a panel."""
