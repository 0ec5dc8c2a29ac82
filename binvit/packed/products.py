"""Products of the exact path: integers from bits or bytes, equal to what float32 gives."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from binvit import bits
from binvit.jit import JIT, kernel
from binvit.nn.rules import Plane


def bit_product(x: Tensor, w: Tensor) -> Tensor:
    """Multiply levels x (B, H, M, K) in {-1, +1} or {0, 1} with levels w (B, H, N, K) in {-1, 0, +1}, from bits.

    Args:
        x: levels stored as floats, either signs or, with any zero in them, {0, 1}.
        w: levels stored as floats.

    Returns:
        float32 (B, H, M, N), exact integers.
    """
    (b, h, m, length), n = x.shape, w.shape[-2]
    out = np.empty((b * h, m, n), np.int32)
    signed = not bool((x == 0).any())
    rows = bits.pack_levels(x.reshape(b * h, m, length).numpy(), 0)
    columns = w.reshape(b * h, n, length).numpy()
    signs, masks = bits.pack_levels(columns, 0), None
    if not columns.all():
        masks = bits.pack_levels(np.abs(columns), 0)
    for i in range(b * h):
        if masks is None:
            bits.binary_matmul(rows[i], signs[i], length, unsigned=not signed, out=out[i])
        else:
            bits.binary_matmul(rows[i], signs[i], length, unsigned=True, mask=masks[i], out=out[i])
            if signed:  # (2 b - 1) c = 2 b c - c
                out[i] = 2 * out[i] - columns[i].sum(-1).astype(np.int32)
    return torch.from_numpy(out).float().reshape(b, h, m, n)


def plane_product(x: Plane, w: Plane, multiply: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Multiply the integers of two planes, (B, H, M, K) and (B, H, N, K) with offsets per head.

    Args:
        x: the rows.
        w: the columns.
        multiply: multiplies levels as `bit_product` does.

    Returns:
        float32 (B, H, M, N), exact integers.
    """
    product = multiply(x.levels, w.levels)
    if x.offset is not None:
        product -= x.offset * w.levels.sum(-1)[..., None, :]
    if w.offset is not None:
        product -= w.offset * x.levels.sum(-1, keepdim=True)
    if x.offset is not None and w.offset is not None:
        product += x.levels.shape[-1] * x.offset * w.offset
    return product


MOST_ROWS = 16
"""With more, converting the weights to float32 once and calling BLAS with all threads is faster."""


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
    out = torch.empty(len(rows), len(w), dtype=torch.float32)
    multiply_integers(rows.contiguous().numpy(), w.numpy(), out.numpy())
    return out.view(*x.shape[:-1], len(w))


@kernel(reorder=True)
def multiply_integers(x: np.ndarray, w: np.ndarray, out: np.ndarray) -> None:
    """Multiply whole numbers whose sums float32 holds exactly, four outputs at once.

    Args:
        x: float32 (M, K).
        w: int8 (N, K).
        out: float32 (M, N), overwritten.
    """
    last = w.shape[0] - 1
    for n in range(0, w.shape[0], 4):
        n1, n2, n3 = min(n + 1, last), min(n + 2, last), min(n + 3, last)
        for m in range(x.shape[0]):
            a = b = c = d = np.float32(0)
            for k in range(x.shape[1]):
                level = x[m, k]
                a += level * np.float32(w[n, k])
                b += level * np.float32(w[n1, k])
                c += level * np.float32(w[n2, k])
                d += level * np.float32(w[n3, k])
            out[m, n] = a
            out[m, n1] = b
            out[m, n2] = c
            out[m, n3] = d
