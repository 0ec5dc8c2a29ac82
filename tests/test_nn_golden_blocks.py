"""Whole blocks of the other binarizers against the numbers of their official codes."""

from __future__ import annotations

import pytest
import torch
from golden_methods import check, close, golden, load, official
from timm.models.vision_transformer import Block
from torch import Tensor, nn

import binvit
from binvit.nn.block_parts import PartNorm
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
PARTS = [
    ("reactnet", "reactnet/deit_block", 0, 4.0, ("ln", "bn")),
    ("binaryvit", "binaryvit/block", 0, 2.0, ("ln", "bn")),
    ("binaryvit", "binaryvit/block_no_pool", 1, 2.0, ("",)),
    ("bhvit-qd", "bhvit-qd/block", 0, 2.0, ("ln",)),
    ("bhvit-qd", "bhvit-qd/block_no_shift", 1, 2.0, ("",)),
]


class TokenBatchNorm(nn.BatchNorm1d):
    """Batch norm over everything but the last dimension, as the released scripts have it."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(0, -2)).view_as(x)


def with_norm(module: nn.Module, kind: str) -> nn.Module:
    """Return the module, its norms replaced by batch norms over the tokens if the kind is "bn"."""
    for name, norm in list(module.named_modules()):
        if kind == "bn" and isinstance(norm, nn.LayerNorm | PartNorm):
            parent, _, child = name.rpartition(".")
            setattr(module.get_submodule(parent), child, TokenBatchNorm(len(norm.weight)).to(norm.weight.dtype))
    return module


@pytest.mark.parametrize(
    ("scheme", "part", "prefix", "ratio", "norm"), [(*fields, norm) for *fields, norms in PARTS for norm in norms]
)
def test_blocks(scheme, part, prefix, ratio, norm):
    names, part = block_names(scheme, prefix), f"{part}_{norm}".strip("_")
    check(with_norm(block_of(scheme, ratio, prefix), norm), part, names, negated=SUBTRACTED)
    block = with_norm(block_of(scheme, ratio, prefix).float(), norm)
    check(block, part, names, negated=SUBTRACTED, tolerance=5e-5)


def attention_of(scheme: str, last: bool = True) -> BinaryAttention:
    attention = block_of(scheme, 2.0).attn
    if not last:
        attention.proj = nn.Identity()
    return attention


@pytest.mark.parametrize(
    ("scheme", "part", "norm"),
    [
        ("binaryvit", "binaryvit/attention_ln", "ln"),
        ("bhvit-qd", "bhvit-qd/attention_ln", "ln"),
        ("bhvit-qd", "bhvit-qd/self_attention_ln", "ln"),
        ("bhvit-qd", "bhvit-qd/self_attention_bn", "bn"),
    ],
)
def test_attention(scheme, part, norm):
    last = "self" not in part
    names = attention_part_names(scheme, last)
    check(with_norm(attention_of(scheme, last), norm), part, names, negated=SUBTRACTED)


def attention_part_names(scheme: str, last: bool) -> dict[str, str | tuple[str, ...]]:
    root = "attention." if scheme == "bhvit-qd" and last else ""
    names = attention_names(True, "", root) | map_names(scheme, f"{root}attention.", "")
    return names if last else {ours: theirs for ours, theirs in names.items() if not ours.startswith("proj.")}


@pytest.mark.parametrize("part", ["block_ln", "block_no_shift", "attention_ln", "self_attention_ln"])
def test_the_first_pass_of_bhvit(part):
    first, arrays = golden(f"bhvit-qd/{part}_init"), golden(f"bhvit-qd/{part}")
    prefix = int(part == "block_no_shift")
    if "block" in part:
        module, names = block_of("bhvit-qd", 2.0, prefix), block_names("bhvit-qd", prefix)
    else:
        last = not part.startswith("self")
        module, names = attention_of("bhvit-qd", last), attention_part_names("bhvit-qd", last)
    load(module, {ours: official(arrays, "param", theirs, SUBTRACTED) for ours, theirs in names.items()})
    for name, buffer in module.named_buffers():
        if name.endswith("initialized"):
            buffer.fill_(False)
    close(module(first["x"].double()), first["y"])
    for ours, theirs in names.items():
        if theirs in first:
            close(module.get_parameter(ours), first[theirs], what=theirs)


def test_parts_start_as_those_of_binaryvit():
    block, start = block_of("binaryvit", 2.0), golden("binaryvit/init")
    block.attn.attention_binarizer.values(torch.rand(1, 2, 9, 9))
    parameters, seen = dict(block.named_parameters()), set()
    for ours, theirs in block_names("binaryvit", 0).items():
        for name in (theirs,) if isinstance(theirs, str) else theirs:
            if name in start:
                seen.add(name)
                assert torch.allclose(parameters[ours], start[name].to(parameters[ours].dtype)), name
    assert seen == set(start)
