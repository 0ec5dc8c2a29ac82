"""Layers of a binarized vision transformer; each replaces the timm layer of the same name and keeps its parameters."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from binvit.nn.fused import autograd
from binvit.nn.layer_parts import AttentionBias, Binarizer, RPReLU, Shortcut
from binvit.nn.products import attention_product, binary_product, superpose
from binvit.nn.rules import Rule
from binvit.nn.schemes import Scheme


def _copy_of(parameter: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)


def _options(scheme: Scheme) -> dict[str, Any]:
    """What the four linear layers of a block have in common besides their rules."""
    return {name: getattr(scheme, name) for name in ("shift", "linear_bias", "rprelu", "shortcut")}


class HeadNorm(nn.LayerNorm):
    """The LayerNorm over the features of a head that a scheme with `qk_norm` puts before query and key."""


class BinaryLinear(nn.Module):
    """Linear layer with binarized weights and inputs: y = b_x(x + shift) b_w(W)^T + bias.

    Args:
        linear: The float layer (`nn.Linear`, or a convolution seen as one by `BinaryPatchConv`); its weights are
            copied.
        weight: Rule of the weights.
        input: Rule of the inputs.
        shift: Learn a shift per input feature, added before the inputs are binarized.
        linear_bias: "keep" the float layer's bias or lack of one, have one "always" or "never".
        rprelu: Follow the layer with an `RPReLU`.
        shortcut: Follow it with a `Shortcut` instead: a norm, the layer's own input and an `RPReLU`.
    """

    def __init__(
        self,
        linear: nn.Linear | nn.Conv2d,
        weight: Rule,
        input: Rule,
        *,
        shift: bool = False,
        linear_bias: str = "keep",
        rprelu: bool = False,
        shortcut: bool = False,
    ) -> None:
        super().__init__()
        matrix = linear.weight.detach().flatten(1)
        self.out_features, self.in_features = matrix.shape
        self.weight = _copy_of(linear.weight)
        bias = nn.Parameter(self.weight.new_zeros(self.out_features)) if linear.bias is None else _copy_of(linear.bias)
        has_bias = linear_bias == "always" or (linear_bias == "keep" and linear.bias is not None)
        self.bias = bias if has_bias else None
        self.shift = nn.Parameter(matrix.new_zeros(self.in_features)) if shift and not input.is_float else None
        self.weight_binarizer = Binarizer(weight, channels=self.out_features)
        self.input_binarizer = Binarizer(input)
        self.post = RPReLU(self.out_features) if rprelu else None
        if shortcut:
            self.post = Shortcut(self.in_features, self.out_features)

    @property
    def matrix(self) -> Tensor:
        """Latent weights, (out_features, in_features)."""
        return self.weight.flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (..., in_features) to (..., out_features)."""
        w = self.matrix
        rules = self.input_binarizer.rule, self.weight_binarizer.rule
        px, pw = self.input_binarizer.values(x, self.shift), self.weight_binarizer.values(w)
        if self.training and autograd.takes_linear(*rules, x, w, self.shift, self.bias):
            y = autograd.elastic_linear(x, w, *rules, *px, pw, self.shift, self.bias)
        else:
            y = binary_product(x, w, *rules, px, pw, self.shift, self.bias)
        return y if self.post is None else self.post(y, x)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}"


class BinaryPatchConv(BinaryLinear):
    """Patch embedding with binarized or 8-bit weights: the strided convolution as one product over unfolded patches.

    In evaluation mode every image is multiplied by itself, so that float rounding cannot depend on the batch.

    Args:
        conv: Convolution whose stride equals its kernel.
        weight: Rule of the weights.
        input: Rule of the patches; a mean over a patch is XNOR-Net's box filter, since patches do not overlap.
    """

    def __init__(self, conv: nn.Conv2d, weight: Rule, input: Rule) -> None:
        super().__init__(conv, weight, input)
        self.patch_size = tuple(conv.kernel_size)
        self.in_chans = conv.in_channels

    def patches(self, x: Tensor) -> Tensor:
        """Cut images (B, C, H, W) into patches (B, L, C * p * p), row by row."""
        b, c, h, w = x.shape
        ph, pw = self.patch_size
        x = x.reshape(b, c, h // ph, ph, w // pw, pw).permute(0, 2, 4, 1, 3, 5)
        return x.reshape(b, (h // ph) * (w // pw), c * ph * pw)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (B, C, H, W) to features (B, width, H / p, W / p)."""
        grid = (x.shape[2] // self.patch_size[0], x.shape[3] // self.patch_size[1])
        if self.training:
            y = super().forward(self.patches(x))
        else:
            y = torch.cat([super(BinaryPatchConv, self).forward(self.patches(image)) for image in x.split(1)])
        return y.mT.reshape(x.shape[0], self.out_features, *grid)


class BinaryAttention(nn.Module):
    """Self-attention with binarized projections and binarized products query x key and map x value.

    Args:
        attention: timm's attention layer; its weights are copied.
        scheme: What is binarized and how.
        grid: Patches along height and width.
        prefix: Number of tokens before the patches.

    Attributes:
        record: Keep the tensors of the last forward pass in `last_attention`: "scores", "map" (softmax and bias),
            "binary" (what multiplies the value), "query", "key", "value" (before binarization) and "value_binary".
    """

    def __init__(self, attention: nn.Module, scheme: Scheme, grid: tuple[int, int], prefix: int) -> None:
        super().__init__()
        heads = self.num_heads = attention.num_heads
        self.head_dim, self.attn_dim = attention.head_dim, attention.attn_dim
        self.register_buffer("factor", torch.tensor(self.head_dim**-0.5, dtype=torch.float32), persistent=False)
        options = _options(scheme)
        weight, input = scheme.rule("weight"), scheme.rule("input")
        self.qkv = BinaryLinear(attention.qkv, weight, input, **options)
        self.q_norm, self.k_norm, self.norm = attention.q_norm, attention.k_norm, attention.norm
        if scheme.qk_norm and isinstance(self.q_norm, nn.Identity):
            self.q_norm, self.k_norm = HeadNorm(self.head_dim), HeadNorm(self.head_dim)
        self.proj = BinaryLinear(attention.proj, weight, input, **options)
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
        self.context_residual = scheme.context_residual
        self.record = False
        self.last_attention: dict[str, Tensor] = {}

    def split_heads(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Split (B, N, 3 * H * d) into query, key and value, each (B, H, N, d), normalized and shifted."""
        b, n, _ = qkv.shape
        q, k, v = qkv.view(b, n, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        if self.query_shift is not None:
            q = q + self.query_shift
        if self.key_shift is not None:
            k = k + self.key_shift
        if self.value_shift is not None:
            v = v + self.value_shift
        return q, k, v

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
            ValueError: If a mask is given, which has no meaning for a binarized map, or the learned bias is for another
                number of tokens.
        """
        if attn_mask is not None or is_causal:
            raise ValueError("Binarized attention takes no attention mask.")
        if self.bias is not None and x.shape[1] != self.bias.tokens:
            raise ValueError(f"The learned attention bias is for {self.bias.tokens} tokens, got {x.shape[1]}.")
        qkv = self.qkv(x)
        y = self._fused(qkv) if self._can_fuse(qkv) else self._by_steps(qkv)
        return self.proj_drop(self.proj(self.norm(y)))

    def _by_steps(self, qkv: Tensor) -> Tensor:
        q, k, v = self.split_heads(qkv)
        scores = self.scores(q, k)
        a = self.attn_drop(self.attention_map(scores))
        if self.record:
            self._keep(scores, a, q, k, v)
        y = self.attend(a, v)
        if self.context_residual:
            y = y + q + k + v
        return y.transpose(1, 2).reshape(*qkv.shape[:2], self.attn_dim)

    def _can_fuse(self, qkv: Tensor) -> bool:
        """The fused core is for training; the first batch goes step by step, since it sets the scales."""
        binarizers = self.query_binarizer, self.key_binarizer, self.attention_binarizer, self.value_binarizer
        plain = self.training and self.softmax and not (self.record or self.context_residual or self.attn_drop.p)
        plain = plain and isinstance(self.q_norm, nn.Identity) and isinstance(self.k_norm, nn.Identity)
        return plain and binarizers[2].is_set and autograd.takes_attention(*(b.rule for b in binarizers), qkv)

    def _fused(self, qkv: Tensor) -> Tensor:
        query, key, map_, value = (
            self.query_binarizer,
            self.key_binarizer,
            self.attention_binarizer,
            self.value_binarizer,
        )
        bias = None if self.bias is None else self.bias()
        shifts = self.query_shift, self.key_shift, self.value_shift
        scales = *query.values(qkv), *key.values(qkv), map_.values(qkv), value.values(qkv)
        return autograd.attention_core(qkv, self.num_heads, bias, shifts, (map_.rule, value.rule), *scales)

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
        scheme: What is binarized and how.
    """

    def __init__(self, mlp: nn.Module, scheme: Scheme) -> None:
        super().__init__()
        options, weight = _options(scheme), scheme.rule("mlp_weight")
        self.fc1 = BinaryLinear(mlp.fc1, weight, scheme.rule("input"), **options)
        self.act = nn.ReLU() if scheme.activation == "relu" else mlp.act
        self.drop1, self.norm = mlp.drop1, mlp.norm
        self.fc2 = BinaryLinear(mlp.fc2, weight, scheme.rule("hidden"), **options)
        self.drop2 = mlp.drop2
        self.limit = scheme.activation_limit

    def activate(self, x: Tensor) -> Tensor:
        """Apply the activation and, if the scheme has one, its limit."""
        x = self.act(x)
        return x if self.limit is None else F.hardtanh(x, -self.limit, self.limit)  # a clamp whose gradient is one pass

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens (B, N, D) to (B, N, D)."""
        x = self.norm(self.drop1(self.activate(self.fc1(x))))
        return self.drop2(self.fc2(x))
