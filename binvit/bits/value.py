"""The product of attention planes and value planes of one head, superposed: sum over i and j of a_i c_j G_i (V_j M_j).

Everything lies transposed: rows are channels, columns are queries, K are the tokens. So the first value group is a
product of tiles, and an element of a sparse higher group is one row of bits to add. All functions are kernels, see
`binvit.bits.linear`. Layouts, for T tokens, P = ceil(T / 64), d channels and G value groups:

* values: float32 (d, 64 P), the value of one head transposed
* value planes: uint32 (2 G d, 2 P): row 2 g d + c is the sign plane of channel c in group g, row (2 g + 1) d + c its
  mask
* kinds: int64 (G,), how a group is multiplied: EVERYTHING (mask of ones), MASKED (both planes) or LISTED (its few
  elements)
* starts: int32 (G, d + 1) and entries: int32 (G, capacity): the elements of a listed group, channel by channel, each as
  2 token + sign
"""

from __future__ import annotations

import numpy as np

from binvit.bits.gemm import (
    PANEL,
    TILE,
    narrow_tile_of_common_bits,
    narrow_tile_of_signs,
    steps_of,
    tile_of_common_bits,
    tile_of_signs,
)
from binvit.bits.jit import kernel
from binvit.bits.lanes import (
    add_bits,
    add_counts,
    floats_above,
    floats_below,
    floats_not_below,
    largest_of_row,
    least_of_row,
    lowest_bit,
    popcount,
)

EVERYTHING, MASKED, LISTED = 0, 1, 2
_NARROW = 16


def entry_capacity(width: int, tokens: int) -> int:
    """Returns how many elements of a value group are worth listing instead of multiplying planes.

    Args:
        width: d, number of channels.
        tokens: T.

    Returns:
        The length of `entries`: one element in 24, where both ways take the same time.
    """
    return max(1, width * tokens // 24)


@kernel
def linear_transposed(weights, first, width, panels, tokens, length, scale, bias, shift, values):
    """Multiplies some rows of packed weights with all tokens: the value of one head, transposed.

    Args:
        weights: uint64 (N, ceil(length / 64)), packed weights, not prepared.
        first: the head's first row of weights.
        width: d, its number of rows.
        panels: uint32 panels of the tokens, from `words_to_panels`.
        tokens: T.
        length: number of inputs, at least 1.
        scale: float32 (N,), per output channel.
        bias: float32 (N,).
        shift: float32 (N,), added after the bias.
        values: float32 (d, 64 P), overwritten: (integer * scale + bias) + shift.
    """
    halves = weights.view(np.uint32)
    steps = steps_of(length)
    counts = np.empty((TILE, PANEL), np.int32)
    for panel in range(panels.shape[0]):
        narrow = tokens - panel * PANEL <= _NARROW
        for channel in range(0, width, TILE):
            row = first + channel
            if narrow:
                narrow_tile_of_signs(halves, row, first + width - 1, panels, panel, steps, length, counts, 0, 0)
            else:
                tile_of_signs(halves, row, first + width - 1, panels, panel, steps, length, counts, 0, 0)
            for r in range(min(TILE, width - channel)):
                factor, offset, after = scale[row + r], bias[row + r], shift[row + r]
                for c in range(PANEL):
                    values[channel + r, panel * PANEL + c] = (np.float32(counts[r, c]) * factor + offset) + after


@kernel
def extrema(values, tokens):
    """Finds the least and the largest value of a head.

    Args:
        values: float32 (d, 64 P).
        tokens: T; what lies behind is padding.

    Returns:
        Two float32 numbers.
    """
    least, largest = np.float32(np.inf), -np.float32(np.inf)
    for c in range(values.shape[0]):
        least = min(least, least_of_row(values, c, tokens))
        largest = max(largest, largest_of_row(values, c, tokens))
    return least, largest


@kernel
def value_planes(values, tokens, lower, upper, planes, kinds, starts, entries):
    """Packs the groups of a value: which elements lie below `lower` or above `upper`, and their signs.

    Args:
        values: float32 (d, 64 P).
        tokens: T.
        lower: float32 (G,), elements below it are in the group. A plain sign has infinity here and minus infinity in
            `upper`; GSB's first group, in which an exact zero contributes nothing, has 0 and 0.
        upper: float32 (G,), elements above it are in the group.
        planes: uint32 (2 G d, 2 P), overwritten.
        kinds: int64 (G,), overwritten.
        starts: int32 (G, d + 1), overwritten.
        entries: int32 (G, capacity), overwritten, see `entry_capacity`.
    """
    width, words = values.shape[0], values.shape[1] // 64
    capacity = entries.shape[1]
    for g in range(lower.shape[0]):
        total = 0
        for c in range(width):
            starts[g, c] = min(total, capacity)
            sign_row, mask_row = 2 * g * width + c, (2 * g + 1) * width + c
            for w in range(words):
                rest = tokens - 64 * w
                valid = ~np.uint64(0) if rest >= 64 else (np.uint64(1) << np.uint64(rest)) - np.uint64(1)
                mask = (floats_below(values, c, 64 * w, lower[g]) | floats_above(values, c, 64 * w, upper[g])) & valid
                sign = floats_not_below(values, c, 64 * w, np.float32(0)) & mask
                planes[sign_row, 2 * w] = np.uint32(sign & np.uint64(0xFFFFFFFF))
                planes[sign_row, 2 * w + 1] = np.uint32(sign >> np.uint64(32))
                planes[mask_row, 2 * w] = np.uint32(mask & np.uint64(0xFFFFFFFF))
                planes[mask_row, 2 * w + 1] = np.uint32(mask >> np.uint64(32))
                before = total
                total += popcount(mask)
                if total <= capacity:
                    while mask != np.uint64(0):
                        bit = lowest_bit(mask)
                        entries[g, before] = 2 * (64 * w + bit) + np.int64(sign >> np.uint64(bit) & np.uint64(1))
                        before += 1
                        mask &= mask - np.uint64(1)
        starts[g, width] = min(total, capacity)
        kinds[g] = EVERYTHING if total == width * tokens else LISTED if total <= capacity else MASKED


@kernel
def attend(panels, sizes, planes, kinds, starts, entries, tokens, coefficients, shift, signs, floats, column):
    """Multiplies attention groups with value groups and combines the exact integers in order, attention groups first.

    Args:
        panels: uint32 (G_a P, 2 P, 64), attention planes, see `binvit.bits.attention`.
        sizes: int32 (G_a, 64 P), tokens in each query's group.
        planes: uint32 (2 G_v d, 2 P), from `value_planes`.
        kinds: int64 (G_v,), from `value_planes`.
        starts: int32 (G_v, d + 1), from `value_planes`.
        entries: int32 (G_v, capacity), from `value_planes`.
        tokens: T.
        coefficients: float32 (G_a, G_v), the products a_i c_j.
        shift: float32 (d,), added before the sign.
        signs: uint64 (d, P), overwritten: bit 1[output + shift >= 0] of 64 queries; `signs_to_words` turns them.
        floats: float32 (T, H d), where the output without the shift is written; (0, 0) if nobody wants it.
        column: the head's first column of `floats`.
    """
    attention_groups, value_groups = coefficients.shape
    width, query_panels = signs.shape
    steps = steps_of(tokens)
    counts = np.empty((2 * TILE, PANEL), np.int32)
    total = np.empty((TILE, PANEL), np.float32)
    for channel in range(0, width, TILE):
        rows = min(TILE, width - channel)
        for query_panel in range(query_panels):
            queries = min(PANEL, tokens - query_panel * PANEL)
            total[:] = 0
            for i in range(attention_groups):
                panel = i * query_panels + query_panel
                for j in range(value_groups):
                    factor = coefficients[i, j]
                    if kinds[j] == LISTED:
                        for r in range(rows):
                            start, stop = starts[j, channel + r], starts[j, channel + r + 1]
                            if start < stop:
                                counts[r] = 0
                                for e in range(start, stop):
                                    token, sign = entries[j, e] >> 1, 2 * (entries[j, e] & 1) - 1
                                    add_bits(counts, r, panels, panel, token >> 5, token & 31, sign)
                                add_counts(total, r, counts, r, counts, r, 0, factor)
                        continue
                    for mask in range(1 if kinds[j] == EVERYTHING else 2):
                        first = (2 * j + mask) * width
                        row, last = first + channel, first + width - 1
                        if queries <= _NARROW:
                            narrow_tile_of_common_bits(
                                planes, row, last, panels, panel, steps, 0, counts, TILE * mask, 0
                            )
                        else:
                            tile_of_common_bits(planes, row, last, panels, panel, steps, 0, counts, TILE * mask, 0)
                    for r in range(rows):
                        if kinds[j] == EVERYTHING:
                            add_counts(total, r, counts, r, sizes, i, query_panel * PANEL, factor)
                        else:
                            add_counts(total, r, counts, r, counts, TILE + r, 0, factor)
            for r in range(rows):
                signs[channel + r, query_panel] = floats_not_below(total, r, 0, -shift[channel + r])
                if floats.shape[0]:
                    for q in range(queries):
                        floats[query_panel * PANEL + q, column + channel + r] = total[r, q]


@kernel
def signs_to_words(signs, words, first):
    """Turns bits of 64 queries per channel into bits of 64 channels per query, the input of the next product.

    Args:
        signs: uint64 (d, P), from `attend`.
        words: uint64 (T, W), the head's words first to first + ceil(d / 64) are overwritten; padding bits are zero.
        first: the head's first word.
    """
    width, tokens = signs.shape[0], words.shape[0]
    block = np.empty(64, np.uint64)
    for part in range((width + 63) // 64):
        channels = min(64, width - 64 * part)
        for panel in range(signs.shape[1]):
            for c in range(channels):
                block[c] = signs[64 * part + c, panel]
            for c in range(channels, 64):
                block[c] = 0
            # Transpose the square of 64 x 64 bits by swapping halves, quarters, ... (Warren, Hacker's Delight, 7-3).
            size, mask = 32, np.uint64(0xFFFFFFFF)
            while size:
                k = 0
                while k < 64:
                    swap = (block[k] >> np.uint64(size) ^ block[k + size]) & mask
                    block[k] ^= swap << np.uint64(size)
                    block[k + size] ^= swap
                    k = (k + size + 1) & ~size
                size >>= 1
                mask ^= mask << np.uint64(size)
            for q in range(min(64, tokens - 64 * panel)):
                words[64 * panel + q, first + part] = block[q]
