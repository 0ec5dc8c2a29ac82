"""Blueprint: everything about a packed model that is no tensor, as JSON types, and the timm model it describes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import timm.layers
from timm.layers import DropPath, PatchDropout
from timm.layers.attention import Attention
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from binvit.nn.convert import binarize
from binvit.nn.schemes import Scheme

_NORMS = {name: getattr(timm.layers, name) for name in ("LayerNorm", "LayerNormFp32", "RmsNorm", "RmsNormFp32")}
_NORMS["torch.LayerNorm"] = nn.LayerNorm
_ACTIVATIONS = {name: getattr(timm.layers, name) for name in ("GELU", "GELUTanh", "QuickGELU")}
_ACTIVATIONS |= {f"torch.{name}": getattr(nn, name) for name in ("GELU", "ReLU", "SiLU")}
# Layers that do nothing in evaluation mode; the rebuilt model has none of them.
_IDLE = (nn.Dropout, DropPath, PatchDropout, nn.Identity)


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
    """

    scheme: Scheme
    vit: Mapping[str, Any]
    classes: tuple[str, ...] = ()
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

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
        """Return the binarized model in evaluation mode, its trained tensors on the "meta" device, without values."""
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
        return binarize(model, self.scheme).eval()


def describe(model: VisionTransformer) -> dict[str, Any]:
    """Return the arguments that rebuild a binarized model, for `Blueprint.vit`.

    Args:
        model: What `binvit.binarize` returned.

    Raises:
        ValueError: If the model has a part that the arguments cannot describe.
    """
    block = model.blocks[0]
    embed, attention, mlp = model.patch_embed, block.attn, block.mlp
    float_attention = next((m for m in model.modules() if isinstance(m, Attention)), None)
    if model.dynamic_img_size:
        raise ValueError("A model with dynamic_img_size=True cannot be packed; a packed model has one image size.")
    width = model.embed_dim
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
        "mlp_ratio": mlp.fc1.out_features / width,
        "qkv_bias": attention.qkv.bias is not None,
        "qk_norm": not isinstance(attention.q_norm, nn.Identity),
        "scale_attn_norm": not isinstance(attention.norm, nn.Identity),
        "scale_mlp_norm": not isinstance(mlp.norm, nn.Identity),
        "proj_bias": attention.proj.bias is not None,
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
        "activation": _name(mlp.act, _ACTIVATIONS, "activation"),
        "fused": True if float_attention is None else bool(float_attention.fused_attn),
    }


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
