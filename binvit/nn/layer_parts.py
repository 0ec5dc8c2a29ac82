"""Parts of the binarized layers: a rule with its parameters, the bias of the attention map."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from binvit.nn.products import ReplaceValue
from binvit.nn.rules import SMALLEST_SCALE, Plane, Rule


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
            tensor = torch.full(shape, value, dtype=torch.float32)
            if rule.learned:
                self.register_parameter(name, nn.Parameter(tensor))
            else:
                self.register_buffer(name, tensor)
        if rule.parameters and rule.learned:
            self.register_buffer("initialized", torch.zeros((), dtype=torch.bool))
        self._seen = False  # spares reading the buffer once it is known to be set

    def values(self, x: Tensor, shift: Tensor | None = None) -> tuple[Tensor, ...]:
        """Return the rule's parameters for binarizing x + shift, no scale that has a floor below it.

        In training mode they are set from the first batch, and clamped for good after a step has taken them too low.
        """
        if not (self.training and self.rule.learned and self.rule.parameters):
            return self.limited()
        parameters = tuple(getattr(self, name) for name in self.rule.parameters)
        if not self.is_set:
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
        for parameter in parameters:
            if not self._is_fine(parameter):
                # Behind autograd's back: a second forward pass finds nothing to clamp, so the first keeps its numbers.
                parameter.data.clamp_(min=SMALLEST_SCALE)
        return parameters

    def limited(self) -> tuple[Tensor, ...]:
        """Return the rule's parameters with scales clamped from below; the parameters themselves stay as they are."""
        parameters = (getattr(self, name) for name in self.rule.parameters)
        return tuple(
            p if self._is_fine(p) else ReplaceValue.apply(p, p.detach().clamp(min=SMALLEST_SCALE)) for p in parameters
        )

    def _is_fine(self, parameter: Tensor) -> bool:
        if not self.rule.floored:
            return True
        # Reading one number is faster than clamping it.
        return parameter.numel() == 1 and parameter.device.type == "cpu" and parameter.item() >= SMALLEST_SCALE

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
            getattr(self, self.rule.parameters[0]).fill_(self.rule.progress(done))

    def extra_repr(self) -> str:
        return repr(self.rule)


class AttentionBias(nn.Module):
    """Learned bias on the attention map, shared by all images.

    Args:
        kind: "full" (one value per head and pair of tokens) or "relative" (one per head and relative position of two
            patches; the row of a prefix token, which has no position, in full; one per prefix token as a key of
            patches).
        heads: Number of heads.
        grid: Patches along height and width.
        prefix: Number of tokens before the patches (class, distillation, registers).
    """

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
        """Number of values per head of a relative bias."""
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

    def forward(self) -> Tensor:
        """Return the bias, (heads, N, N)."""
        return self.values if self.kind == "full" else self.values[:, self.index]

    def extra_repr(self) -> str:
        return f"{self.kind}, {tuple(self.values.shape)}"
