"""Compiled passes over what follows a 1-bit product, both ways; see `binvit.nn.fused.ends`.

Rows are taken together that fill a tile. Every loop touches few arrays: the compiler makes vector code where it can
check that they are apart.
"""

from __future__ import annotations

import numpy as np
from numba import prange

from binvit.jit import kernel
from binvit.nn.fused import elementwise

BLOCK = 128  # rows whose gradients of vectors are summed together
_SHARE = 32  # rows of which a thread takes a whole number, where nothing is summed
ZERO, ONE = np.float32(0), np.float32(1)
VECTORS = 8
FACTOR, WEIGHT, BIAS, SHIFT_IN, SLOPE, SHIFT_OUT, ALPHA, BETA = range(VECTORS)


@kernel(allocates=False)
def _copy(given, out):
    for j in range(out.size):  # numba lets an assignment of slices copy twice, as they might overlap
        out[j] = given[j]


@kernel(allocates=False)
def fill_table(factor, weight, bias, shift_in, slope, shift_out, alpha, beta, table):
    """Write the vectors (N,), each R times, into table (8, R, N); one without numbers is left out.

    Without a weight, the norm's weight is 1 and its bias 0: the kernels ask for nothing else that is not there.
    """
    for i, given in enumerate((factor, weight, bias, shift_in, slope, shift_out, alpha, beta)):
        for row in table[i]:
            for j in range(given.size):
                row[j] = given[j]
    if not weight.size:
        table[WEIGHT] = ONE
        table[BIAS] = ZERO


@kernel(reorder=True, allocates=False)
def _normalize(hat, size, eps, means, inverses):
    # Every `size` neighbours by themselves, in place.
    for p in range(hat.size // size):
        part = hat[p * size : (p + 1) * size]
        mean, square = ZERO, ZERO
        for j in range(size):
            mean += part[j]
        mean /= np.float32(size)
        for j in range(size):
            square += (part[j] - mean) * (part[j] - mean)
        inverse = ONE / np.sqrt(square / np.float32(size) + eps)
        means[p], inverses[p] = mean, inverse
        for j in range(size):
            part[j] = (part[j] - mean) * inverse


@kernel(reorder=True, allocates=False)
def _normalize_again(hat, size, means, inverses):
    for p in range(hat.size // size):
        part, mean, inverse = hat[p * size : (p + 1) * size], means[p], inverses[p]
        for j in range(size):
            part[j] = (part[j] - mean) * inverse


@kernel(reorder=True, allocates=False)
def _normalize_backward(d, hat, size, inverses):
    for p in range(d.size // size):
        part, h, inverse = d[p * size : (p + 1) * size], hat[p * size : (p + 1) * size], inverses[p]
        mean, along = ZERO, ZERO
        for j in range(size):
            mean += part[j]
            along += part[j] * h[j]
        mean, along = mean / np.float32(size), along / np.float32(size)
        for j in range(size):
            part[j] = (part[j] - mean - h[j] * along) * inverse


@kernel(reorder=True, allocates=False)
def _add_own_input(out, x, n, k):
    # Own inputs of rows of k numbers to rows of n.
    if k > n:
        group = k // n
        share = ONE / np.float32(group)
        if group == 4:  # neighbours at a constant distance become vector code
            for j in range(out.size):
                out[j] += ((x[4 * j] + x[4 * j + 1]) + (x[4 * j + 2] + x[4 * j + 3])) * share
        elif group == 2:
            for j in range(out.size):
                out[j] += (x[2 * j] + x[2 * j + 1]) * share
        else:
            for j in range(out.size):
                total = ZERO
                for i in range(group):
                    total += x[j * group + i]
                out[j] += total * share
    elif k == n:
        for j in range(out.size):
            out[j] += x[j]
    elif k:
        for start in range(0, out.size, k):
            part, own = out[start : start + k], x[start // n * k : start // n * k + k]
            for j in range(k):
                part[j] += own[j]


@kernel(reorder=True, allocates=False)
def _own_input_backward(d, dx, n, k):
    if k > n:
        group = k // n
        share = ONE / np.float32(group)
        if group == 4:
            for j in range(d.size):
                v = d[j] * share
                dx[4 * j] = v
                dx[4 * j + 1] = v
                dx[4 * j + 2] = v
                dx[4 * j + 3] = v
        elif group == 2:
            for j in range(d.size):
                v = d[j] * share
                dx[2 * j] = v
                dx[2 * j + 1] = v
        else:
            for j in range(d.size):
                for i in range(group):
                    dx[j * group + i] = d[j] * share
    elif k == n:
        _copy(d, dx)
    elif k:
        dx[:] = ZERO
        for start in range(0, d.size, k):
            part, own = d[start : start + k], dx[start // n * k : start // n * k + k]
            for j in range(k):
                own[j] += part[j]


@kernel(reorder=True, allocates=False)
def _rows_forward(first, last, y, x, vectors, factored, scaled, size, eps, activation, out, moments):
    # The rows of a block.
    n, k, tall = y.shape[1], x.shape[1], vectors.shape[1] // y.shape[1]
    parts = n // size if size else 0
    factor, weight, bias = vectors[FACTOR], vectors[WEIGHT], vectors[BIAS]
    shift, slope, shift_out = vectors[SHIFT_IN], vectors[SLOPE], vectors[SHIFT_OUT]
    alpha, beta = vectors[ALPHA], vectors[BETA]
    for r in range(first, last, tall):
        stop = min(last, r + tall)
        given, row = y[r:stop].reshape((stop - r) * n), out[r:stop].reshape((stop - r) * n)
        if factored:
            for j in range(row.size):
                row[j] = given[j] * factor[j]
        else:
            _copy(given, row)
        if size:
            _normalize(row, size, eps, moments[0, r * parts : stop * parts], moments[1, r * parts : stop * parts])
            for j in range(row.size):
                row[j] = row[j] * weight[j] + bias[j]
        _add_own_input(row, x[r:stop].reshape((stop - r) * k), n, k)
        if activation == 1:
            for j in range(row.size):
                v = row[j]
                v = ONE if v > ONE else v
                row[j] = -ONE if v < -ONE else v
        elif activation == 2:
            for j in range(row.size):
                v = row[j] + shift[j]
                low = slope[j] * v
                row[j] = (v if v > ZERO else low) + shift_out[j]
        if scaled:
            for j in range(row.size):
                row[j] = row[j] * alpha[j] + beta[j]


@elementwise.parallel_kernel(reorder=True)
def end_forward(y, x, vectors, factored, scaled, size, eps, activation, out, moments):
    """Map products (M, N) and own inputs (M, K), K = 0 for none, to (M, N).

    vectors (8, R N) in the order of the module, each R times side by side: for R rows at once. factored, scaled:
    whether there is a factor in front, a scale at the end. size: numbers that are normalized together, 0 for no norm.
    activation: a value of `ACTIVATIONS`. moments (2, M N / size) takes the means and inverse deviations of the norm.
    """
    rows = y.shape[0]
    for block in prange((rows + _SHARE - 1) // _SHARE):
        first, last = block * _SHARE, min(rows, (block + 1) * _SHARE)
        _rows_forward(first, last, y, x, vectors, factored, scaled, size, eps, activation, out, moments)


@kernel(reorder=True, allocates=False)
def _rows_backward(
    first, last, y, x, g, vectors, factored, scaled, size, activation, moments, dy, dx, total, works, sums
):
    # The rows of a block.
    n, k, tall = y.shape[1], x.shape[1], vectors.shape[1] // y.shape[1]
    wide, parts = vectors.shape[1], n // size if size else 0
    hats, inputs, work = works[0], works[1], works[2]
    factor, weight, bias = vectors[FACTOR], vectors[WEIGHT], vectors[BIAS]
    shift, slope, shift_out, alpha = vectors[SHIFT_IN], vectors[SLOPE], vectors[SHIFT_OUT], vectors[ALPHA]
    of_factor, of_weight, of_bias = total[FACTOR], total[WEIGHT], total[BIAS]
    of_shift, of_slope, of_shift_out = total[SHIFT_IN], total[SLOPE], total[SHIFT_OUT]
    of_alpha, of_beta = total[ALPHA], total[BETA]
    for r in range(first, last, tall):
        stop = min(last, r + tall)
        count = (stop - r) * n
        given, up, out = y[r:stop].reshape(count), g[r:stop].reshape(count), dy[r:stop].reshape(count)
        hat, moved, d = hats[:count], inputs[:count], work[:count]
        means, inverses = moments[0, r * parts : stop * parts], moments[1, r * parts : stop * parts]
        if factored:
            for j in range(count):
                hat[j] = given[j] * factor[j]
        else:
            _copy(given, hat)
        if size:
            _normalize_again(hat, size, means, inverses)
        if scaled or activation:  # what follows asks for the numbers before it
            for j in range(count):
                moved[j] = hat[j] * weight[j] + bias[j]
            _add_own_input(moved, x[r:stop].reshape((stop - r) * k), n, k)
        if scaled:
            for j in range(count):
                of_beta[j] += up[j]
                d[j] = up[j] * alpha[j]
        else:
            _copy(up, d)
        if activation == 2:
            for j in range(count):
                moved[j] += shift[j]
            for j in range(count):
                of_shift_out[j] += d[j]
                v = moved[j]
                of_slope[j] += d[j] * (v if v <= ZERO else ZERO)
            if scaled:
                for j in range(count):
                    v = moved[j]
                    low = slope[j] * v
                    of_alpha[j] += up[j] * ((v if v > ZERO else low) + shift_out[j])
            for j in range(count):
                v, high = moved[j], d[j]
                low = high * slope[j]
                v = high if v > ZERO else low
                d[j] = v
                of_shift[j] += v
        elif activation == 1:
            for j in range(count):
                v, above = moved[j], d[j]
                d[j] = above if abs(v) < ONE else ZERO
            if scaled:
                for j in range(count):
                    v = moved[j]
                    v = ONE if v > ONE else v
                    of_alpha[j] += up[j] * (-ONE if v < -ONE else v)
        elif scaled:
            for j in range(count):
                of_alpha[j] += up[j] * moved[j]
        _own_input_backward(d, dx[r:stop].reshape((stop - r) * k), n, k)
        if size:
            for j in range(count):
                of_weight[j] += d[j] * hat[j]
                of_bias[j] += d[j]
            for j in range(count):
                d[j] *= weight[j]
            _normalize_backward(d, hat, size, inverses)
        if factored:
            for j in range(count):
                of_factor[j] += d[j] * given[j]
                out[j] = d[j] * factor[j]
        else:
            _copy(d, out)
    for i in range(8):
        if not (factored if i == FACTOR else size if i <= BIAS else activation == 2 if i <= SHIFT_OUT else scaled):
            continue
        summed = sums[i]
        for start in range(0, wide, n):
            part = total[i, start : start + n]
            for j in range(n):
                summed[j] += part[j]


@elementwise.parallel_kernel(reorder=True)
def end_backward(y, x, g, vectors, factored, scaled, size, activation, moments, dy, dx, dvectors):
    """Write the gradients of `end_forward` for g (M, N): dy (M, N), which may be g, dx (M, K), and dvectors (8, N)."""
    rows, n = y.shape
    blocks = (rows + BLOCK - 1) // BLOCK
    sums = np.zeros((blocks, 8, n), np.float32)
    for place in prange(blocks):
        block = (place + blocks - 1) % blocks  # the last, short one goes to the thread that has one more
        space = np.zeros(11 * vectors.shape[1] + 16, np.float32)
        start = -(space.ctypes.data // 4) % 16  # vectors that cross a cache line take a quarter longer
        space = space[start : start + 11 * vectors.shape[1]].reshape((11, vectors.shape[1]))
        total, works = space[:8], space[8:]
        first, last = block * BLOCK, min(rows, (block + 1) * BLOCK)
        outs = dy, dx, total, works, sums[block]
        _rows_backward(first, last, y, x, g, vectors, factored, scaled, size, activation, moments, *outs)
    dvectors[:] = 0
    for block in range(blocks):
        for i in range(8):
            for j in range(n):
                dvectors[i, j] += sums[block, i, j]
