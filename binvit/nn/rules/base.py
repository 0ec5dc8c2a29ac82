"""What every rule is: planes of small integers with their scales, and the gradients that flow back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

SMALLEST_SCALE = 1e-5


class Plane(NamedTuple):
    """One term `scale * (levels - offset)` of a binarized tensor.

    Attributes:
        levels: integer values stored as floats, of the shape of the input.
        scale: a tensor that broadcasts against `levels`, or None for 1.
        offset: whole numbers that broadcast against `levels`, or None for 0.
        kept: what the rule's `backward_from` starts from, so that a training step computes it once; often nothing.
    """

    levels: Tensor
    scale: Tensor | None
    offset: Tensor | None = None
    kept: tuple[Tensor, ...] = ()

    @property
    def integers(self) -> Tensor:
        """Return levels - offset, of the shape of the levels."""
        return self.levels if self.offset is None else self.levels - self.offset


def superpose(terms: Sequence[Plane]) -> Tensor:
    """Return the sum of scale * (levels - offset) over the planes."""
    total: Any = None
    for plane in terms:
        term = plane.integers if plane.scale is None else plane.integers * plane.scale
        total = term if total is None else total + term
    return total


BELOW_ZERO = -(2.0**-126)  # next to 0, so that x > BELOW_ZERO is x >= 0 but for numbers without weight
BELOW_ONE = 1.0 - 2.0**-24  # the float32 number before 1: |x| < 1 is |x| <= BELOW_ONE


class Form(NamedTuple):
    """What the compiled training step needs to know of a rule that binarizes every number by itself, into one plane.

    With a share, x stands for x minus that share of its row's maximum, and the level at 0 is 1.

    The plane is mean * scale * level(x), with the level 1[x > threshold], or sign(x) without a threshold; the gradient
    is dx = g * mean * gain * slope(x).

    Attributes:
        scale: constant factor of the levels.
        gain: constant factor of the gradient.
        slope: "step" 1[low <= x <= high], "approx" (2 - 2|x|) 1[|x| <= 1] or "ede" k t (1 - tanh^2(t x)), t = high.
        low: lower end of the window.
        high: upper end of the window.
        threshold: above it the level is 1 and elsewhere 0; None for signs.
        mean: mean of |x| over each "row" (last dimension) or "head" (last two) as a further factor, or "none" for 1.
        share: share of the largest value of a row (last dimension).
    """

    scale: float = 1.0
    gain: float = 1.0
    slope: str = "step"
    low: float = -1.0
    high: float = 1.0
    threshold: float | None = None
    mean: str = "none"
    share: float = 0.0


def sign(x: Tensor) -> Tensor:
    """Return +1 where x >= 0 and -1 elsewhere, in the type of x."""
    return (x >= 0).to(x.dtype).mul_(2).sub_(1)  # torch.where with two numbers is several times slower


def reduce_to(x: Tensor, shape: torch.Size) -> Tensor:
    """Sum x over all dimensions along which `shape` was broadcast."""
    return x.sum() if len(shape) == 0 else x.sum_to_size(shape)


@dataclass(frozen=True)
class Rule:
    """How one tensor is binarized.

    Attributes:
        per: what one value of each parameter covers: the whole "tensor", an output "channel" (first dimension of a
            weight) or a "head" of an attention tensor (B, H, N, d).
    """

    per: str = "tensor"

    parameters: ClassVar[tuple[str, ...]] = ()  # names of the tensors that planes() and backward() take after x
    learned: ClassVar[bool] = True  # parameters are trained; False: they are buffers set by a schedule
    by_root: ClassVar[bool] = False  # gradients of the parameters are divided by the root of how many numbers x has
    floored: ClassVar[bool] = False  # parameters are kept above `SMALLEST_SCALE`, which their gradient passes
    lowest: ClassVar[int] = -1  # smallest and largest level
    highest: ClassVar[int] = 1
    groups: ClassVar[int] = 1  # number of planes
    is_float: ClassVar[bool] = False
    by_row: ClassVar[bool] = False  # no parameters, and each row (last dimension) is binarized by itself
    scale_per_token: ClassVar[bool] = False  # scales differ along the tokens, so tokens cannot be summed as integers

    def parameter_shape(self, *, channels: int = 1, heads: int = 1) -> tuple[int, ...]:
        return {"tensor": (), "channel": (channels, 1), "head": (heads, 1, 1)}[self.per]

    def default(self) -> tuple[float, ...]:
        """Return the parameter values of a rule that has not seen data."""
        return (1.0,) * len(self.parameters)

    def initial(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return the parameter values drawn from the first training batch x."""
        return ()

    def first_forward(self, initial: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Return the parameter values that the very first forward pass uses (the official GSB code differs there)."""
        return initial

    def planes(self, x: Tensor, *parameters: Tensor) -> list[Plane]:
        raise NotImplementedError

    def backward(self, x: Tensor, g: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        """Return the gradients to x and to each parameter for the gradient g of the binarized tensor."""
        raise NotImplementedError

    def backward_from(self, kept: Sequence[Tensor], g: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        """Return what `backward` returns, of what a plane of x has kept; for rules whose planes keep something."""
        raise NotImplementedError

    def form(self, *numbers: float) -> Form | None:
        """Return the compiled form for parameters of one value each, None if the rule has none."""
        return None

    def parameter_gradients(self, level: Any, ramp: Any, size: int, *parameters: Any) -> tuple[Any, ...]:
        """Return the gradients of the parameters of a rule with a form.

        Args:
            level: the sum of g level(x).
            ramp: the sum of x dx.
            size: number of elements of x.
            parameters: the parameters.
        """
        return (None,) * len(parameters)

    def _mean(self, x: Tensor) -> Tensor:
        """Return the mean of x over everything that shares one parameter value, in the parameter's shape."""
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
