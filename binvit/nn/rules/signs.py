"""Signs: with a factor that is constant, learned or averaged, and with a gradient that a schedule sharpens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from binvit.nn.rules.base import BELOW_ONE, Form, Plane, Rule, reduce_to, sign


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
        center: the sign is that of c = x - mean over the last dimension, whose gradient h gives dx = h - mean h.
        factor: how s enters the gradient: "constant" dx = g s w; "bare" dx = g w, as Bi-Real Net, ReActNet, BiBERT and
            BinaryViT do for their weights; "exact" dx = g s w + sign(x)/n sum(sign(x) g), the derivative of a mean
            over the row, here that of |c|; "xnor" dx = g (s w + 1/n)(1 - 1/n), the released code of XNOR-Net.
    """

    scale: str = "none"
    window: str = "closed"
    center: bool = False
    factor: str = "constant"

    @property
    def scale_per_token(self) -> bool:
        return self.scale == "row"

    @property
    def by_row(self) -> bool:
        return self.scale != "head"

    def _scale(self, x: Tensor, c: Tensor) -> Tensor | None:
        if self.scale == "none":
            return None
        return (c if self.factor == "exact" else x).abs().mean(-1 if self.scale == "row" else (-2, -1), keepdim=True)

    def planes(self, x: Tensor) -> list[Plane]:
        c = centred(x) if self.center else x
        scale = self._scale(x, c)
        kept = (c,) if scale is None or self.factor == "bare" else (c, scale)
        return [Plane(sign(c), scale, kept=kept)]

    def backward(self, x: Tensor, g: Tensor) -> tuple[Tensor, ...]:
        c = centred(x) if self.center else x
        scale = None if self.factor == "bare" else self._scale(x, c)
        return self.backward_from((c,) if scale is None else (c, scale), g)

    def backward_from(self, kept: Sequence[Tensor], g: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        (c, *scales), n = kept, g.shape[-1]
        scale = scales[0] if scales else None
        slope = window(c, self.window)
        if self.factor == "xnor" and scale is not None:
            return (g * (scale * slope + 1 / n) * (1 - 1 / n),)
        dx = g * slope if scale is None else g * slope * scale
        if self.factor == "exact" and scale is not None:
            levels = sign(c)
            dx = dx + levels * (levels * g).mean(-1, keepdim=True)
        return (centred(dx) if self.center else dx,)

    def form(self, *numbers: float) -> Form | None:
        if self.center or (self.scale != "none" and self.factor != "constant"):
            return None
        if self.window == "approx":
            return Form(slope="approx", mean=self.scale)
        high = {"open": BELOW_ONE, "closed": 1.0, "through": math.inf}[self.window]
        return Form(low=-high, high=high, mean=self.scale)


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

    def form(self, *numbers: float) -> Form | None:
        if self.per != "tensor":
            return None
        return Form(scale=numbers[0], gain=numbers[0], low=-BELOW_ONE, high=BELOW_ONE)

    def parameter_gradients(self, level: Any, ramp: Any, size: int, *parameters: Any) -> tuple[Any, ...]:
        return (level,)


@dataclass(frozen=True)
class LearnedRow(Rule):
    """BiViT's weights: y = a sign(c), c = W minus its row's mean (W itself unless `center`), one learned a per row.

    Backward: dc = a g 1[|c| < 1], dW = dc minus its row's mean (dc itself unless `center`), da = sum of g sign(c) over
    the row. Init: the row's mean of |W|, before the centring.

    References:
        He et al., BiViT: Extremely compressed binary vision transformer, 2023, arXiv 2211.07091, and its code.
    """

    per: str = "channel"
    center: bool = True

    parameters: ClassVar[tuple[str, ...]] = ("scale",)

    def initial(self, x: Tensor) -> tuple[Tensor, ...]:
        return (x.abs().mean(-1, keepdim=True),)

    def planes(self, x: Tensor, scale: Tensor) -> list[Plane]:
        c = centred(x) if self.center else x
        return [Plane(sign(c), scale, kept=(c,))]

    def backward(self, x: Tensor, g: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
        return self.backward_from((centred(x) if self.center else x,), g, scale)

    def backward_from(self, kept: Sequence[Tensor], g: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        (c,), (scale,) = kept, parameters
        dc = g * scale * window(c, "open")
        return centred(dc) if self.center else dc, reduce_to(g * sign(c), scale.shape)


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
        """Return the sharpness t after the share `done` (0 to 1) of training."""
        return 10.0 ** (-3.0 + 4.0 * done)

    def default(self) -> tuple[float, ...]:
        return (self.progress(0.0),)

    @staticmethod
    def slope(x: Tensor, sharpness: Tensor) -> Tensor:
        """Return the derivative that the estimator uses for sign(x)."""
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
        standard, std = self._standard(x)
        scale = self._scale(standard)
        return [Plane(sign(standard), scale, kept=(standard, std, scale))]

    def backward(self, x: Tensor, g: Tensor, sharpness: Tensor) -> tuple[Any, ...]:
        if not self.standardize:
            return g * self.slope(x, sharpness), None
        standard, std = self._standard(x)
        return self.backward_from((standard, std, self._scale(standard)), g, sharpness)

    def backward_from(self, kept: Sequence[Tensor], g: Tensor, *parameters: Tensor) -> tuple[Any, ...]:
        (standard, std, scale), (sharpness,) = kept, parameters
        d = g * scale * self.slope(standard, sharpness)
        # Through (W - mean)/std with the unbiased std: remove the mean and the part along the standardized row.
        along = (d * standard).sum(-1, keepdim=True) / (g.shape[-1] - 1)
        return (d - d.mean(-1, keepdim=True) - standard * along) / std, None

    def form(self, *numbers: float) -> Form | None:
        return None if self.standardize else Form(slope="ede", high=numbers[0])
