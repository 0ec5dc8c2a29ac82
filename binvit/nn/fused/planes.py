"""A rule's plane and its gradients in one compiled pass each, where the rule has a form; else by its own formulas."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from binvit.nn.fused import elementwise
from binvit.nn.rules import Form, Plane, Rule

_NONE = np.empty(0, np.float32)


def _form(rule: Rule, x: Tensor, parameters: Sequence[Tensor]) -> Form | None:
    if rule.is_float or not elementwise.usable(x, *parameters) or any(p.numel() != 1 for p in parameters):
        return None
    form = rule.form(*(p.item() for p in parameters))
    return form if form is not None and form.mean == "none" else None


def planes(rule: Rule, x: Tensor, *parameters: Tensor) -> list[Plane]:
    """Return what `rule.planes(x, *parameters)` does, to the last bit."""
    form = _form(rule, x, parameters)
    if form is None:
        return rule.planes(x, *parameters)
    levels = x.new_empty(x.shape)
    out, limits = levels.view(-1, x.shape[-1]).numpy(), elementwise.numbers(form)[3:]
    elementwise.binary_levels(elementwise.rows_of(x), elementwise.vector(None, x.shape[-1]), *limits, _NONE, out)
    return [Plane(levels, None if form.scale == 1 else x.new_tensor(form.scale))]


def backward(rule: Rule, x: Tensor, g: Tensor, *parameters: Tensor) -> tuple[Any, ...]:
    """Return what `rule.backward(x, g, *parameters)` does, up to the rounding of sums."""
    form = _form(rule, x, parameters)
    if form is None or not elementwise.usable(g):
        return rule.backward(x, g, *parameters)
    one, width = np.float32(1), x.shape[-1]
    dx, dshift = x.new_empty(x.shape), np.empty(width, np.float32)
    out, kind, gain = dx.view(-1, width).numpy(), elementwise.numbers(form), np.float32(form.gain)
    rows, up, shift = elementwise.rows_of(x), elementwise.rows_of(g), elementwise.vector(None, width)
    sums = elementwise.binary_backward(rows, shift, up, one, *kind, gain, _NONE, False, out, dshift)
    values = rule.parameter_gradients(*sums, x.numel(), *(p.item() for p in parameters))
    return dx, *(None if v is None else p.new_full(p.shape, float(v)) for p, v in zip(parameters, values, strict=True))
