"""Compiled forward products of the training step: signs and levels are packed into words and counted by `binvit.bits`.

A sum of signs is an integer that float32 holds exactly, so that counted bits give what a float product would, to the
last bit. Backward products have a float factor and stay float products.
"""

from __future__ import annotations

import numpy as np
from numba import prange
from torch import Tensor

from binvit.bits.attention.lanes import popcount
from binvit.bits.gemm import PreparedWeights
from binvit.bits.packing import WORD, signs_of_64, word_count
from binvit.bits.tile import PANEL, TILE, steps_of, tile_of_signs
from binvit.jit import aligned_empty, kernel
from binvit.nn.fused.elementwise import ONE, ZERO, parallel_kernel, share_of_largest

_HEADS = 8  # that a thread takes together
_ROWS = 8 * TILE  # whose words and products stay in the core's own cache


@kernel
def _pack_panels(levels, panels):
    columns, k = levels.shape
    rest = np.full(WORD, np.float32(-1))  # the last word's levels
    for n in range(columns):
        row = levels[n]
        for w in range(panels.shape[1] // 2):
            if (w + 1) * WORD <= k:
                word = signs_of_64(row, w * WORD)
            else:
                for j in range(w * WORD, k):
                    rest[j - w * WORD] = row[j]
                word = signs_of_64(rest, 0)
            panels[n // PANEL, 2 * w, n % PANEL] = np.uint32(word & np.uint64(0xFFFFFFFF))
            panels[n // PANEL, 2 * w + 1, n % PANEL] = np.uint32(word >> np.uint64(32))


def prepare_levels(levels: np.ndarray) -> PreparedWeights:
    """Pack levels -1 and +1, float32 (N, K), as the right operand of a product."""
    columns, k = levels.shape
    panels = aligned_empty((word_count(columns), 2 * word_count(k), PANEL), np.uint32)
    panels[-1] = 0  # the columns past N
    _pack_panels(levels, panels)
    return PreparedWeights(panels, columns)


@kernel(reorder=True, allocates=False)
def _multiply_block(
    first, x, shift, threshold, unsigned, share, panels, sums, scale, bias, start, means, out, levels, words, products
):
    # levels (64 W,) are -1 behind the first K, words (_ROWS, W) zero; products (_ROWS, columns of all panels).
    k, last = x.shape[1], min(x.shape[0], first + _ROWS)
    for r in range(first, last):
        limit = share_of_largest(x[r], shift, share)
        if unsigned:
            for j in range(k):
                levels[j] = ONE if x[r, j] + shift[j] - limit > threshold else -ONE
        else:
            for j in range(k):
                levels[j] = x[r, j] + shift[j]
        for w in range(words.shape[1]):
            words[r - first, w] = signs_of_64(levels, w * WORD)
        if means.size:
            total = ZERO
            for j in range(k):
                total += abs(x[r, j] + shift[j])
            means[r] = total / np.float32(k)
    halves, halve = words.view(np.uint32), np.int32(1) if unsigned else np.int32(0)
    for panel in range(panels.shape[0]):
        for row in range(0, _ROWS, TILE):
            tile_of_signs(halves, row, _ROWS - 1, panels, panel, steps_of(k), k, products, row, panel * PANEL)
    for r in range(first, last):
        product, y = products[r - first], out[r, start : start + scale.size]
        if means.size:
            for j in range(scale.size):
                y[j] = (product[j] + sums[j]) >> halve
            for j in range(scale.size):  # a loop of its own, so that the order of the factors stays
                y[j] *= means[r]
            for j in range(scale.size):
                y[j] = y[j] * scale[j] + bias[j]
        else:
            for j in range(scale.size):
                y[j] = np.float32((product[j] + sums[j]) >> halve) * scale[j] + bias[j]


@parallel_kernel
def linear_products(x, shift, threshold, unsigned, share, panels, sums, scale, bias, start, means, out):
    """Write b(x + shift) w^T * scale * mean + bias into out (M, ...) from a column on.

    x is (M, K) with a shift of (K,); its levels b are {0, 1} by the threshold if unsigned, else signs. w comes as
    panels of bits with the sums of its rows, `PreparedWeights.sums`, or zeros if signed; scale and bias are (N,). means
    (M,), which may be empty for a mean of 1, takes the mean size of every row.
    """
    count = (x.shape[1] + WORD - 1) // WORD
    for block in prange((x.shape[0] + _ROWS - 1) // _ROWS):
        levels, words = np.full(WORD * count, np.float32(-1)), np.zeros((_ROWS, count), np.uint64)
        work = levels, words, np.empty((_ROWS, PANEL * panels.shape[0]), np.int32)
        how = threshold, unsigned, share, panels, sums, scale, bias, start
        _multiply_block(block * _ROWS, x, shift, *how, means, out, *work)


@kernel(allocates=False)
def _word(numbers, start, kept, rest):
    # A word of the next `kept` signs, zeros behind them: the numbers there belong to the next row and are left out.
    if start + WORD <= numbers.size:
        word = signs_of_64(numbers, start)
        return word if kept >= WORD else word & ((np.uint64(1) << np.uint64(kept)) - np.uint64(1))
    for j in range(WORD):
        rest[j] = numbers[start + j] if j < kept else np.float32(-1)
    return signs_of_64(rest, 0)


@kernel(allocates=False)
def _multiply_matrices(left, right, k, columns, differing, rest, out):
    # One head; left, right and out are its numbers, row by row.
    m, count = columns.shape[1], columns.shape[0]
    for j in range(m):
        for w in range(count):
            columns[w, j] = _word(right, j * k + w * WORD, k - w * WORD, rest)
    for i in range(left.size // k):
        row = out[i * m : (i + 1) * m]
        word = _word(left, i * k, k, rest)
        if count == 1:
            for j in range(m):
                row[j] = np.float32(k - 2 * np.int32(popcount(word ^ columns[0, j])))
            continue
        for j in range(m):
            differing[j] = np.int32(popcount(word ^ columns[0, j]))
        for w in range(1, count):
            word = _word(left, i * k + w * WORD, k - w * WORD, rest)
            for j in range(m):
                differing[j] += np.int32(popcount(word ^ columns[w, j]))
        for j in range(m):
            row[j] = np.float32(k - 2 * differing[j])


@parallel_kernel
def _multiply_heads(a, b, out):
    heads, n, k = a.shape
    m, count = b.shape[1], (k + WORD - 1) // WORD
    for block in prange((heads + _HEADS - 1) // _HEADS):
        columns, differing, rest = np.empty((count, m), np.uint64), np.empty(m, np.int32), np.empty(WORD, np.float32)
        for h in range(block * _HEADS, min(heads, (block + 1) * _HEADS)):
            left, right, result = a[h].reshape(n * k), b[h].reshape(m * k), out[h].reshape(n * m)
            _multiply_matrices(left, right, k, columns, differing, rest, result)


def multiply_signs(a: Tensor, b: Tensor) -> Tensor:
    """Multiply signs (..., N, K) with signs (..., M, K) over K, all contiguous: (..., N, M)."""
    out = a.new_empty(*a.shape[:-1], b.shape[-2])
    matrices = (x.numpy().reshape(-1, *x.shape[-2:]) for x in (a, b, out))
    _multiply_heads(*matrices)
    return out
