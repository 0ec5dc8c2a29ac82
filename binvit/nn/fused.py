"""Fused forms of the two hot places of a training step, for the rules that GSB and its one-group baseline train with.

They give what `binvit.nn.functional` gives, up to float rounding, in fewer passes over memory: products of levels in
int8, and compiled kernels around them (`binvit.nn.kernels`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from binvit.nn import attention_kernels, kernels
from binvit.nn.attention_rules import GsbAttention, GsbValue
from binvit.nn.rules import Bwn, Elastic, Rule

_INT8_WORTHWHILE = 2**24  # multiply-adds from which an int8 product pays for the conversions around it


def elastic_kind(rule: Rule) -> str | None:
    """Return "signed" or "unsigned" for a binary elastic rule with one scale and the official gradient, else None."""
    if type(rule) is not Elastic or rule.per != "tensor" or rule.gradient != "official":
        return None
    return {(-1, 1): "signed", (0, 1): "unsigned"}.get((rule.lo, rule.hi))


def takes_linear(rule_x: Rule, rule_w: Rule, *tensors: Tensor | None) -> bool:
    """Tell whether `elastic_linear` covers a linear layer with these rules and tensors."""
    binary = (rule_w.lowest, rule_w.highest) == (-1, 1) and not rule_w.is_float
    return elastic_kind(rule_x) is not None and binary and kernels.usable(*tensors)


def takes_attention(rule_q: Rule, rule_k: Rule, rule_a: Rule, rule_v: Rule, *tensors: Tensor | None) -> bool:
    """Tell whether `attention_core` covers attention with these rules and tensors."""
    signs = elastic_kind(rule_q) == elastic_kind(rule_k) == "signed"
    by_row = isinstance(rule_a, GsbAttention) and (rule_a.reduce == "row" or not rule_a.thresholds)
    by_head = isinstance(rule_v, GsbValue) and rule_v.gradient == "official"
    by_head = by_head and (rule_v.reduce in ("row", "head") or not rule_v.thresholds)
    maps, values = by_row or elastic_kind(rule_a) == "unsigned", by_head or elastic_kind(rule_v) == "signed"
    return signs and maps and values and kernels.usable(*tensors)


class _ElasticLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rule_x: Elastic,
        rule_w: Rule,
        x: Tensor,
        w: Tensor,
        shift: Tensor | None,
        bias: Tensor | None,
        scale: Tensor,
        *parameters: Tensor,
    ) -> Tensor:
        unsigned = elastic_kind(rule_x) == "unsigned"
        # torch._int_mm was seen to return garbage for inner dimensions of a few elements.
        large = x.numel() * w.shape[0] >= _INT8_WORTHWHILE and w.shape[1] >= 16
        dtype = torch.int8 if large else torch.float32
        if rule_w == Bwn():
            levels_w, scale_w = kernels.centred_signs(w, w.mean(), dtype), w.abs().mean()
        else:
            ((levels_w, scale_w),) = rule_w.planes(w, *parameters)
            levels_w = levels_w.to(dtype)
        factor = scale if scale_w is None else scale * scale_w.flatten()
        levels = kernels.elastic_levels(x, shift, scale, unsigned, dtype)
        rows = levels.flatten(0, -2)
        product = torch._int_mm(rows, levels_w.t()) if large else F.linear(rows, levels_w)
        y = kernels.scale_product(product, factor, bias)
        ctx.unsigned, ctx.rule_w, ctx.has_bias = unsigned, rule_w, bias is not None
        ctx.save_for_backward(x, w, shift, scale, levels, levels_w, scale_w, *parameters)
        return y.view(*x.shape[:-1], w.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        x, w, shift, scale, levels, levels_w, scale_w, *parameters = ctx.saved_tensors
        g = g.flatten(0, -2)
        weights, gain = levels_w.float(), 1.0
        if scale_w is not None and scale_w.numel() == 1:
            gain = scale_w.item()
        elif scale_w is not None:
            weights = weights * scale_w
        dx, dscale, dshift = kernels.elastic_backward(x, shift, g @ weights, gain, scale, ctx.unsigned)
        dw = (g.mT @ levels.flatten(0, -2).float()).mul_(scale)
        dw, *dparameters = ctx.rule_w.backward(w, dw, *parameters)
        return (
            None,
            None,
            dx,
            dw,
            dshift if shift is not None else None,
            g.sum(0) if ctx.has_bias else None,
            dscale,
            *dparameters,
        )


def elastic_linear(
    x: Tensor,
    w: Tensor,
    rule_x: Elastic,
    rule_w: Rule,
    scale: Tensor,
    parameters_w: Sequence[Tensor],
    shift: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    """Compute `binvit.nn.functional.binary_product` for a linear layer with elastic inputs.

    Args:
        x: (..., K), float32 on the CPU.
        w: (N, K).
        rule_x: A rule with an `elastic_kind`.
        rule_w: A rule with levels -1 and +1.
        scale: Parameter of rule_x, shape ().
        parameters_w: Parameters of rule_w.
        shift: (K,) or None.
        bias: (N,) or None.

    Returns:
        (..., N).
    """
    return _ElasticLinear.apply(rule_x, rule_w, x, w, shift, bias, scale, *parameters_w)


def _vectors(tensors: Sequence[Tensor]) -> np.ndarray:
    return np.array([t.item() for t in tensors], np.float32)


def _numpy(x: Tensor | None, shape: tuple[int, ...]) -> np.ndarray:
    return np.zeros(shape, np.float32) if x is None else x.detach().contiguous().view(shape).numpy()


class _AttentionCore(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        heads: int,
        rules: tuple[Rule, Rule],
        qkv: Tensor,
        bias: Tensor | None,
        shift_q: Tensor | None,
        shift_k: Tensor | None,
        shift_v: Tensor | None,
        scale_q: Tensor,
        scale_k: Tensor,
        *scales: Tensor,
    ) -> Tensor:
        b, n, width = qkv.shape
        d = width // (3 * heads)
        joint = qkv.detach().contiguous().view(b, n, 3, heads, d).numpy()
        shifts = [_numpy(shift, (heads, d)) for shift in (shift_q, shift_k, shift_v)]
        thresholds_a, thresholds_v = (np.array(getattr(r, "thresholds", ()), np.float32) for r in rules)
        groups = len(thresholds_a) + 1
        scales_a, scales_v = _vectors(scales[:groups]), _vectors(scales[groups:])
        signs_q, signs_k, value = (qkv.new_empty(b, heads, n, d) for _ in range(3))
        extremes = np.empty((b, heads, 2), np.float32)
        attention_kernels.split_signs(joint, shifts[0], shifts[1], signs_q.numpy(), signs_k.numpy())
        attention_kernels.superpose_value(joint, shifts[2], scales_v, thresholds_v, extremes, value.numpy())
        step = scale_q.item() * scale_k.item() * d**-0.5
        table = np.exp(np.arange(d + 1) * (-2.0 * step)).astype(np.float32)
        product = signs_q @ signs_k.mT
        probability, map_ = torch.empty_like(product), product  # the map may overwrite the products
        extra = np.empty((0, 0, 0), np.float32) if bias is None else bias.detach().contiguous().numpy()
        attention_kernels.superpose_map(
            product.numpy(), extra, table, scales_a, thresholds_a, probability.numpy(), map_.numpy()
        )
        ctx.arrays = (joint, shifts, thresholds_a, thresholds_v, scales_a, scales_v, extremes, extra)
        ctx.scales = scale_q.item(), scale_k.item()
        ctx.has_shift = [shift is not None for shift in (shift_q, shift_k, shift_v)]
        ctx.save_for_backward(qkv, signs_q, signs_k, value, probability, map_)
        return (map_ @ value).transpose(1, 2).reshape(b, n, heads * d)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        qkv, signs_q, signs_k, value, probability, map_ = ctx.saved_tensors
        joint, shifts, thresholds_a, thresholds_v, scales_a, scales_v, extremes, extra = ctx.arrays
        scale_q, scale_k = (np.float32(s) for s in ctx.scales)
        b, heads, n, d = value.shape
        g = g.view(b, n, heads, d).transpose(1, 2).contiguous()
        up_v = map_.mT @ g
        ds = g @ value.mT
        dbias = np.zeros_like(extra)
        sums_a = np.zeros((heads * n, len(scales_a)))
        counts_a = np.zeros((heads * n, len(thresholds_a)))
        attention_kernels.map_backward(
            probability.numpy(), extra, ds.numpy(), scales_a, thresholds_a, np.float32(d**-0.5), dbias, sums_a, counts_a
        )
        up_q, up_k = ds @ signs_k, ds.mT @ signs_q
        dqkv = torch.empty_like(qkv)
        sums = np.zeros((b * heads, 2 + len(scales_v)))
        counts = np.zeros((b * heads, len(thresholds_v)))
        dshift = np.zeros((b, 3, heads, d), np.float32)
        attention_kernels.merge_gradients(
            joint,
            *shifts,
            up_q.numpy(),
            up_k.numpy(),
            up_v.numpy(),
            np.array([scale_k, scale_q]),
            scale_q,
            scale_k,
            scales_v,
            thresholds_v,
            extremes,
            dqkv.view(joint.shape).numpy(),
            sums,
            counts,
            dshift,
        )
        elements = float(value.numel())
        sizes = np.concatenate([[elements] * 3, np.maximum(counts.sum(0), 1)])
        dscale_q, dscale_k, *dscales_v = sums.sum(0) / np.sqrt(sizes)
        sizes = np.concatenate([[probability.numel()], np.maximum(counts_a.sum(0), 1)])
        dscales = [*(sums_a.sum(0) / np.sqrt(sizes)), *dscales_v]
        dshift = torch.from_numpy(dshift.sum(0)).view(3, heads, 1, d)
        dshifts = [part if has else None for part, has in zip(dshift, ctx.has_shift, strict=True)]
        scalars = (qkv.new_tensor(s) for s in (dscale_q, dscale_k, *dscales))
        return None, None, dqkv, torch.from_numpy(dbias) if extra.size else None, *dshifts, *scalars


def attention_core(
    qkv: Tensor,
    heads: int,
    bias: Tensor | None,
    shifts: tuple[Tensor | None, Tensor | None, Tensor | None],
    rules: tuple[Rule, Rule],
    scale_q: Tensor,
    scale_k: Tensor,
    scales_a: Sequence[Tensor],
    scales_v: Sequence[Tensor],
) -> Tensor:
    """Attention from the joint projection to the context: scores, softmax, bias, superposition, product with the value.

    Args:
        qkv: (B, N, 3 * H * d), float32 on the CPU.
        heads: H.
        bias: (H, N, N) or None.
        shifts: Learned shifts of query, key and value, each (H, 1, d) or None.
        rules: Rules of the map and of the value that `takes_attention` accepts.
        scale_q: Elastic scale of the query, shape ().
        scale_k: Elastic scale of the key, shape ().
        scales_a: Parameters of the map's rule.
        scales_v: Parameters of the value's rule.

    Returns:
        (B, N, H * d).
    """
    return _AttentionCore.apply(heads, rules, qkv, bias, *shifts, scale_q, scale_k, *scales_a, *scales_v)
