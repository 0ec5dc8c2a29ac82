"""Softmax of binary scores with the very roundings of torch's CPU kernel, so that no bit of the fast path differs.

torch computes exp(x - max) with SLEEF's polynomial, sums in vectors of some lanes (16 on AVX-512, 8 on AVX2) that it
combines by halves, and multiplies by the sum's reciprocal. A row of scores of d channels has at most d + 1 different
exponentials, so all of them stand in a table, one row for each largest score.

References:
    Shibata and Petrogalli, SLEEF: A portable vectorized library of C standard mathematical functions, 2020 (expf with
    one unit in the last place), and torch's `cpu/vec/functional_base.h` (`reduce_all`).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from llvmlite import ir
from numba import types

from binvit.bits.emitter import Emitter, check_arrays
from binvit.jit import WIDE_VECTORS, kernel, vector_code

WIDTHS = (16, 8, 4)
"""Lanes of torch's vectors: AVX-512, AVX2, NEON."""
_LANES, _LEVELS = 16, 64
_POLYNOMIAL = (0.00139304355252534151, 0.00833336077630519867, 0.0416664853692054749, 0.166666671633720398, 0.5)


def _fused(a: np.ndarray, b: np.ndarray | np.float32, c: np.ndarray | np.float32) -> np.ndarray:
    return (a.astype(np.float64) * np.float64(b) + np.float64(c)).astype(np.float32)


def exponentials(x: np.ndarray) -> np.ndarray:
    """Compute exp(x) for float32 x <= 0 as SLEEF does."""
    x = x.astype(np.float32)
    powers = np.rint(x * np.float32(1.442695040888963407))
    rest = _fused(powers, np.float32(-0.693145751953125), x)
    rest = _fused(powers, np.float32(-1.428606765330187045e-06), rest)
    y = np.full_like(rest, 0.000198527617612853646)
    for coefficient in _POLYNOMIAL:
        y = _fused(y, rest, np.float32(coefficient))
    y = np.float32(1) + _fused(rest * rest, y, rest)
    return np.where(x < -104, np.float32(0), np.ldexp(y, powers.astype(np.int32)).astype(np.float32))


def score_table(scale: torch.Tensor | None, factor: torch.Tensor, width: int) -> np.ndarray:
    """Tabulate the exponentials of a softmax over scores (d - 2 p) * scale * factor.

    Args:
        scale: product of the scales of query and key, or None for 1.
        factor: what the scaled product is multiplied by, 1 / sqrt(d).
        width: d, channels of a head; p counts those that differ, 0 to d.

    Returns:
        float32 (d + 1, at least 64): entry (m, i) is exp of the score of m + i minus that of m; zeros behind p = d.
    """
    scores = torch.arange(width, -width - 1, -2, dtype=torch.float32)
    scores = (scores if scale is None else scores * scale) * factor
    differences = (scores[None] - scores[:, None]).numpy()
    table = np.zeros((width + 1, max(width + 1, _LEVELS)), np.float32)
    for least in range(width + 1):
        table[least, : width + 1 - least] = exponentials(differences[least, least:])
    return table


def torch_lanes() -> int:
    """Find how many lanes torch's softmax has on this machine, by comparing results; 16 if none agrees."""
    generator = torch.Generator().manual_seed(0)
    counts = torch.randint(0, 41, (64, 197), generator=generator)
    factor = torch.tensor(0.11, dtype=torch.float32)
    scores = (40 - 2 * counts).float() * factor
    expected, table = torch.softmax(scores, -1).numpy(), score_table(None, factor, 40)
    octets = counts.numpy().astype(np.uint8)
    attention, reciprocals = np.zeros(octets.shape, np.float32), np.zeros(64, np.float32)
    for lanes in WIDTHS:
        _by_loop(octets, octets.min(1), table, lanes, 197, reciprocals, attention, 0, 64)
        if np.array_equal(attention * reciprocals[:, None], expected):
            return lanes
    return WIDTHS[0]


@kernel
def _row_by_loop(counts, row, least, table, lanes, tokens, attention):
    parts = np.zeros(_LANES, np.float32)
    for j in range(tokens):
        value = table[least, np.int64(counts[row, j]) - least]
        parts[j % lanes] += value
        if attention.shape[0]:
            attention[row, j] = value
    if tokens < lanes:
        for j in range(1, tokens):
            parts[0] += parts[j]
    else:
        while lanes > 1:
            lanes //= 2
            for j in range(lanes):
                parts[j] += parts[lanes + j]
    return parts[0]


@kernel(allocates=False)
def _by_loop(counts, smallest, table, lanes, tokens, reciprocals, attention, start, stop):
    for row in range(start, stop):
        total = _row_by_loop(counts, row, np.int64(smallest[row]), table, lanes, tokens, attention)
        reciprocals[row] = np.float32(1) / total


def _make_row_by_permutation(keep: bool) -> Callable:
    @vector_code(twin=None)
    def row_by_permutation(typing_context, counts, row, least, table, vectors, attention):
        """Sum the exponentials of a row whose levels are below 64, or 255 for padding; may keep them."""
        check_arrays("row_by_permutation", {"counts": (counts, types.uint8, 2), "table": (table, types.float32, 2)})
        check_arrays("row_by_permutation", {"attention": (attention, types.float32, 2)})
        index = types.intp
        signature = types.float32(counts, index, index, table, index, attention)

        def codegen(context, builder, signature, arguments):
            emit = Emitter(context, builder, signature, arguments)
            _, row, least, _, vectors, _ = arguments
            position, lane, real = ir.IntType(64), ir.IntType(32), ir.FloatType()
            integers, floats = ir.VectorType(lane, _LANES), ir.VectorType(real, _LANES)
            tables = [emit.load(emit.address(3, least, first), real, _LANES) for first in range(0, _LEVELS, _LANES)]
            lowest = emit.splat(builder.trunc(least, lane), _LANES)

            def step(k, sums):
                start = builder.mul(k, ir.Constant(position, _LANES))
                where = builder.zext(emit.load(emit.address(0, row, start), ir.IntType(8), _LANES), integers)
                where = builder.sub(where, lowest)
                low, high = (
                    emit.call("llvm.x86.avx512.vpermi2var.ps.512", floats, tables[i], where, tables[i + 1])
                    for i in (0, 2)
                )
                is_low = builder.icmp_unsigned("<", where, ir.Constant(integers, [_LEVELS // 2] * _LANES))
                is_known = builder.icmp_unsigned("<", where, ir.Constant(integers, [_LEVELS] * _LANES))
                values = builder.select(is_low, low, builder.select(is_known, high, ir.Constant(floats, None)))
                if keep:
                    emit.store(values, emit.address(5, row, start))
                return [values if sums is None else builder.fadd(sums[0], values)]

            (total,) = emit.accumulate(vectors, step)
            lanes = _LANES
            while lanes > 1:
                lanes //= 2
                low, high = (
                    builder.shuffle_vector(
                        total, total, ir.Constant(ir.VectorType(lane, lanes), list(range(first, first + lanes)))
                    )
                    for first in (0, lanes)
                )
                total = builder.fadd(low, high)
            return builder.extract_element(total, ir.Constant(lane, 0))

        return signature, codegen

    return row_by_permutation


_sum_row, _keep_row = _make_row_by_permutation(False), _make_row_by_permutation(True)


@kernel(allocates=False)
def _by_permutation(counts, smallest, table, lanes, tokens, reciprocals, attention, start, stop):
    width, vectors = table.shape[0] - 1, (tokens + _LANES - 1) // _LANES
    for row in range(start, stop):
        least = np.int64(smallest[row])
        if lanes != _LANES or tokens < _LANES or width - least >= _LEVELS:
            total = _row_by_loop(counts, row, least, table, lanes, tokens, attention)
        elif attention.shape[0]:
            total = _keep_row(counts, row, least, table, vectors, attention)
        else:
            total = _sum_row(counts, row, least, table, vectors, attention)
        reciprocals[row] = np.float32(1) / total


exponentiate = _by_permutation if WIDE_VECTORS else _by_loop
"""Looks up the exponentials of each row and sums them: the softmax of popcount p is exponential * reciprocal.

``(counts, smallest, table, lanes, tokens, reciprocals, attention, start, stop)`` with counts and smallest from
`binvit.bits.attention.scores.score_counts`, table from `score_table`, lanes from `torch_lanes`; reciprocals float32
(T,) of the sums; attention float32 (T, 64 P) receives the exponentials, or (0, ...) if nobody wants them.
"""


@kernel(allocates=False)
def group_bounds(table, smallest, reciprocals, cuts, bounds, start, stop):
    """Turn thresholds of a map without a bias into bounds of the popcount: softmax > cut exactly where p < bound.

    Args:
        table: from `score_table`.
        smallest: from `binvit.bits.attention.scores.score_counts`.
        reciprocals: from `exponentiate`.
        cuts: float32 (G, T), a threshold per group and query row.
        bounds: uint8 (G, T), columns start to stop are overwritten.
        start: first query.
        stop: one past the last query.
    """
    for g in range(cuts.shape[0]):
        for row in range(start, stop):
            least, cut, reciprocal = np.int64(smallest[row]), cuts[g, row], reciprocals[row]
            # The table falls: bisect for the number of levels above the cut.
            low, high = 0, table.shape[0] - least
            while low < high:
                middle = (low + high) // 2
                if table[least, middle] * reciprocal > cut:
                    low = middle + 1
                else:
                    high = middle
            bounds[g, row] = least + low
