"""Compiled CPU kernels of the training step: several element-wise passes over memory in one.

They compute what the rules in `binvit.nn.rules` and `binvit.nn.attention_rules` define, for the rules that GSB and its
one-group baseline train with, on float32 CPU tensors; everything else takes the rules' own tensor formulas. Sums are
formed in blocks of fixed size, so that results do not depend on the number of threads.
"""

from __future__ import annotations

import functools

import numba
import numpy as np
import torch
from numba import njit, prange
from torch import Tensor

BLOCK = 32  # rows that are summed together
OPTIONS = {"parallel": True, "cache": True, "nogil": True, "fastmath": {"reassoc", "contract", "nsz"}}


def usable(*tensors: Tensor | None) -> bool:
    """Tell whether the kernels can take these tensors: float32 on the CPU, and numba compiles."""
    if numba.config.DISABLE_JIT:
        return False
    _start_threads()
    return all(t is None or (t.dtype == torch.float32 and t.device.type == "cpu") for t in tensors)


@functools.cache
def _start_threads() -> None:
    # numba may start its threads in torch's OpenMP runtime, and thereby sets the number that torch uses.
    before = torch.get_num_threads()
    numba.get_num_threads()
    torch.set_num_threads(before)


def _rows(x: Tensor) -> np.ndarray:
    """View x as (rows, last dimension), contiguous."""
    return x.detach().contiguous().view(-1, x.shape[-1]).numpy()


def _shift(shift: Tensor | None, k: int) -> np.ndarray:
    return np.zeros(k, np.float32) if shift is None else shift.detach().numpy()


@njit(**OPTIONS)
def _levels(x, shift, threshold, unsigned, out):
    rows, k = x.shape
    for block in prange((rows + BLOCK - 1) // BLOCK):
        for r in range(block * BLOCK, min(rows, (block + 1) * BLOCK)):
            if unsigned:
                for j in range(k):
                    out[r, j] = 1 if x[r, j] + shift[j] > threshold else 0
            else:
                for j in range(k):
                    out[r, j] = 1 if x[r, j] + shift[j] >= 0 else -1


@njit(**OPTIONS)
def _centred_signs(w, mean, out):
    rows, k = w.shape
    for r in prange(rows):
        for j in range(k):
            out[r, j] = 1 if w[r, j] - mean >= 0 else -1


@njit(**OPTIONS)
def _elastic_backward(x, shift, g, gain, scale, unsigned, dscale, dshift):
    rows, k = x.shape
    low = np.float32(0) if unsigned else -scale
    for block in prange((rows + BLOCK - 1) // BLOCK):
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
                dshift[block, j] += d
                g[r, j] = d
            total += level - ramp / scale
        dscale[block] = total


@njit(**OPTIONS)
def _scale_rows(product, scale, bias, out):
    rows, n = product.shape
    for block in prange((rows + BLOCK - 1) // BLOCK):
        for r in range(block * BLOCK, min(rows, (block + 1) * BLOCK)):
            for j in range(n):
                out[r, j] = np.float32(product[r, j]) * scale[j] + bias[j]


def elastic_levels(x: Tensor, shift: Tensor | None, scale: Tensor, unsigned: bool, dtype: torch.dtype) -> Tensor:
    """Return the levels of x + shift, of the shape of x.

    Args:
        x: (..., K).
        shift: (K,) or None.
        scale: The elastic scale, shape ().
        unsigned: Levels {0, 1} above half the scale; otherwise -1 and +1.
        dtype: Type of the levels.
    """
    rows = _rows(x)
    out = torch.empty(rows.shape, dtype=dtype)
    _levels(rows, _shift(shift, rows.shape[1]), np.float32(0.5 * scale.item()), unsigned, out.numpy())
    return out.view(x.shape)


def centred_signs(w: Tensor, mean: Tensor, dtype: torch.dtype) -> Tensor:
    """Return sign(w - mean) of a matrix (N, K) in the given type."""
    out = torch.empty(w.shape, dtype=dtype)
    _centred_signs(w.detach().contiguous().numpy(), np.float32(mean.item()), out.numpy())
    return out


def elastic_backward(
    x: Tensor, shift: Tensor | None, g: Tensor, gain: float, scale: Tensor, unsigned: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of an elastic binarizer of x + shift; g is overwritten.

    Args:
        x: (..., K).
        shift: (K,) or None.
        g: Gradient of the binarized tensor divided by `gain`, of the shape of x; contiguous.
        gain: Multiplied into g.
        scale: The elastic scale, shape ().
        unsigned: Levels {0, 1} instead of -1 and +1.

    Returns:
        The gradients to x, to the scale and, (K,), to the shift.
    """
    rows, up = _rows(x), _rows(g)
    blocks = -(-rows.shape[0] // BLOCK)
    dscale, dshift = np.zeros(blocks), np.zeros((blocks, rows.shape[1]), np.float32)
    constants = np.float32(gain), np.float32(scale.item()), unsigned
    _elastic_backward(rows, _shift(shift, rows.shape[1]), up, *constants, dscale, dshift)
    return (
        torch.from_numpy(up).view(x.shape),
        scale.new_tensor(dscale.sum() / x.numel() ** 0.5),
        torch.from_numpy(dshift.sum(0)),
    )


def scale_product(product: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """Return product * scale + bias in float32.

    Args:
        product: Integer product, int32 (M, N).
        scale: Broadcastable to (N,).
        bias: (N,) or None.
    """
    n = product.shape[1]
    out = torch.empty(product.shape, dtype=torch.float32)
    _scale_rows(product.numpy(), scale.detach().expand(n).contiguous().numpy(), _shift(bias, n), out.numpy())
    return out
