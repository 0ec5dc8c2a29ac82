"""Binarization rules: what each binarizer computes, forward and backward, written once as plain tensor formulas.

A rule is a small frozen record without tensors. It turns a tensor `x` into *planes*, pairs of small integer levels
and a scale, whose sum `scale * levels` is what the network computes with, and it knows the gradient that flows back
to `x` and to the rule's parameters. `binvit.nn.products` makes autograd functions of rules, `binvit.nn.layers`
makes layers of them, `binvit.packed` reads the same levels and scales to fold a trained layer into bits.

Notation in the docstrings: g is the gradient with respect to the binarized tensor, 1[.] an indicator, n the number of
elements, a the scale. sign(0) = +1 everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

SMALLEST_SCALE = 1e-5


class Plane(NamedTuple):
    """One term `scale * (levels - offset)` of a binarized tensor.

    Attributes:
        levels: Integer values stored as floats, of the shape of the input.
        scale: A tensor that broadcasts against `levels`, or None for 1.
        offset: Whole numbers that broadcast against `levels`, or None for 0.
    """

    levels: Tensor
    scale: Tensor | None
    offset: Tensor | None = None

    @property
    def integers(self) -> Tensor:
        """Return levels - offset, of the shape of the levels."""
        return self.levels if self.offset is None else self.levels - self.offset


def sign(x: Tensor) -> Tensor:
    """Return +1 where x >= 0 and -1 elsewhere, in the type of x."""
    return torch.where(x >= 0, 1.0, -1.0).to(x.dtype)


def reduce_to(x: Tensor, shape: torch.Size) -> Tensor:
    """Sum x over all dimensions along which `shape` was broadcast."""
    return x.sum() if len(shape) == 0 else x.sum_to_size(shape)


@dataclass(frozen=True)
class Rule:
    """How one tensor is binarized.

    Attributes:
        per: What one value of each parameter covers: the whole "tensor", an output "channel" (first dimension of a
            weight) or a "head" of an attention tensor (B, H, N, d).
    """

    per: str = "tensor"

    parameters: ClassVar[tuple[str, ...]] = ()  # names of the tensors that planes() and backward() take after x
    learned: ClassVar[bool] = True  # parameters are trained; False: they are buffers set by a schedule
    floored: ClassVar[bool] = False  # parameters are kept above `SMALLEST_SCALE`, which their gradient passes
    lowest: ClassVar[int] = -1  # smallest and largest level
    highest: ClassVar[int] = 1
    groups: ClassVar[int] = 1  # number of planes
    is_float: ClassVar[bool] = False
    scale_per_token: ClassVar[bool] = False  # scales differ along the tokens, so tokens cannot be summed as integers

    def parameter_shape(self, *, channels: int = 1, heads: int = 1) -> tuple[int, ...]:
        return {"tensor": (), "channel": (channels, 1), "head": (heads, 1, 1)}[self.per]

    def default(self) -> tuple[float, ...]:
        """Parameter values of a rule that has not seen data."""
        return (1.0,) * len(self.parameters)

    def initial(self, x: Tensor) -> tuple[Tensor, ...]:
        """Parameter values drawn from the first training batch x."""
        return ()

    def first_forward(self, initial: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Parameter values that the very first forward pass uses (the official GSB code differs there)."""
        return initial

    def planes(self, x: Tensor, *parameters: Tensor) -> list[Plane]:
        raise NotImplementedError

    def backward(self, x: Tensor, g: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        """Return the gradients to x and to each parameter for the gradient g of the binarized tensor."""
        raise NotImplementedError

    def _mean(self, x: Tensor) -> Tensor:
        """Mean of x over everything that shares one parameter value, in the parameter's shape."""
        if self.per == "tensor":
            return x.mean()
        if self.per == "channel":
            return x.flatten(1).mean(1, keepdim=True)
        return x.mean((0, 2, 3)).view(-1, 1, 1)


@dataclass(frozen=True)
class Float(Rule):
    """Leave the tensor as it is: y = x, dx = g."""

    is_float: ClassVar[bool] = True

    def planes(self, x: Tensor) -> list[Plane]:
        return [Plane(x, None)]

    def backward(self, x: Tensor, g: Tensor) -> tuple[Tensor, ...]:
        return (g,)


@dataclass(frozen=True)
class Sign(Rule):
    """Sign with an optional data-dependent factor: y = s sign(x), s = 1 or a mean of |x|.

    Backward: dx = g s w(x), with the window w and the factor's part in the gradient as the fields say; n is the length
    of the last dimension.

    Attributes:
        scale: "none", "row" (mean over the last dimension: fan-in of a weight row, or the features of one token),
            "head" (mean over tokens and channels of one head of one image); of x itself, also where it is centred.
        window: "closed" 1[|x| <= 1] (Hubara et al. 2016), "open" 1[|x| < 1], "approx" (2 - 2|x|) 1[|x| <= 1] (Liu et
            al. 2018) or "through" 1.
        center: The sign is that of c = x - mean over the last dimension, whose gradient h gives dx = h - mean h.
        factor: How s enters the gradient: "constant" dx = g s w; "bare" dx = g w, as Bi-Real Net, ReActNet, BiBERT and
            BinaryViT do for their weights; "exact" dx = g s w + sign(x)/n sum(sign(x) g), the derivative of a mean
            over the row, here that of |c|; "xnor" dx = g (s w + 1/n)(1 - 1/n), the released code of XNOR-Net.
    """

    scale: str = "none"
    window: str = "closed"
    center: bool = False
    factor: str = "constant"

    @property
    def scale_per_token(self) -> bool:  # type: ignore[override]
        return self.scale == "row"

    def _scale(self, x: Tensor) -> Tensor | None:
        if self.scale == "none":
            return None
        x = centred(x) if self.center and self.factor == "exact" else x
        return x.abs().mean(-1 if self.scale == "row" else (-2, -1), keepdim=True)

    def planes(self, x: Tensor) -> list[Plane]:
        return [Plane(sign(centred(x) if self.center else x), self._scale(x))]

    def backward(self, x: Tensor, g: Tensor) -> tuple[Tensor, ...]:
        c, n = centred(x) if self.center else x, x.shape[-1]
        slope = window(c, self.window)
        scale = None if self.factor == "bare" else self._scale(x)
        if self.factor == "xnor" and scale is not None:
            return (g * (scale * slope + 1 / n) * (1 - 1 / n),)
        dx = g * slope if scale is None else g * slope * scale
        if self.factor == "exact" and scale is not None:
            levels = sign(c)
            dx = dx + levels * (levels * g).mean(-1, keepdim=True)
        return (centred(dx) if self.center else dx,)


def centred(x: Tensor) -> Tensor:
    """Return x minus its mean over the last dimension; the gradient through it is the same operation."""
    return x - x.mean(-1, keepdim=True)


def window(x: Tensor, kind: str) -> Tensor:
    """Return the slope used for sign(x): 1[|x| < 1], 1[|x| <= 1], (2 - 2|x|) 1[|x| <= 1] or 1; see `Sign`."""
    if kind == "through":
        return torch.ones_like(x)
    size = x.abs()
    if kind == "approx":
        return (2 - 2 * size) * (size <= 1)
    return (size < 1 if kind == "open" else size <= 1).to(x.dtype)


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
    def lowest(self) -> int:  # type: ignore[override]
        return self.lo

    @property
    def highest(self) -> int:  # type: ignore[override]
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
        bit = self.gradient == "bit" and (self.lo, self.hi) == (-1, 1)
        if scale.dim() == 0:
            dscale = torch.dot(levels.flatten(), g.flatten())
            dscale = dscale if bit else dscale - torch.dot(x.flatten(), dx.flatten()) / scale
        else:
            dscale = reduce_to(levels * g, scale.shape)
            dscale = dscale if bit else dscale - reduce_to(x * dx, scale.shape) / scale
        return dx, dscale if self.gradient == "sum" else dscale / (max(x.numel(), 1) * self.hi) ** 0.5


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


@dataclass(frozen=True)
class LearnedOutput(Rule):
    """XNOR-Net++'s learned factor: y = c sign(x), one c per output channel of a weight (or per tensor), init 1.

    Backward: dx = g c 1[|x| < 1], dc = sum of g sign(x) over what shares the c.

    References:
        Bulat and Tzimiropoulos, XNOR-Net++, 2019.
    """

    per: str = "channel"

    parameters: ClassVar[tuple[str, ...]] = ("scale",)

    def initial(self, x: Tensor) -> tuple[Tensor, ...]:
        shape = self.parameter_shape(channels=x.shape[0], heads=x.shape[1])
        return (torch.ones(shape, dtype=x.dtype, device=x.device),)

    def planes(self, x: Tensor, scale: Tensor) -> list[Plane]:
        return [Plane(sign(x), scale)]

    def backward(self, x: Tensor, g: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
        return g * scale * window(x, "open"), reduce_to(g * sign(x), scale.shape)


@dataclass(frozen=True)
class LearnedRow(Rule):
    """BiViT's weights: y = a sign(c), c = W minus its row's mean, one learned a per row.

    Backward: dc = a g 1[|c| < 1], dW = dc minus its row's mean, da = sum of g sign(c) over the row. Init: the row's
    mean of |W|, before the centring.

    References:
        He et al., BiViT: Extremely compressed binary vision transformer, 2023, arXiv 2211.07091, and its code.
    """

    per: str = "channel"

    parameters: ClassVar[tuple[str, ...]] = ("scale",)

    def initial(self, x: Tensor) -> tuple[Tensor, ...]:
        return (x.abs().mean(-1, keepdim=True),)

    def planes(self, x: Tensor, scale: Tensor) -> list[Plane]:
        return [Plane(sign(centred(x)), scale)]

    def backward(self, x: Tensor, g: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
        c = centred(x)
        return centred(g * scale * window(c, "open")), reduce_to(g * sign(c), scale.shape)


@dataclass(frozen=True)
class Ede(Rule):
    """IR-Net's error decay estimator: y = s sign(x), dx = g s k t (1 - tanh^2(t x)), k = max(1/t, 1).

    t grows from 1e-3 to 10 on a log scale over training (`progress`). With `standardize` (weights) x is replaced by
    (W - mean)/std per row, through which the gradient flows, and s = 2^round(log2 mean|x|) per row; otherwise s = 1.

    References:
        Qin et al., Forward and backward information retention for accurate binary neural networks, 2020.
    """

    standardize: bool = False

    parameters: ClassVar[tuple[str, ...]] = ("sharpness",)
    learned: ClassVar[bool] = False

    @staticmethod
    def progress(done: float) -> float:
        """Sharpness t after the share `done` (0 to 1) of training."""
        return 10.0 ** (-3.0 + 4.0 * done)

    def default(self) -> tuple[float, ...]:
        return (self.progress(0.0),)

    @staticmethod
    def slope(x: Tensor, sharpness: Tensor) -> Tensor:
        """Derivative that the estimator uses for sign(x)."""
        return torch.clamp(1 / sharpness, min=1.0) * sharpness * (1 - torch.tanh(sharpness * x) ** 2)

    @staticmethod
    def _standard(x: Tensor) -> tuple[Tensor, Tensor]:
        centred = x - x.mean(-1, keepdim=True)
        std = centred.std(-1, keepdim=True).clamp(min=1e-12)
        return centred / std, std

    @staticmethod
    def _scale(standard: Tensor) -> Tensor:
        return 2.0 ** standard.abs().mean(-1, keepdim=True).log2().round()

    def planes(self, x: Tensor, sharpness: Tensor) -> list[Plane]:
        if not self.standardize:
            return [Plane(sign(x), None)]
        standard, _ = self._standard(x)
        return [Plane(sign(standard), self._scale(standard))]

    def backward(self, x: Tensor, g: Tensor, sharpness: Tensor) -> tuple[Tensor, ...]:
        if not self.standardize:
            return g * self.slope(x, sharpness), None
        standard, std = self._standard(x)
        d = g * self._scale(standard) * self.slope(standard, sharpness)
        # Through (W - mean)/std with the unbiased std: remove the mean and the part along the standardized row.
        along = (d * standard).sum(-1, keepdim=True) / (x.shape[-1] - 1)
        return (d - d.mean(-1, keepdim=True) - standard * along) / std, None
