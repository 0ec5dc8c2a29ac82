"""Layers of a binarized vision transformer; each replaces the timm layer of the same name and keeps its parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import Mlp
from timm.layers.attention import Attention
from torch import Tensor, nn

from binvit.nn.block_parts import Branches, LayerEnd, clip
from binvit.nn.fused import autograd, formed
from binvit.nn.layer_parts import AttentionBias, Binarizer
from binvit.nn.linear import scheme_linear
from binvit.nn.products import attention_product, binary_product
from binvit.nn.rules import superpose
from binvit.nn.schemes import Scheme


class HeadNorm(nn.LayerNorm):
    """The LayerNorm over the features of a head that a scheme with `qk_norm` puts before query and key."""


class BinaryAttention(nn.Module):
    """Self-attention with binarized projections and binarized products query x key and map x value.

    Args:
        attention: timm's attention layer; its weights are copied.
        scheme: what is binarized and how.
        grid: patches along height and width.
        prefix: number of tokens before the patches.

    Attributes:
        record: keep the tensors of the last forward pass in `last_attention`: "scores", "map" (softmax and bias),
            "binary" (what multiplies the value), "query", "key", "value" (before binarization) and "value_binary".
    """

    qkv: Any  # `BinaryLinear`, in a packed model what stands in for it
    proj: Any
    factor: Tensor
    query_binarizer: Binarizer
    key_binarizer: Binarizer
    attention_binarizer: Binarizer
    value_binarizer: Binarizer
    query_shift: nn.Parameter | None
    key_shift: nn.Parameter | None
    value_shift: nn.Parameter | None

    def __init__(self, attention: Attention, scheme: Scheme, grid: tuple[int, int], prefix: int) -> None:
        super().__init__()
        heads = self.num_heads = attention.num_heads
        self.head_dim, self.attn_dim = attention.head_dim, attention.attn_dim
        self.register_buffer("factor", torch.tensor(self.head_dim**-0.5, dtype=torch.float32), persistent=False)
        self.qkv = scheme_linear(attention.qkv, scheme, parts=3)
        self.q_norm, self.k_norm, self.norm = attention.q_norm, attention.k_norm, attention.norm
        if scheme.qk_norm and isinstance(self.q_norm, nn.Identity):
            self.q_norm, self.k_norm = HeadNorm(self.head_dim), HeadNorm(self.head_dim)
        self.proj = scheme_linear(attention.proj, scheme, normed=False, last=True)
        self.attn_drop, self.proj_drop = attention.attn_drop, attention.proj_drop
        for place in ("query", "key", "attention", "value"):
            self.add_module(f"{place}_binarizer", Binarizer(scheme.rule(place), heads=heads))
        for place in ("query", "key", "value"):
            shifted = scheme.shift and scheme.attention_shift and not scheme.rule(place).is_float
            self.register_parameter(
                f"{place}_shift", nn.Parameter(self.qkv.weight.new_zeros(heads, 1, self.head_dim)) if shifted else None
            )
        self.softmax = scheme.attention != "scores"
        kind = scheme.attention_bias
        self.bias = None if kind == "none" else AttentionBias(kind, heads, grid, prefix)
        self.context_end = None
        if scheme.context_norm or scheme.context_residual:
            ends = {"norm": scheme.context_norm, "own_input": scheme.context_residual}
            self.context_end = LayerEnd(self.attn_dim, self.attn_dim, activation=scheme.layer_activation, **ends)
        self.record = False
        self.last_attention: dict[str, Tensor] = {}

    def split_heads(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Split (B, N, 3 * H * d) into query, key and value, each (B, H, N, d), normalized."""
        b, n, _ = qkv.shape
        q, k, v = qkv.view(b, n, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        return self.q_norm(q), self.k_norm(k), v

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        """Return binarized query x key / sqrt(d), (B, H, N, N)."""
        query, key = self.query_binarizer, self.key_binarizer
        return binary_product(q, k, query.rule, key.rule, query.values(q), key.values(k)) * self.factor

    def attention_map(self, scores: Tensor) -> Tensor:
        """Turn scores (B, H, N, N) into the float attention map: softmax, then the learned bias."""
        a = scores.softmax(dim=-1) if self.softmax else scores
        return a if self.bias is None else a + self.bias()

    def attend(self, a: Tensor, v: Tensor) -> Tensor:
        """Return the binarized map (B, H, N, N) times the binarized value (B, H, N, d)."""
        map_, value = self.attention_binarizer, self.value_binarizer
        return attention_product(a, v, map_.rule, value.rule, map_.values(a), value.values(v), exact=not self.training)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Map tokens (B, N, D) to (B, N, D).

        Raises:
            ValueError: if a mask is given, which has no meaning for a binarized map, or the learned bias is for another
                number of tokens.
        """
        if attn_mask is not None or is_causal:
            raise ValueError("Binarized attention takes no attention mask.")
        if self.bias is not None:
            self.bias.check(x, attn_mask, is_causal)
        qkv = self.qkv(x)
        return self.proj_drop(self.proj(self.norm(self._attended(qkv))))

    def _attended(self, qkv: Tensor) -> Tensor:
        """Return the context (B, N, H * d): fused where possible, in training, but not in the first batch."""
        map_, value = self.attention_binarizer, self.value_binarizer
        binarizers = self.query_binarizer, self.key_binarizer, map_, value
        plain = self.training and not (self.record or self.attn_drop.p) and all(b.is_set for b in binarizers)
        if not (plain and isinstance(self.q_norm, nn.Identity) and isinstance(self.k_norm, nn.Identity)):
            return self._by_steps(qkv)
        rules = rule_q, rule_k, rule_a, rule_v = binarizers[0].rule, binarizers[1].rule, map_.rule, value.rule
        bias = None if self.bias is None else self.bias()
        shifts = self.query_shift, self.key_shift, self.value_shift
        values = [binarizer.values(qkv) for binarizer in binarizers]
        plain = self.softmax and self.context_end is None
        if plain and autograd.takes_attention(rule_q, rule_k, rule_a, rule_v, qkv):
            scales = *values[0], *values[1], *values[2:]
            return autograd.attention_core(qkv, self.num_heads, bias, shifts, (rule_a, rule_v), *scales)
        if not formed.takes_forms(rules, values, qkv):
            return self._by_steps(qkv)
        y = formed.attention_by_forms(qkv, self.num_heads, self.softmax, bias, shifts, rules, values)
        return self._ended(y, qkv.unflatten(-1, (3, -1)).unbind(2))

    def _by_steps(self, qkv: Tensor) -> Tensor:
        split = self.split_heads(qkv)
        shifts = self.query_shift, self.key_shift, self.value_shift
        q, k, v = (x if shift is None else x + shift for x, shift in zip(split, shifts, strict=True))
        scores = self.scores(q, k)
        a = self.attn_drop(self.attention_map(scores))
        if self.record:
            self._keep(scores, a, q, k, v)
        return self._ended(self._merge_heads(self.attend(a, v)), [self._merge_heads(x) for x in split])

    def _ended(self, y: Tensor, split: Sequence[Tensor]) -> Tensor:
        if self.context_end is None:
            return y
        query, key, value = split
        return self.context_end(y, query + key + value if self.context_end.own_input else None)

    @staticmethod
    def _merge_heads(x: Tensor) -> Tensor:
        return x.transpose(1, 2).flatten(2)

    @torch.no_grad()
    def _keep(self, scores: Tensor, a: Tensor, q: Tensor, k: Tensor, v: Tensor) -> None:
        kept = {"scores": scores, "map": a, "query": q, "key": k, "value": v}
        kept["binary"] = superpose(self.attention_binarizer.planes(a))
        kept["value_binary"] = superpose(self.value_binarizer.planes(v))
        self.last_attention = {name: tensor.detach().clone() for name, tensor in kept.items()}


class BinaryMlp(nn.Module):
    """MLP with two binarized linear layers.

    Args:
        mlp: timm's MLP; its weights are copied.
        scheme: what is binarized and how.
        grid: patches along height and width, if the tokens are those patches alone; None leaves the scheme's branches
            out.
    """

    fc1: Any  # `BinaryLinear`, in a packed model what stands in for it
    fc2: Any

    def __init__(self, mlp: Mlp, scheme: Scheme, grid: tuple[int, int] | None = None) -> None:
        super().__init__()
        self.fc1 = scheme_linear(mlp.fc1, scheme, "mlp_weight")
        self.act = {"keep": mlp.act, "relu": nn.ReLU(), "none": nn.Identity()}[scheme.activation]
        self.drop1, self.norm = mlp.drop1, mlp.norm
        self.fc2 = scheme_linear(mlp.fc2, scheme, "mlp_weight", "hidden", normed=False, last=True)
        self.drop2 = mlp.drop2
        self.limit = scheme.activation_limit
        self.branches = None
        if grid is not None and scheme.branches != "none":
            self.branches = Branches(scheme.branches, self.fc1.in_features, grid)

    def activate(self, x: Tensor) -> Tensor:
        """Apply the activation and, if the scheme has one, its limit."""
        x = self.act(x)
        return x if self.limit is None else clip(x, self.limit)

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens (B, N, D) to (B, N, D)."""
        y = self.norm(self.drop1(self.activate(self.fc1(x))))
        y = self.drop2(self.fc2(y))
        return y if self.branches is None else y + self.branches(x)
