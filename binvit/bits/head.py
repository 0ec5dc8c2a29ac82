"""One head of binary attention from packed queries and keys to the packed input of the projection, in five steps.

`compute_map` and `pack_map` turn queries and keys into attention planes, `compute_values` and `pack_values` turn packed
tokens into value planes, `multiply` combines both. The steps are kernels; a caller whose maxima run over more than one
head does a step for all heads, reduces, and goes on. All intermediates live in a `Workspace`, so that nothing is
allocated per image.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from binvit.bits.attention import group_bounds, planes_above, planes_below, prepare_keys, score_counts
from binvit.bits.bias import relative_rows
from binvit.bits.jit import aligned_empty, kernel
from binvit.bits.packing import word_count
from binvit.bits.softmax import MAX_HEAD_WIDTH, biased_map, softmax_sums
from binvit.bits.value import attend, entry_capacity, extrema, linear_transposed, signs_to_words, value_planes

_BIAS_ROWS = 16


class Workspace(NamedTuple):
    """Buffers of heads that are worked on at the same time; the first axis of each is the slot.

    Attributes:
        keys: uint8 (S, P, ceil(d / 8), 64) for T tokens, P = ceil(T / 64).
        counts: uint8 (S, T, 64 P).
        smallest: uint8 (S, T).
        sums: float32 (S, T).
        largest: float32 (S, T), the maximum of every row of the attention map.
        attention: float32 (S, T, 64 P), the map itself, only with a bias; padding is minus infinity.
        bias_rows: float32 (S, 16, 64 P + 16).
        cuts: float32 (S, G_a, T).
        bounds: uint8 (S, G_a, T).
        planes: uint32 (S, G_a P, 2 P, 64).
        sizes: int32 (S, G_a, 64 P).
        values: float32 (S, d, 64 P).
        value_planes: uint32 (S, 2 G_v d, 2 P).
        kinds: int64 (S, G_v).
        starts: int32 (S, G_v, d + 1).
        entries: int32 (S, G_v, capacity).
        signs: uint64 (S, d, P).
    """

    keys: np.ndarray
    counts: np.ndarray
    smallest: np.ndarray
    sums: np.ndarray
    largest: np.ndarray
    attention: np.ndarray
    bias_rows: np.ndarray
    cuts: np.ndarray
    bounds: np.ndarray
    planes: np.ndarray
    sizes: np.ndarray
    values: np.ndarray
    value_planes: np.ndarray
    kinds: np.ndarray
    starts: np.ndarray
    entries: np.ndarray
    signs: np.ndarray


def make_workspace(
    slots: int, tokens: int, width: int, attention_groups: int, value_groups: int, biased: bool
) -> Workspace:
    """Allocates the buffers for a number of heads.

    Args:
        slots: how many heads are in flight: threads, or heads of an image where maxima run over all of them.
        tokens: T, at least 1.
        width: d, channels of a head.
        attention_groups: G_a.
        value_groups: G_v.
        biased: whether the attention map has a bias.

    Returns:
        About 400 kB a slot for DeiT-S.

    Raises:
        ValueError: if the width does not fit into bytes.
    """
    if not 1 <= width <= MAX_HEAD_WIDTH:
        raise ValueError(f"A head must be 1 to {MAX_HEAD_WIDTH} channels wide for popcounts in bytes, not {width}.")
    panels = word_count(tokens)
    padded = 64 * panels
    map_rows, bias_rows = (tokens, _BIAS_ROWS) if biased else (0, 0)
    attention = aligned_empty((slots, map_rows, padded), np.float32)
    attention[:] = -np.inf  # padding is in no group, and nothing ever overwrites it
    return Workspace(
        keys=aligned_empty((slots, panels, -(-width // 8), 64), np.uint8),
        counts=aligned_empty((slots, tokens, padded), np.uint8),
        smallest=aligned_empty((slots, tokens), np.uint8),
        sums=aligned_empty((slots, tokens), np.float32),
        largest=aligned_empty((slots, tokens), np.float32),
        attention=attention,
        bias_rows=aligned_empty((slots, bias_rows, padded + 16), np.float32),
        cuts=aligned_empty((slots, attention_groups, tokens), np.float32),
        bounds=aligned_empty((slots, attention_groups, tokens), np.uint8),
        planes=aligned_empty((slots, attention_groups * panels, 2 * panels, 64), np.uint32),
        sizes=aligned_empty((slots, attention_groups, padded), np.int32),
        values=aligned_empty((slots, width, padded), np.float32),
        value_planes=aligned_empty((slots, 2 * value_groups * width, 2 * panels), np.uint32),
        kinds=aligned_empty((slots, value_groups), np.int64),
        starts=aligned_empty((slots, value_groups, width + 1), np.int32),
        entries=aligned_empty((slots, value_groups, entry_capacity(width, tokens)), np.int32),
        signs=aligned_empty((slots, width, panels), np.uint64),
    )


@kernel
def compute_map(workspace, slot, queries, keys, first, width, table, fixed, bias, head):
    """Computes what decides the groups of one head's attention map; `workspace.largest` then holds its row maxima.

    Args:
        workspace: a `Workspace`.
        slot: which slot of it.
        queries: uint64 (T, W), packed queries; every head starts at a word of its own.
        keys: uint64 (T, W), packed keys, alike; may be the same array with another `first`.
        first: pair of integers, the head's first word in `queries` and in `keys`.
        width: d.
        table: float32, `exponential_table` of the score's scale.
        fixed: uint8 (4, 64), `fixed_point_planes` of the table.
        bias: a `Bias`.
        head: which head of the bias.
    """
    tokens = queries.shape[0]
    counts, smallest, sums = workspace.counts[slot], workspace.smallest[slot], workspace.sums[slot]
    largest = workspace.largest[slot]
    prepare_keys(keys, first[1], width, workspace.keys[slot])
    score_counts(queries, first[0], width, workspace.keys[slot], counts, smallest, 0, tokens)
    softmax_sums(counts, smallest, table, fixed, sums, 0, tokens)
    if bias.full.shape[0] > 0:
        attention = workspace.attention[slot]
        biased_map(counts, smallest, table, sums, bias.full[head], 0, attention, largest, 0, tokens)
    elif bias.runs.shape[0] > 0:
        attention, rows = workspace.attention[slot], workspace.bias_rows[slot]
        runs, prefix_rows, prefix_keys = bias.runs[head], bias.prefix_rows[head], bias.prefix_keys[head]
        for start in range(0, tokens, _BIAS_ROWS):
            stop = min(start + _BIAS_ROWS, tokens)
            relative_rows(runs, prefix_rows, prefix_keys, bias.width, tokens, rows, start, stop)
            biased_map(counts, smallest, table, sums, rows, start, attention, largest, start, stop)
    else:
        for row in range(tokens):
            largest[row] = table[0] / sums[row]


@kernel
def pack_map(workspace, slot, table, offsets, ratios, inclusive, maxima):
    """Packs the groups of one head's attention map: A > offset + ratio * maximum, or >= where `inclusive`.

    Args:
        workspace: a `Workspace` after `compute_map`.
        slot: which slot of it.
        table: the one `compute_map` had.
        offsets: float32 (G,).
        ratios: float32 (G,).
        inclusive: bool (G,).
        maxima: float32 (T,), the maximum to compare each row with: `workspace.largest[slot]` for row maxima, else any
            other, repeated.
    """
    tokens = maxima.shape[0]
    cuts, planes, sizes = workspace.cuts[slot], workspace.planes[slot], workspace.sizes[slot]
    for g in range(offsets.shape[0]):
        offset, ratio = offsets[g], ratios[g]
        for row in range(tokens):
            cuts[g, row] = offset + ratio * maxima[row]
        if inclusive[g]:
            for row in range(tokens):
                cuts[g, row] = np.nextafter(cuts[g, row], np.float32(-np.inf))
    if workspace.attention.shape[1] > 0:
        planes_above(workspace.attention[slot], cuts, planes, sizes, 0, tokens)
    else:
        counts, bounds = workspace.counts[slot], workspace.bounds[slot]
        group_bounds(table, workspace.smallest[slot], workspace.sums[slot], cuts, bounds, 0, tokens)
        planes_below(counts, bounds, planes, sizes, 0, tokens)


@kernel
def compute_values(workspace, slot, weights, first_row, panels, tokens, length, scale, bias, shift):
    """Computes one head's value, transposed, into `workspace.values`.

    Args:
        workspace: a `Workspace`.
        slot: which slot of it.
        weights: uint64 (N, ceil(length / 64)), packed weights, not prepared.
        first_row: the head's first row of weights.
        panels: uint32 panels of the tokens, from `words_to_panels`.
        tokens: T.
        length: number of inputs.
        scale: float32 (N,), per row of weights.
        bias: float32 (N,).
        shift: float32 (N,), added after the bias.

    Returns:
        The head's least and largest value.
    """
    values = workspace.values[slot]
    width = values.shape[0]
    linear_transposed(weights, first_row, width, panels, tokens, length, scale, bias, shift, values)
    return extrema(values, tokens)


@kernel
def pack_values(workspace, slot, tokens, lower, upper):
    """Packs the groups of one head's value: elements below `lower` or above `upper`, and their signs.

    Args:
        workspace: a `Workspace` after `compute_values`.
        slot: which slot of it.
        tokens: T.
        lower: float32 (G,); infinity for a plain sign of all elements, with minus infinity in `upper`.
        upper: float32 (G,).
    """
    value_planes(
        workspace.values[slot],
        tokens,
        lower,
        upper,
        workspace.value_planes[slot],
        workspace.kinds[slot],
        workspace.starts[slot],
        workspace.entries[slot],
    )


@kernel
def multiply(workspace, slot, tokens, coefficients, shift, words, first_word, floats, column):
    """Multiplies one head's map with its value and packs the signs of the shifted output.

    Args:
        workspace: a `Workspace` after `pack_map` and `pack_values`.
        slot: which slot of it.
        tokens: T.
        coefficients: float32 (G_a, G_v), the products of both scales.
        shift: float32 (d,), what is added before the sign.
        words: uint64 (T, W), words first_word to first_word + ceil(d / 64) are overwritten.
        first_word: the head's first word.
        floats: float32 (T, H d), columns `column` to column + d receive the output without the shift; (0, 0) for none.
        column: the head's first column of `floats`.
    """
    signs = workspace.signs[slot]
    attend(
        workspace.planes[slot],
        workspace.sizes[slot],
        workspace.value_planes[slot],
        workspace.kinds[slot],
        workspace.starts[slot],
        workspace.entries[slot],
        tokens,
        coefficients,
        shift,
        signs,
        floats,
        column,
    )
    signs_to_words(signs, words, first_word)
