"""The fused form of attention in a training step, for rules that have a `binvit.nn.rules.Form`, or maps per head.

It gives what the layer's own steps give, up to float rounding: query, key and value are copied once, and their levels
are kept for the backward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numba import prange
from torch import Tensor
from torch.autograd.function import once_differentiable

from binvit.jit import kernel
from binvit.nn.fused import heads, planes
from binvit.nn.fused.bit_products import multiply_signs
from binvit.nn.fused.elementwise import parallel_kernel, rows_of, usable
from binvit.nn.fused.float_products import products
from binvit.nn.precision import full_precision
from binvit.nn.rules import Rule, ThreeMaps


def takes_forms(rules: Sequence[Rule], parameters: Sequence[Sequence[Tensor]], qkv: Tensor) -> bool:
    """Tell whether `attention_by_forms` covers attention with these rules and parameters on this joint projection."""
    rule_q, rule_k, rule_a, rule_v = rules
    of_q, of_k, of_a, of_v = parameters
    given = ((rule_q, of_q), (rule_k, of_k), (rule_v, of_v))
    if isinstance(rule_a, ThreeMaps):
        return usable(qkv, *of_a) and all(planes.form_of(rule, qkv, values) is not None for rule, values in given)
    return all(planes.form_of(rule, qkv, values) is not None for rule, values in (*given, (rule_a, of_a)))


@kernel(allocates=False)
def _split_image(image, qkv, shifted, shifts, out):
    _, _, count, tokens, d = out.shape
    for part in range(3):
        for head in range(count):
            start = head * d
            shift = shifts[part, start : start + d]
            for t in range(tokens):
                row = qkv[image, t, part * count * d + start : part * count * d + start + d]
                target = out[part, image, head, t]
                if shifted[part]:
                    for j in range(d):
                        target[j] = row[j] + shift[j]
                else:
                    for j in range(d):
                        target[j] = row[j]


@parallel_kernel
def _split_heads(qkv, shifted, shifts, out):
    """Write qkv (B, N, 3 H d) into out (3, B, H, N, d), each part that is `shifted` (3,) by shifts (3, H d)."""
    for image in prange(out.shape[1]):
        _split_image(image, qkv, shifted, shifts, out)


@kernel(allocates=False)
def _join_image(image, parts, out):
    _, _, count, tokens, d = parts.shape
    for part in range(3):
        for head in range(count):
            start = (part * count + head) * d
            for t in range(tokens):
                target, row = out[image, t, start : start + d], parts[part, image, head, t]
                for j in range(d):
                    target[j] = row[j]


@parallel_kernel
def _join_heads(parts, out):
    """Write parts (3, B, H, N, d) into out (B, N, 3 H d)."""
    for image in prange(parts.shape[1]):
        _join_image(image, parts, out)


def _joint(qkv: Tensor, count: int, shifts: Sequence[Tensor | None]) -> Tensor:
    """Return query, key and value of qkv (B, N, 3 H d), shifted where they have a shift: (3, B, H, N, d)."""
    b, n, width = qkv.shape
    joint = qkv.new_empty(3, b, count, n, width // (3 * count))
    given, moved = np.array([shift is not None for shift in shifts]), np.zeros((3, width // 3), np.float32)
    for row, shift in zip(moved, shifts, strict=True):
        if shift is not None:
            row[:] = shift.detach().numpy().reshape(-1)
    _split_heads(rows_of(qkv).reshape(qkv.shape), given, moved, joint.numpy())
    return joint


def _split(rules: Sequence[Rule], parameters: Sequence[Tensor]) -> list[Sequence[Tensor]]:
    parts, start = [], 0
    for rule in rules:
        count = len(rule.parameters)
        parts.append(parameters[start : start + count])
        start += count
    return parts


def _times(x: Tensor, factor: float) -> Tensor:
    return x if factor == 1 else x.mul_(factor)


class _AttentionByForms(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        count: int,
        softmax: bool,
        rules: Sequence[Rule],
        qkv: Tensor,
        bias: Tensor | None,
        shift_q: Tensor | None,
        shift_k: Tensor | None,
        shift_v: Tensor | None,
        *parameters: Tensor,
    ) -> Tensor:
        b, n, width = qkv.shape
        d, shifts = width // (3 * count), (shift_q, shift_k, shift_v)
        ctx.shifts = [None if shift is None else shift.shape for shift in shifts]
        joint, given = _joint(qkv, count, shifts), _split(rules, parameters)
        forms: list[Any] = [planes.form_of(rule, qkv, values) for rule, values in zip(rules, given, strict=True)]
        form_q, form_k, form_a, form_v = forms
        if form_q == form_k == form_v:
            q, k, v = planes.levels(form_q, joint)
        else:
            q, k, v = (planes.levels(form, x) for form, x in zip((form_q, form_k, form_v), joint, strict=True))
        signs = form_q.threshold is None and form_k.threshold is None
        product = (multiply_signs(q, k) if signs else q @ k.mT).mul_(form_q.scale * form_k.scale * d**-0.5)
        probability = product.softmax(-1) if softmax else product
        a = probability if bias is None else probability + bias
        map_ = heads.binarized(rules[2], a, *given[2]) if form_a is None else planes.levels(form_a, a)
        ctx.rules, ctx.forms, ctx.softmax, ctx.has_bias = rules, forms, softmax, bias is not None
        ctx.save_for_backward(joint, q, k, v, map_, probability, a, *parameters)
        y = products(map_, v)
        y = _times(y, form_v.scale if form_a is None else form_a.scale * form_v.scale)
        return y.transpose(1, 2).reshape(b, n, count * d)

    @staticmethod
    @once_differentiable
    @full_precision
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        joint, q, k, v, map_, probability, a, *parameters = ctx.saved_tensors
        rule_q, rule_k, rule_a, rule_v = ctx.rules
        form_q, form_k, form_a, form_v = ctx.forms
        given_q, given_k, given_a, given_v = _split(ctx.rules, parameters)
        b, count, n, d = q.shape
        g = g.view(b, n, count, d).transpose(1, 2).contiguous()
        split = torch.empty_like(joint)
        dq, dk, dv = split
        scale_a, scale = 1.0 if form_a is None else form_a.scale, d**-0.5
        dpv = planes.gradients(rule_v, form_v, joint[2], products(map_.mT, g), scale_a, dv, *given_v)
        if form_a is None:
            da, *more = heads.gradients(rule_a, a, _times(g @ v.mT, form_v.scale), *given_a)
            dpa = tuple(more)
        else:
            da = torch.empty_like(a)
            dpa = planes.gradients(rule_a, form_a, a, g @ v.mT, form_v.scale, da, *given_a)
        dbias = da.sum(0) if ctx.has_bias else None
        ds = torch._softmax_backward_data(da, probability, -1, da.dtype) if ctx.softmax else da
        if form_a is None:  # in the order of the layer's own steps
            ds, scale = ds * scale, 1.0
        dpq = planes.gradients(rule_q, form_q, joint[0], products(ds, k), scale * form_k.scale, dq, *given_q)
        dpk = planes.gradients(rule_k, form_k, joint[1], products(ds.mT, q), scale * form_q.scale, dk, *given_k)
        dqkv = g.new_empty(b, n, 3 * count * d)
        _join_heads(split.numpy(), dqkv.numpy())
        dshifts = [None if s is None else x.sum_to_size(s) for x, s in zip((dq, dk, dv), ctx.shifts, strict=True)]
        return None, None, None, dqkv, dbias, *dshifts, *dpq, *dpk, *dpa, *dpv


@torch.compiler.disable  # compiled by numba
@full_precision
def _attention_by_forms(
    qkv: Tensor, count: int, softmax: bool, rules: Sequence[Rule], tensors: list[Tensor | None], values: list[Tensor]
) -> Tensor:
    return _AttentionByForms.apply(count, softmax, rules, qkv, *tensors, *values)


def attention_by_forms(
    qkv: Tensor,
    count: int,
    softmax: bool,
    bias: Tensor | None,
    shifts: Sequence[Tensor | None],
    rules: Sequence[Rule],
    parameters: Sequence[Sequence[Tensor]],
) -> Tensor:
    """Compute attention from the joint projection to the context, each tensor binarized by a rule with a form.

    Args:
        qkv: (B, N, 3 * H * d), float32 on the CPU.
        count: the number of heads H.
        softmax: the map is the softmax of the scores, not the scores themselves.
        bias: (H, N, N), added to the map, or None.
        shifts: learned shifts of query, key and value, each (H, 1, d) or None.
        rules: rules of query, key, map and value that `takes_forms` accepts.
        parameters: the parameters of each rule.

    Returns:
        (B, N, H * d).
    """
    return _attention_by_forms(qkv, count, softmax, rules, [bias, *shifts], [p for part in parameters for p in part])
