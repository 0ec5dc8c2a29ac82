"""What a packed file's header says about the model besides its scheme: the transformer's shape, and the model card."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field, Strict
from torch import Tensor

from binvit.config import Config, Number, Switch, Text

# The limits keep a damaged file from filling the memory.
_MOST_PATCHES = 2**14
_Side = Annotated[int, Strict(), Field(ge=1, le=2**14)]
_Count = Annotated[int, Strict(), Field(ge=0, le=2**10)]


class Vit(Config):
    """Arguments of timm's `VisionTransformer`, and what rebuilds its parts."""

    distilled: Switch
    """Whether there are a distillation token and a second head."""
    img_size: tuple[_Side, _Side]
    """Height and width of an image, pixels."""
    patch_size: tuple[_Side, _Side]
    """Height and width of a patch, pixels."""
    in_chans: Annotated[int, Strict(), Field(ge=1, le=2**10)]
    """Channels of an image."""
    num_classes: Annotated[int, Strict(), Field(ge=0, le=2**20)]
    """Outputs of each head; 0 for none."""
    global_pool: Literal["", "avg", "avgmax", "max", "token", "map", "prr"]
    """What the head reads."""
    embed_dim: Annotated[int, Strict(), Field(ge=1, le=2**16)]
    """Width of a token."""
    depth: Annotated[int, Strict(), Field(ge=1, le=2**10)]
    """Number of blocks."""
    num_heads: Annotated[int, Strict(), Field(ge=1, le=2**16)]
    """Attention heads of a block."""
    mlp_ratio: Annotated[Number, Field(gt=0, le=2**10)]
    """Width of the hidden layer as a multiple of the token's."""
    qkv_bias: Switch
    qk_norm: Switch
    scale_attn_norm: Switch
    scale_mlp_norm: Switch
    proj_bias: Switch
    init_values: Number | None
    """A number if there is layer scale."""
    class_token: Switch
    pos_embed: Literal["none", "learn"]
    no_embed_class: Switch
    reg_tokens: _Count
    """Number of register tokens."""
    pre_norm: Switch
    final_norm: Switch
    fc_norm: Switch
    pool_include_prefix: Switch
    norm: Literal["LayerNorm", "LayerNormFp32", "RmsNorm", "RmsNormFp32", "torch.LayerNorm"]
    """Class of the norms, timm's or torch's."""
    epsilon: Annotated[Number, Field(ge=0, le=1)]
    """Of the norms."""
    activation: Literal["GELU", "GELUTanh", "QuickGELU", "torch.GELU", "torch.ReLU", "torch.SiLU"]
    """Class of the hidden layer's activation, timm's or torch's."""
    fused: Switch
    """Whether attention that stays float uses torch's fused kernel."""

    def __post_init__(self) -> None:
        if not 1 <= self.patches <= _MOST_PATCHES:
            raise ValueError(
                f"Images of size {list(self.img_size)} have {self.patches} patches of size {list(self.patch_size)}, "
                f"expected 1 to {_MOST_PATCHES}."
            )

    @property
    def patches(self) -> int:
        """Patches of an image."""
        return math.prod(size // side for size, side in zip(self.img_size, self.patch_size, strict=True))

    def check_sizes(self, tensors: Mapping[str, Tensor]) -> None:
        """Check that the sizes which decide over time and memory are those of the tensors, before anything is built.

        Args:
            tensors: a packed file's tensors by name.

        Raises:
            ValueError: if the depth, the width or the number of patches is another.
        """
        blocks = {found[1] for name in tensors if (found := re.match(r"blocks\.(\d+)\.", name))}
        sizes = {"depth": len(blocks), "embed_dim": _last(tensors, "blocks.0.norm1.weight", -1)}
        if self.pos_embed == "learn":
            prefix = 0 if self.no_embed_class else self.class_token + self.distilled + self.reg_tokens
            sizes["patches"] = _last(tensors, "pos_embed", -2) - prefix
        for name, size in sizes.items():
            if getattr(self, name) != size:
                raise ValueError(
                    f"The packed model does not fit its header: {name} is {getattr(self, name)}, but the tensors are "
                    f"those of {size}."
                )


def _last(tensors: Mapping[str, Tensor], name: str, axis: int) -> int:
    if name not in tensors:
        raise ValueError(f"The packed model does not fit its header: the tensor {name} is missing.")
    shape = tensors[name].shape
    return shape[axis] if len(shape) >= -axis else 0


class Card(Config):
    """What people want to know of a model before they use it; empty where nobody has said it."""

    data: Text = ""
    """What it was trained on."""
    recipe: Text = ""
    """How it was trained."""
    accuracy: Annotated[Number, Field(ge=0, le=1)] | None = None
    """Share of right predictions, on the test images of the data."""
    seeds: tuple[Annotated[int, Strict(), Field(ge=0, lt=2**64)], ...] = ()
    """Seeds of the training."""
    licence: Text = ""
    """Licence of the weights."""

    def __str__(self) -> str:
        """Return what is known, one entry after the other."""
        accuracy = "" if self.accuracy is None else f"{self.accuracy:.2%}"
        seeds = ", ".join(map(str, self.seeds))
        entries = {"data": self.data, "recipe": self.recipe, "accuracy": accuracy, "seeds": seeds}
        entries["licence"] = self.licence
        return "; ".join(f"{name}: {text}" for name, text in entries.items() if text)
