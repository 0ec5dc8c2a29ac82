"""The fused form of a 1-bit linear layer's product: one compiled pass forward, on bits, and one back.

It gives what `binvit.nn.products.binary_product` gives, up to float rounding, for every input rule with a
`binvit.nn.rules.Form` and every weight rule with levels -1 and +1.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from binvit.nn.fused import bit_products, elementwise
from binvit.nn.fused.float_products import product, product_over_rows
from binvit.nn.precision import full_precision
from binvit.nn.rules import Bwn, Rule

_BWN = Bwn()


class Part(NamedTuple):
    """One of the layers whose outputs stand side by side: its rules, their parameters, weights, shift and bias."""

    rule_x: Rule
    rule_w: Rule
    parameters_x: Sequence[Tensor]
    parameters_w: Sequence[Tensor]
    w: Tensor  # (N, K)
    shift: Tensor | None  # (K,)
    bias: Tensor | None  # (N,)


def takes_linear(rule_x: Rule, rule_w: Rule, *tensors: Tensor | None) -> bool:
    """Tell whether `binary_linear` covers a linear layer with these rules and tensors."""
    binary = (rule_w.lowest, rule_w.highest) == (-1, 1) and not rule_w.is_float
    form = rule_x.form(*rule_x.default())
    return binary and form is not None and form.mean in ("none", "row") and elementwise.usable(*tensors)


class _Weights(NamedTuple):
    levels: Tensor
    gain: float  # scales of the weights: one number, or (N, 1)
    gains: Tensor | None
    kept: tuple[Tensor, ...] = ()  # by the rule, for its gradient


def _weights(rule: Rule, w: Tensor, parameters: Sequence[Tensor]) -> _Weights:
    if rule == _BWN:
        levels = w.new_empty(w.shape)
        return _Weights(levels, float(elementwise.centred_signs(elementwise.rows_of(w), levels.numpy())), None)
    ((levels, scale, _, kept),) = rule.planes(w.detach(), *parameters)
    levels = levels.contiguous()
    if scale is not None and scale.numel() == 1:
        return _Weights(levels, scale.item(), None, kept)
    return _Weights(levels, 1.0, scale, kept)


class _BinaryLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, layout: list[tuple[Rule, Rule, int]], x: Tensor, *tensors: Tensor) -> Tensor:
        rows, k = elementwise.rows_of(x), x.shape[-1]
        parts = _split(layout, tensors)
        y = x.new_empty(len(rows), sum(len(part.w) for part in parts))
        weights_of: list[_Weights] = []
        ctx.forms, start = [], 0
        for part in parts:
            n = len(part.w)
            form: Any = part.rule_x.form(*(p.item() for p in part.parameters_x))
            weights = _weights(part.rule_w, part.w, part.parameters_w)
            panels = bit_products.prepare_levels(weights.levels.numpy())
            means = np.empty(len(rows) if form.mean == "row" else 0, np.float32)
            gain = form.scale * weights.gain
            bit_products.linear_products(
                rows,
                elementwise.vector(part.shift, k),
                *elementwise.numbers(form)[3:],
                panels.panels,
                np.zeros(n, np.int32) if form.threshold is None else panels.sums(k),
                elementwise.vector(_times(weights.gains, gain), n, gain),
                elementwise.vector(part.bias, n),
                start,
                means,
                y.numpy(),
            )
            ctx.forms.append((form, weights.gain, means))
            weights_of.append(weights)
            start += n
        ctx.layout, ctx.counts = layout, [len(weights.kept) for weights in weights_of]
        kept = [tensor for weights in weights_of for tensor in (weights.levels, weights.gains, *weights.kept)]
        ctx.save_for_backward(x, *tensors, *kept)
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    @full_precision
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        x, *tensors = ctx.saved_tensors
        kept = iter(tensors[sum(count for _, _, count in ctx.layout) :])
        rows, k = elementwise.rows_of(x), x.shape[-1]
        g = g.reshape(len(rows), -1)
        dx: Any = None
        gradients: list[Any] = []
        start = 0
        for i, part in enumerate(_split(ctx.layout, tensors)):
            form, gain, means = ctx.forms[i]
            levels_w, gains, *of_rule = itertools.islice(kept, 2 + ctx.counts[i])
            up, start = g[:, start : start + len(part.w)], start + len(part.w)
            d = product(up, levels_w if gains is None else levels_w * gains)
            dshift, binary = np.empty(k, np.float32), x.new_empty(rows.shape)
            dx = d if dx is None else dx
            sums = elementwise.binary_backward(
                rows,
                elementwise.vector(part.shift, k),
                d.numpy(),
                np.float32(gain),
                *elementwise.numbers(form),
                np.float32(form.gain),
                means,
                i > 0,
                dx.numpy(),
                dshift,
                binary.numpy(),
            )
            dw = _times(product_over_rows(up, binary), form.scale)
            if of_rule:
                dw, *dpw = part.rule_w.backward_from(of_rule, dw, *part.parameters_w)
            else:
                dw, *dpw = part.rule_w.backward(part.w, dw, *part.parameters_w)
            numbers = [p.item() for p in part.parameters_x]
            dpx = part.rule_x.parameter_gradients(*sums, x.numel(), *numbers)
            gradients += [dw, None if part.shift is None else torch.from_numpy(dshift)]
            gradients += [None if part.bias is None else up.sum(0)]
            gradients += [None if d is None else x.new_tensor(float(d)) for d in dpx]
            gradients += dpw
        return None, dx.view(x.shape), *gradients


def _times(x: Any, factor: float) -> Any:
    """Return a tensor times a factor, None for None; a product with 1 is spared."""
    return x if x is None or factor == 1 else x * factor


def _split(layout: list[tuple[Rule, Rule, int]], tensors: Sequence[Any]) -> list[Part]:
    """Give each part the tensors that belong to it."""
    parts, start = [], 0
    for rule_x, rule_w, count in layout:
        (w, shift, bias, *parameters), start = tensors[start : start + count], start + count
        n = len(rule_x.parameters)
        parts.append(Part(rule_x, rule_w, parameters[:n], parameters[n:], w, shift, bias))
    return parts


@torch.compiler.disable  # compiled by numba
@full_precision
def _binary_linear(x: Tensor, layout: list[tuple[Rule, Rule, int]], tensors: list[Tensor]) -> Tensor:
    return _BinaryLinear.apply(layout, x, *tensors)


def binary_linear(x: Tensor, parts: Sequence[Part]) -> Tensor:
    """Compute `binvit.nn.products.binary_product` for a linear layer, or for several of the same input.

    Args:
        x: (..., K), float32 on the CPU.
        parts: the layers, all of whose rules `takes_linear` accepts.

    Returns:
        (..., sum of N).
    """
    layout, tensors = [], []
    for part in parts:
        given = [part.w, part.shift, part.bias, *part.parameters_x, *part.parameters_w]
        layout.append((part.rule_x, part.rule_w, len(given)))
        tensors += given
    return _binary_linear(x, layout, tensors)
