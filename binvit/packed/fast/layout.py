"""What the fast path's kernels read and write: folded blocks, and memory that is allocated once."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from binvit.bits.attention.bias import Bias
from binvit.bits.attention.head import Workspace, make_workspace
from binvit.jit import aligned_empty

ROW, HEAD, SAMPLE = 0, 1, 2
"""Over what the maxima of map and value run: a query row (the map's only), a head, all heads of an image."""


class Layers(NamedTuple):
    """All blocks, folded; L blocks, width D, H heads of d channels, T tokens, G and V groups of map and value.

    Attributes:
        norms: float32 (L, 2, 3, D): weight, bias and following shift of the two LayerNorms.
        epsilons: float64 (L, 2).
        qk_panels: uint32 (L, ...): weights of query and key; every head starts at a panel of its own.
        qk_lower: int32 (L, columns): the intervals of query and key, see `binvit.bits.linear.Intervals`.
        qk_span: uint32 (L, columns).
        qk_flip: uint64 (L, panels).
        v_words: uint64 (L, H d, words): weights of the value.
        v_affine: float32 (L, 4, H d): scale and bias of the value, its shift, and its shift after an RPReLU.
        tables: float32 (L, d + 1, entries): exponentials of the scores, see `binvit.packed.fast.softmax.score_table`.
        cuts: float32 (L, H, G): constant parts of the map's thresholds.
        shares: float32 (G,): shares of the maximum, added to them.
        inclusive: bool (G,): whether the threshold itself is above.
        value_shares: float32 (V - 1,): thresholds of the value's higher groups as shares of the extrema.
        coefficients: float32 (L, H, G, V): products of the scales of map and value.
        proj_shift: float32 (L, H d): shift before the sign of what the projection reads.
        proj_panels: uint32 (L, ...): weights of the projection, inputs of every head padded to words.
        proj_affine: float32 (L, 2, columns): scale and bias.
        proj_sums: int32 (columns,): minus the number of padded inputs.
        fc1_panels: uint32 (L, ...).
        fc1_lower: int32 (L, columns): intervals of the hidden layer's bits.
        fc1_span: uint32 (L, columns).
        fc1_flip: uint64 (L, panels).
        fc2_panels: uint32 (L, ...).
        fc2_affine: float32 (L, 2, columns).
        fc2_sums: int32 (L, columns): see `binvit.bits.linear.linear_to_floats`.
        posts: float32 (L, 2, 4, D): shift in, slope, shift out and gain after projection and fc2; used if `post`.
        value_post: float32 (L, 3, H d): the same for the value, used if `rprelu`.
        heads: H.
        width: d.
        hidden: number of hidden channels.
        map_reduce: ROW, HEAD or SAMPLE, for the map.
        value_reduce: HEAD or SAMPLE, for the value.
        softmax: whether the map is a softmax.
        value_mean: whether the value's scale is its mean absolute value per head.
        hidden_unsigned: whether hidden bits mean {0, 1}.
        post: whether projection and fc2 are followed by more than bias and residual stream.
        rprelu: whether the value is followed by RPReLU.
        lanes: see `binvit.packed.fast.softmax.torch_lanes`.
    """

    norms: np.ndarray
    epsilons: np.ndarray
    qk_panels: np.ndarray
    qk_lower: np.ndarray
    qk_span: np.ndarray
    qk_flip: np.ndarray
    v_words: np.ndarray
    v_affine: np.ndarray
    tables: np.ndarray
    cuts: np.ndarray
    shares: np.ndarray
    inclusive: np.ndarray
    value_shares: np.ndarray
    coefficients: np.ndarray
    proj_shift: np.ndarray
    proj_panels: np.ndarray
    proj_affine: np.ndarray
    proj_sums: np.ndarray
    fc1_panels: np.ndarray
    fc1_lower: np.ndarray
    fc1_span: np.ndarray
    fc1_flip: np.ndarray
    fc2_panels: np.ndarray
    fc2_affine: np.ndarray
    fc2_sums: np.ndarray
    posts: np.ndarray
    value_post: np.ndarray
    heads: int
    width: int
    hidden: int
    map_reduce: int
    value_reduce: int
    softmax: bool
    value_mean: bool
    hidden_unsigned: bool
    post: bool
    rprelu: bool
    lanes: int


class Scratch(NamedTuple):
    """Memory of the forward pass; the first axis is the task.

    Attributes:
        words: uint64 (tasks, T, words): packed input of the qkv layer and of the MLP.
        qk: uint64 (tasks, T, words): bits of all queries, then of all keys; each head starts at a word of its own.
        token_panels: uint32 (tasks, ...): `words` for products whose columns are the tokens.
        joined: uint64 (tasks, T, words): bits of all heads' outputs.
        hidden: uint64 (tasks, T, words): bits of the hidden layer.
        floats: float32 (tasks, T, D): output of a layer that is followed by more than bias and residual stream.
        tops: float32 (slots + tasks, 3): maximum of the map, least and largest value of each head, then of each image.
        limits: float32 (slots, 2, V): what the elements of the value's groups lie below or above.
        coefficients: float32 (slots, G, V): products of the scales of map and value.
        nothing: float32 (0, 0), in the place of the heads' outputs, which nobody wants as floats.
    """

    words: np.ndarray
    qk: np.ndarray
    token_panels: np.ndarray
    joined: np.ndarray
    hidden: np.ndarray
    floats: np.ndarray
    tops: np.ndarray
    limits: np.ndarray
    coefficients: np.ndarray
    nothing: np.ndarray


def make_scratch(layers: Layers, bias: Bias, tokens: int, tasks: int, slots: int) -> tuple[Scratch, Workspace]:
    """Allocate the memory of a forward pass.

    Args:
        layers: the folded blocks.
        bias: the bias of the attention maps.
        tokens: T.
        tasks: images that run at once.
        slots: heads per image whose results are kept at once.
    """
    size, head_words = layers.norms.shape[-1], -(-layers.width // 64)
    words = -(-size // 64)
    groups = len(layers.shares), len(layers.value_shares) + 1
    workspace = make_workspace(tasks * slots, tokens, layers.width, *groups, bias)
    scratch = Scratch(
        words=aligned_empty((tasks, tokens, words), np.uint64),
        qk=aligned_empty((tasks, tokens, 2 * layers.heads * head_words), np.uint64),
        token_panels=aligned_empty((tasks, -(-tokens // 64), 2 * words, 64), np.uint32),
        joined=aligned_empty((tasks, tokens, layers.heads * head_words), np.uint64),
        hidden=aligned_empty((tasks, tokens, -(-layers.hidden // 64)), np.uint64),
        floats=aligned_empty((tasks, tokens if layers.post else 0, size), np.float32),
        tops=aligned_empty((tasks * slots + tasks, 3), np.float32),
        limits=aligned_empty((tasks * slots, 2, groups[1]), np.float32),
        coefficients=aligned_empty((tasks * slots, *groups), np.float32),
        nothing=np.empty((0, 0), np.float32),
    )
    return scratch, workspace
