"""The learned bias of the attention map, in full or by relative positions on a grid of patches, as rows of floats.

A relative bias of 14 x 14 patches is a table of 729 floats a head; a row of the map takes from it one run of
consecutive entries for every row of patches. Queries of one column take the same runs, so that these are laid end to
end once for each column, and each row of the map is a piece of that.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from llvmlite import ir
from numba import types

from binvit.bits.emitter import Emitter, check_arrays
from binvit.bits.packing import word_count
from binvit.jit import aligned_empty, kernel, vector_code

_RUN = 16


class Bias(NamedTuple):
    """The attention bias of all heads of a layer, as the kernels read it; what a kind does not use is empty.

    Attributes:
        full: float32 (H, T, 64 ceil(T / 64)), one number per head and pair of tokens.
        halves: uint16 (H, T, 16 ceil(T / 16)), the bits of the same numbers as float16, from `in_halves`.
        runs: float32 (H, (2 h - 1)(2 w - 1) + 16), relative positions in falling order: the key's minus the query's.
        prefix_rows: float32 (H, prefix, 64 ceil(T / 64)), the rows of queries that are no patches.
        prefix_keys: float32 (H, 16 ceil(prefix / 16), at least 16), the bias between any patch and a key that is none.
        width: w, patches in a row of the grid.
    """

    full: np.ndarray
    halves: np.ndarray
    runs: np.ndarray
    prefix_rows: np.ndarray
    prefix_keys: np.ndarray
    width: int


def no_bias() -> Bias:
    """Return the bias of a map that has none.

    Returns:
        A `Bias` of empty arrays.
    """
    return _bias()


def full_bias(values: np.ndarray) -> Bias:
    """Prepare one number per head and pair of tokens.

    Args:
        values: (H, T, T), any float type.

    Returns:
        The bias with padded rows.

    Raises:
        ValueError: if the last two axes differ.
    """
    values = np.asarray(values)
    if values.ndim != 3 or values.shape[1] != values.shape[2]:
        raise ValueError(f"A full attention bias has the shape (heads, tokens, tokens), not {values.shape}.")
    return _bias(full=_padded(values))


def in_halves(bias: Bias) -> Bias:
    """Keep a full bias as float16 if that changes none of its numbers: it is read once an image, from far away.

    Args:
        bias: of one layer, or of some with a leading axis.

    Returns:
        The same bias, with `halves` in the place of `full`; unchanged if a number is no finite float16 number.
    """
    if not bias.full.size:
        return bias
    tokens = bias.full.shape[-2]
    numbers = bias.full[..., : -(-tokens // _RUN) * _RUN]
    halves = aligned_empty(numbers.shape, np.uint16)
    with np.errstate(over="ignore"):
        halves.view(np.float16)[...] = numbers
    back = halves.view(np.float16).astype(np.float32)
    if not (np.isfinite(back).all() and np.array_equal(back.view(np.uint32), numbers.view(np.uint32))):
        return bias
    return bias._replace(full=bias.full[..., :0, :, :], halves=halves)


def relative_bias(values: np.ndarray, grid: tuple[int, int], prefix: int) -> Bias:
    """Prepare one number per head and relative position of two patches.

    Args:
        values: (H, (2 h - 1)(2 w - 1) + prefix T + prefix), any float type, for T = prefix + h w tokens: the positions
            of the query relative to the key, row by row; the rows of the prefix tokens, which have no position; one
            number per prefix token as a key of patches.
        grid: h and w, the patches along height and width.
        prefix: number of tokens before the patches.

    Returns:
        The bias as runs of consecutive numbers.

    Raises:
        ValueError: if the table's length does not fit the grid and prefix.
    """
    values, (h, w) = np.asarray(values, np.float32), grid
    positions, tokens = (2 * h - 1) * (2 * w - 1), prefix + h * w
    wanted = positions + prefix * tokens + prefix
    if values.ndim != 2 or values.shape[1] != wanted:
        raise ValueError(
            f"A relative attention bias of {h} x {w} patches and {prefix} prefix tokens has the shape "
            f"(heads, {wanted}), not {values.shape}."
        )
    heads = len(values)
    runs = np.zeros((heads, positions + _RUN), np.float32)  # runs are copied in whole vectors
    runs[:, :positions] = values[:, positions - 1 :: -1] if positions else 0
    rows, keys = np.split(values[:, positions:], [prefix * tokens], axis=1)
    rows = rows.reshape(heads, prefix, tokens)
    padded_keys = np.zeros((heads, max(_RUN, -(-prefix // _RUN) * _RUN)), np.float32)
    padded_keys[:, :prefix] = keys
    return _bias(runs=runs, prefix_rows=_padded(rows), prefix_keys=padded_keys, width=w)


def _bias(
    full: np.ndarray | None = None,
    runs: np.ndarray | None = None,
    prefix_rows: np.ndarray | None = None,
    prefix_keys: np.ndarray | None = None,
    width: int = 0,
) -> Bias:
    nothing, flat = np.zeros((0, 0, 0), np.float32), np.zeros((0, 0), np.float32)
    return Bias(
        nothing if full is None else full,
        np.zeros((0, 0, 0), np.uint16),
        flat if runs is None else runs,
        nothing if prefix_rows is None else prefix_rows,
        flat if prefix_keys is None else prefix_keys,
        width,
    )


def _padded(rows: np.ndarray) -> np.ndarray:
    padded = aligned_empty((*rows.shape[:-1], 64 * word_count(rows.shape[-1])), np.float32)
    padded[..., : rows.shape[-1]] = rows
    padded[..., rows.shape[-1] :] = 0
    return padded


def _copy_vectors_twin(source, start, target, row, column, count):
    target[row, column : column + _RUN * count] = source[start : start + _RUN * count]


@vector_code(twin=_copy_vectors_twin)
def _copy_vectors(typing_context, source, start, target, row, column, count):
    """Copy sixteen floats `count` times."""
    check_arrays("copy_vectors", {"source": (source, types.float32, 1), "target": (target, types.float32, 2)})
    index = types.intp
    signature = types.void(source, index, target, index, index, index)

    def codegen(context, builder, signature, arguments):
        emit = Emitter(context, builder, signature, arguments)
        _, start, _, row, column, count = arguments
        source, target = emit.address(0, start), emit.address(2, row, column)

        def step(k, _):
            place = [builder.mul(k, ir.Constant(ir.IntType(64), _RUN))]
            emit.store(emit.load(builder.gep(source, place), ir.FloatType(), _RUN), builder.gep(target, place))
            return []

        emit.accumulate(count, step)
        return context.get_dummy_value()

    return signature, codegen


@kernel(allocates=False)
def unfold_runs(runs, front, width, unfolded):
    """Lay the runs of queries of one column end to end, so that the bias of a query and all patches is one piece.

    Args:
        runs: float32, `Bias.runs` of the head.
        front: numbers before the first run, at least those of the keys that are no patches.
        width: w, patches in a row of the grid.
        unfolded: float32 `unfolded_shape` of the bias, overwritten: a row per column of the grid.
    """
    stride, count = 2 * width - 1, (width + _RUN - 1) // _RUN
    for x in range(width):
        for i in range((runs.shape[0] - _RUN) // stride):
            # What is written past a run is overwritten by the next one, or lies behind the last.
            _copy_vectors(runs, i * stride + width - 1 - x, unfolded, x, front + i * width, count)


def unfolded_shape(bias: Bias) -> tuple[int, int]:
    """Return the shape of what `unfold_runs` writes for one head.

    Args:
        bias: of one layer, or of some with a leading axis.
    """
    positions, width = bias.runs.shape[-1] - _RUN, bias.width
    return (width, bias.prefix_keys.shape[-1] + positions // (2 * width - 1) * width + _RUN) if width else (0, 0)
