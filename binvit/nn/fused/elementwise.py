"""Compiled CPU kernels of the training step: several element-wise passes over memory in one.

They compute what the rules in `binvit.nn.rules` and `binvit.nn.rules` define, for the rules that GSB and its
one-group baseline train with, on float32 CPU tensors; everything else takes the rules' own tensor formulas. Sums are
formed in blocks of fixed size, so that results do not depend on the number of threads.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import prange
from torch import Tensor

from binvit.jit import JIT, get_threads, kernel

BLOCK = 32  # rows that are summed together


def usable(*tensors: Tensor | None) -> bool:
    """Tell whether the kernels can take these tensors: float32 on the CPU, and numba compiles."""
    if not JIT:
        return False
    get_threads()  # starts them: numba may take torch's OpenMP runtime over, and the number that torch uses with it
    return all(t is None or (t.dtype == torch.float32 and t.device.type == "cpu" and t.numel()) for t in tensors)


@kernel(parallel=True, reorder=True)
def elastic_levels(x, shift, threshold, unsigned, out):
    """Levels of x + shift, (M, K) with a shift of (K,): {0, 1} above the threshold if unsigned, else -1 and +1."""
    rows, k = x.shape
    for block in prange((rows + BLOCK - 1) // BLOCK):
        for r in range(block * BLOCK, min(rows, (block + 1) * BLOCK)):
            if unsigned:
                for j in range(k):
                    out[r, j] = 1 if x[r, j] + shift[j] > threshold else 0
            else:
                for j in range(k):
                    out[r, j] = 1 if x[r, j] + shift[j] >= 0 else -1


@kernel(parallel=True, reorder=True)
def centred_signs(w, out):
    """Signs of w - mean(w), (N, K), into out; returns the mean of |w|."""
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


@kernel(parallel=True, reorder=True)
def elastic_backward(x, shift, g, gain, scale, unsigned, dshift):
    """Gradients of an elastic binarizer of x + shift, (M, K) with a shift of (K,).

    g is the gradient of the binarized tensor divided by `gain`, and becomes the gradient of x in place; dshift (K,)
    takes the gradient of the shift. Returns the gradient of the scale before its division by a root of the size.
    """
    rows, k = x.shape
    low = np.float32(0) if unsigned else -scale
    blocks = (rows + BLOCK - 1) // BLOCK
    sums, columns = np.empty(blocks), np.zeros((blocks, k), np.float32)
    for block in prange(blocks):
        total = 0.0
        for r in range(block * BLOCK, min(rows, (block + 1) * BLOCK)):
            level, ramp = np.float32(0), np.float32(0)
            for j in range(k):
                v = x[r, j] + shift[j]
                up = g[r, j] * gain
                if unsigned:
                    level += up if v > np.float32(0.5) * scale else np.float32(0)
                else:
                    level += up if v >= 0 else -up
                d = up if (v >= low) and (v <= scale) else np.float32(0)
                ramp += v * d
                columns[block, j] += d
                g[r, j] = d
            total += level - ramp / scale
        sums[block] = total
    dshift[:] = 0
    for block in range(blocks):
        for j in range(k):
            dshift[j] += columns[block, j]
    return np.float32(sums.sum())


@kernel(parallel=True, reorder=True)
def scale_product(product, scale, bias, out):
    """Write product * scale + bias, (M, N) with vectors of (N,), into out, which may be the product."""
    rows, n = product.shape
    for block in prange((rows + BLOCK - 1) // BLOCK):
        for r in range(block * BLOCK, min(rows, (block + 1) * BLOCK)):
            for j in range(n):
                out[r, j] = np.float32(product[r, j]) * scale[j] + bias[j]


def rows_of(x: Tensor) -> np.ndarray:
    """View a tensor as (rows, last dimension), contiguous, outside autograd."""
    return x.detach().contiguous().view(-1, x.shape[-1]).numpy()


def vector(values: Tensor | None, size: int) -> np.ndarray:
    """Return float32 values for `size` columns as an array: a vector, one number for all of them, or None for zeros."""
    if values is None:
        return np.zeros(size, np.float32)
    if values.numel() == 1:
        return np.full(size, values.item(), np.float32)
    return values.detach().reshape(size).numpy()
