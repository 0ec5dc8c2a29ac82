"""Group Superposition Binarization (GSB) of the attention map A (B, H, N, N) and of the value v (B, H, N, d)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from binvit.config import show
from binvit.nn.rules.base import SMALLEST_SCALE, Plane, Rule, sign

REDUCTIONS = ("batch", "sample", "head", "row")


def largest(x: Tensor, reduce: str) -> Tensor:
    """Return the largest value of x (B, H, N, M) over the "batch", a "sample", a "head" or a "row", broadcastable.

    It is 0 where there is no value.
    """
    over = {"batch": (0, 1, 2, 3), "sample": (1, 2, 3), "head": (2, 3), "row": (3,)}[reduce]
    if not x.numel():  # of which torch takes a sum, but no maximum
        return x.sum(over, keepdim=True)
    return x.amax(over, keepdim=True)


@dataclass(frozen=True)
class Gsb(Rule):
    """What both superpositions share: thresholds t_1 < ... < t_{G-1}, reduction, gradient and initialization.

    Attributes:
        thresholds: shares of the maximum above which groups 2, 3, ... start; () is the elastic baseline.
        reduce: the set over which the maximum runs, one of `REDUCTIONS`.
        gradient: "official", or "masked": each group's straight-through window is multiplied by the group's own mask.
        init: "stacked", or "official": the released code subtracts the lower levels in the first forward pass only and
            stores the unsubtracted values.

    References:
        Gao et al., Group superposition binarization for vision transformer with limited training samples, Neural
        Networks 172, 2024, arXiv 2305.07931, and its official code.
    """

    thresholds: tuple[float, ...] = (0.7, 0.9)
    reduce: str = "row"
    gradient: str = "official"
    init: str = "stacked"

    by_root: ClassVar[bool] = True
    floored: ClassVar[bool] = True

    @property
    def parameters(self) -> tuple[str, ...]:
        return ("scale", *(f"scale{i + 2}" for i in range(len(self.thresholds))))

    @property
    def groups(self) -> int:
        return len(self.thresholds) + 1

    def _stack(self, raw: list[Tensor]) -> tuple[Tensor, ...]:
        """Subtract from every level what the levels below it already contribute."""
        steps = [raw[0]] + [high - low for low, high in itertools.pairwise(raw)]
        return tuple(step.clamp(min=SMALLEST_SCALE) for step in steps)

    def initial(self, x: Tensor) -> tuple[Tensor, ...]:
        raw = self._raw_levels(x)
        if self.init == "official":
            return tuple(level.clamp(min=SMALLEST_SCALE) for level in raw)
        return self._stack(raw)

    def first_forward(self, initial: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return self._stack(list(initial)) if self.init == "official" else initial

    def masks(self, x: Tensor) -> list[Tensor]:
        """Return boolean masks of groups 2, 3, ...; nested, of the shape of x."""
        raise NotImplementedError

    def _raw_levels(self, x: Tensor) -> list[Tensor]:
        raise NotImplementedError

    @staticmethod
    def _group_means(size: Tensor, masks: list[Tensor], factor: float, first: Tensor) -> list[Tensor]:
        """Return first, then factor times the mean of size over each mask without the next; empty: the one below."""
        sums = [(size * mask).sum() for mask in masks] + [size.new_zeros(())]
        counts = [mask.sum() for mask in masks] + [size.new_zeros((), dtype=torch.int64)]
        levels = [first]
        for i in range(len(masks)):
            count = counts[i] - counts[i + 1]
            mean = factor * (sums[i] - sums[i + 1]) / count.clamp(min=1)
            levels.append(torch.where(count > 0, mean, levels[-1]))
        return levels


@dataclass(frozen=True)
class GsbAttention(Gsb):
    """GSB of the attention map: y = a_1 round(clip(A/a_1, 0, 1)) + sum_i a_{i+1} T_i, with T_i = 1[A > t_i max A].

    Backward ("official"): dA = g (1[0 <= A/a_1 <= 1] + sum_i a_{i+1} T_i); da_1 as in the unsigned elastic;
    da_{i+1} = sum(T_i g) / sqrt(#T_i). "masked" is the same here, since every window already carries its mask.
    """

    lowest: ClassVar[int] = 0

    def masks(self, x: Tensor) -> list[Tensor]:
        if not self.thresholds:
            return []
        top = largest(x, self.reduce)
        return [x > t * top for t in self.thresholds]

    def _raw_levels(self, x: Tensor) -> list[Tensor]:
        return self._group_means(x, self.masks(x), 4.0, 4.0 * x.mean())

    def planes(self, x: Tensor, *scales: Tensor) -> list[Plane]:
        levels = [x > 0.5 * scales[0], *self.masks(x)]
        return [Plane(level.to(x.dtype), scale) for level, scale in zip(levels, scales, strict=True)]

    def backward(self, x: Tensor, g: Tensor, *scales: Tensor) -> tuple[Tensor, ...]:
        inside = (x >= 0) & (x <= scales[0])
        through = inside.to(x.dtype)
        flat = g.flatten()
        level = torch.dot((x > 0.5 * scales[0]).to(x.dtype).flatten(), flat)
        first = level - torch.dot(x.flatten(), (g * through).flatten()) / scales[0]
        dscales = [first / max(x.numel(), 1) ** 0.5]
        for mask, scale in zip(self.masks(x), scales[1:], strict=True):
            kept = mask.to(x.dtype)
            dscales.append(torch.dot(kept.flatten(), flat) / kept.sum().clamp(min=1).sqrt())
            through.addcmul_(kept, scale)
        return through.mul_(g), *dscales


@dataclass(frozen=True)
class GsbValue(Gsb):
    """GSB of the value: y = sum_i a_i sign(x_i), with x_1 = v and x_{i+1} = v T_i.

    T_i = 1[v > t_i max v] + 1[v < t_i min v]; masked-out elements of the higher groups contribute nothing.
    Backward ("official"): dv = g sum_i 1[|x_i/a_i| <= 1], so that elements outside a mask fall inside its window and
    small values receive the gradient once per group; "masked" multiplies window i by T_{i-1}.
    da_i = sum((sign x_i - (x_i/a_i) 1[|x_i/a_i| <= 1]) g) / sqrt(#T_{i-1}).
    """

    def _over(self) -> str:
        return "head" if self.reduce == "row" else self.reduce

    def masks(self, x: Tensor) -> list[Tensor]:
        if not self.thresholds:
            return []
        top, bottom = largest(x, self._over()), -largest(-x, self._over())
        return [(x > t * top) | (x < t * bottom) for t in self.thresholds]

    def _raw_levels(self, x: Tensor) -> list[Tensor]:
        size, masks = x.abs(), self.masks(x)
        everything = torch.ones_like(x, dtype=torch.bool)
        levels = self._group_means(size, [everything, *masks], 2.0, 2.0 * size.mean())
        return levels[1:]

    def planes(self, x: Tensor, *scales: Tensor) -> list[Plane]:
        levels = sign(x)
        planes = [Plane(levels, scales[0])]
        for mask, scale in zip(self.masks(x), scales[1:], strict=True):
            planes.append(Plane(levels * mask, scale))
        return planes

    def backward(self, x: Tensor, g: Tensor, *scales: Tensor) -> tuple[Tensor, ...]:
        size, levels = x.abs(), sign(x)
        signed, sized = levels * g, x * g
        total, dscales = torch.zeros_like(x), []
        for mask, scale in zip([None, *self.masks(x)], scales, strict=True):
            inside = size <= scale
            count: int | Tensor
            if mask is None:
                window_, count = inside, max(x.numel(), 1)
                ones, ramp = signed.sum(), (sized * inside).sum()
            else:
                window_ = (inside & mask) if self.gradient == "masked" else (inside | ~mask)
                count = mask.sum().clamp(min=1).to(x.dtype)  # the root of an integer would be float32
                ones, ramp = (signed * mask).sum(), (sized * (inside & mask)).sum()
            total += window_
            dscales.append((ones - ramp / scale) / count**0.5)
        return total * g, *dscales


def check_thresholds(thresholds: Sequence[float]) -> None:
    """Raise a ValueError unless the thresholds are numbers that increase strictly and lie in (0, 1)."""
    numbers = isinstance(thresholds, Sequence) and not isinstance(thresholds, str)
    if not numbers or any(isinstance(t, bool) or not isinstance(t, int | float) for t in thresholds):
        raise ValueError(f"thresholds must be a list of numbers, got {show(thresholds)}.")
    pairs = itertools.pairwise(thresholds)
    if any(not 0 < t < 1 for t in thresholds) or any(b <= a for a, b in pairs):
        raise ValueError(f"thresholds must increase strictly and lie between 0 and 1, got {tuple(thresholds)}.")
