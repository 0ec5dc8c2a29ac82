"""Where a packed model's bytes and operations are: nothing that is still float is left out."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from safetensors.torch import save as serialize
from timm.layers import AttentionPoolLatent
from timm.layers.attention import Attention
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from binvit.nn.block_parts import Branches, LayerEnd, PartNorm
from binvit.nn.layer_parts import BiasedAttention
from binvit.packed.exact import PackedAttention, PackedLinear
from binvit.packed.files import pack_header
from binvit.packed.vit import PARTS, PackedViT, part_of

PRODUCTS, SOFTMAX, STREAM = "query x key, map x value", "softmax and groups", "residual stream"
COLUMNS = ("parameters", "float32_bytes", "bytes", "binary_ops", "float_ops")


@dataclass(frozen=True)
class Audit:
    """Bytes and operations of one image's forward pass, by part.

    Attributes:
        table: one row per part with the columns of `COLUMNS`. A multiply-add, an addition, a comparison, an exponential
            is one operation; a product of 1-bit numbers and its addition is one binary operation.
        file_bytes: size of the packed file.
        float32_file_bytes: size of a file with all parameters of the trained model in float32.
    """

    table: pd.DataFrame
    file_bytes: int
    float32_file_bytes: int

    @property
    def totals(self) -> pd.Series:
        """Sum of the table, and OPs = binary_ops / 64 + float_ops, as binary networks are compared."""
        sums = self.table.sum().to_dict()
        return pd.Series(sums | {"ops": sums["binary_ops"] / 64 + sums["float_ops"]})

    @property
    def share(self) -> float:
        """Size of the packed file over that of the float32 file."""
        return self.file_bytes / self.float32_file_bytes

    def __str__(self) -> str:
        shown = pd.concat([self.table, self.table.sum().to_frame("total").T])
        lines = [shown.map(lambda number: f"{number:,.0f}").to_string()]
        ops, size, whole = self.totals["ops"], self.file_bytes, self.float32_file_bytes
        lines.append(f"OPs = binary_ops / 64 + float_ops = {ops:,.0f} per image")
        lines.append(f"file: {size:,} bytes, {self.share:.1%} of the {whole:,} bytes of float32")
        return "\n".join(lines)


def audit(model: PackedViT) -> Audit:
    """Count a model's bytes and operations by part.

    Args:
        model: a packed model.

    Returns:
        The audit; patch embedding and heads count as float operations even where their weights have eight bits.

    Raises:
        ValueError: if the model is not packed.
    """
    if not isinstance(model, PackedViT):
        raise ValueError(f"audit() takes a PackedViT, got {type(model).__name__}; use binvit.pack() first.")
    trained = {name: t for name, t in model.blueprint.build().state_dict().items() if not name.endswith("initialized")}
    counts: dict[str, Counter[str]] = {column: Counter() for column in COLUMNS}
    for name, tensor in trained.items():
        part = part_of(name, model.tensors.get(name, tensor))
        if ".weight_binarizer." in name:
            part = part_of(name.replace("weight_binarizer.scale", "weight_scale"), tensor)
        counts["parameters"][part] += tensor.numel()
        counts["float32_bytes"][part] += 4 * tensor.numel()
    counts["bytes"].update(model.nbytes)
    _count_operations(model, counts["binary_ops"], counts["float_ops"])
    order = [*PARTS, PRODUCTS, SOFTMAX, STREAM]
    rows = [part for part in order if any(counter[part] for counter in counts.values())]
    table = pd.DataFrame({column: [counter[row] for row in rows] for column, counter in counts.items()}, index=rows)
    floats = {name: torch.zeros(tensor.shape, dtype=torch.float32, device="cpu") for name, tensor in trained.items()}
    file_bytes = len(serialize(model.tensors, pack_header(model)))
    return Audit(table, file_bytes, len(serialize(floats)))


def _count_operations(model: PackedViT, binary: Counter, floats: Counter) -> None:
    vit = model._model
    tokens = vit.patch_embed.num_patches + vit.num_prefix_tokens
    width, patches = vit.embed_dim, vit.patch_embed.num_patches
    proj = vit.patch_embed.proj
    area = vit.patch_embed.patch_size[0] * vit.patch_embed.patch_size[1] * model.blueprint.image_shape[0]
    on_bits = isinstance(proj, PackedLinear) and proj.on_bits
    (binary if on_bits else floats)["patch embedding"] += patches * area * width
    if vit.pos_embed is not None:
        floats["position embedding and tokens"] += vit.pos_embed.numel()
    for block in vit.blocks:
        for linear in (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2):
            _count_linear(linear, tokens, binary, floats)
        _count_attention(block.attn, tokens, binary, floats)
        if not isinstance(block.mlp.act, nn.Identity):
            floats["activation functions"] += tokens * block.mlp.fc1.out_features
        if getattr(block.mlp, "branches", None) is not None:
            floats["branches"] += _branch_operations(block.mlp.branches) * tokens * width
        floats[STREAM] += 2 * tokens * width
        scaled = sum(not isinstance(scale, nn.Identity) for scale in (block.ls1, block.ls2))
        floats["norms"] += scaled * tokens * width
    if isinstance(vit.attn_pool, AttentionPoolLatent):
        _count_pool(vit.attn_pool, patches if not vit.pool_include_prefix else tokens, floats)
    floats["norms"] += sum(_count_norm(name, module, vit, tokens) for name, module in vit.named_modules())
    for name in ("head", "head_dist"):
        head: Any = getattr(vit, name, None)
        if hasattr(head, "in_features"):
            on_bits = isinstance(head, PackedLinear) and head.on_bits
            (binary if on_bits else floats)["heads"] += head.in_features * head.out_features


def _count_norm(name: str, module: Any, vit: VisionTransformer, tokens: int) -> int:
    if isinstance(module, PartNorm):
        return 4 * tokens * len(module.weight)
    if not hasattr(module, "normalized_shape"):
        return 0
    rows = {"fc_norm": 1, "attn_pool.norm": getattr(vit.attn_pool, "latent_len", 1)}.get(name, tokens)
    if name.endswith((".q_norm", ".k_norm")):
        rows *= vit.blocks[0].attn.num_heads
    return 4 * rows * module.normalized_shape[-1]  # mean, variance, normalization, weight and bias


def _count_pool(pool: AttentionPoolLatent, tokens: int, floats: Counter) -> None:
    """Count timm's attention pooling, whose latent queries read all tokens."""
    latents, width = pool.latent_len, pool.num_heads * pool.head_dim
    rows = (
        (pool.q, latents),
        (pool.kv, tokens),
        (pool.proj, latents),
        (pool.mlp.fc1, latents),
        (pool.mlp.fc2, latents),
    )
    for linear, count in rows:
        floats["heads"] += count * linear.in_features * linear.out_features
        floats["biases"] += 0 if linear.bias is None else count * linear.out_features
    floats[PRODUCTS] += 2 * latents * tokens * width
    floats[SOFTMAX] += 3 * latents * tokens * pool.num_heads
    floats["activation functions"] += latents * pool.mlp.fc1.out_features
    floats[STREAM] += latents * pool.out_features


def _count_linear(linear: nn.Linear | PackedLinear, tokens: int, binary: Counter, floats: Counter) -> None:
    products, outputs = tokens * linear.in_features * linear.out_features, tokens * linear.out_features
    if not isinstance(linear, PackedLinear) or not linear.on_bits:
        floats["float weights"] += products
    else:
        binary["1-bit weights"] += products
    if isinstance(linear, PackedLinear):
        if not linear.input_rule.is_float:
            # The comparison that makes the bits.
            floats["activation scales"] += linear.parts * tokens * linear.in_features
        if linear.scale is not None:
            floats["weight scales"] += outputs
        if linear.shift is not None:
            floats["shifts"] += tokens * linear.shift.numel()
        if linear.post is not None:
            _count_end(linear.post, tokens * linear.in_features, outputs, floats)
    if linear.bias is not None:
        floats["biases"] += outputs


def _count_end(end: LayerEnd, inputs: int, outputs: int, floats: Counter) -> None:
    """Count what follows a product, but for its norm, which is a module among the others."""
    if end.factor is not None:
        floats["weight scales"] += outputs
    if end.own_input:  # a wider input is averaged first
        floats[STREAM] += outputs + (inputs if inputs > outputs else 0)
    if end.clips:
        floats["activation functions"] += 2 * outputs
    if end.activation is not None:
        floats["activation functions"] += 3 * outputs
    if end.scale is not None:
        floats["norms"] += 2 * outputs


def _branch_operations(branches: Branches) -> int:
    """Return the operations of the branches for a number of the map: sums, means, scales, offsets, additions."""
    axes = 2 * sum(size + 1 for size in branches.SIZES)
    return axes + 3 * len(branches.scales)


def _count_attention(attention: Attention, tokens: int, binary: Counter, floats: Counter) -> None:
    entries, elements = attention.num_heads * tokens * tokens, tokens * attention.attn_dim
    if not isinstance(attention, PackedAttention):
        floats[PRODUCTS] += 2 * entries * attention.head_dim
        floats[SOFTMAX] += 3 * entries
        floats["attention bias"] += entries * isinstance(attention, BiasedAttention)
        return
    rules = {place: getattr(attention, f"{place}_binarizer").rule for place in ("query", "key", "attention", "value")}
    places = {place: rule.is_float for place, rule in rules.items()}
    groups = {place: rules[place].groups for place in ("attention", "value")}
    scores_are_float = places["query"] or places["key"]
    (floats if scores_are_float else binary)[PRODUCTS] += entries * attention.head_dim
    sums_are_float = places["attention"] or places["value"] or rules["value"].scale_per_token
    planes = 1 if sums_are_float else groups["attention"] * groups["value"]
    (floats if sums_are_float else binary)[PRODUCTS] += planes * entries * attention.head_dim
    # Exponential, sum and division, then one comparison a group.
    floats[SOFTMAX] += 3 * entries * attention.softmax + entries * groups["attention"] * (not places["attention"])
    if attention.bias is not None:
        floats["attention bias"] += entries
    for place, factor in (("query", 1), ("key", 1), ("value", groups["value"])):
        floats["activation scales"] += 0 if places[place] else factor * elements
        floats["shifts"] += elements if getattr(attention, f"{place}_shift") is not None else 0
    if attention.context_end is not None:
        # The sum of query, key and value, which is then added.
        floats[STREAM] += 2 * elements if attention.context_end.own_input else 0
        _count_end(attention.context_end, elements, elements, floats)
