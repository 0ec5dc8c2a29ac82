"""Blueprint: everything about a packed model that is no tensor, as JSON types, and the timm model it describes."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import timm.layers
from timm.layers import DropPath, Mlp, PatchDropout
from timm.layers.attention import Attention
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from binvit.nn.convert import binarize, fill_buffers
from binvit.nn.layer_parts import LimitedActivation
from binvit.nn.layers import BinaryMlp, HeadNorm
from binvit.nn.schemes import Scheme

_NORMS = {name: getattr(timm.layers, name) for name in ("LayerNorm", "LayerNormFp32", "RmsNorm", "RmsNormFp32")}
_NORMS["torch.LayerNorm"] = nn.LayerNorm
_ACTIVATIONS = {name: getattr(timm.layers, name) for name in ("GELU", "GELUTanh", "QuickGELU")}
_ACTIVATIONS |= {f"torch.{name}": getattr(nn, name) for name in ("GELU", "ReLU", "SiLU")}
# Layers that do nothing in evaluation mode; the rebuilt model has none of them.
_IDLE = (nn.Dropout, DropPath, PatchDropout, nn.Identity)
_LARGEST_SIDE = _MOST_PATCHES = 2**14


def _is_number(value: Any, smallest: float = -sys.float_info.max) -> bool:
    return type(value) in (int, float) and smallest <= value <= sys.float_info.max


def _integer(smallest: int, largest: int) -> tuple[Callable[[Any], bool], str]:
    return (
        lambda value: type(value) is int and smallest <= value <= largest,
        f"an integer from {smallest} to {largest}",
    )


def _choice(names: Iterable[str]) -> tuple[Callable[[Any], bool], str]:
    names = tuple(names)
    return lambda value: isinstance(value, str) and value in names, f"one of {', '.join(map(repr, names))}"


_SIDE = _integer(1, _LARGEST_SIDE)
_PAIR = lambda value: isinstance(value, list) and len(value) == 2 and all(map(_SIDE[0], value)), f"two of {_SIDE[1]}"
_SWITCH = lambda value: isinstance(value, bool), "true or false"
# What a field of `Blueprint.vit` may hold; the limits keep a damaged file from filling the memory.
_FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "distilled": _SWITCH,
    "img_size": _PAIR,
    "patch_size": _PAIR,
    "in_chans": _integer(1, 2**10),
    "num_classes": _integer(0, 2**20),
    "global_pool": _choice(("", "avg", "avgmax", "max", "token", "map", "prr")),
    "embed_dim": _integer(1, 2**16),
    "depth": _integer(1, 2**10),
    "num_heads": _integer(1, 2**16),
    "mlp_ratio": (lambda value: _is_number(value) and 0 < value <= 2**10, "a number above 0, up to 1024"),
    "qkv_bias": _SWITCH,
    "qk_norm": _SWITCH,
    "scale_attn_norm": _SWITCH,
    "scale_mlp_norm": _SWITCH,
    "proj_bias": _SWITCH,
    "init_values": (lambda value: value is None or _is_number(value), "a finite number or null"),
    "class_token": _SWITCH,
    "pos_embed": _choice(("none", "learn")),
    "no_embed_class": _SWITCH,
    "reg_tokens": _integer(0, 2**10),
    "pre_norm": _SWITCH,
    "final_norm": _SWITCH,
    "fc_norm": _SWITCH,
    "pool_include_prefix": _SWITCH,
    "norm": _choice(_NORMS),
    "epsilon": (lambda value: _is_number(value, 0), "a finite number from 0"),
    "activation": _choice(_ACTIVATIONS),
    "fused": _SWITCH,
}


@dataclass(frozen=True)
class Blueprint:
    """What a packed file's header says about the model.

    Attributes:
        scheme: How the model is binarized.
        vit: Arguments of timm's `VisionTransformer`, as JSON types, with the names of the norm and the activation, the
            norm's epsilon, and whether the model has a distillation token.
        classes: One name per class; empty where they are not known.
        mean: Channel means that the images were normalized with; empty where they are not known.
        std: Channel standard deviations, likewise.

    Raises:
        ValueError: If a field has another type, lies out of its range, or does not fit the others.
    """

    scheme: Scheme
    vit: Mapping[str, Any]
    classes: tuple[str, ...] = ()
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        _check_vit(self.vit)
        _check_classes(self.classes, self.vit["num_classes"])
        _check_normalization(self.mean, self.std, self.vit["in_chans"])

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an image."""
        return (self.vit["in_chans"], *self.vit["img_size"])

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as JSON types."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        lists = {name: list(value) for name, value in fields.items() if isinstance(value, tuple)}
        return fields | lists | {"scheme": self.scheme.to_dict(), "vit": dict(self.vit)}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Blueprint:
        """Make a blueprint from what `to_dict` returned."""
        lists = {name: tuple(value) for name, value in fields.items() if isinstance(value, list)}
        return cls(**{**fields, **lists, "scheme": Scheme.from_dict(fields["scheme"])})

    def build(self) -> VisionTransformer:
        """Return the binarized model in evaluation mode, its trained tensors on the "meta" device, without values.

        Raises:
            ValueError: If the fields do not fit each other.
        """
        try:
            return self._build()
        except (ArithmeticError, AssertionError, LookupError, RuntimeError, TypeError) as error:
            reason = f"{error}".partition("\n")[0] or type(error).__name__
            raise ValueError(f"The blueprint describes no vision transformer that can be built ({reason}).") from None

    def _build(self) -> VisionTransformer:
        arguments = dict(self.vit)
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
        model = binarize(model, self.scheme).eval()
        fill_buffers(model)  # no file holds them
        return model


def _check_vit(vit: Mapping[str, Any]) -> None:
    if not isinstance(vit, Mapping) or vit.keys() != _FIELDS.keys():
        names = set(vit) ^ _FIELDS.keys() if isinstance(vit, Mapping) else {type(vit).__name__}
        raise ValueError(f"The blueprint's field vit has other entries than expected: {', '.join(sorted(names))}.")
    for name, (fits, expected) in _FIELDS.items():
        if not fits(vit[name]):
            raise ValueError(f"The blueprint's field {name} must be {expected}, got {vit[name]!r}.")
    patches = math.prod(size // side for size, side in zip(vit["img_size"], vit["patch_size"], strict=True))
    if not 1 <= patches <= _MOST_PATCHES:
        raise ValueError(
            f"Images of size {vit['img_size']} have {patches} patches of size {vit['patch_size']}, expected 1 to "
            f"{_MOST_PATCHES}."
        )


def _check_classes(classes: tuple[str, ...], count: int) -> None:
    if not isinstance(classes, tuple) or not all(isinstance(name, str) for name in classes):
        raise ValueError(f"The class names must be a list of strings, got {classes!r}.")
    if classes and len(classes) != count:
        raise ValueError(f"The model has {count} classes, but {len(classes)} class names came.")


def _check_normalization(mean: tuple[float, ...], std: tuple[float, ...], channels: int) -> None:
    for name, values in (("mean", mean), ("std", std)):
        if not isinstance(values, tuple) or not all(map(_is_number, values)):
            raise ValueError(f"The {name} must be a list of finite numbers, got {values!r}.")
    if (mean or std) and not len(mean) == len(std) == channels:
        raise ValueError(
            f"The mean has {len(mean)} numbers and the std {len(std)}, expected one of each for every of the model's "
            f"{channels} channels, or none."
        )
    if any(value <= 0 for value in std):
        raise ValueError(f"The std must be positive, got {std}.")


def describe(model: VisionTransformer) -> dict[str, Any]:
    """Return the arguments that rebuild a binarized model, for `Blueprint.vit`.

    Args:
        model: What `binvit.binarize` returned.

    Raises:
        ValueError: If the model has a part that the arguments cannot describe.
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
    """The MLP ratio of which timm, which truncates, makes the hidden width."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)


def check_same(model: nn.Module, rebuilt: nn.Module) -> None:
    """Check that a rebuilt model computes what the model computes.

    Args:
        model: The model to pack.
        rebuilt: What its blueprint builds.

    Raises:
        ValueError: If layers, shapes or options differ; the sentence names the first place.
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
