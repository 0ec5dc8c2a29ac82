"""The fused form of attention in a training step, for the rules that GSB and its one-group baseline train with.

It gives what the layer's own steps give, up to float rounding, in fewer passes over memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from binvit.nn.fused import attention, elementwise
from binvit.nn.fused.bit_products import multiply_signs
from binvit.nn.fused.float_products import products
from binvit.nn.precision import full_precision
from binvit.nn.rules import Elastic, GsbAttention, GsbValue, Rule


def elastic_kind(rule: Rule) -> str | None:
    """Return "signed" or "unsigned" for a binary elastic rule with one scale and the official gradient, else None."""
    if type(rule) is not Elastic or rule.per != "tensor" or rule.gradient != "official":
        return None
    return {(-1, 1): "signed", (0, 1): "unsigned"}.get((rule.lo, rule.hi))


def takes_attention(rule_q: Rule, rule_k: Rule, rule_a: Rule, rule_v: Rule, *tensors: Tensor | None) -> bool:
    """Tell whether `attention_core` covers attention with these rules and tensors."""
    signs = elastic_kind(rule_q) == elastic_kind(rule_k) == "signed"
    by_row = isinstance(rule_a, GsbAttention) and (rule_a.reduce == "row" or not rule_a.thresholds)
    by_head = (
        isinstance(rule_v, GsbValue)
        and rule_v.gradient == "official"
        and (rule_v.reduce in ("row", "head") or not rule_v.thresholds)
    )
    maps, values = by_row or elastic_kind(rule_a) == "unsigned", by_head or elastic_kind(rule_v) == "signed"
    return signs and maps and values and elementwise.usable(*tensors)


def _numbers(tensors: Sequence[Tensor]) -> np.ndarray:
    return np.array([t.item() for t in tensors], np.float32)


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
        joint = elementwise.rows_of(qkv).reshape(b, n, 3, heads, d)
        shifts = [elementwise.vector(shift, heads * d).reshape(heads, d) for shift in (shift_q, shift_k, shift_v)]
        thresholds_a, thresholds_v = (np.array(getattr(r, "thresholds", ()), np.float32) for r in rules)
        groups = len(thresholds_a) + 1
        scales_a, scales_v = _numbers(scales[:groups]), _numbers(scales[groups:])
        signs_q, signs_k, value = qkv.new_empty(3, b * heads, n, d).unbind()
        extremes = np.empty((b, heads, 2), np.float32)
        query, key, values = (x.numpy().reshape(b, heads, n, d) for x in (signs_q, signs_k, value))
        attention.split_signs(joint, *shifts[:2], query, key)
        attention.superpose_value(joint, shifts[2], scales_v, thresholds_v, extremes, values)
        size_q, size_k = scale_q.item(), scale_k.item()
        table = np.exp(np.arange(d + 1) * (-2.0 * size_q * size_k * d**-0.5)).astype(np.float32)
        map_ = multiply_signs(signs_q, signs_k)  # which the map overwrites
        probability = qkv.new_empty(b, heads, n, n)
        extra = np.empty((0, 0, 0), np.float32) if bias is None else bias.detach().contiguous().numpy()
        maps = map_.numpy().reshape(b, heads, n, n)
        attention.superpose_map(maps, extra, table, scales_a, thresholds_a, probability.numpy(), maps)
        ctx.arrays = (shifts, thresholds_a, thresholds_v, scales_a, scales_v, extremes, extra)
        ctx.sizes = np.float32(size_q), np.float32(size_k)
        ctx.has_shift = [shift is not None for shift in (shift_q, shift_k, shift_v)]
        ctx.save_for_backward(qkv, signs_q, signs_k, value, map_, probability)
        return products(map_, value).view(b, heads, n, d).transpose(1, 2).reshape(b, n, heads * d)

    @staticmethod
    @once_differentiable
    @full_precision
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        qkv, signs_q, signs_k, value, map_, probability = ctx.saved_tensors
        shifts, thresholds_a, thresholds_v, scales_a, scales_v, extremes, extra = ctx.arrays
        scale_q, scale_k = ctx.sizes
        probability = probability.numpy()
        b, heads, n, _ = probability.shape
        d = value.shape[2]
        joint = elementwise.rows_of(qkv).reshape(b, n, 3, heads, d)
        g = g.view(b, n, heads, d).transpose(1, 2).reshape(value.shape)
        up_v = products(map_.mT, g)
        ds = torch.bmm(g, value.mT)
        dbias = np.zeros_like(extra)
        sums_a = np.zeros((heads * n, len(scales_a)))
        counts_a = np.zeros((heads * n, len(thresholds_a)))
        up = ds.numpy().reshape(probability.shape)
        factor = np.float32(d**-0.5)
        attention.map_backward(probability, extra, up, scales_a, thresholds_a, factor, dbias, sums_a, counts_a)
        ups = [u.numpy().reshape(b, heads, n, d) for u in (products(ds, signs_k), products(ds.mT, signs_q), up_v)]
        dqkv = qkv.new_empty(qkv.shape)
        sums = np.zeros((b * heads, 2 + len(scales_v)))
        counts = np.zeros((b * heads, len(thresholds_v)))
        dshift = np.zeros((b, 3, heads, d), np.float32)
        attention.merge_gradients(
            joint,
            *shifts,
            *ups,
            np.array([scale_k, scale_q]),
            scale_q,
            scale_k,
            scales_v,
            thresholds_v,
            extremes,
            dqkv.numpy().reshape(joint.shape),
            sums,
            counts,
            dshift,
        )
        sizes = np.concatenate([[qkv.numel() // 3] * 3, counts.sum(0), [probability.size], counts_a.sum(0)])
        dscales = np.concatenate([sums.sum(0), sums_a.sum(0)]) / np.sqrt(np.maximum(sizes, 1))
        dscale_q, dscale_k, *dscales = torch.from_numpy(dscales.astype(np.float32)).unbind()
        dscales_v, dscales_a = dscales[: len(scales_v)], dscales[len(scales_v) :]
        summed = torch.from_numpy(dshift.sum(0)).view(3, heads, 1, d)
        dshifts = [part if has else None for part, has in zip(summed, ctx.has_shift, strict=True)]
        dbias = torch.from_numpy(dbias) if extra.size else None
        return None, None, dqkv, dbias, *dshifts, dscale_q, dscale_k, *dscales_a, *dscales_v


@torch.compiler.disable
@full_precision
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
    """Compute attention from the joint projection to the context: scores, softmax, bias, superposition, product.

    Args:
        qkv: (B, N, 3 * H * d), float32 on the CPU.
        heads: H.
        bias: (H, N, N) or None.
        shifts: learned shifts of query, key and value, each (H, 1, d) or None.
        rules: rules of the map and of the value that `takes_attention` accepts.
        scale_q: elastic scale of the query, shape ().
        scale_k: elastic scale of the key, shape ().
        scales_a: parameters of the map's rule.
        scales_v: parameters of the value's rule.

    Returns:
        (B, N, H * d).

    Raises:
        ValueError: if the bias is for another number of heads or tokens: the kernels do not look.
    """
    if bias is not None and bias.shape != (heads, qkv.shape[1], qkv.shape[1]):
        raise ValueError(f"A bias of shape {tuple(bias.shape)} does not fit {heads} heads and {qkv.shape[1]} tokens.")
    return _AttentionCore.apply(heads, rules, qkv, bias, *shifts, scale_q, scale_k, *scales_a, *scales_v)
