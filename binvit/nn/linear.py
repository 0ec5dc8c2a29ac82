"""Linear layers of a binarized vision transformer; each replaces a float one and keeps its parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from binvit.nn.block_parts import LayerEnd
from binvit.nn.fused.linear import Layer, binary_linear, takes_linear
from binvit.nn.layer_parts import Binarizer
from binvit.nn.products import ReplaceValue, binary_product
from binvit.nn.rules import Rule
from binvit.nn.schemes import Scheme


def _copy_of(parameter: Tensor) -> nn.Parameter:
    return nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)


def _in_backward() -> bool:
    """Tell whether a backward pass is running, which computes checkpointed blocks again."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def each(binarizer: Binarizer | nn.ModuleList) -> list[Binarizer]:
    """Return a layer's binarizer, or that of each of its parts, as a list."""
    return cast("list[Binarizer]", list(binarizer) if isinstance(binarizer, nn.ModuleList) else [binarizer])


class BinaryLinear(nn.Module):
    """Linear layer with binarized weights and inputs: y = end(b_x(x + shift) b_w(W)^T + bias, x).

    Args:
        linear: the float layer (`nn.Linear`, or a convolution seen as one by `BinaryPatchConv`); its weights are
            copied.
        weight: rule of the weights.
        input: rule of the inputs.
        shift: learn a shift per input feature, added before the inputs are binarized.
        linear_bias: "keep" the float layer's bias or lack of one, have one "always" or "never".
        parts: the outputs are those of so many layers of equal width (query, key and value), each with binarizers and a
            shift of its own.
        latent: what happens to the latent weights before every training step's forward pass, for good: "free" nothing,
            "clipped" to [-1, 1], "centred" over each row's fan-in, then clipped.
        norm: normalize the inputs first.
        post: what follows, a `LayerEnd`.
    """

    weight_binarizer: Any  # one, or a ModuleList of one per part
    input_binarizer: Any

    def __init__(
        self,
        linear: nn.Linear | nn.Conv2d,
        weight: Rule,
        input: Rule,
        *,
        shift: bool = False,
        linear_bias: str = "keep",
        parts: int = 1,
        latent: str = "free",
        norm: bool = False,
        post: LayerEnd | None = None,
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = linear.weight.detach().flatten(1).shape
        self.parts, self.latent = parts, latent
        self.weight = _copy_of(linear.weight)
        bias = nn.Parameter(self.weight.new_zeros(self.out_features)) if linear.bias is None else _copy_of(linear.bias)
        has_bias = linear_bias == "always" or (linear_bias == "keep" and linear.bias is not None)
        self.bias = bias if has_bias else None
        shape = (self.in_features,) if parts == 1 else (parts, self.in_features)
        self.shift = nn.Parameter(self.weight.new_zeros(shape)) if shift and not input.is_float else None
        rows = self.out_features // parts
        weights = [Binarizer(weight, channels=rows) for _ in range(parts)]
        inputs = [Binarizer(input) for _ in range(parts)]
        self.weight_binarizer: Binarizer | nn.ModuleList = weights[0] if parts == 1 else nn.ModuleList(weights)
        self.input_binarizer: Binarizer | nn.ModuleList = inputs[0] if parts == 1 else nn.ModuleList(inputs)
        self.norm = nn.LayerNorm(self.in_features) if norm else None
        self.post = post

    @property
    def matrix(self) -> Tensor:
        """Latent weights, (out_features, in_features)."""
        return self.weight.flatten(1)

    @property
    def weight_binarizers(self) -> list[Binarizer]:
        """The binarizer of each part's weights."""
        return each(self.weight_binarizer)

    @property
    def input_binarizers(self) -> list[Binarizer]:
        """The binarizer of each part's inputs."""
        return each(self.input_binarizer)

    @property
    def shifts(self) -> list[Tensor | None]:
        """The learned shift of each part's inputs, (in_features,)."""
        return [self.shift] * self.parts if self.shift is None or self.parts == 1 else list(self.shift.unbind())

    def constrained(self) -> Tensor:
        """Return the latent weights (out_features, in_features) that are binarized; in training mode they stay so."""
        w = self.matrix
        if self.latent == "free":
            return w
        fixed = w.detach()
        if self.latent == "centred":
            fixed = fixed - fixed.mean(1, keepdim=True)
        fixed = fixed.clamp(-1, 1)
        if not self.training:
            return ReplaceValue.apply(w, fixed)
        # Behind autograd's back: a second forward pass before the step changes nothing but the rounding of what the
        # first has kept, and not even that where a checkpointed block is computed again.
        if not _in_backward():
            self.weight.data.copy_(fixed.view_as(self.weight))
        return self.matrix

    def _layer(self, x: Tensor) -> Layer:
        inputs, weights = self.input_binarizers, self.weight_binarizers
        w, shift = self.constrained(), self.shift
        shifts, rows = [shift] * self.parts, [w]
        if self.parts > 1:
            rows = list(w.detach().chunk(self.parts))
            shifts = shifts if shift is None else list(shift.detach())
        rule_x, rule_w, none = inputs[0].rule, weights[0].rule, [()] * self.parts
        of_x = [b.values(x, shift) for b, shift in zip(inputs, shifts, strict=True)] if rule_x.parameters else none
        of_w = [b.values(w) for b, w in zip(weights, rows, strict=True)] if rule_w.parameters else none
        return Layer(rule_x, rule_w, of_x, of_w, w, shift, self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (..., in_features) to (..., out_features)."""
        inputs, post = x if self.norm is None else self.norm(x), self.post
        layer = self._layer(inputs)
        if self.training and takes_linear(layer.rule_x, layer.rule_w, inputs, layer.w, layer.shift, layer.bias):
            if post is None:
                return binary_linear(inputs, layer)
            if post.is_compiled(x):
                return binary_linear(inputs, layer, post.kind, x if post.own_input else None, post.vectors)
            y = binary_linear(inputs, layer)
        else:
            y = self._by_parts(inputs, layer)
        return y if post is None else post(y, x)

    def _by_parts(self, x: Tensor, layer: Layer) -> Tensor:
        weights: Sequence[Tensor] = [layer.w]
        biases: Sequence[Tensor | None] = [self.bias] * self.parts
        if self.parts > 1:  # one part needs no views, whose gradients would be copied
            weights = layer.w.chunk(self.parts)
            biases = biases if self.bias is None else self.bias.chunk(self.parts)
        products = [
            binary_product(x, w, layer.rule_x, layer.rule_w, of_x, of_w, shift, bias)
            for w, of_x, of_w, shift, bias in zip(
                weights, layer.parameters_x, layer.parameters_w, self.shifts, biases, strict=True
            )
        ]
        return products[0] if self.parts == 1 else torch.cat(products, -1)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}"


def scheme_linear(
    linear: nn.Linear,
    scheme: Scheme,
    weight: str = "weight",
    input: str = "input",
    *,
    parts: int = 1,
    normed: bool = True,
    last: bool = False,
) -> BinaryLinear:
    """Return a linear layer of a block with the parts that the scheme names.

    Args:
        linear: the float layer.
        scheme: what is binarized and how.
        weight: which of the scheme's places holds for the weights.
        input: which of them holds for the inputs.
        parts: number of equal parts of the output: 3 for query, key and value.
        normed: the block itself normalizes the inputs.
        last: the layer ends a branch of the block, so that a scale of the branch belongs here.
    """
    outputs, inputs = linear.weight.shape
    ends: dict[str, Any] = {
        "factor": scheme.output_factor,
        "norm": scheme.norm == "after",
        "own_input": scheme.own_input,
        "activation": scheme.layer_activation,
        "scale": scheme.layer_scale and last,
    }
    has_end = any(value not in (False, "none") for value in ends.values())
    return BinaryLinear(
        linear,
        scheme.rule(weight),
        scheme.rule(input),
        shift=scheme.shift,
        linear_bias=scheme.linear_bias,
        parts=parts if scheme.separate_qkv else 1,
        latent=scheme.latent,
        norm=scheme.norm == "before" and not normed,
        post=LayerEnd(inputs, outputs, parts=parts, **ends) if has_end else None,
    )


class BinaryPatchConv(BinaryLinear):
    """Patch embedding with binarized or 8-bit weights: the strided convolution as one product over unfolded patches.

    In evaluation mode every image is multiplied by itself, so that float rounding cannot depend on the batch; not
    where `torch.export` writes down one graph for batches of any size.

    Args:
        conv: convolution whose stride equals its kernel.
        weight: rule of the weights.
        input: rule of the patches; a mean over a patch is XNOR-Net's box filter, since patches do not overlap.
    """

    def __init__(self, conv: nn.Conv2d, weight: Rule, input: Rule) -> None:
        super().__init__(conv, weight, input)
        self.patch_size = tuple(conv.kernel_size)
        self.in_chans = conv.in_channels

    def patches(self, x: Tensor) -> Tensor:
        """Cut images (B, C, H, W) into patches (B, L, C * p * p), row by row."""
        b, c, h, w = x.shape
        ph, pw = self.patch_size
        x = x.reshape(b, c, h // ph, ph, w // pw, pw).permute(0, 2, 4, 1, 3, 5)
        return x.reshape(b, (h // ph) * (w // pw), c * ph * pw)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (B, C, H, W) to features (B, width, H / p, W / p)."""
        grid = (x.shape[2] // self.patch_size[0], x.shape[3] // self.patch_size[1])
        if self.training or torch.compiler.is_exporting():
            y = super().forward(self.patches(x))
        else:
            y = torch.cat([super(BinaryPatchConv, self).forward(self.patches(image)) for image in x.split(1)])
        return y.mT.reshape(x.shape[0], self.out_features, *grid)
