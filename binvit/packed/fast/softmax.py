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
from binvit.jit import HALF_FLOATS, WIDE_VECTORS, kernel, vector_code

WIDTHS = (16, 8, 4)
"""Lanes of torch's vectors: AVX-512, AVX2, NEON."""
_LANES, _LEVELS, _INDEX = 16, 64, ir.IntType(64)
_AHEAD = 8  # rows of the bias: an image needs more numbers of it than a cache holds, and the CPU foresees too few
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


def _add_bias_twin(attention, row, tokens, reciprocal, bias, bias_row):
    values = attention[row, :tokens] * reciprocal + bias[bias_row, :tokens]
    attention[row, :tokens] = values
    attention[row, tokens : -(-tokens // _LANES) * _LANES] = -np.inf
    return values.max()


def _add_half_bias_twin(attention, row, tokens, reciprocal, bias, bias_row):
    return _add_bias_twin(attention, row, tokens, reciprocal, bias.view(np.float16).astype(np.float32), bias_row)


def _load_floats(emit: Emitter, address: ir.Value) -> ir.Value:
    return emit.load(address, ir.FloatType(), _LANES)


def _load_halves(emit: Emitter, address: ir.Value) -> ir.Value:
    builder, floats = emit.builder, ir.VectorType(ir.FloatType(), _LANES)
    numbers = emit.load(address, ir.IntType(16), _LANES)
    if HALF_FLOATS:
        return builder.fpext(builder.bitcast(numbers, ir.VectorType(ir.HalfType(), _LANES)), floats)
    integers = ir.VectorType(ir.IntType(32), _LANES)

    def same(number):
        return ir.Constant(integers, [number] * _LANES)

    # Exponent and mantissa where float32 has them, the exponent 112 too small: exact for finite numbers.
    wide = builder.zext(numbers, integers)
    small = builder.shl(builder.and_(wide, same(0x7FFF)), same(13))
    size = builder.fmul(builder.bitcast(small, floats), ir.Constant(floats, [2.0**112] * _LANES))
    sign = builder.shl(builder.and_(wide, same(0x8000)), same(16))
    return builder.bitcast(builder.or_(builder.bitcast(size, integers), sign), floats)


class _RowWithBias:
    # Emits one row of the map: exponentials to softmax + bias, padding to minus infinity, and the maximum of the row.

    def __init__(self, emit: Emitter, row: ir.Value, tokens: ir.Value, reciprocal: ir.Value) -> None:
        builder, lanes = emit.builder, _INDEX(_LANES)
        self._emit, self._row, self._factor = emit, row, emit.splat(reciprocal, _LANES)
        self.last = builder.udiv(builder.sub(tokens, _INDEX(1)), lanes)
        self._inside = self.before(builder.sub(tokens, builder.mul(self.last, lanes)))

    def before(self, count: ir.Value) -> ir.Value:
        left = self._emit.splat(self._emit.builder.trunc(count, ir.IntType(32)), _LANES)
        return self._emit.builder.icmp_signed("<", ir.Constant(left.type, list(range(_LANES))), left)

    def end(self, bias: Callable[[ir.Value], ir.Value]) -> ir.Value:
        return self._write(self.last, bias, self._inside)

    def step(self, k: ir.Value, largest: ir.Value, bias: Callable[[ir.Value], ir.Value]) -> ir.Value:
        builder, values = self._emit.builder, self._write(k, bias)
        return builder.select(builder.fcmp_ordered(">", values, largest), values, largest)

    def _write(self, k: ir.Value, bias: Callable[[ir.Value], ir.Value], inside: ir.Value | None = None) -> ir.Value:
        builder, start = self._emit.builder, self._emit.builder.mul(k, _INDEX(_LANES))
        target = self._emit.address(0, self._row, start)
        values = builder.fadd(builder.fmul(_load_floats(self._emit, target), self._factor), bias(start))
        if inside is not None:
            values = builder.select(inside, values, ir.Constant(values.type, [float("-inf")] * _LANES))
        self._emit.store(values, target)
        return values


def _make_add_bias(half: bool) -> Callable:
    load_bias = _load_halves if half else _load_floats

    @vector_code(twin=_add_half_bias_twin if half else _add_bias_twin)
    def add_bias(typing_context, attention, row, tokens, reciprocal, bias, bias_row):
        """Turn a row of exponentials into softmax + bias, set its padding to minus infinity, return the maximum."""
        number = types.uint16 if half else types.float32
        check_arrays("add_bias", {"attention": (attention, types.float32, 2), "bias": (bias, number, 2)})
        index, real = types.intp, types.float32
        signature = types.float32(attention, index, index, real, bias, index)

        def codegen(context, builder, signature, arguments):
            emit = Emitter(context, builder, signature, arguments)
            _, row, tokens, reciprocal, _, bias_row = arguments
            later, out = builder.add(bias_row, _INDEX(_AHEAD)), _RowWithBias(emit, row, tokens, reciprocal)

            def bias_at(start):
                emit.prefetch(emit.address(4, later, start))
                return load_bias(emit, emit.address(4, bias_row, start))

            largest = emit.fold(0, out.last, out.end(bias_at), lambda k, value: out.step(k, value, bias_at))
            return emit.extremum(">", largest)

        return signature, codegen

    return add_bias


_add_bias, _add_half_bias = _make_add_bias(half=False), _make_add_bias(half=True)


def _add_piece_twin(attention, row, tokens, reciprocal, unfolded, column, start, keys, prefix):
    bias = unfolded[column : column + 1, start : start + tokens].copy()
    bias[0, :prefix] = keys[:prefix]
    return _add_bias_twin(attention, row, tokens, reciprocal, bias, 0)


@vector_code(twin=_add_piece_twin)
def _add_piece(typing_context, attention, row, tokens, reciprocal, unfolded, column, start, keys, prefix):
    """Do as `_add_bias` with a piece of a row of `unfolded`, whose first numbers those of `keys` replace."""
    floats, index = types.float32, types.intp
    arrays = {"attention": (attention, floats, 2), "unfolded": (unfolded, floats, 2), "keys": (keys, floats, 1)}
    check_arrays("add_piece", arrays)
    signature = floats(attention, index, index, floats, unfolded, index, index, keys, index)

    def codegen(context, builder, signature, arguments):
        emit = Emitter(context, builder, signature, arguments)
        _, row, tokens, reciprocal, _, column, first, _, prefix = arguments
        out = _RowWithBias(emit, row, tokens, reciprocal)

        def of_patches(start):
            return _load_floats(emit, emit.address(4, column, builder.add(first, start)))

        def of_any(start):
            place = builder.select(builder.icmp_signed("<", start, emit.length(7, 0)), start, _INDEX(0))
            keys = _load_floats(emit, emit.address(7, place))  # of which none is taken from place 0 behind the last
            return builder.select(out.before(builder.sub(prefix, start)), keys, of_patches(start))

        mixed = builder.udiv(builder.add(prefix, _INDEX(_LANES - 1)), _INDEX(_LANES))
        mixed = builder.select(builder.icmp_signed("<", mixed, out.last), mixed, out.last)
        largest = emit.fold(0, mixed, out.end(of_any), lambda k, value: out.step(k, value, of_any))
        largest = emit.fold(mixed, out.last, largest, lambda k, value: out.step(k, value, of_patches))
        return emit.extremum(">", largest)

    return signature, codegen


@kernel(allocates=False)
def add_bias(attention, reciprocals, bias, largest, start, stop):
    """Turn exponentials into the attention map, softmax + bias.

    Args:
        attention: float32 (T, 64 P), from `exponentiate`; padding becomes minus infinity.
        reciprocals: float32 (T,), from `exponentiate`.
        bias: float32 (T, at least 16 ceil(T / 16)).
        largest: float32 (T,), the maximum of each row.
        start: first query.
        stop: one past the last query.
    """
    tokens = reciprocals.shape[0]
    for row in range(start, stop):
        largest[row] = _add_bias(attention, row, tokens, reciprocals[row], bias, row)


@kernel(allocates=False)
def add_half_bias(attention, reciprocals, bias, largest, start, stop):
    """Turn exponentials into the attention map, softmax + bias, with a bias whose numbers are float16.

    Args:
        attention: as for `add_bias`.
        reciprocals: as for `add_bias`.
        bias: uint16 (T, at least 16 ceil(T / 16)), bits of float16 numbers.
        largest: as for `add_bias`.
        start: first query.
        stop: one past the last query.
    """
    tokens = reciprocals.shape[0]
    for row in range(start, stop):
        largest[row] = _add_half_bias(attention, row, tokens, reciprocals[row], bias, row)


@kernel(allocates=False)
def add_relative_bias(attention, reciprocals, unfolded, prefix_rows, prefix_keys, width, largest, start, stop):
    """Turn exponentials into the attention map, softmax + bias, with a bias by relative positions.

    Args:
        attention: as for `add_bias`.
        reciprocals: as for `add_bias`.
        unfolded: float32, from `binvit.bits.attention.bias.unfold_runs`; as many numbers in front as `prefix_keys`.
        prefix_rows: float32, `Bias.prefix_rows` of the head.
        prefix_keys: float32, `Bias.prefix_keys` of the head.
        width: w, patches in a row of the grid.
        largest: as for `add_bias`.
        start: first query.
        stop: one past the last query.
    """
    tokens, prefix, front = reciprocals.shape[0], prefix_rows.shape[0], prefix_keys.shape[0]
    for row in range(start, min(stop, prefix)):
        largest[row] = _add_bias(attention, row, tokens, reciprocals[row], prefix_rows, row)
    height = (tokens - prefix) // width
    for row in range(max(start, prefix), stop):
        y, x = (row - prefix) // width, (row - prefix) % width
        first = front - prefix + (height - 1 - y) * width
        largest[row] = _add_piece(attention, row, tokens, reciprocals[row], unfolded, x, first, prefix_keys, prefix)


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
