"""Layers of a binarized vision transformer; each replaces the timm layer of the same name and keeps its parameters."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from binvit.nn.functional import attention_product, binary_product, superpose
from binvit.nn.rules import SMALLEST_SCALE, Plane, Rule
from binvit.nn.schemes import Scheme


class Binarizer(nn.Module):
    """A rule together with its parameters, which are set from the first batch seen in training mode.

    Args:
        rule: The rule.
        channels: Output channels, for rules with parameters per channel.
        heads: Attention heads, for rules with parameters per head.
    """

    def __init__(self, rule: Rule, *, channels: int = 1, heads: int = 1) -> None:
        super().__init__()
        self.rule = rule
        shape = rule.parameter_shape(channels=channels, heads=heads)
        for name, value in zip(rule.parameters, rule.default(), strict=True):
            tensor = torch.full(shape, value)
            if rule.learned:
                self.register_parameter(name, nn.Parameter(tensor))
            else:
                self.register_buffer(name, tensor)
        if rule.parameters and rule.learned:
            self.register_buffer("initialized", torch.zeros((), dtype=torch.bool))
        self._seen = False  # spares reading the buffer once it is known to be set

    def values(self, x: Tensor, shift: Tensor | None = None) -> tuple[Tensor, ...]:
        """Return the rule's parameters for binarizing x + shift; in training mode they are set or clamped before."""
        parameters = tuple(getattr(self, name) for name in self.rule.parameters)
        if not (self.training and self.rule.learned and parameters):
            return parameters
        if not self._seen and not self.initialized:
            with torch.no_grad():
                initial = self.rule.initial(x if shift is None else x + shift)
                for parameter, value in zip(parameters, initial, strict=True):
                    parameter.copy_(value)
                self.initialized.fill_(True)
                offsets = [
                    first - value for first, value in zip(self.rule.first_forward(initial), initial, strict=True)
                ]
            self._seen = True
            return tuple(p + offset for p, offset in zip(parameters, offsets, strict=True))
        self._seen = True
        with torch.no_grad():
            for name, parameter in zip(self.rule.parameters, parameters, strict=True):
                if name != "offset":  # the one parameter that may be negative
                    parameter.clamp_(min=SMALLEST_SCALE)
        return parameters

    def planes(self, x: Tensor) -> list[Plane]:
        """Return the planes of x with the current parameters."""
        return self.rule.planes(x, *(getattr(self, name) for name in self.rule.parameters))

    def set_progress(self, done: float) -> None:
        """Move a schedule-driven parameter to the share `done` (0 to 1) of training."""
        if not self.rule.learned and self.rule.parameters:
            getattr(self, self.rule.parameters[0]).fill_(self.rule.progress(done))

    def extra_repr(self) -> str:
        return repr(self.rule)


class RPReLU(nn.Module):
    """ReActNet's activation: y = PReLU_c(x - m1_c) + m2_c, one slope and two shifts per channel.

    Args:
        channels: Size of the last dimension.

    References:
        Liu et al., ReActNet, 2020.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.shift_in = nn.Parameter(torch.zeros(channels))
        self.shift_out = nn.Parameter(torch.zeros(channels))
        self.slope = nn.Parameter(torch.full((channels,), 0.25))

    def forward(self, x: Tensor) -> Tensor:
        moved = x - self.shift_in
        return torch.where(moved >= 0, moved, self.slope * moved) + self.shift_out


class BinaryLinear(nn.Module):
    """Linear layer with binarized weights and inputs: y = b_x(x + shift) b_w(W)^T + bias.

    Args:
        linear: The float layer (`nn.Linear`, or a convolution seen as one by `BinaryPatchConv`); its weights are
            copied.
        weight: Rule of the weights.
        input: Rule of the inputs.
        shift: Learn a shift per input feature, added before the inputs are binarized.
        rprelu: Follow the layer with an `RPReLU`.
    """

    def __init__(
        self, linear: nn.Linear | nn.Conv2d, weight: Rule, input: Rule, *, shift: bool = False, rprelu: bool = False
    ) -> None:
        super().__init__()
        matrix = linear.weight.detach().flatten(1)
        self.out_features, self.in_features = matrix.shape
        self.weight = nn.Parameter(linear.weight.detach().clone())
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach().clone())
        self.shift = nn.Parameter(torch.zeros(self.in_features)) if shift and not input.is_float else None
        self.weight_binarizer = Binarizer(weight, channels=self.out_features)
        self.input_binarizer = Binarizer(input)
        self.post = RPReLU(self.out_features) if rprelu else None

    @property
    def matrix(self) -> Tensor:
        """Latent weights, (out_features, in_features)."""
        return self.weight.flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (..., in_features) to (..., out_features)."""
        w = self.matrix
        y = binary_product(
            x,
            w,
            self.input_binarizer.rule,
            self.weight_binarizer.rule,
            self.input_binarizer.values(x, self.shift),
            self.weight_binarizer.values(w),
            self.shift,
            self.bias,
        )
        return y if self.post is None else self.post(y)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}"


class BinaryPatchConv(BinaryLinear):
    """Patch embedding with binarized or 8-bit weights: the strided convolution as one product over unfolded patches.

    In evaluation mode every image is multiplied by itself, so that float rounding cannot depend on the batch.

    Args:
        conv: Convolution whose stride equals its kernel.
        weight: Rule of the weights.
        input: Rule of the patches; a mean over a patch is XNOR-Net's box filter, since patches do not overlap.
        shift: Learn a shift per input feature.
        rprelu: Follow the layer with an `RPReLU`.
    """

    def __init__(
        self, conv: nn.Conv2d, weight: Rule, input: Rule, *, shift: bool = False, rprelu: bool = False
    ) -> None:
        super().__init__(conv, weight, input, shift=shift, rprelu=rprelu)
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


class AttentionBias(nn.Module):
    """Learned bias on the attention map, shared by all images.

    Args:
        kind: "full" (one value per head and pair of tokens) or "relative" (one per head and relative position of two
            patches, plus one per head for every pair that involves a prefix token and, for patches, per prefix token).
        heads: Number of heads.
        grid: Patches along height and width.
        prefix: Number of tokens before the patches (class, distillation, registers).
    """

    def __init__(self, kind: str, heads: int, grid: tuple[int, int], prefix: int) -> None:
        super().__init__()
        self.kind = kind
        tokens = prefix + grid[0] * grid[1]
        if kind == "full":
            self.values = nn.Parameter(torch.zeros(heads, tokens, tokens))
            return
        self.values = nn.Parameter(torch.zeros(heads, self.table_size(grid, prefix)))
        self.register_buffer("index", self.relative_index(grid, prefix), persistent=False)

    @staticmethod
    def table_size(grid: tuple[int, int], prefix: int) -> int:
        """Number of values per head of a relative bias."""
        return (2 * grid[0] - 1) * (2 * grid[1] - 1) + prefix * prefix + 2 * prefix

    @staticmethod
    def relative_index(grid: tuple[int, int], prefix: int) -> Tensor:
        """Return where in the table the bias of each pair of tokens stands, int64 (N, N).

        The table holds the (2 h - 1)(2 w - 1) relative positions row by row, then the pairs of prefix tokens, then one
        value per prefix token as a query and one per prefix token as a key of a patch.
        """
        h, w = grid
        rows, columns = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
        rows, columns = rows.flatten(), columns.flatten()
        relative = (rows[:, None] - rows[None] + h - 1) * (2 * w - 1) + (columns[:, None] - columns[None] + w - 1)
        start = (2 * h - 1) * (2 * w - 1)
        n = prefix + h * w
        index = torch.empty(n, n, dtype=torch.int64)
        index[prefix:, prefix:] = relative
        index[:prefix, :prefix] = start + torch.arange(prefix * prefix).view(prefix, prefix)
        index[:prefix, prefix:] = start + prefix * prefix + torch.arange(prefix)[:, None]
        index[prefix:, :prefix] = start + prefix * prefix + prefix + torch.arange(prefix)[None]
        return index

    def forward(self) -> Tensor:
        """Return the bias, (heads, N, N)."""
        return self.values if self.kind == "full" else self.values[:, self.index]

    def extra_repr(self) -> str:
        return f"{self.kind}, {tuple(self.values.shape)}"


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
        self.register_buffer("factor", torch.tensor(self.head_dim**-0.5), persistent=False)
        options = {"shift": scheme.shift, "rprelu": scheme.rprelu}
        weight, input = scheme.rule("weight"), scheme.rule("input")
        self.qkv = BinaryLinear(attention.qkv, weight, input, **options)
        self.q_norm, self.k_norm, self.norm = attention.q_norm, attention.k_norm, attention.norm
        self.proj = BinaryLinear(attention.proj, weight, input, **options)
        self.attn_drop, self.proj_drop = attention.attn_drop, attention.proj_drop
        for place in ("query", "key", "attention", "value"):
            self.add_module(f"{place}_binarizer", Binarizer(scheme.rule(place), heads=heads))
        for place in ("query", "key", "value"):
            shifted = scheme.shift and not scheme.rule(place).is_float
            self.register_parameter(
                f"{place}_shift", nn.Parameter(torch.zeros(heads, 1, self.head_dim)) if shifted else None
            )
        self.softmax = scheme.attention != "scores"
        kind = scheme.attention_bias
        self.bias = None if kind == "none" else AttentionBias(kind, heads, grid, prefix)
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
        rule_q, rule_k = self.query_binarizer.rule, self.key_binarizer.rule
        pq, pk = self.query_binarizer.values(q), self.key_binarizer.values(k)
        return binary_product(q, k, rule_q, rule_k, pq, pk) * self.factor

    def attention_map(self, scores: Tensor) -> Tensor:
        """Turn scores (B, H, N, N) into the float attention map: softmax, then the learned bias."""
        a = scores.softmax(dim=-1) if self.softmax else scores
        return a if self.bias is None else a + self.bias()

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Map tokens (B, N, D) to (B, N, D).

        Raises:
            ValueError: If a mask is given: the binarized map has no meaning for masked tokens.
        """
        if attn_mask is not None or is_causal:
            raise ValueError("Binarized attention takes no attention mask.")
        b, n, _ = x.shape
        q, k, v = self.split_heads(self.qkv(x))
        scores = self.scores(q, k)
        a = self.attn_drop(self.attention_map(scores))
        pa, pv = self.attention_binarizer.values(a), self.value_binarizer.values(v)
        rule_a, rule_v = self.attention_binarizer.rule, self.value_binarizer.rule
        y = attention_product(a, v, rule_a, rule_v, pa, pv, exact=not self.training)
        if self.record:
            self._keep(scores, a, q, k, v)
        y = self.norm(y.transpose(1, 2).reshape(b, n, self.attn_dim))
        return self.proj_drop(self.proj(y))

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
        options = {"shift": scheme.shift, "rprelu": scheme.rprelu}
        weight = scheme.rule("weight")
        self.fc1 = BinaryLinear(mlp.fc1, weight, scheme.rule("input"), **options)
        self.act, self.drop1, self.norm = mlp.act, mlp.drop1, mlp.norm
        self.fc2 = BinaryLinear(mlp.fc2, weight, scheme.rule("hidden"), **options)
        self.drop2 = mlp.drop2
        self.limit = scheme.activation_limit

    def activate(self, x: Tensor) -> Tensor:
        """Apply the activation and, if the scheme has one, its limit."""
        x = self.act(x)
        return x if self.limit is None else x.clamp(-self.limit, self.limit)

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens (B, N, D) to (B, N, D)."""
        x = self.norm(self.drop1(self.activate(self.fc1(x))))
        return self.drop2(self.fc2(x))
