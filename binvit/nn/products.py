"""Products of binarized tensors as autograd functions: exact integers first, scales once afterwards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from binvit.nn.fused import planes
from binvit.nn.fused.float_products import product, product_over_rows
from binvit.nn.precision import full_precision
from binvit.nn.rules import Plane, Rule

LARGEST_EXACT = 2**24  # integers below are exact in float32


class _Binarize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rule: Rule, x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.rule = rule
        ctx.save_for_backward(x, *parameters)
        return planes.binarized(rule, x, *parameters)

    @staticmethod
    @once_differentiable
    @full_precision
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        x, *parameters = ctx.saved_tensors
        return None, *planes.backward(ctx.rule, x, g, *parameters)


@full_precision
def binarize(x: Tensor, rule: Rule, *parameters: Tensor) -> Tensor:
    """Binarize x by a rule.

    Args:
        x: any tensor the rule accepts.
        rule: a `binvit.nn.rules.Rule`.
        parameters: the rule's parameters, in the order of `rule.parameters`.

    Returns:
        The sum of the rule's planes, of the shape of x.
    """
    return x if rule.is_float else _Binarize.apply(rule, x, *parameters)


def exact_in_float32(terms: int, a: Rule, b: Rule) -> bool:
    """Tell whether a sum of that many products of two rules' levels is an exact float32 integer."""
    size = max(abs(a.lowest), a.highest) * max(abs(b.lowest), b.highest)
    return terms * size < LARGEST_EXACT


def integer_product(x: Tensor, w: Tensor, exact: bool = True) -> Tensor:
    """Multiply two tensors of integer levels, x (..., M, K) and w (..., N, K) or (N, K), into (..., M, N), exactly.

    Args:
        x: levels stored as floats.
        w: levels stored as floats.
        exact: the sums fit into float32; otherwise they are formed in float64.
    """
    if not exact:
        return integer_product(x.double(), w.double()).to(x.dtype)
    return F.linear(x, w) if w.dim() == 2 else x @ w.mT


def apply_scales(product: Tensor, sx: Tensor | None, sw: Tensor | None) -> Tensor:
    """Multiply a product (..., M, N) in place by the scales of its rows' tensor and of its columns' tensor.

    The order of the operations is part of the contract: the packed model repeats it to the last bit.

    Args:
        product: the integer product, overwritten.
        sx: None, one value, or (..., M, 1).
        sw: None, one value, or (..., N, 1).
    """
    if sw is not None and sw.dim():
        sw = sw.mT
    if sx is not None and sw is not None and (sx.dim() == 0 or sw.dim() == 0 or sx.shape[-2] == 1):
        return product.mul_(sx * sw)
    for scale in (sw, sx):
        if scale is not None:
            product.mul_(scale)
    return product


def scaled_product(x: Plane, w: Plane, rule_x: Rule, rule_w: Rule) -> Tensor:
    """Return (x.integers @ w.integers^T) * scales, integers first."""
    if rule_x.is_float or rule_w.is_float:
        exact = True
    else:
        exact = exact_in_float32(x.levels.shape[-1], rule_x, rule_w)
    return apply_scales(integer_product(x.integers, w.integers, exact), x.scale, w.scale)


class _BinaryProduct(torch.autograd.Function):
    """y = b(x + shift) b(w)^T + bias: integer product first, scales once afterwards, closed-form gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        rules: tuple[Rule, Rule],
        n_x: int,
        x: Tensor,
        w: Tensor,
        shift: Tensor | None,
        bias: Tensor | None,
        *parameters: Tensor,
    ) -> Tensor:
        rule_x, rule_w = rules
        if shift is not None:
            x = x + shift
        px, pw = parameters[:n_x], parameters[n_x:]
        (plane_x,) = planes.planes(rule_x, x, *px)
        (plane_w,) = planes.planes(rule_w, w, *pw)
        y = scaled_product(plane_x, plane_w, rule_x, rule_w)
        if bias is not None:
            y.add_(bias)
        ctx.rules, ctx.n_x = rules, n_x
        ctx.shift_shape = None if shift is None else shift.shape
        ctx.has_bias = bias is not None
        ctx.save_for_backward(x, w, *parameters)
        return y

    @staticmethod
    @once_differentiable
    @full_precision
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        rule_x, rule_w = ctx.rules
        x, w, *parameters = ctx.saved_tensors
        px, pw = parameters[: ctx.n_x], parameters[ctx.n_x :]
        need_x = ctx.needs_input_grad[2] or ctx.needs_input_grad[4] or any(ctx.needs_input_grad[6 : 6 + ctx.n_x])
        dx: Tensor | None = None
        dpx: list[Tensor | None] = [None] * len(px)
        if need_x:
            wb = planes.binarized(rule_w, w, *pw)
            up = product(g.flatten(0, -2), wb).view(x.shape) if w.dim() == 2 else g @ wb
            dx, *dpx = planes.backward(rule_x, x, up, *px)
        xb = planes.binarized(rule_x, x, *px)
        gw = product_over_rows(g.flatten(0, -2), xb.flatten(0, -2)) if w.dim() == 2 else g.mT @ xb
        dw, *dpw = planes.backward(rule_w, w, gw, *pw)
        dshift = None if dx is None or ctx.shift_shape is None else dx.sum_to_size(ctx.shift_shape)
        dbias = g.flatten(0, -2).sum(0) if ctx.has_bias else None
        return None, None, dx, dw, dshift, dbias, *dpx, *dpw


@full_precision
def binary_product(
    x: Tensor,
    w: Tensor,
    rule_x: Rule,
    rule_w: Rule,
    parameters_x: Sequence[Tensor] = (),
    parameters_w: Sequence[Tensor] = (),
    shift: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Multiply two binarized tensors: y = b_x(x + shift) b_w(w)^T + bias.

    Args:
        x: (..., M, K).
        w: (N, K), or (..., N, K) with the leading dimensions of x.
        rule_x: a rule with one plane.
        rule_w: a rule with one plane.
        parameters_x: parameters of rule_x.
        parameters_w: parameters of rule_w.
        shift: added to x before it is binarized; broadcasts against x.
        bias: (N,), added to the product.

    Returns:
        (..., M, N); the integer product is formed first and scaled once, so that bits give the same numbers.
    """
    return _BinaryProduct.apply((rule_x, rule_w), len(parameters_x), x, w, shift, bias, *parameters_x, *parameters_w)


class ReplaceValue(torch.autograd.Function):
    """Another value for a tensor, whose gradient passes through."""

    @staticmethod
    def forward(ctx: Any, differentiable: Tensor, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        return g, None


def superposed_product(attention: Sequence[Plane], value: Sequence[Plane]) -> Tensor:
    """Multiply two superpositions, attention (B, H, N, N) and value (B, H, N, d), plane by plane in integers.

    The sum runs over the attention planes and, inside, over the value planes; the order is part of the contract.
    """
    total: Any = None
    for plane_a in attention:
        for plane_v in value:
            product = plane_a.integers @ plane_v.integers
            scales = [s for s in (plane_a.scale, plane_v.scale) if s is not None]
            if scales:
                product.mul_(scales[0] * scales[1] if len(scales) == 2 else scales[0])
            total = product if total is None else total.add_(product)
    return total


@full_precision
def attention_product(
    attention: Tensor,
    value: Tensor,
    rule_a: Rule,
    rule_v: Rule,
    parameters_a: Sequence[Tensor] = (),
    parameters_v: Sequence[Tensor] = (),
    exact: bool = False,
) -> Tensor:
    """Multiply the binarized attention map with the binarized value.

    Args:
        attention: (B, H, N, N).
        value: (B, H, N, d).
        rule_a: rule of the map.
        rule_v: rule of the value.
        parameters_a: parameters of rule_a.
        parameters_v: parameters of rule_v.
        exact: form the products plane by plane in integers, as bits do; otherwise, with several planes, in one float
            product, which is faster to train with and differs by rounding.

    Returns:
        (B, H, N, d).
    """
    binary = not (rule_a.is_float or rule_v.is_float or rule_v.scale_per_token)
    if exact and binary:
        with torch.no_grad():
            value_ = superposed_product(rule_a.planes(attention, *parameters_a), rule_v.planes(value, *parameters_v))
        tensors = attention, value, *parameters_a, *parameters_v
        if not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)):
            return value_
    if binary and rule_a.groups == rule_v.groups == 1 and not exact:
        # Integers first, since a sum of signs is often 0, and noise in its place would give it a sign.
        return binary_product(attention, value.mT, rule_a, rule_v, parameters_a, parameters_v)
    product = binarize(attention, rule_a, *parameters_a) @ binarize(value, rule_v, *parameters_v)
    return ReplaceValue.apply(product, value_) if exact and binary else product
