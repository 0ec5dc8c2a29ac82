"""Binary linear layers on packed tokens: normalize, shift and pack what goes in; keep bits or floats of what comes out.

All functions are kernels: compiled code may call them, so that a whole forward pass is one compiled function. They
work on the token rows start to stop, and never allocate more than a few kilobytes. Layouts, for T tokens, width D, N
outputs:

* words of tokens: uint64 (T, ceil(D / 64)), as `pack_signs` makes them
* panels of weights: ``prepare_weights(...).panels``; vectors per output are padded with `pad_outputs`
* panels of tokens: uint32 (ceil(T / 64), 2 ceil(D / 64), 64): the words of tokens word-major, for products whose
  columns are the tokens
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from binvit.bits.gemm import PANEL, TILE, steps_of, tile_of_signs
from binvit.bits.jit import kernel
from binvit.bits.lanes import in_interval, normalized_signs, scale_and_add
from binvit.bits.packing import word_count


class Intervals(NamedTuple):
    """Which integers of each output channel give a bit: those of one interval, or all others.

    Attributes:
        lower: int32 (64 panels,), the interval's first integer.
        span: uint32 (64 panels,), its last integer minus its first.
        flip: uint64 (panels,), 1 where the bit is set outside the interval.
    """

    lower: np.ndarray
    span: np.ndarray
    flip: np.ndarray


def make_intervals(first: np.ndarray, last: np.ndarray, outside: np.ndarray | None = None) -> Intervals:
    """Prepares the bits 1[first <= integer <= last], or their complement, for `linear_to_bits`.

    A threshold is a half-open interval: ``1[integer >= t]`` has first t and last 2**31 - 1.

    Args:
        first: whole numbers (N,), the interval's first integer.
        last: whole numbers (N,), its last integer; below `first` for an empty interval.
        outside: bool (N,), True where the bit is set outside the interval.

    Returns:
        The intervals, padded to whole panels with channels whose bit is never set.

    Raises:
        ValueError: if the shapes differ or a number does not fit into 32 bits.
    """
    first, last = np.asarray(first, np.int64), np.asarray(last, np.int64)
    outside = np.zeros(first.shape, bool) if outside is None else np.asarray(outside, bool)
    if first.ndim != 1 or first.shape != last.shape or first.shape != outside.shape:
        raise ValueError(
            f"Intervals need one first, last and outside per channel, not shapes {first.shape}, {last.shape} and "
            f"{outside.shape}."
        )
    limits = np.iinfo(np.int32)
    if first.size and (min(first.min(), last.min()) < limits.min or max(first.max(), last.max()) > limits.max):
        raise ValueError(f"Interval bounds must lie between {limits.min} and {limits.max}.")
    empty = last < first
    size = word_count(len(first)) * PANEL
    lower, span = np.full(size, limits.min, np.int32), np.full(size, 2**32 - 1, np.uint32)
    flip = np.ones(size, bool)  # outside of everything: never
    lower[: len(first)] = np.where(empty, limits.min, first)
    span[: len(first)] = np.where(empty, 2**32 - 1, last - first)
    flip[: len(first)] = outside ^ empty
    return Intervals(lower, span, np.packbits(flip, bitorder="little").view("<u8").astype(np.uint64))


def pad_outputs(x: np.ndarray, dtype: np.typing.DTypeLike = np.float32) -> np.ndarray:
    """Pads a vector per output channel with zeros to whole panels.

    Args:
        x: (N,).
        dtype: its type in the kernel.

    Returns:
        Array (64 ceil(N / 64),).
    """
    padded = np.zeros(word_count(len(x)) * PANEL, dtype)
    padded[: len(x)] = x
    return padded


@kernel(reorder=True)
def normalize_and_pack(x, gamma, beta, shift, epsilon, words, start, stop):
    """Packs the signs of LayerNorm(x) + shift.

    Args:
        x: float32 (T, D), the residual stream.
        gamma: float32 (D,), LayerNorm's weight.
        beta: float32 (D,), LayerNorm's bias.
        shift: float32 (D,), added before the sign.
        epsilon: LayerNorm's epsilon.
        words: uint64 (T, ceil(D / 64)), rows start to stop are overwritten.
        start: first row.
        stop: one past the last row.
    """
    # No calls with arrays inside the loop: counting their references would take longer than the row itself.
    width = x.shape[1]
    whole = width // 64
    share = np.float32(1) / np.float32(width)
    for i in range(start, stop):
        total = np.float32(0)
        for k in range(width):
            total += x[i, k]
        mean = total * share
        squares = np.float32(0)
        for k in range(width):
            squares += (x[i, k] - mean) * (x[i, k] - mean)
        inverse = np.float32(1) / np.sqrt(squares * share + np.float32(epsilon))
        for w in range(whole):
            words[i, w] = normalized_signs(x, i, 64 * w, mean, inverse, gamma, beta, shift)
        if whole < words.shape[1]:
            word = np.uint64(0)
            for k in range(64 * whole, width):
                if ((x[i, k] - mean) * inverse * gamma[k] + beta[k]) + shift[k] >= 0:
                    word |= np.uint64(1) << np.uint64(k - 64 * whole)
            words[i, whole] = word


@kernel
def words_to_panels(words, panels, start, stop):
    """Rearranges the words of tokens into panels of tokens, for products whose columns are the tokens.

    Args:
        words: uint64 (T, W).
        panels: uint32 (ceil(T / 64), 2 W, 64), the columns of tokens start to stop are overwritten.
        start: first token.
        stop: one past the last token.
    """
    for i in range(start, stop):
        panel, column = i // 64, i % 64
        for w in range(words.shape[1]):
            panels[panel, 2 * w, column] = np.uint32(words[i, w] & np.uint64(0xFFFFFFFF))
            panels[panel, 2 * w + 1, column] = np.uint32(words[i, w] >> np.uint64(32))


@kernel
def linear_to_bits(words, panels, length, lower, span, flip, out, start, stop):
    """Multiplies signs by signs and keeps one bit of each sum: whether it lies in its channel's interval.

    Args:
        words: uint64 (T, ceil(length / 64)), signs of the input.
        panels: uint32 panels of the weights (N, length).
        length: number of inputs, at least 1.
        lower: `Intervals.lower`.
        span: `Intervals.span`.
        flip: `Intervals.flip`.
        out: uint64 (T, ceil(N / 64)), rows start to stop are overwritten; padding bits are zero.
        start: first row.
        stop: one past the last row.
    """
    halves = words.view(np.uint32)
    steps = steps_of(length)
    counts = np.empty((TILE, PANEL), np.int32)
    for panel in range(panels.shape[0]):
        for row in range(start, stop, TILE):
            tile_of_signs(halves, row, stop - 1, panels, panel, steps, length, counts, 0, 0)
            for r in range(min(TILE, stop - row)):
                out[row + r, panel] = in_interval(counts, r, lower, span, panel * PANEL) ^ flip[panel]


@kernel
def linear_to_floats(words, panels, length, sums, unsigned, scale, bias, out, residual, start, stop):
    """Multiplies signs, or levels {0, 1}, by signs, scales each channel, adds its bias and maybe the residual stream.

    Args:
        words: uint64 (T, ceil(length / 64)), bits of the input.
        panels: uint32 panels of the weights (N, length).
        length: number of inputs, at least 1.
        sums: int32 (64 panels,), `PreparedWeights.sums` if `unsigned`, else zeros.
        unsigned: whether bits mean {0, 1} instead of {-1, +1}.
        scale: float32 (64 panels,), see `pad_outputs`.
        bias: float32 (64 panels,).
        out: float32 (T, N), rows start to stop are overwritten: integer * scale + bias.
        residual: whether to add to what `out` holds instead.
        start: first row.
        stop: one past the last row.
    """
    halves = words.view(np.uint32)
    steps = steps_of(length)
    halve = np.int32(1) if unsigned else np.int32(0)
    counts = np.empty((TILE, PANEL), np.int32)
    for panel in range(panels.shape[0]):
        column = panel * PANEL
        columns = min(PANEL, out.shape[1] - column)
        for row in range(start, stop, TILE):
            tile_of_signs(halves, row, stop - 1, panels, panel, steps, length, counts, 0, 0)
            for r in range(min(TILE, stop - row)):
                if columns == PANEL:
                    scale_and_add(counts, r, sums, halve, scale, bias, column, out, row + r, residual)
                else:
                    for c in range(columns):
                        n = column + c
                        y = np.float32((counts[r, c] + sums[n]) >> halve) * scale[n] + bias[n]
                        out[row + r, n] = out[row + r, n] + y if residual else y
