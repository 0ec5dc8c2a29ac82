"""Parts that a scheme names for its blocks: norms, own inputs, activations and scales around 1-bit layers, branches."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from binvit.nn.fused import elementwise
from binvit.nn.fused.ends import End, layer_end

LAYER_ACTIVATIONS = ("none", "clip", "rprelu")
BRANCHES = ("none", "pool", "shift")


def clip(x: Tensor, limit: float = 1.0) -> Tensor:
    """Return x clipped to [-limit, limit], with the gradient g 1[|x| < limit]: none at the bounds, unlike a clamp's."""
    return F.hardtanh(x, -limit, limit)


class RPReLU(nn.Module):
    """ReActNet's activation: y = PReLU_c(x + m1_c) + m2_c, one slope and two shifts per channel.

    At exactly 0 the slope is the negative one.

    Args:
        channels: size of the last dimension.

    References:
        Liu et al., ReActNet, 2020. BinaryViT's code subtracts m1: the same function, the other sign of the parameter.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.shift_in = nn.Parameter(torch.zeros(channels, dtype=torch.float32))
        self.shift_out = nn.Parameter(torch.zeros(channels, dtype=torch.float32))
        self.slope = nn.Parameter(torch.full((channels,), 0.25, dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        """Map x (..., channels) to the same shape."""
        moved = x + self.shift_in
        return torch.where(moved > 0, moved, self.slope * moved) + self.shift_out


class ChannelScale(nn.Module):
    """BinaryViT's LayerScale: y = x alpha_c + beta_c, beta 0 at the start.

    Args:
        channels: size of the last dimension.
        start: alpha at the start.

    References:
        Le and Li, BinaryViT: Pushing binary vision transformers towards convolutional models, 2023.
    """

    def __init__(self, channels: int, start: float = 0.1) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.full((channels,), start, dtype=torch.float32))
        self.beta = nn.Parameter(torch.zeros(channels, dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        """Map x (..., channels) to the same shape."""
        return x * self.alpha + self.beta


class PartNorm(nn.Module):
    """LayerNorm of equal parts of the last dimension, each on its own: of query, key and value.

    The mean is taken off before anything is scaled, as in the compiled training step: a sum of signs that equals its
    mean is exactly 0 in both. torch's kernel gives such a tie some -2e-8, and the sign behind it another value.

    Args:
        channels: size of the last dimension.
        parts: number of parts.
    """

    def __init__(self, channels: int, parts: int = 1) -> None:
        super().__init__()
        self.parts, self.eps = parts, 1e-5
        self.weight = nn.Parameter(torch.ones(channels, dtype=torch.float32))
        self.bias = nn.Parameter(torch.zeros(channels, dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        """Map x (..., channels) to the same shape."""
        parts = x.unflatten(-1, (self.parts, -1))
        centred = parts - parts.mean(-1, keepdim=True)
        deviation = (centred.square().mean(-1, keepdim=True) + self.eps).rsqrt()
        return (centred * deviation).flatten(-2) * self.weight + self.bias


class LayerEnd(nn.Module):
    """What follows a 1-bit product, in this order; every part can be absent.

    A learned factor per output, a norm, the addition of the layer's own input, an activation, a `ChannelScale`. An own
    input that is narrower than the output is repeated side by side, a wider one averaged over neighbouring features.

    Args:
        in_features: width of the layer's input.
        out_features: width of its output.
        parts: the norm is of so many equal parts, each on its own.
        factor: multiply by a learned factor per output, 1 at the start (XNOR-Net++).
        norm: normalize the output.
        own_input: add the layer's own input.
        activation: "none", "clip" to [-1, 1] or "rprelu".
        scale: end with a `ChannelScale`.

    Raises:
        ValueError: if the own input is to be added and neither width divides the other.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        parts: int = 1,
        factor: bool = False,
        norm: bool = False,
        own_input: bool = False,
        activation: str = "none",
        scale: bool = False,
    ) -> None:
        super().__init__()
        if own_input and in_features % out_features and out_features % in_features:
            raise ValueError(
                "A layer's own input can be added where one of its widths divides the other, got "
                f"{in_features} and {out_features}."
            )
        self.out_features, self.own_input = out_features, own_input
        self.factor = nn.Parameter(torch.ones(out_features, dtype=torch.float32)) if factor else None
        self.norm = PartNorm(out_features, parts) if norm else None
        self.activation = RPReLU(out_features) if activation == "rprelu" else None
        self.clips = activation == "clip"
        self.scale = ChannelScale(out_features) if scale else None

    def fit(self, x: Tensor) -> Tensor:
        """Bring the layer's own input (..., in_features) to its output's width."""
        width = x.shape[-1]
        if width > self.out_features:
            return x.unflatten(-1, (self.out_features, width // self.out_features)).mean(-1)
        return x if width == self.out_features else torch.cat([x] * (self.out_features // width), dim=-1)

    @property
    def kind(self) -> End:
        """The end as the compiled training step takes it."""
        norm = self.norm
        activation = "rprelu" if self.activation is not None else "clip" if self.clips else "none"
        return End(0 if norm is None else norm.parts, 0.0 if norm is None else norm.eps, activation)

    @property
    def vectors(self) -> list[Tensor | None]:
        """The end's eight parameters as the compiled training step takes them, each (out_features,) or None."""
        norm, act, scale = self.norm, self.activation, self.scale
        vectors: list[Tensor | None] = [self.factor]
        vectors += [None, None] if norm is None else [norm.weight, norm.bias]
        vectors += [None] * 3 if act is None else [act.shift_in, act.slope, act.shift_out]
        return vectors + ([None, None] if scale is None else [scale.alpha, scale.beta])

    def is_compiled(self, *tensors: Tensor | None) -> bool:
        """Tell whether the compiled training step computes this end for such tensors."""
        known = self.norm is None or type(self.norm) is PartNorm
        return self.training and known and elementwise.usable(*tensors)

    def forward(self, y: Tensor, x: Tensor | None = None) -> Tensor:
        """Map a product (..., out_features) and the layer's input x (..., in_features) to (..., out_features)."""
        own = x if self.own_input else None
        if self.is_compiled(y, own):
            return layer_end(y, own, self.kind, self.vectors)
        if self.factor is not None:
            y = y * self.factor
        if self.norm is not None:
            y = self.norm(y)
        if self.own_input and x is not None:
            y = y + self.fit(x)
        if self.clips:
            y = clip(y)
        if self.activation is not None:
            y = self.activation(y)
        return y if self.scale is None else self.scale(y)

    def extra_repr(self) -> str:
        return f"own_input={self.own_input}, clips={self.clips}"


class Branches(nn.Module):
    """Token-mixing branches beside the MLP: sum of ChannelScale(mix(x)) over the sizes 3 and 5, alpha 0 at the start.

    Kind "pool" (BinaryViT): mix is the average over so many neighbours along one axis of the patches' grid, zero-padded
    and divided by the full size. Kind "shift" (BHViT): the mean of the circular shifts along one axis, and for each
    size one mix that shifts the four quarters of the channels down, up, right and left.

    Args:
        kind: "pool" or "shift".
        channels: width of a token.
        grid: patches along height and width.

    References:
        Le and Li, BinaryViT, 2023; Gao et al., BHViT: Binarized hybrid vision transformer, 2025.
    """

    SIZES = (3, 5)

    def __init__(self, kind: str, channels: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.kind, self.grid = kind, tuple(grid)
        count = len(self.SIZES) * (2 if kind == "pool" else 3)
        self.scales = nn.ModuleList(ChannelScale(channels, 0.0) for _ in range(count))

    def mixes(self, x: Tensor) -> list[Tensor]:
        """Return the mixed maps of x (B, C, H, W): per size along the width, along the height and by quarters."""
        mixed = []
        for size in self.SIZES:
            reach = size // 2
            if self.kind == "pool":
                mixed.append(F.avg_pool2d(x, (1, size), stride=1, padding=(0, reach)))
                mixed.append(F.avg_pool2d(x, (size, 1), stride=1, padding=(reach, 0)))
                continue
            for axis in (3, 2):
                shifted = [x.roll(step, axis) for step in range(-reach, reach + 1)]
                mixed.append(torch.stack(shifted).mean(0))
            moves = ((reach, 2), (-reach, 2), (reach, 3), (-reach, 3))  # down, up, right, left
            quarters = [q.roll(*move) for q, move in zip(x.chunk(4, 1), moves, strict=True)]
            mixed.append(torch.cat(quarters, 1))
        return mixed

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens (B, H * W, C) to the same shape.

        Raises:
            ValueError: if the tokens are not the grid's.
        """
        if x.shape[1] != self.grid[0] * self.grid[1]:
            raise ValueError(
                f"The branches are for a grid of {self.grid[0]} x {self.grid[1]}, got {x.shape[1]} tokens."
            )
        map_ = x.mT.unflatten(2, self.grid)
        mixed = [scale(m.flatten(2).mT) for scale, m in zip(self.scales, self.mixes(map_), strict=True)]
        return torch.stack(mixed).sum(0)

    def extra_repr(self) -> str:
        return f"{self.kind}, {self.grid}"
