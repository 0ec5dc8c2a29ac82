"""Products of a few rows with 8-bit weights, as the classification heads need them for a single image."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from binvit.bits.jit import JIT, kernel

MOST_ROWS = 4
"""With more, converting the weights to float32 once and calling BLAS is faster."""


def few_rows_product(x: Tensor, w: Tensor) -> Tensor | None:
    """Multiply integer levels without a float32 copy of the weights.

    Args:
        x: float32 (..., K), whole numbers.
        w: int8 (N, K); the sums are below 2**24, so that any order of adding them is exact.

    Returns:
        float32 (..., N), or None where this form does not pay: many rows, or no compiler.
    """
    rows = x.reshape(-1, x.shape[-1])
    if not JIT or len(rows) > MOST_ROWS or w.dtype != torch.int8:
        return None
    out = torch.empty(len(rows), len(w))
    _multiply(rows.contiguous().numpy(), w.numpy(), out.numpy())
    return out.view(*x.shape[:-1], len(w))


@kernel(reorder=True)
def _multiply(x, w, out):
    for n in range(w.shape[0]):
        for m in range(x.shape[0]):
            total = np.float32(0)
            for k in range(x.shape[1]):
                total += x[m, k] * np.float32(w[n, k])
            out[m, n] = total
