"""binarize(): any timm VisionTransformer -> its binarized copy."""

from __future__ import annotations

import copy
from typing import Any

import torch
from timm.layers import Mlp, PatchEmbed
from timm.layers.attention import Attention
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn

from binvit.nn.catalogue import scheme as scheme_of
from binvit.nn.layer_parts import AttentionBias, LimitedActivation, bias_attention
from binvit.nn.layers import BinaryAttention, BinaryMlp
from binvit.nn.linear import BinaryLinear, BinaryPatchConv
from binvit.nn.model import Binarized, binarize_heads, binarized_class, like
from binvit.nn.schemes import Scheme

# Vectors that take much of a packed file while they stay float32, by the ends of their names; the largest kinds first.
VECTORS = (("attn.bias.values",), ("pos_embed",), ("shift",), (".bias", "norm1.weight", "norm2.weight"))


def binarize(model: VisionTransformer, scheme: Scheme | str) -> VisionTransformer:
    """Return a binarized copy of a timm vision transformer; the model itself is left untouched.

    Weights are kept. Learned scales start from the first batch that the copy sees in training mode, or from
    `calibrate`.

    Args:
        model: a `timm` `VisionTransformer` or `VisionTransformerDistilled` made of plain pre-norm blocks; query-key
            norms, layer scale, registers, stochastic depth and every pooling are kept as they are.
        scheme: a `Scheme` or the name of one.

    Returns:
        A model of a subclass of the model's class (`binvit.nn.model.Binarized`) with the attribute `scheme`, whose
        attention, MLP, patch embedding and heads are replaced as the scheme's components say.

    Raises:
        ValueError: if the model is no such vision transformer, or has a part that has no binarized form.
    """
    scheme = _checked(model, scheme)
    return _binarize(copy.deepcopy(model), scheme)


def binarize_(model: VisionTransformer, scheme: Scheme | str) -> VisionTransformer:
    """Binarize a timm vision transformer itself, as `binarize` does with a copy, and return it.

    Args:
        model: as `binarize` takes it.
        scheme: a `Scheme` or the name of one.

    Raises:
        ValueError: as `binarize` says.
    """
    return _binarize(model, _checked(model, scheme))


def _checked(model: nn.Module, scheme: Scheme | str) -> Scheme:
    scheme = scheme_of(scheme) if isinstance(scheme, str) else scheme
    if not isinstance(scheme, Scheme):
        raise ValueError(f"scheme must be a Scheme or a name, got {type(scheme).__name__}.")
    _check_model(model, scheme)
    return scheme


def _binarize(model: VisionTransformer, scheme: Scheme) -> VisionTransformer:
    model.scheme = scheme
    with next(model.parameters()).device:  # what is added belongs there, whatever torch's default device is
        _replace_parts(model, scheme)
        binarize_heads(model)
    if not isinstance(model, Binarized):
        kind: Any = type(model)
        model.__class__ = binarized_class(kind)
    return model.train(model.training)


def _replace_parts(model: VisionTransformer, scheme: Scheme) -> None:
    if scheme.binarizes("patch_embed"):
        weight, input = scheme.rule("patch_weight"), scheme.rule("patch_input")
        # No shift: it would undo the normalization of the images.
        model.patch_embed.proj = like(BinaryPatchConv(model.patch_embed.proj, weight, input), model.patch_embed.proj)
    where = model.patch_embed.grid_size, model.num_prefix_tokens
    for block in model.blocks:
        if scheme.binarizes("mhsa"):
            block.attn = like(BinaryAttention(block.attn, scheme, *where), block.attn.qkv)
        elif scheme.attention_bias != "none":
            bias_attention(block.attn, scheme.attention_bias, *where)
        if scheme.binarizes("mlp"):
            grid = None if model.num_prefix_tokens else model.patch_embed.grid_size
            block.mlp = like(BinaryMlp(block.mlp, scheme, grid), block.mlp.fc1)
        elif scheme.activation_limit is not None:
            block.mlp.act = LimitedActivation(block.mlp.act, scheme.activation_limit)


def _check_model(model: nn.Module, scheme: Scheme) -> None:
    if not isinstance(model, VisionTransformer):
        raise ValueError(f"binarize() takes a timm VisionTransformer, got {type(model).__name__}.")
    former = getattr(model, "scheme", None)
    if former is not None and former.components:
        raise ValueError(f"The model is binarized already, by the scheme {former.name!r}.")
    if former is not None and (former.attention_bias != "none" or former.activation_limit is not None):
        raise ValueError(
            f"The model has a learned attention bias or an activation limit already, by the scheme {former.name!r}; "
            "binarize the model that it was made of."
        )
    if scheme.binarizes("patch_embed"):
        embed = model.patch_embed
        proj = getattr(embed, "proj", None)
        if not isinstance(embed, PatchEmbed) or not isinstance(proj, nn.Conv2d) or proj.kernel_size != proj.stride:
            raise ValueError(
                f"The patch embedding must be timm's PatchEmbed, got {type(embed).__name__}; leave the component "
                "patch_embed out to keep it in float."
            )
        size = embed.img_size
        if size is not None and (size[0] % embed.patch_size[0] or size[1] % embed.patch_size[1]):
            sizes = [" x ".join(map(str, pair)) for pair in (size, embed.patch_size)]
            raise ValueError(f"The image size {sizes[0]} is not divisible by the patch size {sizes[1]}.")
    biased, limited = scheme.attention_bias != "none", scheme.activation_limit is not None
    if biased and model.dynamic_img_size:
        raise ValueError("A learned attention bias needs a fixed image size; use dynamic_img_size=False.")
    if biased and not isinstance(model.patch_drop, nn.Identity):
        raise ValueError("A learned attention bias needs every patch in its place; use patch_drop_rate=0.")
    branched = scheme.binarizes("mlp") and scheme.branches != "none" and not model.num_prefix_tokens
    if branched and (model.dynamic_img_size or not isinstance(model.patch_drop, nn.Identity)):
        raise ValueError(
            "Branches that mix neighbouring patches need every patch of one image size; use dynamic_img_size=False and "
            "patch_drop_rate=0."
        )
    for i, block in enumerate(model.blocks):
        if type(block) is not Block:
            raise ValueError(f"Block {i} is a {type(block).__name__}; only timm's pre-norm Block can be binarized.")
        if scheme.binarizes("mhsa") or biased:
            if type(block.attn) is not Attention:
                raise ValueError(
                    f"Block {i} has {type(block.attn).__name__} as attention; only timm's Attention can be binarized "
                    "or get a learned bias."
                )
            if block.attn.gate is not None:
                raise ValueError(f"Block {i} has gated attention, which has no binarized form and no learned bias.")
        changed = scheme.binarizes("mlp") or limited
        if changed and (type(block.mlp) is not Mlp or not isinstance(block.mlp.fc1, nn.Linear)):
            raise ValueError(
                f"Block {i} has {type(block.mlp).__name__} as MLP; only timm's Mlp can be binarized or have its "
                "activation limited."
            )


@torch.no_grad()
def init_latent_weights(model: VisionTransformer) -> VisionTransformer:
    """Draw the latent weights as the scheme's authors start a training from nothing, and return the model.

    Weights that have a rule of their own in the MLP, and without `latent_init` in the scheme all, stay as they are.

    Args:
        model: a binarized model.
    """
    scheme = getattr(model, "scheme", None)
    if scheme is not None and scheme.latent_init is not None:
        for block in model.blocks:
            for layer in block.modules():
                if isinstance(layer, BinaryLinear) and layer.weight_binarizers[0].rule == scheme.rule("weight"):
                    layer.weight.uniform_(*scheme.latent_init)
    return model


@torch.no_grad()
def round_vectors(model: VisionTransformer) -> VisionTransformer:
    """Return a copy of a trained model whose vectors (`VECTORS`) are float16 numbers; its packed file stores them so.

    A 1-bit model can answer differently where a number close to a threshold was rounded across it, so measure the copy.
    Tensors with elements beyond the range of float16 stay as they are.

    Args:
        model: a model that `binarize` returned, trained; its parameters keep the type float32.

    Raises:
        ValueError: if the model is not binarized.
    """
    if getattr(model, "scheme", None) is None:
        raise ValueError(f"round_vectors() takes a model made by binvit.binarize(), got {type(model).__name__}.")
    model = copy.deepcopy(model)
    for name, parameter in model.named_parameters():
        half = parameter.half()
        if any(name.endswith(ends) for ends in VECTORS) and half.isfinite().all():
            parameter.copy_(half)
    return model


def fill_buffers(model: VisionTransformer) -> None:
    """Give the buffers that no state holds their values, in a binarized model built on the "meta" device."""
    index = None
    for module in model.modules():
        if isinstance(module, BinaryAttention):
            module.factor = torch.tensor(module.head_dim**-0.5, dtype=torch.float32, device="cpu")
        elif isinstance(module, AttentionBias) and module.kind == "relative":
            if index is None:  # one for all blocks: it is as large as a whole attention map
                with torch.device("cpu"):
                    index = AttentionBias.relative_index(model.patch_embed.grid_size, model.num_prefix_tokens)
            module.index = index


def set_progress(model: VisionTransformer, done: float) -> None:
    """Tell schedule-driven binarizers (IR-Net's gradient) which share `done`, 0 to 1, of training is over."""
    for module in model.modules():
        if module is not model and hasattr(module, "set_progress"):
            module.set_progress(done)
