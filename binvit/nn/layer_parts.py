"""Parts of the binarized layers: a rule with its parameters, the bias of the attention map."""

from __future__ import annotations

from typing import Any

import torch
from timm.layers.attention import Attention
from torch import Tensor, nn

from binvit.nn.block_parts import clip
from binvit.nn.products import ReplaceValue
from binvit.nn.rules import SMALLEST_SCALE, Plane, Rule


class Binarizer(nn.Module):
    """A rule together with its parameters, which are set from the first batch seen in training mode.

    Args:
        rule: the rule.
        channels: output channels, for rules with parameters per channel.
        heads: attention heads, for rules with parameters per head.

    Attributes:
        initialized: 0 before the parameters are set and 1 afterwards. An exponential moving average of a copy made
            before averages it like the parameters, which start from 0; divided by it they are the average of all
            values since the first batch.
        sets_itself: a batch in training mode may set the parameters.
    """

    initialized: Tensor

    def __init__(self, rule: Rule, *, channels: int = 1, heads: int = 1) -> None:
        super().__init__()
        self.rule = rule
        shape = rule.parameter_shape(channels=channels, heads=heads)
        for name, value in zip(rule.parameters, rule.default(), strict=True):
            if rule.learned:
                self.register_parameter(name, nn.Parameter(torch.zeros(shape, dtype=torch.float32)))
            else:
                self.register_buffer(name, torch.full(shape, value, dtype=torch.float32))
        if rule.parameters and rule.learned:
            self.register_buffer("initialized", torch.zeros((), dtype=torch.float32))
        self.sets_itself = True
        self._seen = False  # spares reading the buffer once it is known to be 1

    def values(self, x: Tensor, shift: Tensor | None = None) -> tuple[Tensor, ...]:
        """Return the rule's parameters for binarizing x + shift, no scale that has a floor below it.

        In training mode they are set from the first batch, and clamped for good after a step has taken them too low.
        """
        if not self.rule.parameters:
            return ()
        if not (self.training and self.rule.learned):
            return self.limited()
        if not self.is_set:
            first = self._set(x if shift is None else x + shift) if self.sets_itself else None
            return self.limited() if first is None else first
        if torch.compiler.is_compiling():
            return self.limited()
        parameters = self._learned()
        if not self._seen:
            for parameter in parameters:
                parameter.data.div_(self.initialized)
            self.initialized.fill_(1)
            self._seen = True
        for parameter in parameters:
            if not self._is_fine(parameter):
                # Behind autograd's back: a second forward pass finds nothing to clamp, so the first keeps its numbers.
                parameter.data.clamp_(min=SMALLEST_SCALE)
        return parameters

    def _learned(self) -> tuple[nn.Parameter, ...]:
        return tuple(getattr(self, name) for name in self.rule.parameters)

    @torch.no_grad()
    def _initial(self, x: Tensor) -> tuple[Tensor, ...] | None:
        """Return the values that x would set, None if there are none or some are not finite."""
        initial = self.rule.initial(x) if x.numel() else ()
        return initial if initial and all(bool(value.isfinite().all()) for value in initial) else None

    def _set(self, x: Tensor) -> tuple[Tensor, ...] | None:
        """Set the parameters from x, and return those of the first forward pass; None if x cannot set them."""
        initial = self._initial(x)
        if initial is None:
            return None
        parameters = self._learned()
        with torch.no_grad():
            for parameter, value in zip(parameters, initial, strict=True):
                parameter.copy_(value)
            self.initialized.fill_(1)
            offsets = [first - value for first, value in zip(self.rule.first_forward(initial), initial, strict=True)]
        self._seen = True
        return tuple(p + offset for p, offset in zip(parameters, offsets, strict=True))

    def forget(self) -> None:
        """Return to the state before the first batch."""
        self._seen = False
        if self.rule.parameters and self.rule.learned:
            self.initialized.zero_()

    def limited(self) -> tuple[Tensor, ...]:
        """Return the rule's parameters with scales clamped from below; the parameters themselves stay as they are."""
        parameters = tuple(getattr(self, name) for name in self.rule.parameters)
        if not self.rule.learned:
            return parameters
        if not self._seen:
            parameters = tuple(map(self._settled, parameters, self.rule.default()))
        return tuple(
            p if self._is_fine(p) else ReplaceValue.apply(p, p.detach().clamp(min=SMALLEST_SCALE)) for p in parameters
        )

    def _settled(self, parameter: Tensor, default: float) -> Tensor:
        """Return the average that a parameter stands for, the rule's default before anything was averaged."""
        if _is_readable(self.initialized) and self.initialized.item() == 1:
            return parameter
        share = self.initialized
        value = torch.where(share > 0, parameter.detach() / share.clamp(min=1e-30), default)
        return ReplaceValue.apply(parameter, value)

    def _is_fine(self, parameter: Tensor) -> bool:
        if not self.rule.floored:
            return True
        # Reading one number is faster than clamping it.
        return _is_readable(parameter) and parameter.item() >= SMALLEST_SCALE

    @property
    def is_set(self) -> bool:
        """Tell whether the parameters have left their defaults, by a batch in training mode or by loading."""
        return self._seen or not (self.rule.parameters and self.rule.learned) or bool(self.initialized)

    def planes(self, x: Tensor) -> list[Plane]:
        """Return the planes of x with the current parameters."""
        return self.rule.planes(x, *self.limited())

    def _load_from_state_dict(self, *arguments: Any, **options: Any) -> None:
        self._seen = False  # what is loaded may be a model that has seen no batch
        super()._load_from_state_dict(*arguments, **options)

    def set_progress(self, done: float) -> None:
        """Move a schedule-driven parameter to the share `done` (0 to 1) of training."""
        if not self.rule.learned and self.rule.parameters:
            rule: Any = self.rule
            getattr(self, rule.parameters[0]).fill_(rule.progress(done))

    def extra_repr(self) -> str:
        return repr(self.rule)


def _is_readable(x: Tensor) -> bool:
    """Tell whether reading a number is cheap, and no obstacle to tracing."""
    return x.numel() == 1 and x.device.type == "cpu" and not torch.compiler.is_compiling()


class AttentionBias(nn.Module):
    """Learned bias on the attention map, shared by all images.

    Args:
        kind: "full" (one value per head and pair of tokens) or "relative" (one per head and relative position of two
            patches; the row of a prefix token, which has no position, in full; one per prefix token as a key of
            patches).
        heads: number of heads.
        grid: patches along height and width.
        prefix: number of tokens before the patches (class, distillation, registers).
    """

    index: Tensor

    def __init__(self, kind: str, heads: int, grid: tuple[int, int], prefix: int) -> None:
        super().__init__()
        self.kind = kind
        self.tokens = tokens = prefix + grid[0] * grid[1]
        if kind == "full":
            self.values = nn.Parameter(torch.zeros(heads, tokens, tokens, dtype=torch.float32))
            return
        self.values = nn.Parameter(torch.zeros(heads, self.table_size(grid, prefix), dtype=torch.float32))
        self.register_buffer("index", self.relative_index(grid, prefix), persistent=False)

    @staticmethod
    def table_size(grid: tuple[int, int], prefix: int) -> int:
        """Return the number of values per head of a relative bias."""
        h, w = grid
        return (2 * h - 1) * (2 * w - 1) + prefix * (prefix + h * w) + prefix

    @staticmethod
    def relative_index(grid: tuple[int, int], prefix: int) -> Tensor:
        """Return where in the table the bias of each pair of tokens stands, int64 (N, N).

        The table holds the (2 h - 1)(2 w - 1) relative positions row by row, then the rows of the prefix tokens, then
        one value per prefix token as a key of a patch.
        """
        h, w = grid
        rows, columns = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
        rows, columns = rows.flatten(), columns.flatten()
        relative = (rows[:, None] - rows[None] + h - 1) * (2 * w - 1) + (columns[:, None] - columns[None] + w - 1)
        start = (2 * h - 1) * (2 * w - 1)
        n = prefix + h * w
        index = torch.empty(n, n, dtype=torch.int64)
        index[prefix:, prefix:] = relative
        index[:prefix] = start + torch.arange(prefix * n).view(prefix, n)
        index[prefix:, :prefix] = start + prefix * n + torch.arange(prefix)[None]
        return index

    def check(self, x: Tensor, attn_mask: Tensor | None, is_causal: bool) -> None:
        """Refuse masks, which a sum of map and bias has no place for, and other numbers of tokens x (B, N, D)."""
        if attn_mask is not None or is_causal:
            raise ValueError("Attention with a learned bias takes no attention mask.")
        if x.shape[1] != self.tokens:
            raise ValueError(f"The learned attention bias is for {self.tokens} tokens, got {x.shape[1]}.")

    def forward(self) -> Tensor:
        """Return the bias, (heads, N, N)."""
        return self.values if self.kind == "full" else self.values[:, self.index]

    def extra_repr(self) -> str:
        return f"{self.kind}, {tuple(self.values.shape)}"


class BiasedAttention(Attention):
    """timm's attention in float with a learned bias of its map: (softmax(q k^T / sqrt(d)) + bias) v.

    The class is given to a layer of timm by `bias_attention`.
    """

    bias: AttentionBias

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Map tokens (B, N, D) to (B, N, D).

        Raises:
            ValueError: if a mask is given, or the learned bias is for another number of tokens.
        """
        self.bias.check(x, attn_mask, is_causal)
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        map_ = (self.q_norm(q) * self.scale @ self.k_norm(k).mT).softmax(-1) + self.bias()
        y = self.attn_drop(map_) @ v
        return self.proj_drop(self.proj(self.norm(y.transpose(1, 2).flatten(2))))


def bias_attention(attention: Attention, kind: str, grid: tuple[int, int], prefix: int) -> BiasedAttention:
    """Give timm's attention, in place, a learned bias; the arguments are those of `AttentionBias`."""
    attention.__class__ = BiasedAttention
    attention.bias = AttentionBias(kind, attention.num_heads, grid, prefix).to(
        attention.qkv.weight.device, attention.qkv.weight.dtype
    )
    return attention


class LimitedActivation(nn.Module):
    """An activation clipped to [-limit, limit].

    Args:
        act: the activation.
        limit: the largest size.
    """

    def __init__(self, act: nn.Module, limit: float) -> None:
        super().__init__()
        self.act, self.limit = act, limit

    def forward(self, x: Tensor) -> Tensor:
        """Map x to the same shape."""
        return clip(self.act(x), self.limit)
