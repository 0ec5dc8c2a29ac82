"""The exact path: the evaluation-mode model itself, with every product of bits formed from packed words.

All float steps are the model's own torch operations, in the same order and on the same shapes. Sums of binary levels
are integers that float32 holds exactly, so that popcounts give the same numbers and the logits are equal to the last
bit. The path works for every scheme; it is also what the fast path falls back to.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from binvit import bits
from binvit.nn.convert import VECTORS
from binvit.nn.layer_parts import AttentionBias, Binarizer
from binvit.nn.layers import BinaryAttention
from binvit.nn.linear import BinaryLinear, BinaryPatchConv, each
from binvit.nn.products import apply_scales, exact_in_float32, integer_product
from binvit.nn.rules import Plane, Rule, superpose
from binvit.packed.blueprint import Blueprint
from binvit.packed.products import bit_product, few_rows_product, plane_product

FLOATS = (torch.float32, torch.float16)
"""How numbers that are no weights are stored; float16 only where `pack` may round, at `binvit.nn.convert.VECTORS`."""
_HALVED = tuple(ending for endings in VECTORS for ending in endings)


def is_binary(rule: Rule) -> bool:
    """Tell whether all levels of a rule fit into planes of bits: -1, 0 and +1."""
    return not rule.is_float and rule.lowest >= -1 and rule.highest <= 1


def weight_dtype(rule: Rule) -> torch.dtype:
    """Return how a packed model stores weights of a rule: uint64 words of signs, int8 levels, or float32."""
    if is_binary(rule):
        return torch.uint64
    return torch.float32 if rule.is_float else torch.int8


class PackedLinear(nn.Module):
    """`BinaryLinear` with weights of one bit, eight bits or, where the scheme leaves them so, 32.

    Args:
        layer: the layer to stand in for; its weights are not used.
        weight: uint64 words (out, words) of the signs, int8 levels (out, in), or float32 (out, in).
        scale: the weights' scale, or None for 1.
    """

    def __init__(self, layer: BinaryLinear, weight: Tensor, scale: Tensor | None) -> None:
        super().__init__()
        self.in_features, self.out_features, self.parts = layer.in_features, layer.out_features, layer.parts
        self.input_binarizer, self.weight_rule = layer.input_binarizer, layer.weight_binarizers[0].rule
        self.bias, self.shift, self.norm, self.post = layer.bias, layer.shift, layer.norm, layer.post
        self.scale = scale
        self.words: Any = weight.numpy() if weight.dtype == torch.uint64 else None
        self.on_bits = self.words is not None and is_binary(self.input_rule)
        if self.words is None:
            self.levels = weight
        elif not self.on_bits:
            self.levels = torch.from_numpy(bits.unpack_signs(self.words, self.in_features))

    @property
    def input_binarizers(self) -> list[Binarizer]:
        """The binarizer of each part's inputs."""
        return each(self.input_binarizer)

    @property
    def input_rule(self) -> Rule:
        """The rule of the inputs."""
        return self.input_binarizers[0].rule

    @cached_property
    def _prepared(self) -> list[bits.PreparedWeights]:
        return [bits.prepare_weights(words) for words in np.split(self.words, self.parts)]

    def forward(self, x: Tensor) -> Tensor:
        """Map x (..., in_features) to (..., out_features)."""
        normed = x if self.norm is None else self.norm(x)
        if self.parts == 1:
            shifted = normed if self.shift is None else normed + self.shift
            (plane,) = self.input_binarizer.planes(shifted)
            return self.finish(self._product(0, plane.levels), plane.scale, x)
        products = []
        for i, binarizer in enumerate(self.input_binarizers):
            (plane,) = binarizer.planes(normed if self.shift is None else normed + self.shift[i])
            scale = None if self.scale is None else self.scale[i]
            y = apply_scales(self._product(i, plane.levels), plane.scale, scale)
            products.append(y if self.bias is None else y.add_(self.bias.chunk(self.parts)[i]))
        y = torch.cat(products, -1)
        return y if self.post is None else self.post(y, x)

    def _product(self, part: int, levels: Tensor) -> Tensor:
        """Multiply the levels of the inputs (..., in_features) with those of one part's weights."""
        rule = self.input_rule
        if self.on_bits:
            rows = levels.reshape(-1, self.in_features).numpy()
            unsigned = rule.lowest == 0
            packed = bits.pack_levels(rows) if unsigned else bits.pack_signs(rows)
            weights = self._prepared[part]
            product = torch.from_numpy(bits.binary_matmul(packed, weights, self.in_features, unsigned=unsigned))
            return product.float().reshape(*levels.shape[:-1], -1)
        levels_w = self.levels.chunk(self.parts)[part]
        floats = rule.is_float or self.weight_rule.is_float
        exact = floats or exact_in_float32(self.in_features, rule, self.weight_rule)
        y = few_rows_product(levels, levels_w) if exact and not floats else None
        return integer_product(levels, levels_w.float(), exact) if y is None else y

    def finish(self, product: Tensor, input_scale: Tensor | None, x: Tensor | None = None) -> Tensor:
        """Turn integer products (..., out_features), overwritten, and the input x into the layer's output."""
        y = apply_scales(product, input_scale, self.scale)
        if self.bias is not None:
            y.add_(self.bias)
        return y if self.post is None else self.post(y, x)


class PackedPatchConv(PackedLinear):
    """`BinaryPatchConv` on packed weights; the arguments are those of `PackedLinear`."""

    def __init__(self, layer: BinaryPatchConv, weight: Tensor, scale: Tensor | None) -> None:
        super().__init__(layer, weight, scale)
        self.patch_size, self.in_chans = layer.patch_size, layer.in_chans

    def forward(self, x: Tensor) -> Tensor:
        """Map images (B, C, H, W) to features (B, width, H / p, W / p)."""
        grid = (x.shape[2] // self.patch_size[0], x.shape[3] // self.patch_size[1])
        patches: Any = BinaryPatchConv.patches
        y = torch.cat([super(PackedPatchConv, self).forward(patches(self, image)) for image in x.split(1)])
        return y.mT.reshape(x.shape[0], self.out_features, *grid)


class PackedAttention(BinaryAttention):
    """`BinaryAttention` whose two products, query x key and map x value, are formed from bits."""

    multiply = staticmethod(bit_product)

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        """Return binarized query x key / sqrt(d), (B, H, N, N)."""
        if not (is_binary(self.query_binarizer.rule) and is_binary(self.key_binarizer.rule)):
            return super().scores(q, k)
        (q_plane,), (k_plane,) = self.query_binarizer.planes(q), self.key_binarizer.planes(k)
        product = plane_product(q_plane, k_plane, self.multiply)
        return apply_scales(product, q_plane.scale, k_plane.scale) * self.factor

    def attend(self, a: Tensor, v: Tensor) -> Tensor:
        """Return the binarized map (B, H, N, N) times the binarized value (B, H, N, d)."""
        rules = self.attention_binarizer.rule, self.value_binarizer.rule
        maps, values = self.attention_binarizer.planes(a), self.value_binarizer.planes(v)
        if any(rule.is_float for rule in rules) or rules[1].scale_per_token:
            return superpose(maps) @ superpose(values)
        total: Any = None
        for a_plane in maps:
            for v_plane in values:
                product = plane_product(a_plane, v_plane._replace(levels=v_plane.levels.mT), self.multiply)
                scales = [s for s in (a_plane.scale, v_plane.scale) if s is not None]
                if scales:
                    product.mul_(scales[0] * scales[1] if len(scales) == 2 else scales[0])
                total = product if total is None else total.add_(product)
        return total


class RelativeBias(AttentionBias):
    """A relative `AttentionBias` without an index per pair of tokens: a small file may claim many tokens.

    Attributes:
        grid: patches along height and width.
        prefix: number of tokens before the patches.
    """

    grid: tuple[int, int]
    prefix: int

    def forward(self) -> Tensor:
        """Return the bias, (heads, N, N)."""
        (h, w), prefix, n, values = self.grid, self.prefix, self.tokens, self.values
        heads, length = values.shape
        # Entry (i, j, k, l) is the table's (i + k, j + l); a patch at (h - 1 - k, w - 1 - l) is the key.
        pairs = values.as_strided((heads, h, w, h, w), (length, 2 * w - 1, 1, 2 * w - 1, 1)).flip(3, 4)
        _, rows, keys = values.split([(2 * h - 1) * (2 * w - 1), prefix * n, prefix], 1)
        bias = values.new_empty(heads, n, n)
        bias[:, prefix:, prefix:] = pairs.reshape(heads, h * w, h * w)
        bias[:, :prefix] = rows.reshape(heads, prefix, n)
        bias[:, prefix:, :prefix] = keys[:, None]
        return bias


def build_exact(
    blueprint: Blueprint, tensors: Mapping[str, Tensor], model: VisionTransformer | None = None
) -> VisionTransformer:
    """Rebuild the evaluation-mode model of a packed file on packed weights.

    Args:
        blueprint: the file's header.
        tensors: the file's tensors: the model's state, with the weights of binarized layers as words or int8 levels
            and their scales as `weight_scale`.
        model: what `Blueprint.build` has returned, of which the model is made; None builds it.

    Raises:
        ValueError: if the blueprint cannot be built, or if a tensor is missing, unexpected, of another shape or type
            than the blueprint says, not finite, or has bits set past the end of a row.
    """
    blueprint.vit.check_sizes(tensors)
    model, rest = model or blueprint.build(), dict(tensors)
    for name, module in list(model.named_modules()):
        parent, _, child = name.rpartition(".")
        if isinstance(module, BinaryLinear):
            kind: Any = PackedPatchConv if isinstance(module, BinaryPatchConv) else PackedLinear
            setattr(model.get_submodule(parent), child, kind(module, *_take_weight(name, module, rest)))
        elif isinstance(module, BinaryAttention):
            module.__class__ = PackedAttention
            module.factor = torch.tensor(module.head_dim**-0.5, dtype=torch.float32)
        elif isinstance(module, AttentionBias) and module.kind == "relative":
            module.__class__ = RelativeBias
            del module.index
            module.grid, module.prefix = model.patch_embed.grid_size, model.num_prefix_tokens
    expected = model.state_dict()
    flags = {name: torch.tensor(1.0) for name in expected if name.endswith(".initialized")}
    for name in expected | rest:
        shape = None if name in flags or name not in expected else expected[name].shape
        _check_tensor(name, rest.get(name), FLOATS if name.endswith(_HALVED) else FLOATS[:1], shape)
    model.load_state_dict({name: _aligned(tensor) for name, tensor in rest.items()} | flags, assign=True)
    return model.requires_grad_(False)


def _aligned(tensor: Tensor) -> Tensor:
    # A copy starts at a multiple of 64 bytes, wherever the file put the tensor: vector units round alike.
    return tensor.to(torch.float32 if tensor.is_floating_point() else tensor.dtype, copy=True)


def fold_weight(layer: BinaryLinear) -> Plane:
    """Return levels (out_features, in_features) and scale of a layer's weights; a scale of each part if it has some."""
    weights = layer.constrained().chunk(layer.parts)
    planes = [b.planes(w)[0] for b, w in zip(layer.weight_binarizers, weights, strict=True)]
    if layer.parts == 1:
        return planes[0]
    scales = [plane.scale for plane in planes if plane.scale is not None]
    scale = torch.stack(scales) if scales else None
    return Plane(torch.cat([plane.levels for plane in planes]), scale)


def _take_weight(name: str, layer: BinaryLinear, tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
    """Take a layer's weight and its scale, None where the rule has none, out of the tensors of a file."""
    dtype, names = weight_dtype(layer.weight_binarizers[0].rule), (f"{name}.weight", f"{name}.weight_scale")
    weight: Any = tensors.pop(names[0], None)
    scale = tensors.pop(names[1], None)
    words = dtype == torch.uint64
    columns = bits.word_count(layer.in_features) if words else layer.in_features
    _check_tensor(names[0], weight, (dtype,), (layer.out_features, columns))
    tail = layer.in_features % 64
    if words and tail and (weight[:, -1].numpy() >> np.uint64(tail)).any():
        raise ValueError(
            f"The packed model does not fit its header: the tensor {names[0]} has bits past its {layer.in_features} "
            "columns."
        )
    rows = layer.out_features // layer.parts
    shape = _scale_shape(layer.weight_binarizers[0].rule, rows, layer.in_features, layer.parts)
    _check_tensor(names[1], scale, FLOATS[:1], shape)
    return weight if words else _aligned(weight), None if scale is None else _aligned(scale)


@lru_cache(maxsize=1024)  # its steps on the "meta" device take longer than those on numbers
def _scale_shape(rule: Rule, rows: int, columns: int, parts: int) -> tuple[int, ...] | None:
    """Return the shape of the scale of folded weights, None if the rule has none."""
    with torch.device("meta"):
        scale = Binarizer(rule, channels=rows).planes(torch.empty(rows, columns))[0].scale
    if scale is None:
        return None
    return tuple(scale.shape) if parts == 1 else (parts, *scale.shape)


def _check_tensor(
    name: str, tensor: Tensor | None, dtypes: tuple[torch.dtype, ...], shape: Sequence[int] | None
) -> None:
    """Refuse a tensor of a file that has none of the types or another shape, where None stands for no tensor."""
    if tensor is None and shape is None:
        return
    sentence = f"The packed model does not fit its header: the tensor {name} "
    if tensor is None:
        raise ValueError(f"{sentence}is missing.")
    if shape is None:
        raise ValueError(f"{sentence}of shape {tuple(tensor.shape)} is none of the model's.")
    if tensor.dtype not in dtypes or tensor.shape != tuple(shape):
        types = " or ".join(map(_type_name, dtypes))
        raise ValueError(
            f"{sentence}is {_type_name(tensor.dtype)} of shape {tuple(tensor.shape)}, expected {types} of shape "
            f"{tuple(shape)}."
        )
    if tensor.is_floating_point() and not tensor.isfinite().all():
        raise ValueError(f"{sentence}holds numbers that are not finite.")


def _type_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
