"""The fast path's forward pass through the blocks: the steps of `binvit.bits`, composed into one compiled function.

A block works on token rows (`_enter`, `_leave`) and on heads (`_score`, `_attend`). Threads that work on one image
share the rows and the heads and wait for each other twice a block. Zeros are passed as `np.int64(0)`: a literal would
make numba compile a copy of the callee for its value.
"""

from __future__ import annotations

import numpy as np

from binvit.bits.attention.bias import unfold_runs
from binvit.bits.attention.head import compute_values, multiply, pack_values
from binvit.bits.attention.scores import planes_above, planes_below, prepare_keys, score_counts
from binvit.bits.gemm import TILE
from binvit.bits.linear import linear_to_bits, linear_to_floats, words_to_panels
from binvit.jit import kernel
from binvit.packed.fast.biased_map import add_bias, add_half_bias, add_relative_bias
from binvit.packed.fast.layernorm import normalize_and_pack
from binvit.packed.fast.layout import ROW, SAMPLE
from binvit.packed.fast.patches import embed_patches
from binvit.packed.fast.softmax import exponentiate, group_bounds
from binvit.packed.fast.threads import STEP, finish_part, take_next, take_part, wait_for_parts

_PARTS = 4  # of a step for each thread
_MAP_ROWS = 16  # of the map that get their bias while they lie in the nearest cache


@kernel(allocates=False)
def _enter(s, block, x, c, task, start, stop):
    # Residual stream -> bits of query and key, and the tokens' bits side by side for the value.
    norm = s.norms[block, 0]
    normalize_and_pack(x, norm[0], norm[1], norm[2], s.epsilons[block, 0], c.words[task], start, stop)
    linear_to_bits(
        c.words[task],
        s.qk_panels[block],
        x.shape[1],
        s.qk_lower[block],
        s.qk_span[block],
        s.qk_flip[block],
        c.qk[task],
        start,
        stop,
    )
    words_to_panels(c.words[task], c.token_panels[task], start, stop)


@kernel(allocates=False)
def _leave(s, block, x, c, task, start, stop):
    # Bits of the heads -> projection -> residual stream -> MLP -> residual stream.
    out = c.floats[task] if s.post else x
    affine = s.proj_affine[block]
    length = 64 * c.joined.shape[2]
    linear_to_floats(
        c.joined[task],
        s.proj_panels[block],
        length,
        s.proj_sums,
        np.bool_(False),
        affine[0],
        affine[1],
        out,
        not s.post,
        start,
        stop,
    )
    if s.post:
        _add_post(out, s.posts[block, 0], x, start, stop)
    norm = s.norms[block, 1]
    normalize_and_pack(x, norm[0], norm[1], norm[2], s.epsilons[block, 1], c.words[task], start, stop)
    linear_to_bits(
        c.words[task],
        s.fc1_panels[block],
        x.shape[1],
        s.fc1_lower[block],
        s.fc1_span[block],
        s.fc1_flip[block],
        c.hidden[task],
        start,
        stop,
    )
    affine = s.fc2_affine[block]
    linear_to_floats(
        c.hidden[task],
        s.fc2_panels[block],
        s.hidden,
        s.fc2_sums[block],
        s.hidden_unsigned,
        affine[0],
        affine[1],
        out,
        not s.post,
        start,
        stop,
    )
    if s.post:
        _add_post(out, s.posts[block, 1], x, start, stop)


@kernel(allocates=False)
def _add_post(y, post, x, start, stop):
    for i in range(start, stop):
        for n in range(x.shape[1]):
            moved = y[i, n] - post[0, n]
            x[i, n] += ((moved if moved >= 0 else post[1, n] * moved) + post[2, n]) * post[3, n]


@kernel(allocates=False)
def _score(s, biases, block, head, c, heads, task, slot):
    # Value, popcounts, softmax sums and maxima of one head.
    tokens, width = c.words.shape[1], s.width
    affine = s.v_affine[block]
    least, most = compute_values(
        heads,
        slot,
        s.v_words[block],
        head * width,
        c.token_panels[task],
        tokens,
        s.norms.shape[3],
        affine[0],
        affine[1],
        affine[2],
    )
    if s.rprelu:
        least, most = _bend(heads.values[slot], s.value_post[block], affine[3], head * width, tokens)
    words, qk = (width + 63) // 64, c.qk[task]
    counts, smallest = heads.counts[slot], heads.smallest[slot]
    prepare_keys(qk, (s.heads + head) * words, width, heads.keys[slot])
    score_counts(qk, head * words, width, heads.keys[slot], counts, smallest, 0, tokens)
    top = _fill_map(s, biases, block, head, heads, slot, tokens) if s.softmax else np.float32(0)
    c.tops[slot, 0], c.tops[slot, 1], c.tops[slot, 2] = top, least, most


@kernel(allocates=False)
def _fill_map(s, biases, block, head, heads, slot, tokens):
    # Exponentials and their sums; with a bias the map itself. Returns the largest entry.
    counts, smallest, sums, map_ = heads.counts[slot], heads.smallest[slot], heads.sums[slot], heads.attention[slot]
    largest, table = heads.largest[slot], s.tables[block]
    if biases.runs.shape[1]:
        keys = biases.prefix_keys[block, head]
        unfold_runs(biases.runs[block, head], keys.shape[0], biases.width, heads.bias_runs[slot])
    for start in range(0, tokens, _MAP_ROWS):
        stop = min(start + _MAP_ROWS, tokens)
        exponentiate(counts, smallest, table, s.lanes, tokens, sums, map_, start, stop)
        if biases.halves.shape[1]:
            add_half_bias(map_, sums, biases.halves[block, head], largest, start, stop)
        elif biases.full.shape[1]:
            add_bias(map_, sums, biases.full[block, head], largest, start, stop)
        elif biases.runs.shape[1]:
            rows, keys = biases.prefix_rows[block, head], biases.prefix_keys[block, head]
            unfolded = heads.bias_runs[slot]
            add_relative_bias(map_, sums, unfolded, rows, keys, biases.width, largest, start, stop)
        else:
            for t in range(start, stop):
                largest[t] = table[smallest[t], 0] * sums[t]
    top = largest[0]
    for t in range(tokens):
        top = max(top, largest[t])
    return top


@kernel(allocates=False)
def _pack_map(s, block, head, heads, slot, tokens, peak):
    # The groups of the map: entries above a threshold for each row and group.
    maxima, cuts, bounds = heads.largest[slot], heads.cuts[slot], heads.bounds[slot]
    if s.map_reduce != ROW:
        maxima[:] = peak
    for g in range(cuts.shape[0]):
        _set_cuts(cuts[g], s.cuts[block, head, g], s.shares[g], s.inclusive[g], maxima)
    if heads.attention.shape[1]:
        planes_above(heads.attention[slot], cuts, heads.planes[slot], heads.sizes[slot], 0, tokens)
        return
    if s.softmax:
        group_bounds(s.tables[block], heads.smallest[slot], heads.sums[slot], cuts, bounds, 0, tokens)
    else:
        bounds[:] = (s.width + 1) // 2  # d - 2 p > 0
    planes_below(heads.counts[slot], bounds, heads.planes[slot], heads.sizes[slot], 0, tokens)


@kernel(allocates=False)
def _bend(values, post, shift, first, tokens):
    # RPReLU, then the shift; returns the new extrema.
    least, most = np.float32(np.inf), np.float32(-np.inf)
    for k in range(values.shape[0]):
        n = first + k
        for t in range(tokens):
            moved = values[k, t] - post[0, n]
            values[k, t] = ((moved if moved >= 0 else post[1, n] * moved) + post[2, n]) + shift[n]
            least, most = min(least, values[k, t]), max(most, values[k, t])
    return least, most


@kernel(allocates=False)
def _set_cuts(cuts, offset, share, inclusive, maxima):
    for t in range(cuts.shape[0]):
        cuts[t] = offset + share * maxima[t]
    if inclusive:
        for t in range(cuts.shape[0]):
            cuts[t] = np.nextafter(cuts[t], np.float32(-np.inf))


@kernel(allocates=False)
def _attend(s, block, head, c, heads, task, slot, tops):
    # Groups of map and value of one head, their products, and the head's share of the projection's input.
    tokens, width = c.words.shape[1], s.width
    peak = (tops if s.map_reduce == SAMPLE else c.tops[slot])[0]
    _pack_map(s, block, head, heads, slot, tokens, peak)
    extremes = tops if s.value_reduce == SAMPLE else c.tops[slot]
    lower, upper = c.limits[slot, 0], c.limits[slot, 1]
    lower[0], upper[0] = np.inf, -np.inf
    for g in range(1, lower.shape[0]):
        lower[g], upper[g] = s.value_shares[g - 1] * extremes[1], s.value_shares[g - 1] * extremes[2]
    pack_values(heads, slot, tokens, lower, upper)
    factor = _mean_size(heads.values[slot], tokens) if s.value_mean else np.float32(1)
    coefficients = c.coefficients[slot]
    for i in range(coefficients.shape[0]):
        for j in range(coefficients.shape[1]):
            coefficients[i, j] = s.coefficients[block, head, i, j] * factor
    words, shift = (width + 63) // 64, s.proj_shift[block, head * width : (head + 1) * width]
    multiply(heads, slot, tokens, coefficients, shift, c.joined[task], head * words, c.nothing, np.int64(0))


@kernel(allocates=False)
def _mean_size(values, tokens):
    total = 0.0
    for k in range(values.shape[0]):
        for t in range(tokens):
            total += abs(values[k, t])
    return np.float32(total / (values.shape[0] * tokens))


@kernel(allocates=False)
def _run_image(s, biases, x, c, heads, task):
    tokens, tops, start = x.shape[0], c.tops[c.tops.shape[0] - 1 - task], np.int64(0)
    first = task * s.heads
    for block in range(s.norms.shape[0]):
        _enter(s, block, x, c, task, start, tokens)
        tops[0], tops[1], tops[2] = -np.inf, np.inf, -np.inf
        for head in range(s.heads):
            _score(s, biases, block, head, c, heads, task, first + head)
            own = c.tops[first + head]
            tops[0], tops[1], tops[2] = max(tops[0], own[0]), min(tops[1], own[1]), max(tops[2], own[2])
        for head in range(s.heads):
            _attend(s, block, head, c, heads, task, first + head, tops)
        _leave(s, block, x, c, task, start, tokens)


@kernel(allocates=False)
def run_whole_images(s, biases, patches, images, x, c, heads, task, counter):
    """Run images whose maxima run over all heads from pixels to the last block, while other threads take others.

    Args:
        s: the folded blocks.
        biases: `binvit.bits.attention.bias.Bias` with a leading axis for the blocks.
        patches: `binvit.packed.fast.patches.Patches`; without weights, x holds the tokens already.
        images: float32 (B, C, H, W).
        x: float32 (B, T, D), the residual stream, overwritten.
        c: from `make_scratch`, with one slot per head.
        heads: from `make_scratch`.
        task: which task's memory to use.
        counter: int64 (1,), the next image that nobody has taken.
    """
    image = take_next(counter, 0)
    while image < x.shape[0]:
        if patches.weights.shape[0]:
            embed_patches(patches, images[image], x[image], np.int64(0), patches.positions.shape[0])
        _run_image(s, biases, x[image], c, heads, task)
        image = take_next(counter, 0)


@kernel(allocates=False)
def share_image(s, biases, patches, image, x, c, heads, task, tasks, counters):
    """Run one image from pixels to the last block, alone or together with other threads that call the same.

    A step is cut into parts, and a thread takes the next part that nobody has. So nobody waits for a thread that starts
    late, because another program's threads are still on its core; one that never comes is not missed.

    Args:
        s: the folded blocks; no maximum may run over all heads.
        biases: `binvit.bits.attention.bias.Bias` with a leading axis for the blocks.
        patches: as for `run_whole_images`.
        image: float32 (C, H, W).
        x: float32 (T, D), the residual stream, overwritten.
        c: from `make_scratch`, for one task with one slot per thread.
        heads: from `make_scratch`.
        task: this thread's number.
        tasks: number of threads.
        counters: int64 (`shared_counters(blocks)`,) zeros: which parts of each step were taken and how many are done.
    """
    tokens, blocks, own, step = x.shape[0], s.norms.shape[0], np.int64(0), np.int64(0)
    if patches.weights.shape[0]:
        count = patches.positions.shape[0]
        rows, parts = _parts(count, tasks)
        part = take_part(counters, step, parts, task)
        while part >= 0:
            embed_patches(patches, image, x, part * rows, min(count, (part + 1) * rows))
            part = finish_part(counters, step, parts, task)
        wait_for_parts(counters, step, parts)
        step += STEP
    rows, parts = _parts(tokens, tasks)
    for block in range(blocks + 1):
        part = take_part(counters, step, parts, task)
        while part >= 0:
            start, stop = part * rows, min(tokens, (part + 1) * rows)
            if block > 0:
                _leave(s, block - 1, x, c, own, start, stop)
            if block < blocks:
                _enter(s, block, x, c, own, start, stop)
            part = finish_part(counters, step, parts, task)
        wait_for_parts(counters, step, parts)
        step += STEP
        if block < blocks:
            head = take_part(counters, step, s.heads, task)
            while head >= 0:
                _score(s, biases, block, head, c, heads, own, task)
                _attend(s, block, head, c, heads, own, task, c.tops[task])
                head = finish_part(counters, step, s.heads, task)
            wait_for_parts(counters, step, s.heads)
            step += STEP


def shared_counters(blocks: int) -> int:
    """Return how many counters the threads of `share_image` need."""
    return STEP * (2 * blocks + 2)


@kernel(allocates=False)
def _parts(rows, tasks):
    # Whole tiles, and enough parts that the last one is short.
    tiles = (rows + TILE - 1) // TILE
    part = max(1, tiles // (_PARTS * tasks)) * TILE
    return part, (rows + part - 1) // part
