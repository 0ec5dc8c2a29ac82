"""export_onnx(): a packed model's evaluation form as ONNX, for other runtimes.

ONNX has no products of bits: what is -1, 0 and +1 here are floats there, the sums the same exact integers, and the
file is as large as the float model's.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from binvit import bits
from binvit.files import atomic_write
from binvit.nn.layer_parts import AttentionBias, Binarizer
from binvit.nn.linear import BinaryPatchConv
from binvit.nn.precision import on_cpu
from binvit.nn.products import scaled_product
from binvit.nn.rules import Plane
from binvit.packed.exact import PackedAttention, PackedLinear, PackedPatchConv, build_exact, is_binary
from binvit.packed.vit import PackedViT

OPSET = 18
_LARGEST = 2**31 - 2**20  # what protobuf writes into one file, less room for the graph


@on_cpu()
def export_onnx(model: PackedViT, path: str | Path) -> Path:
    """Write a packed model as ONNX: input "images", float32 (batch, C, H, W), output "logits".

    Args:
        model: what `binvit.pack` or `binvit.load` returned.
        path: the file; readers see either the old one or all of the new one.

    Returns:
        The path.

    Raises:
        ModuleNotFoundError: if the packages of the extra `export` are not installed.
        ValueError: if the model is not packed, or larger than an ONNX file may be.
    """
    if not isinstance(model, PackedViT):
        raise ValueError(f"export_onnx() writes a PackedViT, got {type(model).__name__}; use binvit.pack() first.")
    size = 4 * sum(parameter.numel() for parameter in model.blueprint.build().parameters())
    if size > _LARGEST:
        raise ValueError(f"As floats the model has {size} bytes, more than the {_LARGEST} that an ONNX file holds.")
    for package in ("onnx", "onnxscript"):
        try:
            __import__(package)
        except ModuleNotFoundError:
            raise ModuleNotFoundError(f"{package} is not installed (pip install binvit[export]).") from None
    network = _as_floats(model)
    images = torch.zeros(2, *model.blueprint.image_shape)  # 2: an axis of one would be taken for a constant
    buffer = io.BytesIO()
    with _silence():
        program = torch.onnx.export(
            network,
            (images.float(),),
            dynamo=True,
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            opset_version=OPSET,
            verbose=False,
        )
        cast(Any, program).save(buffer)  # a file or, other than its types say, any buffer
    return atomic_write(path, buffer.getvalue())


def _as_floats(model: PackedViT) -> nn.Module:
    """Rebuild the evaluation-mode model of plain float operations, without autograd functions and kernels."""
    network = build_exact(model.blueprint, model.tensors)
    for module in list(network.modules()):
        for name, child in module.named_children():
            if isinstance(child, Binarizer):
                setattr(module, name, _FixedBinarizer(child))
            elif isinstance(child, AttentionBias):
                values = child().detach().clone()
                child.__class__ = _FixedBias
                child.values = nn.Parameter(values, requires_grad=False)
        if isinstance(module, PackedLinear):
            if module.words is not None:
                module.levels = torch.from_numpy(bits.unpack_signs(module.words, module.in_features))
            module.levels = module.levels.float()
            module.__class__ = _FloatPatchConv if isinstance(module, PackedPatchConv) else _FloatLinear
        elif isinstance(module, PackedAttention):
            module.__class__ = _FloatAttention
    return network.eval()


class _FixedBinarizer(nn.Module):
    """A binarizer whose parameters are numbers that nothing has to look at any more."""

    def __init__(self, binarizer: Binarizer) -> None:
        super().__init__()
        self.rule, self.count = binarizer.rule, len(binarizer.rule.parameters)
        for i, parameter in enumerate(binarizer.limited()):
            self.register_buffer(f"parameter{i}", parameter.detach().clone())

    def planes(self, x: Tensor) -> list[Plane]:
        return self.rule.planes(x, *(getattr(self, f"parameter{i}") for i in range(self.count)))


class _FixedBias(AttentionBias):
    def forward(self) -> Tensor:
        return self.values


class _FloatLinear(PackedLinear):
    def _product(self, part: int, levels: Tensor) -> Tensor:
        return F.linear(levels, self.levels.chunk(self.parts)[part])


class _FloatPatchConv(PackedPatchConv):
    _product = _FloatLinear._product

    def forward(self, x: Tensor) -> Tensor:
        grid = (x.shape[2] // self.patch_size[0], x.shape[3] // self.patch_size[1])
        y = PackedLinear.forward(self, BinaryPatchConv.patches(cast(Any, self), x))
        return y.mT.reshape(x.shape[0], self.out_features, *grid)


class _FloatAttention(PackedAttention):
    multiply = staticmethod(lambda x, w: x @ w.mT)

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        rules = self.query_binarizer.rule, self.key_binarizer.rule
        if is_binary(rules[0]) and is_binary(rules[1]):
            return super().scores(q, k)
        (q_plane,), (k_plane,) = self.query_binarizer.planes(q), self.key_binarizer.planes(k)
        return scaled_product(q_plane, k_plane, *rules) * self.factor


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Keep the exporter's progress and warnings, which nobody can act on, from the caller."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
