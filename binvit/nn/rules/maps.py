"""Rules of the attention map (B, H, N, N), and of attention tensors with parameters per head."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from binvit.nn.rules.base import BELOW_ONE, BELOW_ZERO, SMALLEST_SCALE, Form, Plane, Rule, reduce_to, sign
from binvit.nn.rules.signs import Ede, window


@dataclass(frozen=True)
class MapThreshold(Rule):
    """Keep the large entries of each row: y = s 1[A >= share * max of the row].

    s is 1 or, with `mean_scale`, the mean of A over the kept entries of the row, a constant for the gradient. The
    mean is taken per row (a choice of this project) so that no image depends on another. Backward: dA = s g w(A -
    share max), with a window w of `binvit.nn.rules.Sign`.

    References:
        The threshold of He et al., BiViT, 2023 (share 0.25). CNN binarizers define no rule for attention maps: share
        0.5 is this project's choice for them.
    """

    share: float = 0.5
    mean_scale: bool = False
    window: str = "through"

    lowest: ClassVar[int] = 0

    def _threshold(self, x: Tensor) -> Tensor:
        return self.share * x.amax(-1, keepdim=True)

    def planes(self, x: Tensor) -> list[Plane]:
        keep = (x >= self._threshold(x)).to(x.dtype)
        return [Plane(keep, self._mean_kept(x, keep) if self.mean_scale else None)]

    @staticmethod
    def _mean_kept(x: Tensor, keep: Tensor) -> Tensor:
        return (x * keep).sum(-1, keepdim=True) / keep.sum(-1, keepdim=True).clamp(min=1)

    def backward(self, x: Tensor, g: Tensor) -> tuple[Tensor, ...]:
        dx = g if self.window == "through" else g * window(x - self._threshold(x), self.window)
        if self.mean_scale:
            dx = dx * self._mean_kept(x, (x >= self._threshold(x)).to(x.dtype))
        return (dx,)

    def form(self, *numbers: float) -> Form | None:
        high = {"open": BELOW_ONE, "closed": 1.0, "approx": 1.0, "through": math.inf}[self.window]
        slope = "approx" if self.window == "approx" else "step"
        form = Form(slope=slope, low=-high, high=high, threshold=BELOW_ZERO, share=self.share)
        return None if self.mean_scale else form


@dataclass(frozen=True)
class MapEde(MapThreshold):
    """`MapThreshold` with IR-Net's gradient at the distance d from the threshold, dA = g k t (1 - tanh^2(t d))."""

    parameters: ClassVar[tuple[str, ...]] = ("sharpness",)
    learned: ClassVar[bool] = False

    def default(self) -> tuple[float, ...]:
        return (self.progress(0.0),)

    @staticmethod
    def progress(done: float) -> float:
        """Return the sharpness t after the share `done` (0 to 1) of training."""
        return Ede.progress(done)

    def planes(self, x: Tensor, sharpness: Tensor) -> list[Plane]:
        return super().planes(x)

    def backward(self, x: Tensor, g: Tensor, sharpness: Tensor) -> tuple[Tensor, None]:
        return g * Ede.slope(x - self._threshold(x), sharpness), None

    def form(self, *numbers: float) -> Form | None:
        return Form(slope="ede", high=numbers[0], threshold=BELOW_ZERO, share=self.share)


@dataclass(frozen=True)
class MapLearned(MapThreshold):
    """The map of `MapThreshold` times one learned factor c, init 1: dA = g c, dc = sum of g over the kept entries.

    References:
        Bulat and Tzimiropoulos, XNOR-Net++, 2019, whose factor belongs to the output of a product.
    """

    parameters: ClassVar[tuple[str, ...]] = ("scale",)

    def initial(self, x: Tensor) -> tuple[Tensor, ...]:
        return (x.new_ones(()),)

    def planes(self, x: Tensor, scale: Tensor) -> list[Plane]:
        return [Plane((x >= self._threshold(x)).to(x.dtype), scale)]

    def backward(self, x: Tensor, g: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
        return g * scale, (g * (x >= self._threshold(x))).sum()

    def form(self, *numbers: float) -> Form | None:
        form = super().form()
        return None if form is None else form._replace(scale=numbers[0], gain=numbers[0])

    def parameter_gradients(self, level: Any, ramp: Any, size: int, *parameters: Any) -> tuple[Any, ...]:
        return (level,)


@dataclass(frozen=True)
class HeadSign(Rule):
    """Bi-ViT's binarizer with a step and an offset per head: y = a (sign u - r), with u = x/a + r and r = round(z).

    Backward with w = 1[|u| <= 1], sums over the head and n over the whole tensor: dx = g w,
    da = sum(g (sign u - r - w x/a)) / sqrt(n), dz = a sum(g (w - 1)) / sqrt(n). Init, one value for all heads:
    a = 2 mean|x|, z = 0.1 (min x + a). A map, which is not negative, starts constant by that; heads tell keys apart
    once their z has fallen below -1/2.

    References:
        Li et al., Bi-ViT: Pushing the limit of vision transformer quantization, 2024, and its code, which keeps a above
        no floor; here only the first value is kept above the smallest scale.
    """

    per: str = "head"

    parameters: ClassVar[tuple[str, ...]] = ("scale", "offset")
    by_root: ClassVar[bool] = True

    def default(self) -> tuple[float, ...]:
        return (1.0, 0.0)

    def initial(self, x: Tensor) -> tuple[Tensor, ...]:
        scale = (2 * x.abs().mean()).clamp(min=SMALLEST_SCALE)
        shape = self.parameter_shape(heads=x.shape[1])
        return scale.expand(shape), (0.1 * (x.min() + scale)).expand(shape)

    def planes(self, x: Tensor, scale: Tensor, offset: Tensor) -> list[Plane]:
        whole = offset.round()
        return [Plane(sign(x / scale + whole), scale, whole)]

    def backward(self, x: Tensor, g: Tensor, scale: Tensor, offset: Tensor) -> tuple[Tensor, ...]:
        whole, ratio = offset.round(), x / scale
        moved = ratio + whole
        through = g * (moved.abs() <= 1)
        root = max(x.numel(), 1) ** 0.5
        dscale = reduce_to(g * (sign(moved) - whole) - through * ratio, scale.shape)
        return through, dscale / root, scale * reduce_to(through - g, scale.shape) / root


@dataclass(frozen=True)
class ThreeMaps(Rule):
    """BHViT's quantization decomposition: y = a sum over s = 1, 2, 3 of 1[r >= s], r = round(3 A/a + z) per head.

    Backward with w = 1[0 <= r <= 3], G = H/sqrt(3 n) for H heads, sums over the head: dA = 3 g w,
    da = G sum(g (clip(r, 0, 3) - w 3 A/a)), dz = a G sum(g w). Init: a = 2 mean(3 A)/sqrt 3, z = 0.1 min(3 A).

    References:
        Gao et al., BHViT: Binarized hybrid vision transformer, 2025, and its official code; z is not subtracted again.
    """

    per: str = "head"

    parameters: ClassVar[tuple[str, ...]] = ("scale", "offset")
    by_root: ClassVar[bool] = True
    lowest: ClassVar[int] = 0
    groups: ClassVar[int] = 3

    def default(self) -> tuple[float, ...]:
        return (1.0, 0.0)

    def initial(self, x: Tensor) -> tuple[Tensor, ...]:
        scale = 2 * self._mean(3 * x) / 3**0.5
        return scale.clamp(min=SMALLEST_SCALE), 0.1 * (3 * x).amin((0, 2, 3)).view(-1, 1, 1)

    @staticmethod
    def rounded(x: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
        """Return the level of each entry before it is clipped to 0, ..., 3."""
        return (3 * x / scale + offset).round()

    def planes(self, x: Tensor, scale: Tensor, offset: Tensor) -> list[Plane]:
        rounded = self.rounded(x, scale, offset)
        return [Plane((rounded >= s).to(x.dtype), scale) for s in (1, 2, 3)]

    def backward(self, x: Tensor, g: Tensor, scale: Tensor, offset: Tensor) -> tuple[Tensor, ...]:
        rounded = self.rounded(x, scale, offset)
        through = g * ((rounded >= 0) & (rounded <= 3))
        share = x.shape[1] / max(3 * x.numel(), 1) ** 0.5
        dscale = reduce_to(g * rounded.clamp(0, 3) - through * 3 * x / scale, scale.shape)
        return 3 * through, share * dscale, share * scale * reduce_to(through, scale.shape)


@dataclass(frozen=True)
class ScoreSign(Rule):
    """BiBERT's map on the raw scores S, no softmax: y = 1[S > 0], dS = g 1[|S| < 1].

    References:
        Qin et al., BiBERT: Accurate fully binarized BERT, 2022.
    """

    lowest: ClassVar[int] = 0

    def planes(self, x: Tensor) -> list[Plane]:
        return [Plane((x > 0).to(x.dtype), None)]

    def backward(self, x: Tensor, g: Tensor) -> tuple[Tensor, ...]:
        return (g * (x.abs() < 1),)

    def form(self, *numbers: float) -> Form | None:
        return Form(low=-BELOW_ONE, high=BELOW_ONE, threshold=0.0)
