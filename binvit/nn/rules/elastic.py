"""Quantizers with a learned step, and binary weights with a mean-absolute-value factor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from binvit.nn.rules.base import SMALLEST_SCALE, Form, Plane, Rule, reduce_to, sign


@dataclass(frozen=True)
class Elastic(Rule):
    """Learned-step quantizer, binary and signed by default: y = a sign(x).

    Forward: y = a round(clip(x/a, lo, hi)), with sign(x) in place of the rounding when lo = -1 and hi = 1.
    Backward: dx = g 1[lo <= x/a <= hi] and
    da = sum((level - (x/a) 1[lo <= x/a <= hi]) g) / sqrt(n hi); with one step per channel the sum runs over the
    channel and n still counts the whole tensor, as released.
    With `gradient="bit"` the scale of the signed binarizer gets the gradient of BiT's released code, which has no
    window: da = sum(sign(x) g) / sqrt(n). With `gradient="sum"` da is not divided (BinaryViT).
    Init: a = 2 mean|x| (signed), 4 mean|x| ({0, 1}), 2 mean|x| / sqrt(hi) (more bits), or the constant `start`.

    References:
        Esser et al., Learned step size quantization, 2020; Liu et al., BiT: Robustly binarized multi-distilled
        transformer, 2022; the official GSB code.
    """

    lo: int = -1
    hi: int = 1
    gradient: str = "official"
    start: float | None = None

    parameters: ClassVar[tuple[str, ...]] = ("scale",)
    floored: ClassVar[bool] = True

    @property
    def by_root(self) -> bool:
        return self.gradient != "sum"

    @property
    def lowest(self) -> int:
        return self.lo

    @property
    def highest(self) -> int:
        return self.hi

    def initial(self, x: Tensor) -> tuple[Tensor, ...]:
        if self.start is not None:
            return (torch.full_like(self._mean(x), self.start),)
        factor = 4.0 if self.lo == 0 else 2.0 / self.hi**0.5
        return ((factor * self._mean(x.abs())).clamp(min=SMALLEST_SCALE),)

    def levels(self, x: Tensor, scale: Tensor) -> Tensor:
        if (self.lo, self.hi) == (-1, 1):
            return sign(x)
        if (self.lo, self.hi) == (0, 1):
            return (x > 0.5 * scale).to(x.dtype)  # round half to even sends 1/2 to 0
        return torch.clamp(x / scale, self.lo, self.hi).round()

    def planes(self, x: Tensor, scale: Tensor) -> list[Plane]:
        return [Plane(self.levels(x, scale), scale)]

    def backward(self, x: Tensor, g: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
        if self.lo == -self.hi:
            outside = x.abs() > self.hi * scale
        else:
            outside = (x < self.lo * scale) | (x > self.hi * scale)
        dx = g.masked_fill(outside, 0.0)
        levels = self.levels(x, scale)
        if scale.dim() == 0:
            level, ramp = torch.dot(levels.flatten(), g.flatten()), torch.dot(x.flatten(), dx.flatten())
        else:
            level, ramp = reduce_to(levels * g, scale.shape), reduce_to(x * dx, scale.shape)
        return dx, *self.parameter_gradients(level, ramp, x.numel(), scale)

    def form(self, *numbers: float) -> Form | None:
        if self.per != "tensor" or self.hi != 1 or self.lo not in (-1, 0):
            return None
        (scale,) = numbers
        threshold = 0.5 * scale if self.lo == 0 else None
        return Form(scale=scale, low=self.lo * scale, high=scale, threshold=threshold)

    def parameter_gradients(self, level: Any, ramp: Any, size: int, *parameters: Any) -> tuple[Any, ...]:
        if self.gradient != "bit" or (self.lo, self.hi) != (-1, 1):
            level = level - ramp / parameters[0]
        return (level if self.gradient == "sum" else level / (max(size, 1) * self.hi) ** 0.5,)


@dataclass(frozen=True)
class Bwn(Rule):
    """Binary weights with a mean-absolute-value factor: y = s sign(W - m), dW = g.

    Attributes:
        scale: s is the mean of |W| over the whole "tensor", over each output "channel", or "none" for 1.
        center: m is the mean of W over the whole "tensor", over each output "channel", or "none" for 0.

    References:
        Rastegari et al., XNOR-Net, 2016; as released with GSB (no clipping; the mean is one per tensor, also where the
        factor is one per channel).
    """

    scale: str = "tensor"
    center: str = "tensor"

    @staticmethod
    def _over(x: Tensor, where: str) -> Tensor:
        return x.mean(-1, keepdim=True) if where == "channel" else x.mean()

    def planes(self, x: Tensor) -> list[Plane]:
        levels = sign(x if self.center == "none" else x - self._over(x, self.center))
        return [Plane(levels, None if self.scale == "none" else self._over(x.abs(), self.scale))]

    def backward(self, x: Tensor, g: Tensor) -> tuple[Tensor, ...]:
        return (g,)
