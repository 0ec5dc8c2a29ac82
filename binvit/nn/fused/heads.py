"""Compiled passes of the rules whose parameters belong to heads: Bi-ViT's sign and BHViT's three maps.

Each number is what the rule's own tensor formulas give, to the last bit; sums stay torch's, in its order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numba import prange
from torch import Tensor

from binvit.nn.fused import elementwise
from binvit.nn.rules import HeadSign, Rule, ThreeMaps, reduce_to

ZERO, ONE, THREE = np.float32(0), np.float32(1), np.float32(3)


def takes_heads(rule: Rule, x: Tensor, parameters: Sequence[Tensor]) -> bool:
    """Tell whether `integers`, `binarized` and `gradients` cover x (B, H, N, M) with this rule and parameters."""
    if not isinstance(rule, HeadSign | ThreeMaps) or x.dim() != 4 or not elementwise.usable(x, *parameters):
        return False
    return all(p.shape == (x.shape[1], 1, 1) for p in parameters)


@elementwise.parallel_kernel
def _signs(x, scale, whole, factor, out):
    """Write factor (sign(x / scale + whole) - whole) for x (B * H, M), each vector (H,)."""
    for r in prange(x.shape[0]):
        h = r % scale.size
        low, high = (-ONE - whole[h]) * factor[h], (ONE - whole[h]) * factor[h]
        for j in range(x.shape[1]):
            out[r, j] = high if x[r, j] / scale[h] + whole[h] >= ZERO else low


@elementwise.parallel_kernel
def _signs_backward(x, g, scale, whole, dx, of_scale, of_offset):
    """Write the gradient of x (B * H, M) and what the gradients of scale and offset sum up."""
    for r in prange(x.shape[0]):
        h = r % scale.size
        for j in range(x.shape[1]):
            ratio = x[r, j] / scale[h]
            moved = ratio + whole[h]
            through = g[r, j] * (ONE if abs(moved) <= ONE else ZERO)
            level = (ONE if moved >= ZERO else -ONE) - whole[h]
            dx[r, j] = through
            of_scale[r, j] = g[r, j] * level - through * ratio
            of_offset[r, j] = through - g[r, j]


@elementwise.parallel_kernel
def _maps(x, scale, offset, out):
    """Write the sum of the three scaled maps of x (B * H, M)."""
    for r in prange(x.shape[0]):
        h = r % scale.size
        a = scale[h]
        for j in range(x.shape[1]):
            level = np.rint(THREE * x[r, j] / a + offset[h])
            first, second = (a if level >= ONE else a * ZERO), (a if level >= np.float32(2) else a * ZERO)
            out[r, j] = first + second + (a if level >= THREE else a * ZERO)


@elementwise.parallel_kernel
def _maps_backward(x, g, scale, offset, dx, of_scale, of_offset):
    """Write the gradient of x (B * H, M) and what the gradients of scale and offset sum up."""
    for r in prange(x.shape[0]):
        h = r % scale.size
        for j in range(x.shape[1]):
            level = np.rint(THREE * x[r, j] / scale[h] + offset[h])
            through = g[r, j] * (ONE if (level >= ZERO) and (level <= THREE) else ZERO)
            clipped = ZERO if level < ZERO else level
            clipped = THREE if clipped > THREE else clipped
            dx[r, j] = THREE * through
            of_scale[r, j] = g[r, j] * clipped - through * THREE * x[r, j] / scale[h]
            of_offset[r, j] = through


def _rows_of(x: Tensor) -> np.ndarray:
    return x.detach().contiguous().view(x.shape[0] * x.shape[1], -1).numpy()


def _vector(parameter: Tensor) -> np.ndarray:
    return parameter.detach().contiguous().view(-1).numpy()


def integers(x: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    """Return the levels of `HeadSign` less their offset, for x (B, H, N, M) and parameters (H, 1, 1), of x's shape."""
    out = x.new_empty(x.shape)
    factor = np.ones(scale.numel(), np.float32)
    _signs(_rows_of(x), _vector(scale), _vector(offset.round()), factor, _rows_of(out))
    return out


def binarized(rule: Rule, x: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    """Return the sum of the rule's planes for x (B, H, N, M) and parameters (H, 1, 1), of x's shape."""
    out, factor = x.new_empty(x.shape), _vector(scale)
    if isinstance(rule, HeadSign):
        _signs(_rows_of(x), factor, _vector(offset.round()), factor, _rows_of(out))
    else:
        _maps(_rows_of(x), factor, _vector(offset), _rows_of(out))
    return out


def gradients(rule: Rule, x: Tensor, g: Tensor, scale: Tensor, offset: Tensor) -> tuple[Any, ...]:
    """Return what `rule.backward` does: gradients of x (B, H, N, M), scale and offset (H, 1, 1), for g of x's shape."""
    dx, of_scale, of_offset = (x.new_empty(x.shape) for _ in range(3))
    outs = [_rows_of(out) for out in (dx, of_scale, of_offset)]
    signs = isinstance(rule, HeadSign)
    backward = _signs_backward if signs else _maps_backward
    backward(_rows_of(x), _rows_of(g), _vector(scale), _vector(offset.round() if signs else offset), *outs)
    dscale, doffset = reduce_to(of_scale, scale.shape), reduce_to(of_offset, scale.shape)
    if signs:
        root = max(x.numel(), 1) ** 0.5
        return dx, dscale / root, scale * doffset / root
    share = x.shape[1] / max(3 * x.numel(), 1) ** 0.5
    return dx, share * dscale, share * scale * doffset
