"""The attention map of one head on bits: popcounts, groups by comparison, planes for the product with the value.

With q and k of d signs each, q.k = d - 2 p where p = popcount(q xor k), so a map has at most d + 1 different values,
and softmax is monotone: "A > threshold" is "p < bound" with one bound per query row and group. All functions are
kernels, see `binvit.bits.linear`. Layouts, for T tokens, P = ceil(T / 64) panels and G groups:

* keys: uint8 (P, ceil(d / 8), 64), the k-th eight bits of 64 tokens side by side
* counts: uint8 (T, 64 P), the popcounts p of every query row; 255 for padding
* planes: uint32 (G * P, 2 P, 64), the groups as panels of the product with the value: columns are the queries, K are
  the tokens; panel g * P + i holds the queries 64 i to 64 i + 63 of group g
* sizes: int32 (G, 64 P), the number of tokens in each query's group
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from llvmlite import ir
from numba import types

from binvit.bits.attention.lanes import column_sizes, write_bytes_below, write_floats_above
from binvit.bits.emitter import Emitter, check_arrays
from binvit.bits.tile import PANEL, steps_of
from binvit.jit import kernel, vector_code

MAX_HEAD_WIDTH = 254
"""Channels of a head at most: popcounts are bytes, and 255 marks padding."""
_ROWS = 6


def _count_rows_twin(queries, row, last, first, keys, panel, panels, steps, counts):
    rows = np.minimum(np.arange(row, row + _ROWS), last)
    left = queries[rows, first : first + steps]
    for p in range(panel, panel + panels):
        total = np.bitwise_count(left[:, :, None] ^ keys[p]).sum(axis=1)
        for r, values in zip(rows, total, strict=True):
            counts[r, 64 * p : 64 * p + 64] = values


def _make_count_rows(panels: int) -> Callable:
    def twin(queries, row, last, first, keys, panel, steps, counts):
        _count_rows_twin(queries, row, last, first, keys, panel, panels, steps, counts)

    @vector_code(twin=twin)
    def count_rows(typing_context, queries, row, last, first, keys, panel, steps, counts):
        check_arrays(
            "count_rows",
            {"queries": (queries, types.uint8, 2), "keys": (keys, types.uint8, 3), "counts": (counts, types.uint8, 2)},
        )
        index = types.intp
        signature = types.void(queries, index, index, index, keys, index, index, counts)

        def codegen(context, builder, signature, arguments):
            emit = Emitter(context, builder, signature, arguments)
            _, row, last, first, _, panel, steps, _ = arguments
            position, octet = ir.IntType(64), ir.IntType(8)

            def number(value):
                return ir.Constant(position, value)

            rows = []
            for r in range(_ROWS):
                i = builder.add(row, number(r))
                rows.append(builder.select(builder.icmp_signed("<", i, last), i, last))
            queries = [emit.address(0, i, first) for i in rows]
            pages = [emit.address(4, builder.add(panel, number(p)), 0, 0) for p in range(panels)]

            def step(k, counts):
                offset = builder.mul(k, number(64))
                columns = [emit.load(builder.gep(page, [offset]), octet) for page in pages]
                result = []
                for r in range(_ROWS):
                    query = emit.splat(builder.load(builder.gep(queries[r], [k])))
                    for p in range(panels):
                        count = emit.popcount(builder.xor(query, columns[p]))
                        result.append(count if counts is None else builder.add(counts[r * panels + p], count))
                return result

            totals = emit.accumulate(steps, step)
            for r in range(_ROWS):
                for p in range(panels):
                    column = builder.mul(builder.add(panel, number(p)), number(64))
                    emit.store(totals[r * panels + p], emit.address(7, rows[r], column))
            return context.get_dummy_value()

        return signature, codegen

    return count_rows


_count_four_panels = _make_count_rows(4)
_count_one_panel = _make_count_rows(1)


@kernel(allocates=False)
def prepare_keys(words, first, width, keys):
    """Rearrange the packed keys of one head so that 64 tokens lie side by side.

    Args:
        words: uint64 (T, W), packed keys of all heads; each head starts at a word of its own.
        first: the head's first word.
        width: d, its number of channels.
        keys: uint8 (P, ceil(d / 8), 64), overwritten.
    """
    octets = words.view(np.uint8)
    steps = (width + 7) // 8
    keys[keys.shape[0] - 1] = 0
    for token in range(words.shape[0]):
        for k in range(steps):
            keys[token // 64, k, token % 64] = octets[token, 8 * first + k]


def _cover_padding_twin(counts, row, panels, padding):
    counts[row, 64 * panels - 64 : 64 * panels] |= padding
    return counts[row, : 64 * panels].min()


@vector_code(twin=_cover_padding_twin)
def _cover_padding(typing_context, counts, row, panels, padding):
    """Set a row's last panel to 255 where padding is 255, and return the row's least byte."""
    check_arrays("cover_padding", {"counts": (counts, types.uint8, 2), "padding": (padding, types.uint8, 1)})
    signature = types.uint8(counts, types.intp, types.intp, padding)

    def codegen(context, builder, signature, arguments):
        emit = Emitter(context, builder, signature, arguments)
        _, row, panels, _ = arguments
        position, octet = ir.IntType(64), ir.IntType(8)
        last = builder.mul(builder.sub(panels, ir.Constant(position, 1)), ir.Constant(position, 64))
        target = emit.address(0, row, last)
        emit.store(builder.or_(emit.load(target, octet), emit.load(emit.address(3, 0), octet)), target)

        def step(k, least):
            lanes = emit.load(emit.address(0, row, builder.mul(k, ir.Constant(position, 64))), octet)
            if least is None:
                return [lanes]
            return [builder.select(builder.icmp_unsigned("<", lanes, least[0]), lanes, least[0])]

        return emit.reduce("umin", emit.accumulate(panels, step)[0])

    return signature, codegen


@kernel
def score_counts(words, first, width, keys, counts, smallest, start, stop):
    """Count the channels in which each query and each key differ.

    Args:
        words: uint64 (T, W), packed queries of all heads; each head starts at a word of its own.
        first: the head's first word.
        width: d, its number of channels.
        keys: from `prepare_keys`.
        counts: uint8 (T, 64 P), rows start to stop are overwritten.
        smallest: uint8 (T,), the least count of each row: its largest score.
        start: first query.
        stop: one past the last query.
    """
    octets = words.view(np.uint8)
    steps = (width + 7) // 8
    panels, tokens = keys.shape[0], words.shape[0]
    padding = np.zeros(64, np.uint8)
    padding[tokens - 64 * (panels - 1) :] = 255
    for row in range(start, stop, _ROWS):
        whole = panels // 4 * 4
        for panel in range(0, whole, 4):
            _count_four_panels(octets, row, stop - 1, 8 * first, keys, panel, steps, counts)
        for panel in range(whole, panels):
            _count_one_panel(octets, row, stop - 1, 8 * first, keys, panel, steps, counts)
        for r in range(row, min(row + _ROWS, stop)):
            smallest[r] = _cover_padding(counts, r, panels, padding)


@kernel
def _count_columns(planes, groups, steps, sizes, start, stop):
    panels = planes.shape[0] // groups
    scratch = np.empty((1, PANEL), np.int32)
    for g in range(groups):
        for panel in range(start // PANEL, (stop + PANEL - 1) // PANEL):
            column_sizes(planes, g * panels + panel, steps, scratch)
            for query in range(max(start, panel * PANEL), min(stop, (panel + 1) * PANEL)):
                sizes[g, query] = scratch[0, query % PANEL]


@kernel(allocates=False)
def planes_below(counts, bounds, planes, sizes, start, stop):
    """Pack the groups of a map without a bias: the bits 1[p < bound].

    Args:
        counts: from `score_counts`.
        bounds: uint8 (G, T), one per group and query row: bound b means scores above d - 2 b.
        planes: uint32 (G * P, 2 P, 64), the columns of queries start to stop are overwritten.
        sizes: int32 (G, 64 P), entries start to stop are overwritten.
        start: first query.
        stop: one past the last query.
    """
    panels, steps = counts.shape[1] // 64, steps_of(bounds.shape[1])
    for row in range(start, stop):
        panel, column = row // 64, row % 64
        for g in range(bounds.shape[0]):
            write_bytes_below(counts, row, bounds[g, row], planes, g * panels + panel, column, steps)
    _count_columns(planes, bounds.shape[0], steps, sizes, start, stop)


@kernel(allocates=False)
def planes_above(attention, cuts, planes, sizes, start, stop):
    """Pack the groups of a map of floats: the bits 1[A > cut].

    Args:
        attention: float32 (T, 64 P); padding is minus infinity.
        cuts: float32 (G, T), a threshold per group and query row. For A >= cut pass the next smaller number.
        planes: as in `planes_below`.
        sizes: as in `planes_below`.
        start: first query.
        stop: one past the last query.
    """
    panels, steps = attention.shape[1] // 64, steps_of(cuts.shape[1])
    for row in range(start, stop):
        panel, column = row // 64, row % 64
        for g in range(cuts.shape[0]):
            write_floats_above(attention, row, cuts[g, row], planes, g * panels + panel, column, steps)
    _count_columns(planes, cuts.shape[0], steps, sizes, start, stop)
