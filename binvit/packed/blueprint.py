"""Blueprint: everything about a packed model that is no tensor, as JSON types, and the timm model it describes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Annotated, Any, Literal, Self

import timm.layers
from pydantic import Field, InstanceOf, Strict
from timm.layers import DropPath, Mlp, PatchDropout
from timm.layers.attention import Attention
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from binvit.config import Config, Number, Text, show
from binvit.nn.convert import binarize_
from binvit.nn.layer_parts import LimitedActivation
from binvit.nn.layers import BinaryMlp, HeadNorm
from binvit.nn.schemes import Scheme
from binvit.packed.header import Card, Vit

_NORMS = {name: getattr(timm.layers, name) for name in ("LayerNorm", "LayerNormFp32", "RmsNorm", "RmsNormFp32")}
_NORMS["torch.LayerNorm"] = nn.LayerNorm
_ACTIVATIONS = {name: getattr(timm.layers, name) for name in ("GELU", "GELUTanh", "QuickGELU")}
_ACTIVATIONS |= {f"torch.{name}": getattr(nn, name) for name in ("GELU", "ReLU", "SiLU")}
# Layers that do nothing in evaluation mode; the rebuilt model has none of them.
_IDLE = (nn.Dropout, DropPath, PatchDropout, nn.Identity)

Interpolation = Literal["bilinear", "bicubic"]


class Blueprint(Config):
    """What a packed file's header says about the model."""

    scheme: InstanceOf[Scheme]
    """How the model is binarized."""
    vit: InstanceOf[Vit]
    """The transformer's shape."""
    classes: tuple[Text, ...] = ()
    """One name per class; empty where they are not known."""
    mean: tuple[Number, ...] = ()
    """Channel means that the images were normalized with; empty where they are not known."""
    std: tuple[Annotated[Number, Field(gt=0)], ...] = ()
    """Channel standard deviations, likewise."""
    resize: Annotated[int, Strict(), Field(ge=1, le=2**15)] | None = None
    """Pixels of an image's short side before its centre is cut out; None for the short side of what the model reads."""
    interpolation: Interpolation = "bicubic"
    """How images are resized."""
    card: InstanceOf[Card] = Card()
    """What people want to know."""

    def __post_init__(self) -> None:
        _check_classes(self.classes, self.vit.num_classes)
        _check_normalization(self.mean, self.std, self.vit.in_chans)
        if self.resize is not None and self.resize < min(self.vit.img_size):
            raise ValueError(
                f"Images cannot be resized to {self.resize} pixels, which is less than the model reads "
                f"({' x '.join(map(str, self.vit.img_size))})."
            )

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an image."""
        return (self.vit.in_chans, *self.vit.img_size)

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as JSON types."""
        fields = {name: getattr(self, name) for name in self.field_names()}
        lists = {name: list(value) for name, value in fields.items() if isinstance(value, tuple)}
        return fields | lists | {name: fields[name].to_dict() for name in ("scheme", "vit", "card")}

    @classmethod
    def from_dict(cls, values: Any) -> Self:
        """Make a blueprint of what `to_dict` returned, or a former version's."""
        if not isinstance(values, Mapping):
            raise ValueError(f"A blueprint must be a mapping of field names to values, got {show(values)}.")
        records: dict[str, Any] = {"scheme": Scheme, "vit": Vit, "card": Card}
        made = {}
        for name in records.keys() & values.keys():
            if not isinstance(values[name], Mapping):
                raise ValueError(f"The blueprint's {name} must be a mapping, got {show(values[name])}.")
            made[name] = records[name].from_dict(values[name])
        return super().from_dict({**values, **made})

    def build(self) -> VisionTransformer:
        """Return the binarized model in evaluation mode, its trained tensors on the "meta" device, without values.

        Raises:
            ValueError: if the fields do not fit each other.
        """
        try:
            return self._build()
        except (ArithmeticError, AssertionError, LookupError, RuntimeError, TypeError) as error:
            reason = f"{error}".partition("\n")[0] or type(error).__name__
            raise ValueError(f"The blueprint describes no vision transformer that can be built ({reason}).") from None

    def _build(self) -> VisionTransformer:
        arguments = self.vit.to_dict()
        kind = VisionTransformerDistilled if arguments.pop("distilled") else VisionTransformer
        norm, epsilon, fused = _NORMS[arguments.pop("norm")], arguments.pop("epsilon"), arguments.pop("fused")
        activation = _ACTIVATIONS[arguments.pop("activation")]
        model = kind(
            **arguments,
            norm_layer=partial(norm, eps=epsilon),
            act_layer=activation,
            weight_init="skip",
            device="meta",
        )
        for module in model.modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = fused
        return binarize_(model, self.scheme).eval()


def _check_classes(classes: tuple[str, ...], count: int) -> None:
    if classes and len(classes) != count:
        raise ValueError(f"The model has {count} classes, but {len(classes)} class names came.")


def _check_normalization(mean: tuple[float, ...], std: tuple[float, ...], channels: int) -> None:
    if (mean or std) and not len(mean) == len(std) == channels:
        raise ValueError(
            f"The mean has {len(mean)} numbers and the std {len(std)}, expected one of each for every of the model's "
            f"{channels} channels, or none."
        )


def describe(model: VisionTransformer) -> dict[str, Any]:
    """Return the arguments that rebuild a binarized model, for `Vit`.

    Args:
        model: what `binvit.binarize` returned.

    Raises:
        ValueError: if the model has a part that the arguments cannot describe.
    """
    block = model.blocks[0]
    embed, attention, mlp = model.patch_embed, block.attn, block.mlp
    for i, other in enumerate(model.blocks):
        if not isinstance(other.mlp, Mlp | BinaryMlp):
            raise ValueError(
                f"Block {i} has {type(other.mlp).__name__} as MLP, which has no packed form; only timm's Mlp has."
            )
    float_attention = next((m for m in model.modules() if isinstance(m, Attention)), None)
    if model.dynamic_img_size:
        raise ValueError("A model with dynamic_img_size=True cannot be packed; a packed model has one image size.")
    width = model.embed_dim
    activation = mlp.act.act if isinstance(mlp.act, LimitedActivation) else mlp.act
    if isinstance(mlp, BinaryMlp) and model.scheme.activation != "keep":  # the scheme's, whatever timm's was
        activation = next((m.act for m in model.modules() if isinstance(m, Mlp)), timm.layers.GELU())
    biases = attention.proj.bias, mlp.fc1.bias, mlp.fc2.bias  # a scheme may leave out those of its layers
    return {
        "distilled": isinstance(model, VisionTransformerDistilled),
        "img_size": list(embed.img_size),
        "patch_size": list(embed.patch_size),
        "in_chans": embed.proj.in_chans if hasattr(embed.proj, "in_chans") else embed.proj.in_channels,
        "num_classes": model.num_classes,
        "global_pool": model.global_pool,
        "embed_dim": width,
        "depth": len(model.blocks),
        "num_heads": attention.num_heads,
        "mlp_ratio": _ratio(mlp.fc1.out_features, width),
        "qkv_bias": attention.qkv.bias is not None,
        "qk_norm": not isinstance(attention.q_norm, nn.Identity | HeadNorm),
        "scale_attn_norm": not isinstance(attention.norm, nn.Identity),
        "scale_mlp_norm": not isinstance(mlp.norm, nn.Identity),
        "proj_bias": any(bias is not None for bias in biases),
        "init_values": None if isinstance(block.ls1, nn.Identity) else 1.0,
        "class_token": model.cls_token is not None,
        "pos_embed": "none" if model.pos_embed is None else "learn",
        "no_embed_class": model.no_embed_class,
        "reg_tokens": model.num_reg_tokens,
        "pre_norm": not isinstance(model.norm_pre, nn.Identity),
        "final_norm": not (isinstance(model.norm, nn.Identity) and isinstance(model.fc_norm, nn.Identity)),
        "fc_norm": not isinstance(model.fc_norm, nn.Identity),
        "pool_include_prefix": model.pool_include_prefix,
        "norm": _name(block.norm1, _NORMS, "normalization"),
        "epsilon": block.norm1.eps,
        "activation": _name(activation, _ACTIVATIONS, "activation"),
        "fused": True if float_attention is None else bool(float_attention.fused_attn),
    }


def _ratio(hidden: int, width: int) -> float:
    """Return the MLP ratio of which timm, which truncates, makes the hidden width."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)


def check_same(model: nn.Module, rebuilt: nn.Module) -> None:
    """Check that a rebuilt model computes what the model computes.

    Args:
        model: the model to pack.
        rebuilt: what its blueprint builds.

    Raises:
        ValueError: if layers, shapes or options differ; the sentence names the first place.
    """
    theirs, ours = dict(model.named_modules()), dict(rebuilt.named_modules())
    for name in theirs | ours:
        pair = [modules.get(name, nn.Identity()) for modules in (theirs, ours)]
        if all(isinstance(module, _IDLE) for module in pair):
            continue
        details = [(type(m).__name__, getattr(m, "eps", None), getattr(m, "approximate", None)) for m in pair]
        if details[0] != details[1]:
            raise ValueError(f"The model cannot be packed: {name} is {pair[0]}, which has no packed form here.")
    theirs, ours = model.state_dict(), rebuilt.state_dict()
    for name in theirs | ours:
        if name not in ours or name not in theirs or theirs[name].shape != ours[name].shape:
            raise ValueError(
                f"The model cannot be packed: the tensor {name} is not that of a plain vision transformer."
            )


def _name(module: nn.Module, known: Mapping[str, type], what: str) -> str:
    for name, kind in known.items():
        if type(module) is kind:
            return name
    names = ", ".join(kind.__name__ for kind in known.values())
    raise ValueError(f"The model's {what} {type(module).__name__} cannot be packed; {names} can.")
