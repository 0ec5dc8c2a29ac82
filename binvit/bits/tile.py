"""The register tile of all products of bits: xor or and, population count, add.

The right operand is kept word-major in panels: 32 bits of 64 columns lie side by side, four vectors of sixteen lanes. A
tile of six rows by those four vectors stays in 24 vector registers while K goes by; a step is one broadcast of an
activation word, one xor, one population count and one addition. 32-bit lanes make the counts int32 without a
conversion. LLVM lowers the same code to AVX-512, to shuffles on AVX2 and SSE, and to NEON.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from llvmlite import ir
from numba import types

from binvit.bits.emitter import Emitter, check_arrays
from binvit.jit import kernel, vector_code

PANEL = 64
"""Columns of a panel of prepared weights; also the bits of one word, so that a panel's signs are one output word."""
TILE = 6
"""Rows of the register tile: 3 to 6 rows are equally fast at K = 384, 6 are 3 % faster at K = 1536."""
TILE_LANES = 16
"""Columns of a vector of the tile."""
_VECTORS = PANEL // TILE_LANES


def _tile_twin(signed: bool) -> Callable:
    def tile(a, row, last, panels, panel, steps, length, out, out_row, out_column):
        rows = np.minimum(np.arange(row, row + TILE), last)
        left, right = a[rows, :steps, None], panels[panel, :steps]
        counts = np.bitwise_count(left ^ right if signed else left & right).sum(axis=1, dtype=np.int32)
        out[out_row : out_row + TILE, out_column : out_column + PANEL] = length - 2 * counts if signed else counts

    return tile


def emit_tile(
    emit: Emitter,
    signed: bool,
    vectors: int,
    rows: list[ir.Value],
    page: ir.Value,
    steps: ir.Value,
    follows: bool = False,
) -> list:
    """Emit the counts of one register tile: xor (or and), population count, add, over all steps.

    Args:
        emit: the emitter.
        signed: whether to count differing bits of signs instead of common bits.
        vectors: how many vectors of sixteen columns.
        rows: addresses of the rows of the left operand.
        page: address of the panel of the right operand.
        steps: number of 32-bit steps, at least 1.
        follows: whether the next panel will be read soon, and maybe from afar.

    Returns:
        A vector of sixteen counts per row and vector, row by row.
    """
    builder, index, lane = emit.builder, ir.IntType(64), ir.IntType(32)

    def step(k, counts):
        base = builder.mul(k, index(PANEL))
        columns = [
            emit.load(builder.gep(page, [builder.add(base, index(v * TILE_LANES))]), lane, TILE_LANES)
            for v in range(vectors)
        ]
        if follows:
            for v in range(vectors):
                place = builder.add(builder.mul(builder.add(k, steps), index(PANEL)), index(v * TILE_LANES))
                emit.prefetch(builder.gep(page, [place]))
        result = []
        for r, row in enumerate(rows):
            activation = emit.splat(builder.load(builder.gep(row, [k])), TILE_LANES)
            for v in range(vectors):
                count = emit.popcount((builder.xor if signed else builder.and_)(activation, columns[v]))
                result.append(count if counts is None else builder.add(counts[r * vectors + v], count))
        return result

    return emit.accumulate(steps, step)


def clamped_rows(emit: Emitter, row: ir.Value, last: ir.Value) -> list[ir.Value]:
    """Emit the indices of a tile's rows: those past the end repeat the last, so that a short tile needs no own code.

    Args:
        emit: the emitter.
        row: the first row.
        last: the last row that exists.

    Returns:
        Six indices.
    """
    rows = [emit.builder.add(row, ir.IntType(64)(r)) for r in range(TILE)]
    return [emit.builder.select(emit.builder.icmp_signed("<", r, last), r, last) for r in rows]


def _make_tile(signed: bool) -> Callable:
    @vector_code(twin=_tile_twin(signed))
    def tile(typing_context, a, row, last, panels, panel, steps, length, out, out_row, out_column):
        check_arrays("a register tile", {"a": (a, types.uint32, 2), "w": (panels, types.uint32, 3)})
        check_arrays("a register tile", {"out": (out, types.int32, 2)})
        index = types.intp
        signature = types.void(a, index, index, panels, index, index, types.int32, out, index, index)

        def codegen(context, builder, signature, arguments):
            emit = Emitter(context, builder, signature, arguments)
            _, row, last, _, panel, steps, length, _, out_row, out_column = arguments
            rows = [emit.address(0, i, 0) for i in clamped_rows(emit, row, last)]
            totals = emit_tile(emit, signed, _VECTORS, rows, emit.address(3, panel, 0, 0), steps)
            for r in range(TILE):
                target = emit.address(7, builder.add(out_row, ir.IntType(64)(r)), out_column)
                for v in range(_VECTORS):
                    total = totals[r * _VECTORS + v]
                    if signed:
                        total = builder.sub(emit.splat(length, TILE_LANES), builder.add(total, total))
                    emit.store(total, builder.gep(target, [ir.IntType(64)(v * TILE_LANES)]))
            return context.get_dummy_value()

        return signature, codegen

    return tile


tile_of_signs = _make_tile(signed=True)
"""Writes K - 2 popcount(a xor w) of six rows (repeating the last) and 64 columns to an int32 array."""
tile_of_common_bits = _make_tile(signed=False)
"""Writes popcount(a and w) of six rows (repeating the last) and 64 columns to an int32 array."""


@kernel
def steps_of(length: int) -> int:
    """Return how many 32-bit steps hold `length` bits.

    Args:
        length: K.

    Returns:
        ceil(K / 32); a padding half word is never read.
    """
    return (length + 31) // 32
