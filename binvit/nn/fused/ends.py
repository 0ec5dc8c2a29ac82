"""The fused form of what follows a 1-bit product: factor, norm, own input, activation and scale in one pass each way.

Nothing is saved but the inputs and the norms' moments; the backward pass computes the rest again, row by row in the
first-level cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from binvit.jit import aligned_empty
from binvit.nn.fused import elementwise
from binvit.nn.fused.end_kernels import ALPHA, FACTOR, VECTORS, end_backward, end_forward, fill_table
from binvit.nn.precision import full_precision

TILE = 1024  # numbers that a loop goes over: few enough for the first-level cache, enough to be worth its start
_NONE = np.empty(0, np.float32)
ACTIVATIONS = {"none": 0, "clip": 1, "rprelu": 2}


class End(NamedTuple):
    """What follows a product; see `binvit.nn.block_parts.LayerEnd`."""

    parts: int  # of the norm; 0 for none
    eps: float
    activation: str


def _table(vectors: Sequence[Tensor | None], width: int) -> np.ndarray:
    """Return the vectors (8, R N), each as many times as fill a tile of a power of two of rows."""
    table = aligned_empty((VECTORS, 1 << max(0, (TILE // width).bit_length() - 1), width), np.float32)
    fill_table(*[_NONE if value is None else value.detach().contiguous().numpy() for value in vectors], table)
    return table.reshape(VECTORS, -1)


class Tail(NamedTuple):
    """What the backward pass of an end needs besides its inputs."""

    table: np.ndarray
    given: list[bool]  # which of the vectors there are
    size: int
    activation: int
    moments: np.ndarray


def apply_end(kind: End, y: Tensor, own: np.ndarray | None, vectors: Sequence[Tensor | None]) -> tuple[Tensor, Tail]:
    """Compute an end of products (M, N) and own inputs (M, K) outside autograd: (M, N), and what `gradients` takes."""
    out, own = y.new_empty(y.shape), _no_rows(len(y)) if own is None else own
    rows, width = y.shape
    given, size = [value is not None for value in vectors], width // kind.parts if kind.parts else 0
    moments = np.empty((2, rows * kind.parts), np.float32)
    tail = Tail(_table(vectors, width), given, size, ACTIVATIONS[kind.activation], moments)
    how = tail.table, given[FACTOR], given[ALPHA], size, np.float32(kind.eps), tail.activation
    end_forward(y.numpy(), own, *how, out.numpy(), moments)
    return out, tail


def gradients(
    tail: Tail, y: Tensor, own: np.ndarray | None, g: Tensor
) -> tuple[Tensor, Tensor | None, list[Tensor | None]]:
    """Return the gradients of products (M, N), of own inputs (M, K) and of the vectors, for g (M, N)."""
    dy, summed = y.new_empty(y.shape), y.new_empty(VECTORS, y.shape[1])
    down = y.new_empty(len(y), 0 if own is None else own.shape[1])
    how = tail.table, tail.given[FACTOR], tail.given[ALPHA], tail.size, tail.activation, tail.moments
    rows = _no_rows(len(y)) if own is None else own
    end_backward(y.numpy(), rows, elementwise.rows_of(g), *how, dy.numpy(), down.numpy(), summed.numpy())
    dvectors = [d if given else None for given, d in zip(tail.given, summed.unbind(), strict=True)]
    return dy, None if own is None else down, dvectors


def _no_rows(rows: int) -> np.ndarray:
    return np.empty((rows, 0), np.float32)


def _flat(x: Tensor) -> Tensor:
    return x.detach().contiguous().view(-1, x.shape[-1])


class _LayerEnd(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kind: End, y: Tensor, x: Tensor | None, *vectors: Tensor | None) -> Tensor:
        out, ctx.tail = apply_end(kind, _flat(y), None if x is None else elementwise.rows_of(x), vectors)
        ctx.save_for_backward(y, x)
        return out.view(y.shape)

    @staticmethod
    @once_differentiable
    @full_precision
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        y, x = ctx.saved_tensors
        dy, dx, dvectors = gradients(ctx.tail, _flat(y), None if x is None else elementwise.rows_of(x), g)
        return None, dy.view(y.shape), None if dx is None else dx.view(x.shape), *dvectors


@torch.compiler.disable  # compiled by numba
@full_precision
def layer_end(y: Tensor, x: Tensor | None, kind: End, vectors: Sequence[Tensor | None]) -> Tensor:
    """Compute `binvit.nn.block_parts.LayerEnd`.

    Args:
        y: products (..., N), float32 on the CPU.
        x: the layer's own input (..., K), or None; one of the widths divides the other.
        kind: the parts without parameters.
        vectors: factor, weight and bias of the norm, the activation's inner shift, slope and outer shift, factor and
            offset of the channels' scale; each (N,) or None.

    Returns:
        (..., N).
    """
    return _LayerEnd.apply(kind, y, x, *vectors)
