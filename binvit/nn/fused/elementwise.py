"""Compiled CPU kernels of the 1-bit linear layers' training step: several element-wise passes over memory in one.

They compute what a rule's `binvit.nn.rules.Form` says, on float32 CPU tensors; everything else takes the rules' own
tensor formulas. Sums are formed in blocks of fixed size, so that results do not depend on the number of threads.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numba import prange
from torch import Tensor

from binvit.jit import JIT, kernel
from binvit.nn.rules import Form
from binvit.threads import get_threads, start_threads, use_threads

BLOCK = 32  # rows that are summed together
ZERO, ONE, TWO = np.float32(0), np.float32(1), np.float32(2)
SLOPES = {"step": 0, "approx": 1, "ede": 2}
WINDOWS = {"closed": 0, "open": 1}
SHORTEST_ROW = 8  # numbers; torch sums shorter rows in another order


def usable(*tensors: Tensor | None) -> bool:
    """Tell whether the kernels can take these tensors: float32 on the CPU, and numba compiles."""
    if not JIT or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    start_threads()  # numba may take torch's OpenMP runtime over, and the number that torch uses with it
    return all(map(_fits, tensors))


def _fits(t: Tensor | None) -> bool:
    return t is None or (t.dtype == torch.float32 and t.is_cpu and t.numel() > 0)


def parallel_kernel(function: Callable | None = None, *, reorder: bool = False) -> Callable:
    """Compile a kernel of parallel loops that run on no more threads than torch has.

    torch follows ``OMP_NUM_THREADS``, which clusters, Snakemake and torchrun set, and numba does not: processes side by
    side would each use all cores, and wait for one another's threads.

    Args:
        function: the kernel, as for `binvit.jit.kernel`.
        reorder: whether floating-point sums may be reordered.

    Returns:
        The compiled kernel, to be called from Python.
    """
    if function is None:
        return functools.partial(parallel_kernel, reorder=reorder)
    compiled = kernel(function, parallel=True, reorder=reorder)

    @functools.wraps(function)
    def call(*arguments: Any) -> Any:
        if (most := torch.get_num_threads()) >= get_threads():
            return compiled(*arguments)
        with use_threads(most):
            return compiled(*arguments)

    return call


def numbers(form: Form) -> tuple[int, np.float32, np.float32, np.float32, bool, np.float32]:
    """Return a form as the kernels take it: slope, low, high, threshold, whether the levels are {0, 1}, share."""
    threshold = np.float32(0 if form.threshold is None else form.threshold)
    low, high, share = np.float32(form.low), np.float32(form.high), np.float32(form.share)
    return SLOPES[form.slope], low, high, threshold, form.threshold is not None, share


@kernel(reorder=True, allocates=False)
def share_of_largest(x, shift, share):
    """Return the share of the largest x + shift, both (K,)."""
    if share == 0:
        return ZERO
    top = x[0] + shift[0]
    for j in range(x.size):
        top = max(top, x[j] + shift[j])
    return share * top


@kernel(reorder=True, allocates=False)
def _levels_of_rows(first, last, x, shift, threshold, unsigned, share, out):
    k = x.shape[1]
    for r in range(first, last):
        limit = share_of_largest(x[r], shift, share)
        if unsigned:
            for j in range(k):
                out[r, j] = 1 if x[r, j] + shift[j] - limit > threshold else 0
        else:
            for j in range(k):
                out[r, j] = 1 if x[r, j] + shift[j] >= 0 else -1


@parallel_kernel(reorder=True)
def binary_levels(x, shift, threshold, unsigned, share, out):
    """Write the levels of x + shift, (M, K) with a shift of (K,): {0, 1} by the threshold if unsigned, else signs."""
    rows = x.shape[0]
    for block in prange((rows + BLOCK - 1) // BLOCK):
        first, last = block * BLOCK, min(rows, (block + 1) * BLOCK)
        _levels_of_rows(first, last, x, shift, threshold, unsigned, share, out)


@parallel_kernel(reorder=True)
def centred_signs(w, out):
    """Write the signs of w - mean(w), (N, K), into out and return the mean of |w|."""
    rows, k = w.shape
    sums, sizes = np.empty(rows), np.empty(rows)
    for r in prange(rows):
        total, size = np.float32(0), np.float32(0)
        for j in range(k):
            total += w[r, j]
            size += abs(w[r, j])
        sums[r], sizes[r] = total, size
    mean = np.float32(sums.sum() / w.size)
    for r in prange(rows):
        for j in range(k):
            out[r, j] = 1 if w[r, j] >= mean else -1
    return np.float32(sizes.sum() / w.size)


@kernel(allocates=False)
def _sum_of_row(x, absolute, sums):
    # The sum of x (K,), of |x| if `absolute`, in the order in which torch sums a contiguous last dimension: four
    # vectors of eight side by side, folded into the next level after every sixteenth. sums (4, 32) is overwritten.
    chunks, i = x.size // 32, 0
    for level in range(4):
        for j in range(32):
            sums[level, j] = ZERO
    while i + 16 <= chunks:
        for start in range(32 * i, 32 * (i + 16), 32):
            for j in range(32):
                sums[0, j] += abs(x[start + j]) if absolute else x[start + j]
        i += 16
        for level in range(1, 4):
            for j in range(32):
                sums[level, j] += sums[level - 1, j]
                sums[level - 1, j] = ZERO
            if i & (15 << (4 * level)):
                break
    for start in range(32 * i, 32 * chunks, 32):
        for j in range(32):
            sums[0, j] += abs(x[start + j]) if absolute else x[start + j]
    for level in range(1, 4):
        for j in range(32):
            sums[0, j] += sums[level, j]
    for start in range(32 * chunks, x.size - 7, 8):
        for j in range(8):
            sums[0, j] += abs(x[start + j]) if absolute else x[start + j]
    for start in range(8, 32, 8):
        for j in range(8):
            sums[0, j] += sums[0, start + j]
    total = ZERO
    for j in range(x.size // 8 * 8, x.size):
        total += abs(x[j]) if absolute else x[j]
    for j in range(8):
        total += sums[0, j]
    return total


@parallel_kernel
def sums_of_rows(x, absolute, out):
    """Write the sums of x (N, K), of |x| if `absolute`, into out (N,); K is at least `SHORTEST_ROW`."""
    for r in prange(x.shape[0]):
        out[r] = _sum_of_row(x[r], absolute, np.empty((4, 32), np.float32))


@functools.cache
def sums_like_torch() -> bool:
    """Tell whether the kernels sum several rows and take their means as this torch does here, to the last bit."""
    for k in (SHORTEST_ROW, 48, 100, 1111, 20000):
        x = torch.linspace(-1, 3, 3 * k, dtype=torch.float32, device="cpu").mul_(7).cos_().view(3, k)
        own = np.empty(3, np.float32)
        for absolute in (False, True):
            sums_of_rows(x.numpy(), absolute, own)
            expected = x.abs() if absolute else x
            if not (np.array_equal(own, expected.sum(-1)) and np.array_equal(own / np.float32(k), expected.mean(-1))):
                return False
    return True


@parallel_kernel
def signs_of_rows(w, center, centred, levels, sizes):
    """Write the signs of w (N, K), and each row's mean size unless `sizes` (N,) is empty.

    If `center`, the signs are those of w less its rows' means, which is written to `centred` (N, K).
    """
    k = w.shape[1]
    for r in prange(w.shape[0]):
        sums = np.empty((4, 32), np.float32)
        if center:
            mean = _sum_of_row(w[r], False, sums) / np.float32(k)
            for j in range(k):
                centred[r, j] = w[r, j] - mean
            for j in range(k):
                levels[r, j] = ONE if centred[r, j] >= ZERO else -ONE
        else:
            for j in range(k):
                levels[r, j] = ONE if w[r, j] >= ZERO else -ONE
        if sizes.size:
            sizes[r] = _sum_of_row(w[r], True, sums) / np.float32(k)


@parallel_kernel
def slopes_of_rows(c, g, window, scales, center, out):
    """Write g times the slope of a window, a value of `WINDOWS`, at c (N, K), times the rows' scales (N,) if any.

    If `center`, each row's mean is taken off.
    """
    k = c.shape[1]
    for r in prange(c.shape[0]):
        row = out[r]
        if window == 0:
            for j in range(k):
                row[j] = g[r, j] * (ONE if abs(c[r, j]) <= ONE else ZERO)
        else:
            for j in range(k):
                row[j] = g[r, j] * (ONE if abs(c[r, j]) < ONE else ZERO)
        if scales.size:
            for j in range(k):
                row[j] *= scales[r]
        if center:
            mean = _sum_of_row(row, False, np.empty((4, 32), np.float32)) / np.float32(k)
            for j in range(k):
                row[j] -= mean


@kernel(reorder=True)
def ede_slope(x, t):
    """Return IR-Net's slope k t (1 - tanh^2(t x)), k = max(1 / t, 1), written so that it becomes vector code."""
    u = max(np.float32(-2.885390082) * abs(t * x), np.float32(-120))  # base-2 logarithm of e^(-2 |t x|)
    whole = np.floor(u + np.float32(0.5))
    f = (u - whole) * np.float32(0.6931471806)
    e = ONE + f * (ONE + f * (np.float32(1 / 2) + f * (np.float32(1 / 6) + f * (np.float32(1 / 24)
        + f * (np.float32(1 / 120) + f * (np.float32(1 / 720) + f * np.float32(1 / 5040)))))))  # fmt: skip
    e *= np.int32((np.int32(whole) + np.int32(127)) << np.int32(23)).view(np.float32)
    return max(ONE, t) * np.float32(4) * e / ((ONE + e) * (ONE + e))


@kernel(reorder=True, allocates=False)
def _backward_of_rows(
    first, last, x, shift, g, gain, slope, low, high, threshold, unsigned, share, passed, means, add, out, sums, row,
    binary, columns,
):  # fmt: skip
    # The rows of a block: sums (2,) and row (K,) are overwritten, columns (K,) are added to.
    k = x.shape[1]
    total, ramped = 0.0, 0.0
    for r in range(first, last):
        level, ramp = ZERO, ZERO
        limit = share_of_largest(x[r], shift, share)
        factor = passed * means[r] if means.size else passed
        if slope == 0:
            for j in range(k):
                v = x[r, j] + shift[j] - limit
                row[j] = g[r, j] * gain * factor if (v >= low) and (v <= high) else ZERO
            for j in range(k):
                v = x[r, j] + shift[j] - limit
                up = g[r, j] * gain
                if unsigned:
                    level += up if v > threshold else ZERO
                else:
                    level += up if v >= 0 else -up
                ramp += v * row[j]
        elif slope == 1:
            for j in range(k):
                size = abs(x[r, j] + shift[j] - limit)
                row[j] = g[r, j] * gain * factor * (TWO - TWO * size) if size <= ONE else ZERO
        else:
            for j in range(k):
                row[j] = g[r, j] * gain * factor * ede_slope(x[r, j] + shift[j] - limit, high)
        if binary.size:
            mean = means[r] if means.size else ONE
            if unsigned:
                for j in range(k):
                    binary[r, j] = mean if x[r, j] + shift[j] - limit > threshold else ZERO
            else:
                for j in range(k):
                    binary[r, j] = mean if x[r, j] + shift[j] >= 0 else -mean
        for j in range(k):
            columns[j] += row[j]
        if add:
            for j in range(k):
                out[r, j] += row[j]
        else:
            for j in range(k):
                out[r, j] = row[j]
        total += level
        ramped += ramp
    sums[0], sums[1] = total, ramped


@parallel_kernel(reorder=True)
def binary_backward(
    x, shift, g, gain, slope, low, high, threshold, unsigned, share, passed, means, add, out, dshift, binary
):
    """Write the gradients of a binarizer of x + shift, (M, K) with a shift of (K,).

    `gain` g is the gradient of the levels' sum before the factors of the form; times `passed`, the row's mean (M,) and
    the slope it is the gradient of x, which is written to `out` (which may be g) or added to it; dshift (K,) takes the
    gradient of the shift, and binary (M, K), if it is not empty, the levels times the row's mean. Returns the sums of
    g level and of x dx.
    """
    rows, k = x.shape
    blocks = (rows + BLOCK - 1) // BLOCK
    sums, columns = np.empty((blocks, 2)), np.zeros((blocks, k), np.float32)
    for block in prange(blocks):
        row = np.empty(k, np.float32)
        first, last = block * BLOCK, min(rows, (block + 1) * BLOCK)
        how = gain, slope, low, high, threshold, unsigned, share, passed
        _backward_of_rows(first, last, x, shift, g, *how, means, add, out, sums[block], row, binary, columns[block])
    dshift[:] = 0
    for block in range(blocks):
        for j in range(k):
            dshift[j] += columns[block, j]
    return sums[:, 0].sum(), sums[:, 1].sum()


def rows_of(x: Tensor) -> np.ndarray:
    """View a tensor as (rows, last dimension), contiguous, outside autograd."""
    return np.ascontiguousarray(x.detach().numpy()).reshape(-1, x.shape[-1])


def vector(values: Tensor | None, size: int, default: float = 0.0) -> np.ndarray:
    """Return float32 values for `size` columns as an array: a vector, one number for all, None for the default."""
    if values is None:
        return np.full(size, default, np.float32) if default else _zeros(size)
    if values.numel() == 1:
        return np.full(size, values.item(), np.float32)
    return values.detach().reshape(size).contiguous().numpy()


@functools.lru_cache(256)
def _zeros(size: int) -> np.ndarray:
    return np.zeros(size, np.float32)  # shared: the kernels only read it
