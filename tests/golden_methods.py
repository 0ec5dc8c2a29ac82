"""The numbers of the official codes of the other binarizers, `golden/methods.npz`, and how they are compared."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

DEFAULT = Path(__file__).parent / "golden" / "methods.npz"


@functools.cache
def _file() -> dict[str, np.ndarray]:
    with np.load(os.environ.get("BINVIT_GOLDEN_METHODS") or DEFAULT) as file:
        return {name: file[name] for name in file.files}


def golden(part: str) -> dict[str, Tensor]:
    """Return the arrays of a part such as "bireal/weight", by what follows in their names."""
    found = {
        name.removeprefix(f"{part}/"): torch.tensor(array)
        for name, array in _file().items()
        if name.startswith(f"{part}/")
    }
    if not found:
        raise KeyError(f"There is no part {part} in the golden numbers.")
    return found


def close(
    got: Tensor, want: Tensor, tolerance: float = 1e-5, where: Tensor | None = None, what: str = "", size: float = 0.0
) -> None:
    """Compare relative to the largest value, or to `size` if that is more, on the entries `where`."""
    got, want = got.detach().reshape(want.shape), want.detach()
    if where is not None:
        got, want = got[where], want[where]
    distance, size = (got - want).abs().max().item(), max(want.abs().max().item(), size)
    assert distance <= tolerance * size, f"{what}: {distance} of {size}"


def load(module: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Give a module's parameters the values, which must be all of them."""
    parameters = dict(module.named_parameters())
    assert parameters.keys() == values.keys(), parameters.keys() ^ values.keys()
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(values[name].reshape(parameter.shape))
    for buffer_name, buffer in module.named_buffers():
        if buffer_name.endswith("initialized"):
            buffer.fill_(True)


Names = Mapping[str, str | tuple[str, ...]]


def official(arrays: Mapping[str, Tensor], kind: str, names: str | tuple[str, ...], negated: Sequence[str]) -> Tensor:
    """Return an array of the kind "param" or "grad", or several stacked along the first axis."""
    names = (names,) if isinstance(names, str) else names
    signs = [-1.0 if name.endswith(tuple(negated)) else 1.0 for name in names]
    found = [sign * arrays[f"{kind}/{name}"] for sign, name in zip(signs, names, strict=True)]
    return torch.cat(found) if len(found) > 1 else found[0]


def check(
    module: nn.Module, part: str, names: Names, negated: Sequence[str] = ("no name",), tolerance: float = 1e-5
) -> None:
    """Compare output and all gradients of a module with those of an official one.

    Args:
        module: takes x and gives y; its parameters are overwritten.
        part: a part with x, y, gy, gx, `param/*` and `grad/*`.
        names: official name of each parameter, or several that are stacked along the first axis.
        negated: ends of the official names whose parameters have the other sign here.
        tolerance: largest difference, as a share of the largest value of an array.
    """
    arrays = golden(part)
    load(module, {ours: official(arrays, "param", theirs, negated) for ours, theirs in names.items()})
    dtype = next(module.parameters()).dtype
    x = arrays["x"].to(dtype, copy=True).requires_grad_()
    y = module(x)
    close(y, arrays["y"], tolerance, what=f"{part} y")
    y.backward(arrays["gy"].to(dtype))
    close(x.grad, arrays["gx"], tolerance, what=f"{part} gx")
    gradients = {ours: official(arrays, "grad", theirs, negated) for ours, theirs in names.items()}
    size = 1e-2 * max(gradient.abs().max().item() for gradient in gradients.values())  # a bias before a norm has none
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        close(parameter.grad, gradients[name], tolerance, what=f"{part} {name}", size=size)
