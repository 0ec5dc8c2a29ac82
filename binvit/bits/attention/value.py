"""The product of attention planes and value planes of one head, superposed: sum over i and j of a_i c_j G_i (V_j M_j).

Everything lies transposed: rows are channels, columns are queries, K are the tokens. So the first value group is a
product of tiles, and an element of a sparse higher group is one row of bits to add. All functions are kernels, see
`binvit.bits.linear`. Layouts, for T tokens, P = ceil(T / 64), d channels and G value groups:

* values: float32 (d, 64 P), the value of one head transposed
* value planes: uint32 (2 G d, 2 P): row 2 g d + c is the sign plane of channel c in group g, row (2 g + 1) d + c its
  mask
* kinds: int64 (G,), how a group is multiplied: EVERYTHING (mask of ones), MASKED (both planes) or LISTED (its few
  elements)
* starts: int32 (G, d + 1) and entries: int32 (G, capacity + 1): the elements of a listed group, channel by channel,
  each as 2 token + sign with its channel in the bits above, and one behind the last that belongs to no channel
"""

from __future__ import annotations

import numpy as np

from binvit.bits.attention.combine import (
    CHANNEL,
    add_counts,
    add_lists,
    narrow_add_lists,
    narrow_tile_of_terms,
    tile_of_terms,
)
from binvit.bits.attention.extrema import largest_of_rows, least_of_rows
from binvit.bits.attention.lanes import (
    floats_not_below,
    floats_outside,
    lowest_bit,
    narrow_tile_of_values,
    popcount,
    tile_of_values,
)
from binvit.bits.tile import (
    PANEL,
    TILE,
    steps_of,
    tile_of_common_bits,
)
from binvit.jit import kernel

EVERYTHING, MASKED, LISTED = 0, 1, 2
_NARROW = 16


def entry_capacity(width: int, tokens: int) -> int:
    """Return how many elements of a value group are worth listing instead of multiplying planes.

    Args:
        width: d, number of channels.
        tokens: T.

    Returns:
        One element in 24, where both ways take the same time.

    Raises:
        ValueError: if there are too many tokens for an entry of 32 bits.
    """
    if not 0 < tokens < 1 << (CHANNEL - 1):
        raise ValueError(f"Attention on bits takes 1 to {(1 << (CHANNEL - 1)) - 1} tokens, not {tokens}.")
    return max(1, width * tokens // 24)


@kernel
def linear_transposed(weights, first, width, panels, tokens, length, scale, bias, shift, values):
    """Multiply some rows of packed weights with all tokens: the value of one head, transposed.

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
    for panel in range(panels.shape[0]):
        narrow, start = tokens - panel * PANEL <= _NARROW, panel * PANEL
        for channel in range(0, width, TILE):
            row, last = first + channel, first + width - 1
            if narrow:
                narrow_tile_of_values(
                    halves, row, last, panels, panel, steps, length, scale, bias, shift, values, channel, start
                )
            else:
                tile_of_values(
                    halves, row, last, panels, panel, steps, length, scale, bias, shift, values, channel, start
                )


@kernel(allocates=False)
def extrema(values, tokens):
    """Find the least and the largest value of a head.

    Args:
        values: float32 (d, 64 P).
        tokens: T; what lies behind is padding.

    Returns:
        Two float32 numbers.
    """
    rows = values.shape[0]
    return least_of_rows(values, 0, rows, tokens), largest_of_rows(values, 0, rows, tokens)


@kernel
def value_planes(values, tokens, lower, upper, planes, kinds, starts, entries):
    """Pack the groups of a value: which elements lie below `lower` or above `upper`, and their signs.

    Args:
        values: float32 (d, 64 P).
        tokens: T.
        lower: float32 (G,), elements below it are in the group. A plain sign has infinity here and minus infinity in
            `upper`, which takes every element, a NaN too; GSB's first group, in which an exact zero contributes
            nothing, has 0 and 0.
        upper: float32 (G,), elements above it are in the group.
        planes: uint32 (2 G d, 2 P), overwritten.
        kinds: int64 (G,), overwritten.
        starts: int32 (G, d + 1), overwritten.
        entries: int32 (G, capacity + 1), overwritten, see `entry_capacity`.
    """
    width, words = values.shape[0], values.shape[1] // 64
    groups, capacity = lower.shape[0], entries.shape[1] - 1
    totals = np.zeros(groups, np.int64)
    pairs = planes.view(np.uint64)
    plain = lower[0] == np.inf and upper[0] == -np.inf  # the first group is everything
    nested = True  # as groups of rising thresholds are: where one has no element, the next has none
    for g in range(2, groups):
        nested = nested and lower[g] <= lower[g - 1] and upper[g] >= upper[g - 1]
    for c in range(width):
        for g in range(groups):
            starts[g, c] = min(totals[g], capacity)
        for w in range(words):
            rest = tokens - 64 * w
            valid = ~np.uint64(0) if rest >= 64 else (np.uint64(1) << np.uint64(rest)) - np.uint64(1)
            positive = floats_not_below(values, c, 64 * w, np.float32(0)) & valid
            mask = valid
            for g in range(groups):
                whole = plain and g == 0
                if not (whole or (g > 1 and nested and mask == np.uint64(0))):
                    mask = floats_outside(values, c, 64 * w, lower[g], upper[g]) & valid
                sign = positive & mask
                pairs[2 * g * width + c, w] = sign
                pairs[(2 * g + 1) * width + c, w] = mask
                before = totals[g]
                totals[g] = before + popcount(mask)
                if totals[g] <= capacity and not whole:
                    left = mask
                    while left != np.uint64(0):
                        bit = lowest_bit(left)
                        place = 2 * (64 * w + bit) + np.int64(sign >> np.uint64(bit) & np.uint64(1))
                        entries[g, before] = (c << CHANNEL) + place
                        before += 1
                        left &= left - np.uint64(1)
    for g in range(groups):
        total = totals[g]
        starts[g, width] = min(total, capacity)
        entries[g, min(total, capacity)] = width << CHANNEL
        kinds[g] = EVERYTHING if total == width * tokens else LISTED if total <= capacity else MASKED


@kernel
def attend(panels, sizes, planes, kinds, starts, entries, tokens, coefficients, shift, signs, floats, column):
    """Multiply attention groups with value groups and combine the exact integers in order, attention groups first.

    Args:
        panels: uint32 (G_a P, 2 P, 64), attention planes, see `binvit.bits.attention`.
        sizes: int32 (G_a, 64 P), tokens in each query's group.
        planes: uint32 (2 G_v d, 2 P), from `value_planes`.
        kinds: int64 (G_v,), from `value_planes`.
        starts: int32 (G_v, d + 1), from `value_planes`.
        entries: int32 (G_v, capacity + 1), from `value_planes`.
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
    # Six rows of counts of a masked group: common bits with the sign plane, then with the mask plane.
    counts = np.empty((2 * TILE, PANEL), np.int32)
    total = np.empty((TILE, PANEL), np.float32)
    for channel in range(0, width, TILE):
        rows = min(TILE, width - channel)
        for query_panel in range(query_panels):
            start_query = query_panel * PANEL
            queries = min(PANEL, tokens - start_query)
            if kinds[0] == LISTED:
                total[:] = 0
            for i in range(attention_groups):
                panel = i * query_panels + query_panel
                for j in range(value_groups):
                    factor, begins = coefficients[i, j], i + j == 0
                    row, last = 2 * j * width + channel, (2 * j + 1) * width - 1
                    if kinds[j] == LISTED:
                        start, stop = starts[j, channel], starts[j, channel + rows]
                        if queries <= _NARROW:
                            narrow_add_lists(total, channel, panels, panel, entries, j, start, stop, factor)
                        else:
                            add_lists(total, channel, panels, panel, entries, j, start, stop, factor)
                    elif kinds[j] == MASKED:
                        for mask in range(2):
                            tile_of_common_bits(
                                planes,
                                row + mask * width,
                                last + mask * width,
                                panels,
                                panel,
                                steps,
                                0,
                                counts,
                                mask * TILE,
                                0,
                            )
                        for r in range(rows):
                            add_counts(total, r, counts, r, counts, TILE + r, 0, factor, begins)
                    elif queries <= _NARROW:
                        narrow_tile_of_terms(
                            planes, row, last, panels, panel, steps, sizes, i, start_query, factor, begins, total
                        )
                    else:
                        tile_of_terms(
                            planes, row, last, panels, panel, steps, sizes, i, start_query, factor, begins, total
                        )
            for r in range(rows):
                signs[channel + r, query_panel] = floats_not_below(total, r, 0, -shift[channel + r])
            if floats.shape[0]:
                for r in range(rows):
                    for q in range(queries):
                        floats[start_query + q, column + channel + r] = total[r, q]


@kernel
def signs_to_words(signs, words, first):
    """Turn bits of 64 queries per channel into bits of 64 channels per query, the input of the next product.

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
