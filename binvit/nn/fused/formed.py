"""The fused form of attention in a training step, for rules that all have a `binvit.nn.rules.Form`.

It gives what the layer's own steps give, up to float rounding: query, key and value are copied once, and their levels
are kept for the backward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from binvit.nn.fused import planes
from binvit.nn.fused.bit_products import multiply_signs
from binvit.nn.precision import full_precision
from binvit.nn.rules import Rule


def takes_forms(rules: Sequence[Rule], parameters: Sequence[Sequence[Tensor]], *tensors: Tensor) -> bool:
    """Tell whether `attention_by_forms` covers attention with these rules, parameters and tensors."""
    return all(
        planes.form_of(rule, tensor, values) is not None
        for rule, values in zip(rules, parameters, strict=True)
        for tensor in tensors
    )


def _split(rules: Sequence[Rule], parameters: Sequence[Tensor]) -> list[Sequence[Tensor]]:
    parts, start = [], 0
    for rule in rules:
        count = len(rule.parameters)
        parts.append(parameters[start : start + count])
        start += count
    return parts


class _AttentionByForms(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        heads: int,
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
        d = width // (3 * heads)
        joint = qkv.detach().view(b, n, 3, heads, d).permute(2, 0, 3, 1, 4).contiguous()
        ctx.shifts = [None if shift is None else shift.shape for shift in (shift_q, shift_k, shift_v)]
        for x, shift in zip(joint, (shift_q, shift_k, shift_v), strict=True):
            if shift is not None:
                x += shift
        given = _split(rules, parameters)
        forms: list[Any] = [planes.form_of(rule, qkv, values) for rule, values in zip(rules, given, strict=True)]
        form_q, form_k, form_a, form_v = forms
        q, k, v = (planes.levels(form, x) for form, x in zip((form_q, form_k, form_v), joint, strict=True))
        signs = form_q.threshold is None and form_k.threshold is None
        product = (multiply_signs(q, k) if signs else q @ k.mT).mul_(form_q.scale * form_k.scale * d**-0.5)
        probability = product.softmax(-1) if softmax else product
        a = probability if bias is None else probability + bias
        map_ = planes.levels(form_a, a)
        ctx.rules, ctx.forms, ctx.softmax, ctx.has_bias = rules, forms, softmax, bias is not None
        ctx.save_for_backward(joint, q, k, v, map_, probability, a, *parameters)
        y = map_ @ v
        scale = form_a.scale * form_v.scale
        y = y if scale == 1 else y.mul_(scale)
        return y.transpose(1, 2).reshape(b, n, heads * d)

    @staticmethod
    @once_differentiable
    @full_precision
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        joint, q, k, v, map_, probability, a, *parameters = ctx.saved_tensors
        rule_q, rule_k, rule_a, rule_v = ctx.rules
        form_q, form_k, form_a, form_v = ctx.forms
        given_q, given_k, given_a, given_v = _split(ctx.rules, parameters)
        b, heads, n, d = q.shape
        g = g.view(b, n, heads, d).transpose(1, 2).contiguous()
        split = torch.empty_like(joint)
        dq, dk, dv = split
        dpv = planes.gradients(rule_v, form_v, joint[2], map_.mT @ g, form_a.scale, dv, *given_v)
        da = torch.empty_like(a)
        dpa = planes.gradients(rule_a, form_a, a, g @ v.mT, form_v.scale, da, *given_a)
        dbias = da.sum(0) if ctx.has_bias else None
        ds = torch._softmax_backward_data(da, probability, -1, da.dtype) if ctx.softmax else da
        scale = d**-0.5
        dpq = planes.gradients(rule_q, form_q, joint[0], ds @ k, scale * form_k.scale, dq, *given_q)
        dpk = planes.gradients(rule_k, form_k, joint[1], ds.mT @ q, scale * form_q.scale, dk, *given_k)
        dqkv = split.permute(1, 3, 0, 2, 4).reshape(b, n, -1)
        dshifts = [None if s is None else x.sum_to_size(s) for x, s in zip((dq, dk, dv), ctx.shifts, strict=True)]
        return None, None, None, dqkv, dbias, *dshifts, *dpq, *dpk, *dpa, *dpv


@torch.compiler.disable  # compiled by numba
@full_precision
def _attention_by_forms(
    qkv: Tensor, heads: int, softmax: bool, rules: Sequence[Rule], tensors: list[Tensor | None], values: list[Tensor]
) -> Tensor:
    return _AttentionByForms.apply(heads, softmax, rules, qkv, *tensors, *values)


def attention_by_forms(
    qkv: Tensor,
    heads: int,
    softmax: bool,
    bias: Tensor | None,
    shifts: Sequence[Tensor | None],
    rules: Sequence[Rule],
    parameters: Sequence[Sequence[Tensor]],
) -> Tensor:
    """Compute attention from the joint projection to the context, each tensor binarized by a rule with a form.

    Args:
        qkv: (B, N, 3 * H * d), float32 on the CPU.
        heads: H.
        softmax: the map is the softmax of the scores, not the scores themselves.
        bias: (H, N, N), added to the map, or None.
        shifts: learned shifts of query, key and value, each (H, 1, d) or None.
        rules: rules of query, key, map and value that `takes_forms` accepts.
        parameters: the parameters of each rule.

    Returns:
        (B, N, H * d).
    """
    return _attention_by_forms(qkv, heads, softmax, rules, [bias, *shifts], [p for part in parameters for p in part])
