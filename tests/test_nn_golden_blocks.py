"""Whole blocks of the other binarizers against the numbers of their official codes."""

from __future__ import annotations

import pytest
from golden_methods import check
from timm.models.vision_transformer import Block
from torch import nn

import binvit
from binvit.nn.layers import BinaryAttention, BinaryMlp

GRID = (3, 3)


def block_of(scheme: str, ratio: float, prefix: int = 0, heads: int = 2, width: int = 32) -> Block:
    """Return a block with its attention and its MLP binarized, in float64; its norms have the official epsilon."""
    scheme = binvit.scheme(scheme)
    block = Block(width, heads, ratio, qkv_bias=True, norm_layer=nn.LayerNorm)
    block.attn = BinaryAttention(block.attn, scheme, GRID, prefix)
    block.mlp = BinaryMlp(block.mlp, scheme, None if prefix else GRID)
    return block.train().double()


def end(ours: str, theirs: str, scale: bool = False) -> dict[str, str]:
    """Names of what follows a layer: norm and shifted PReLU, LayerScale."""
    names = {f"{ours}.norm.weight": f"{theirs}.norm.weight", f"{ours}.norm.bias": f"{theirs}.norm.bias"}
    names |= {f"{ours}.activation.{mine}": f"{theirs}.rprelu.{name}" for mine, name in RPRELU.items()}
    if scale:
        names |= {
            f"{ours}.scale.alpha": f"{theirs}.layerscale.alpha",
            f"{ours}.scale.beta": f"{theirs}.layerscale.move",
        }
    return names


RPRELU = {"shift_in": "move1", "slope": "prelu.weight", "shift_out": "move2"}


def attention_names(scale: bool, ours: str = "attn.", theirs: str = "attention.") -> dict[str, str | tuple[str, ...]]:
    inner = f"{theirs}attention."
    each = [(place, place[0]) for place in ("query", "key", "value")]
    names: dict[str, str | tuple[str, ...]] = {
        f"{ours}qkv.weight": tuple(f"{inner}{place}.weight" for place, _ in each),
        f"{ours}qkv.shift": tuple(f"{inner}move{letter}" for _, letter in each),
        f"{ours}proj.weight": f"{theirs}output.dense.weight",
        f"{ours}proj.shift": f"{theirs}output.move",
    }
    names |= {f"{ours}{place}_shift": f"{inner}move{letter}2" for place, letter in each}
    for kind in ("weight", "bias"):
        names[f"{ours}qkv.post.norm.{kind}"] = tuple(f"{inner}norm{letter}.{kind}" for _, letter in each)
        names[f"{ours}context_end.norm.{kind}"] = f"{inner}norm_context.{kind}"
    for mine, name in RPRELU.items():
        names[f"{ours}qkv.post.activation.{mine}"] = tuple(f"{inner}rprelu{letter}.{name}" for _, letter in each)
        names[f"{ours}context_end.activation.{mine}"] = f"{inner}rprelu_context.{name}"
    return names | end(f"{ours}proj.post", f"{theirs}output", scale)


def block_names(scheme: str, prefix: int) -> dict[str, str | tuple[str, ...]]:
    root = "layer." if scheme == "bhvit-qd" else ""
    scale = scheme != "reactnet"
    names = attention_names(scale, theirs=f"{root}attention.")
    names |= map_names(scheme, f"{root}attention.attention.", "attn.")
    for layer, theirs in (("fc1", "intermediate"), ("fc2", "output")):
        names |= {f"mlp.{layer}.weight": f"{root}{theirs}.dense.weight", f"mlp.{layer}.shift": f"{root}{theirs}.move"}
        names |= end(f"mlp.{layer}.post", f"{root}{theirs}", scale and layer == "fc2")
    for ours, theirs in (("norm1", "layernorm_before"), ("norm2", "layernorm_after")):
        names |= {f"{ours}.{kind}": f"{root}{theirs}.{kind}" for kind in ("weight", "bias")}
    if not prefix and scale:
        kinds = ("w", "h", "ch") if scheme == "bhvit-qd" else ("w", "h")
        order = [f"{kind}{size}" for size in (3, 5) for kind in kinds]
        for i, name in enumerate(order):
            names[f"mlp.branches.scales.{i}.alpha"] = f"{root}layerscale_{name}.alpha"
            names[f"mlp.branches.scales.{i}.beta"] = f"{root}layerscale_{name}.move"
    return names


def map_names(scheme: str, theirs: str, ours: str) -> dict[str, str]:
    if scheme != "bhvit-qd":
        return {f"{ours}attention_binarizer.scale": f"{theirs}att_prob_clip"}
    return {
        f"{ours}attention_binarizer.scale": f"{theirs}att_prob_quantizer.alpha",
        f"{ours}attention_binarizer.offset": f"{theirs}att_prob_quantizer.zero_point",
    }


# In BinaryViT's and BHViT's codes the first shift of the PReLU is subtracted.
SUBTRACTED = ("move1",)


@pytest.mark.parametrize(
    ("scheme", "part", "prefix", "ratio"),
    [
        ("reactnet", "reactnet/deit_block_ln", 0, 4.0),
        ("binaryvit", "binaryvit/block_ln", 0, 2.0),
        ("binaryvit", "binaryvit/block_no_pool", 1, 2.0),
        ("bhvit-qd", "bhvit-qd/block_ln", 0, 2.0),
        ("bhvit-qd", "bhvit-qd/block_no_shift", 1, 2.0),
    ],
)
def test_blocks(scheme, part, prefix, ratio):
    names = block_names(scheme, prefix)
    check(block_of(scheme, ratio, prefix), part, names, negated=SUBTRACTED)
    check(block_of(scheme, ratio, prefix).float(), part, names, negated=SUBTRACTED, tolerance=5e-5)
