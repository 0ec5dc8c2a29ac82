"""Where binarization loses information: one tensor of a float model at a time, and how a batch leaks into logits."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import binvit
from binvit.lab.data.datasets import ImageData
from binvit.lab.data.loader import Batches
from binvit.lab.data.transforms import eval_transform
from binvit.lab.training.devices import Team
from binvit.lab.training.evaluation import classify
from binvit.nn.layer_parts import Binarizer
from binvit.nn.layers import BinaryAttention
from binvit.nn.linear import BinaryLinear
from binvit.nn.rules import SMALLEST_SCALE, Rule, superpose
from binvit.nn.schemes import Scheme

# Tensor of a transformer block -> the fields of a scheme that make it 1-bit; all other fields stay "float".
TENSORS: dict[str, dict[str, str]] = {
    "query": {"query": "elastic"},
    "key": {"key": "elastic"},
    "attention map": {"attention": "elastic"},
    "value": {"value": "elastic"},
    "linear weights": {"weight": "bwn"},
    "linear inputs": {"input": "elastic", "hidden": "elastic_unsigned"},
}
SUPERPOSED = {"attention map": {"attention": "gsb"}, "value": {"value": "gsb"}}
_PLACES = ("weight", "input", "hidden", "query", "key", "attention", "value")
_REFITS = 12  # levels of an unsigned binarizer depend on its scale; they settle within a few rounds


def single_tensor_options(tensor: str, superposed: bool = False, **options: Any) -> dict[str, Any]:
    """Return the fields that turn the scheme "gsb" into one that binarizes a single tensor of every block.

    Args:
        tensor: a key of `TENSORS`.
        superposed: binarize by GSB, which is defined for the attention map and the value, instead of by one group.
        **options: further fields, such as thresholds and reduce.

    Returns:
        fields for `binvit.scheme("gsb", ...)` or for a trial's `scheme_options`.

    Raises:
        ValueError: there is no such tensor, or GSB is not defined for it.
    """
    valid = SUPERPOSED if superposed else TENSORS
    if tensor not in valid:
        kind = "GSB does not binarize" if superposed else "There is no tensor"
        raise ValueError(f"{kind} {tensor!r}; valid tensors are {', '.join(valid)}.")
    plain = {"shift": False, "attention_bias": "none", "activation_limit": None, "components": ("mlp", "mhsa")}
    return dict.fromkeys(_PLACES, "float") | plain | valid[tensor] | options


def binarize_tensor(
    model: VisionTransformer, scheme: Scheme, images: Tensor, least_squares: bool = True
) -> VisionTransformer:
    """Binarize a trained float model without training it further, its scales set from images.

    Args:
        model: a float timm vision transformer.
        scheme: what becomes 1-bit.
        images: training images as the model sees them, (B, 3, H, W).
        least_squares: choose the scales a that minimize ||b(x; a) - x||^2, layer by layer, each seeing what the
            binarized layers before it put out. False keeps the scales that training starts from (twice as large for
            signs), as `binvit.calibrate` sets them.

    Returns:
        The binarized copy in evaluation mode.
    """
    binary = binvit.calibrate(binvit.binarize(model, scheme).eval(), images)
    if least_squares:
        learned = [module for module in binary.modules() if isinstance(module, Binarizer) and module.rule.parameters]
        for binarizer in learned:
            values = functools.partial(_fitted_values, binarizer)
            binarizer.values = values  # type: ignore[method-assign] # in the one forward pass that follows
        with torch.no_grad():
            binary(images)
        for binarizer in learned:
            del binarizer.values
    return binary


def _fitted_values(binarizer: Binarizer, x: Tensor, shift: Tensor | None = None) -> tuple[Tensor, ...]:
    """Set a binarizer's scales on what arrives, so that all later layers see its final output."""
    scales = fit_scales(binarizer.rule, x if shift is None else x + shift)
    for name, scale in zip(binarizer.rule.parameters, scales, strict=True):
        getattr(binarizer, name).copy_(scale)
    return scales


@torch.no_grad()
def fit_scales(rule: Rule, x: Tensor) -> tuple[Tensor, ...]:
    """Return the scales that bring the binarized tensor closest to x in the sense of least squares.

    Where levels depend on a scale, levels and scales are computed in turn, from two starts: the rule's own initial
    scales and tiny ones, at which everything positive has the upper level. The best scales found are returned.

    Args:
        rule: a rule with one scale per plane and tensor, such as `Elastic` or GSB's.
        x: the float tensor, of a shape the rule takes.

    Returns:
        One scale per plane, each of shape ().
    """
    initial, target = rule.initial(x), x.flatten().double()
    best, least = initial, math.inf
    for start in (initial, tuple(torch.full_like(scale, SMALLEST_SCALE) for scale in initial))[
        : 1 + (rule.lowest == 0)
    ]:
        scales = start
        for _ in range(_REFITS):
            levels = torch.stack([plane.levels.flatten().double() for plane in rule.planes(x, *scales)])
            error = float((torch.stack(scales).double() @ levels - target).square().sum())
            if error < least:
                best, least = scales, error
            # A plane without any entry makes the equations singular; the pseudo-inverse gives it the scale 0.
            solution = torch.linalg.pinv(levels @ levels.T, hermitian=True) @ (levels @ target)
            before, scales = scales, tuple(scale.clamp(min=SMALLEST_SCALE) for scale in solution.to(x.dtype))
            if all(torch.isclose(*pair, rtol=1e-5) for pair in zip(before, scales, strict=True)):
                break
    return best


def _binarized_tensors(model: VisionTransformer, images: Tensor) -> list[tuple[Binarizer, Tensor]]:
    """Return every binarizer of the blocks that is not float, with the tensor it binarizes."""
    found: list[tuple[Binarizer, Tensor]] = []
    inside = list(model.blocks.modules())
    attentions = [module for module in inside if isinstance(module, BinaryAttention)]
    linears = [module for module in inside if isinstance(module, BinaryLinear)]

    def keep(layer: BinaryLinear, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0] if layer.norm is None else layer.norm(inputs[0])
        for binarizer, shift in zip(layer.input_binarizers, layer.shifts, strict=True):
            found.append((binarizer, x if shift is None else x + shift))

    hooks = [linear.register_forward_pre_hook(keep) for linear in linears]
    for attention in attentions:
        attention.record = True
    try:
        with torch.no_grad():
            model(images)
        for linear in linears:
            weights = linear.constrained().detach().chunk(linear.parts)
            found += zip(linear.weight_binarizers, weights, strict=True)
        for attention in attentions:
            seen = attention.last_attention
            for place, name in (("query", "query"), ("key", "key"), ("attention", "map"), ("value", "value")):
                found.append((getattr(attention, f"{place}_binarizer"), seen[name]))
    finally:
        for hook in hooks:
            hook.remove()
        for attention in attentions:
            attention.record, attention.last_attention = False, {}
    return [(binarizer, x) for binarizer, x in found if not binarizer.rule.is_float]


def relative_error(binary: Tensor, x: Tensor) -> float:
    """Return ||b - x|| / ||x|| of a binarized tensor b: 0 without loss, 1 when a zero tensor would do as well."""
    return float((binary - x).double().norm() / x.double().norm().clamp(min=1e-300))


def cosine_similarity(binary: Tensor, x: Tensor) -> float:
    """Return the cosine of the angle between a binarized tensor and the float one, which no scale can change."""
    a, b = binary.double().flatten(), x.double().flatten()
    return float(a @ b / (a.norm() * b.norm()).clamp(min=1e-300))


def entropy(levels: Tensor) -> float:
    """Return the Shannon entropy of a tensor's distribution over its different values, in bits per element."""
    counts = torch.unique(levels, return_counts=True)[1].double()
    share = counts / counts.sum()
    return max(0.0, float(-(share * share.log2()).sum()))


def tensor_losses(model: VisionTransformer, images: Tensor) -> dict[str, float]:
    """Measure what the binarized tensors of a model have lost, each against its own float input.

    Args:
        model: a binarized model in evaluation mode.
        images: the model's input, (B, 3, H, W).

    Returns:
        relative_error, cosine and entropy (bits per element), each the mean over the binarized tensors of all blocks.

    Raises:
        ValueError: no tensor of the model's blocks is binarized.
    """
    rows = []
    for binarizer, x in _binarized_tensors(model, images):
        binary = superpose(binarizer.planes(x)).detach()
        rows.append((relative_error(binary, x), cosine_similarity(binary, x), entropy(binary)))
    if not rows:
        raise ValueError("No tensor of the model's blocks is binarized, so there is no loss to measure.")
    return dict(zip(("relative_error", "cosine", "entropy"), np.mean(rows, axis=0).tolist(), strict=True))


def sample_images(data: ImageData, split: str = "train", count: int = 256) -> Tensor:
    """Return images spread evenly over a split as a model sees them, float32 (count or fewer, 3, H, W)."""
    dataset = getattr(data, split)
    chosen = np.unique(np.linspace(0, len(dataset) - 1, count).astype(int))
    transform = eval_transform(data.image_size, data.mean, data.std)
    return torch.stack([transform(dataset[index][0]) for index in chosen])


def one_tensor_at_a_time(
    model: VisionTransformer,
    data: ImageData,
    images: int = 256,
    thresholds: Sequence[float] = (0.7, 0.9),
    reduce: str = "row",
    least_squares: bool = True,
    batch_size: int = 256,
    device: str | None = None,
) -> pd.DataFrame:
    """Binarize each tensor of a trained float model alone, without further training, and measure what is lost.

    Args:
        model: a float timm vision transformer.
        data: the data it was trained on; scales are set on training images, losses are measured on test images.
        images: how many images set the scales, and on how many errors and entropies are measured.
        thresholds: of GSB's groups.
        reduce: the set over which GSB's maxima run.
        least_squares: as in `binarize_tensor`.
        batch_size: images of an evaluation step.
        device: "cpu" or "cuda"; None takes the GPU if there is one.

    Returns:
        One row per tensor and binarizer ("1-bit" or "GSB"): tensor, binarizer, test_accuracy, accuracy_drop,
        relative_error, cosine and entropy.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    model = model.to(device).eval()
    calibration = sample_images(data, "train", images).to(device)
    measured = sample_images(data, "test", images).to(device)
    test = Batches(data.test, eval_transform(data.image_size, data.mean, data.std), batch_size)

    def accuracy(model: nn.Module) -> float:
        return float(np.mean(classify(model, test, Team(device)) == data.test.labels))

    reference = accuracy(model)
    rows = []
    for tensor, superposed in [(name, kind) for name in TENSORS for kind in (False, True)]:
        if superposed and tensor not in SUPERPOSED:
            continue
        options = single_tensor_options(tensor, superposed, thresholds=tuple(thresholds), reduce=reduce)
        binary = binarize_tensor(model, binvit.scheme("gsb", **options), calibration, least_squares)
        reached = accuracy(binary)
        row: dict[str, Any] = {
            "tensor": tensor,
            "binarizer": "GSB" if superposed else "1-bit",
            "test_accuracy": reached,
        }
        rows.append(row | {"accuracy_drop": reference - reached} | tensor_losses(binary, measured))
    return pd.DataFrame(rows)
