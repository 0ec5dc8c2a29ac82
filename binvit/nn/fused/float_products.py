"""Float products of a training step: large ones by oneDNN where torch has it, small ones in register tiles.

torch multiplies float32 matrices by MKL, whose kernels for processors of other makers are short of their vectors: both
ways are twice as fast there. On Intel's own they are not, and torch multiplies.
"""

from __future__ import annotations

import functools
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor

from binvit.config import show
from binvit.nn.fused import small_products

LIBRARIES = ("oneDNN", "torch")
"""What can multiply: oneDNN itself, with tiles for products that are not worth a call of it, or what torch chooses."""
SWITCH = "BINVIT_PRODUCTS"
"""The environment variable that chooses one of them."""

_LARGE = 2**24  # multiplications from which on a product gains more than the call of oneDNN costs
_SMALLEST = 2**19  # from which on tiles are faster than torch


def library() -> str:
    """Return what multiplies the floats of training steps on the CPU, an element of `LIBRARIES`.

    It is what the environment variable BINVIT_PRODUCTS names, else torch on Intel's processors and oneDNN on others.

    Raises:
        ValueError: the environment variable BINVIT_PRODUCTS names something else.
    """
    asked = os.environ.get(SWITCH) or LIBRARIES[_is_intels()]
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
    """Multiply two matrices, a (M, N) and b (N, K), outside autograd: (M, K), by what `library` says."""
    way = _way(a, b, len(a) * b.numel())
    if way == "tiles":
        return small_products.multiply(a, b)
    return _product(a, b) if way == "oneDNN" else a @ b


def product_over_rows(a: Tensor, b: Tensor) -> Tensor:
    """Multiply the transpose of a (M, N) by b (M, K), outside autograd: (N, K), by what `library` says."""
    way = _way(a, b, a.shape[1] * b.numel())
    if way == "tiles":
        return small_products.multiply_over_rows(a, b)
    return _product_over_rows(a, b) if way == "oneDNN" else a.mT @ b


def products(a: Tensor, b: Tensor) -> Tensor:
    """Multiply matrices a (..., M, K) and b (..., K, N), outside autograd: (..., M, N), by tiles or torch."""
    plain = a.dtype == b.dtype == torch.float32 and a.is_cpu and b.is_cpu
    if not plain or a.numel() * b.shape[-1] < _SMALLEST or library() == "torch" or not small_products.takes_each(a, b):
        return a @ b
    return small_products.multiply_each(a, b)


def _way(a: Tensor, b: Tensor, multiplications: int) -> str:
    plain = a.dtype == b.dtype == torch.float32 and a.is_cpu and b.is_cpu
    if not plain or multiplications < min(_SMALLEST, _LARGE) or library() == "torch":
        return "torch"
    if multiplications >= _LARGE:
        return "oneDNN"
    return "tiles" if small_products.takes(a, b) else "torch"


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
def _is_intels() -> bool:
    """Say whether Intel has made this processor, for which MKL is written."""
    with suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        return "GenuineIntel" in file.read()
    return "GenuineIntel" in platform.processor()  # of Windows; other systems run on other processors by now


@functools.cache
def _has_onednn() -> bool:
    a = torch.arange(6.0, dtype=torch.float32, device="cpu").view(2, 3)
    try:
        return torch.equal(_product(a, a.mT), a @ a.mT) and torch.equal(_product_over_rows(a, a), a.mT @ a)
    except (AttributeError, RuntimeError, TypeError):  # torch was built without it, or calls it otherwise
        return False
