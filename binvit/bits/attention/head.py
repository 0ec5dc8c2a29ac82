"""The memory of one head of binary attention, and the steps of its value and of its product with the map.

`compute_values` and `pack_values` turn packed tokens into value planes, `multiply` combines them with the planes of the
map, which `binvit.bits.attention` and `binvit.packed.fast.softmax` make. The steps are kernels; a caller whose maxima
run over more than one head does a step for all heads, reduces, and goes on. All intermediates live in a `Workspace`, so
that nothing is allocated per image.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from binvit.bits.attention.bias import Bias, unfolded_shape
from binvit.bits.attention.scores import MAX_HEAD_WIDTH
from binvit.bits.attention.value import attend, entry_capacity, extrema, linear_transposed, signs_to_words, value_planes
from binvit.bits.packing import word_count
from binvit.jit import aligned_empty, kernel


class Workspace(NamedTuple):
    """Buffers of heads that are worked on at the same time; the first axis of each is the slot.

    Attributes:
        keys: uint8 (S, P, ceil(d / 8), 64) for T tokens, P = ceil(T / 64).
        counts: uint8 (S, T, 64 P).
        smallest: uint8 (S, T).
        sums: float32 (S, T).
        largest: float32 (S, T), the maximum of every row of the attention map.
        attention: float32 (S, T, 64 P), the map itself, only with a bias; padding is minus infinity.
        bias_runs: float32 (S, ...), the head's relative bias as `binvit.bits.attention.bias.unfold_runs` leaves it.
        cuts: float32 (S, G_a, T).
        bounds: uint8 (S, G_a, T).
        planes: uint32 (S, G_a P, 2 P, 64).
        sizes: int32 (S, G_a, 64 P).
        values: float32 (S, d, 64 P).
        value_planes: uint32 (S, 2 G_v d, 2 P).
        kinds: int64 (S, G_v).
        starts: int32 (S, G_v, d + 1).
        entries: int32 (S, G_v, capacity + 1).
        signs: uint64 (S, d, P).
    """

    keys: np.ndarray
    counts: np.ndarray
    smallest: np.ndarray
    sums: np.ndarray
    largest: np.ndarray
    attention: np.ndarray
    bias_runs: np.ndarray
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
    slots: int, tokens: int, width: int, attention_groups: int, value_groups: int, bias: Bias
) -> Workspace:
    """Allocate the buffers for a number of heads.

    Args:
        slots: how many heads are in flight: threads, or heads of an image where maxima run over all of them.
        tokens: T, at least 1.
        width: d, channels of a head.
        attention_groups: g_a.
        value_groups: g_v.
        bias: the bias of the attention map, of one layer or of some with a leading axis.

    Returns:
        About 400 kB a slot for DeiT-S.

    Raises:
        ValueError: if the width does not fit into bytes.
    """
    if not 1 <= width <= MAX_HEAD_WIDTH:
        raise ValueError(f"A head must be 1 to {MAX_HEAD_WIDTH} channels wide for popcounts in bytes, not {width}.")
    panels = word_count(tokens)
    padded = 64 * panels
    biased = bias.full.size + bias.halves.size + bias.runs.size > 0
    attention = aligned_empty((slots, tokens if biased else 0, padded), np.float32)
    attention[:] = -np.inf  # padding is in no group, and nothing ever overwrites it
    return Workspace(
        keys=aligned_empty((slots, panels, -(-width // 8), 64), np.uint8),
        counts=aligned_empty((slots, tokens, padded), np.uint8),
        smallest=aligned_empty((slots, tokens), np.uint8),
        sums=aligned_empty((slots, tokens), np.float32),
        largest=aligned_empty((slots, tokens), np.float32),
        attention=attention,
        bias_runs=aligned_empty((slots, *unfolded_shape(bias)), np.float32),
        cuts=aligned_empty((slots, attention_groups, tokens), np.float32),
        bounds=aligned_empty((slots, attention_groups, tokens), np.uint8),
        planes=aligned_empty((slots, attention_groups * panels, 2 * panels, 64), np.uint32),
        sizes=aligned_empty((slots, attention_groups, padded), np.int32),
        values=aligned_empty((slots, width, padded), np.float32),
        value_planes=aligned_empty((slots, 2 * value_groups * width, 2 * panels), np.uint32),
        kinds=aligned_empty((slots, value_groups), np.int64),
        starts=aligned_empty((slots, value_groups, width + 1), np.int32),
        entries=aligned_empty((slots, value_groups, entry_capacity(width, tokens) + 1), np.int32),
        signs=aligned_empty((slots, width, panels), np.uint64),
    )


@kernel(allocates=False)
def compute_values(workspace, slot, weights, first_row, panels, tokens, length, scale, bias, shift):
    """Compute one head's value, transposed, into `workspace.values`.

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


@kernel(allocates=False)
def pack_values(workspace, slot, tokens, lower, upper):
    """Pack the groups of one head's value: elements below `lower` or above `upper`, and their signs.

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


@kernel(allocates=False)
def multiply(workspace, slot, tokens, coefficients, shift, words, first_word, floats, column):
    """Multiply one head's map with its value and pack the signs of the shifted output.

    Args:
        workspace: a `Workspace` whose `planes` and `sizes` hold the map, after `pack_values`.
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
