"""The attention map with a learned bias: exponentials become softmax + bias, and rows tell their maximum."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from llvmlite import ir
from numba import types

from binvit.bits.emitter import Emitter, check_arrays
from binvit.jit import HALF_FLOATS, kernel, vector_code

_LANES, _INDEX = 16, ir.IntType(64)
_AHEAD = 8  # rows of the bias: an image needs more numbers of it than a cache holds, and the CPU foresees too few


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
            # Behind the keys' end any of them may be read: no lane there lies in front of `prefix`.
            place = builder.select(builder.icmp_signed("<", start, emit.length(7, 0)), start, _INDEX(0))
            keys = _load_floats(emit, emit.address(7, place))
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
        attention: float32 (T, 64 P), from `binvit.packed.fast.softmax.exponentiate`; padding becomes minus infinity.
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
