"""A rule's plane and its gradients in one compiled pass each, where the rule has a form; else by its own formulas."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from binvit.nn.fused import elementwise, heads
from binvit.nn.rules import Form, HeadSign, Plane, Rule, superpose

_NONE, _NO_LEVELS = np.empty(0, np.float32), np.empty((0, 0), np.float32)


def form_of(rule: Rule, x: Tensor, parameters: Sequence[Tensor]) -> Form | None:
    """Return the rule's form with these parameters, None if the kernels cannot take it or x."""
    if rule.is_float or not elementwise.usable(x, *parameters) or any(p.numel() != 1 for p in parameters):
        return None
    form = rule.form(*(p.item() for p in parameters))
    return form if form is not None and form.mean == "none" else None


def _rows_of(x: Tensor, form: Form) -> np.ndarray:
    """View x as rows: the tensor's own where they matter, else longer ones, which make better vector code."""
    rows = elementwise.rows_of(x)
    return rows if form.share or x.dim() < 3 else rows.reshape(-1, x.shape[-1] * x.shape[-2])


def levels(form: Form, x: Tensor) -> Tensor:
    """Return the levels of x, of its shape."""
    rows, out = _rows_of(x, form), x.new_empty(x.shape)
    limits, shift = elementwise.numbers(form)[3:], elementwise.vector(None, rows.shape[1])
    elementwise.binary_levels(rows, shift, *limits, out.view(rows.shape).numpy())
    return out


def gradients(
    rule: Rule, form: Form, x: Tensor, g: Tensor, gain: float, dx: Tensor, *parameters: Tensor
) -> tuple[Any, ...]:
    """Return the gradients to the parameters for the gradient gain * g of the binarized x, and write dx, contiguous."""
    rows, up = _rows_of(x, form), _rows_of(g, form)
    shift, gain_x = elementwise.vector(None, rows.shape[1]), np.float32(form.gain)
    out, kind, ignored = dx.view(rows.shape).numpy(), elementwise.numbers(form), np.empty_like(shift)
    more = _NONE, False, out, ignored, _NO_LEVELS
    sums = elementwise.binary_backward(rows, shift, up, np.float32(gain), *kind, gain_x, *more)
    values = rule.parameter_gradients(*sums, x.numel(), *(p.item() for p in parameters))
    return tuple(None if v is None else p.new_full(p.shape, float(v)) for p, v in zip(parameters, values, strict=True))


def planes(rule: Rule, x: Tensor, *parameters: Tensor) -> list[Plane]:
    """Return what `rule.planes(x, *parameters)` does, to the last bit; an offset may be in the levels already."""
    if isinstance(rule, HeadSign) and heads.takes_heads(rule, x, parameters):
        return [Plane(heads.integers(x, *parameters), parameters[0])]
    form = form_of(rule, x, parameters)
    if form is None:
        return rule.planes(x, *parameters)
    return [Plane(levels(form, x), None if form.scale == 1 else x.new_tensor(form.scale))]


def binarized(rule: Rule, x: Tensor, *parameters: Tensor) -> Tensor:
    """Return the sum of the planes of x, to the last bit."""
    if heads.takes_heads(rule, x, parameters):
        return heads.binarized(rule, x, *parameters)
    return superpose(planes(rule, x, *parameters))


def backward(rule: Rule, x: Tensor, g: Tensor, *parameters: Tensor) -> tuple[Any, ...]:
    """Return what `rule.backward(x, g, *parameters)` does, up to the rounding of sums."""
    if not elementwise.usable(g):
        return rule.backward(x, g, *parameters)
    if heads.takes_heads(rule, x, parameters):
        return heads.gradients(rule, x, g, *parameters)
    form = form_of(rule, x, parameters)
    if form is None:
        return rule.backward(x, g, *parameters)
    dx = x.new_empty(x.shape)
    return dx, *gradients(rule, form, x, g, 1.0, dx, *parameters)
