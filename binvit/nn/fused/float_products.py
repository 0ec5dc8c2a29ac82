"""Float products of a training step, by oneDNN where torch has it: on some processors twice as fast as torch's own.

torch multiplies float32 matrices by MKL, whose kernels for processors of other makers are short of their vectors.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from binvit.config import show

LIBRARIES = ("oneDNN", "torch")
"""What can multiply: oneDNN itself, or what torch chooses."""
SWITCH = "BINVIT_PRODUCTS"
"""The environment variable that chooses one of them."""

_LARGE = 2**24  # multiplications from which on a product gains more than the call of oneDNN costs


def library() -> str:
    """Return what multiplies the floats of training steps on the CPU, an element of `LIBRARIES`.

    Raises:
        ValueError: the environment variable BINVIT_PRODUCTS names something else.
    """
    asked = os.environ.get(SWITCH) or LIBRARIES[0]
    if asked not in LIBRARIES:
        raise ValueError(f"{SWITCH} must be oneDNN or torch, got {show(asked)}.")
    return asked if asked == "torch" or (torch.backends.mkldnn.enabled and _has_onednn()) else "torch"


@contextmanager
def multiply_by(name: str) -> Iterator[None]:
    """Let a library multiply, in this process and in those that it starts meanwhile.

    Args:
        name: an element of `LIBRARIES`.
    """
    before = os.environ.get(SWITCH)
    os.environ[SWITCH] = name
    try:
        yield
    finally:
        del os.environ[SWITCH]
        if before is not None:
            os.environ[SWITCH] = before


def product(a: Tensor, b: Tensor) -> Tensor:
    """Multiply two matrices, a (M, N) and b (N, K), outside autograd: (M, K), large ones by the library in use."""
    return _product(a, b) if _is_for_onednn(a, b, len(a) * b.numel()) else a @ b


def product_over_rows(a: Tensor, b: Tensor) -> Tensor:
    """Multiply the transpose of a (M, N) by b (M, K), outside autograd: (N, K), large ones by the library in use."""
    return _product_over_rows(a, b) if _is_for_onednn(a, b, a.shape[1] * b.numel()) else a.mT @ b


def _is_for_onednn(a: Tensor, b: Tensor, multiplications: int) -> bool:
    plain = all(t.dtype == torch.float32 and t.device.type == "cpu" for t in (a, b))
    return plain and multiplications >= _LARGE and library() == "oneDNN"


def _product(a: Tensor, b: Tensor) -> Tensor:
    # What torch's own compiler calls for linear layers: the second factor is transposed.
    operator: Any = torch.ops.mkldnn._linear_pointwise
    return operator(a, b.mT, None, "none", [], "")


def _product_over_rows(a: Tensor, b: Tensor) -> Tensor:
    # The gradient of a linear layer's weights. Its two copies go through memory in order, as those of a transpose for
    # the operator above would not.
    operator: Any = torch.ops.aten.mkldnn_linear_backward_weights
    shape = a.new_empty(a.shape[1], b.shape[1])
    return operator(a.to_mkldnn(), b.to_mkldnn(), shape, False)[0].to_dense()


@functools.cache
def _has_onednn() -> bool:
    a = torch.arange(6.0, dtype=torch.float32, device="cpu").view(2, 3)
    try:
        return torch.equal(_product(a, a.mT), a @ a.mT) and torch.equal(_product_over_rows(a, a), a.mT @ a)
    except (AttributeError, RuntimeError, TypeError):  # torch was built without it, or calls it otherwise
        return False
