"""PackedViT: a binary vision transformer that runs on bits."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any, cast, overload

import numpy as np
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from binvit import bits
from binvit.config import show
from binvit.images import Source, normalize, to_pixels
from binvit.nn.model import poison
from binvit.nn.precision import forked, on_cpu
from binvit.packed.blueprint import Blueprint
from binvit.packed.exact import build_exact
from binvit.packed.fast.fold import NotFoldable
from binvit.packed.fast.path import FastPath
from binvit.packed.fast.threads import ONE_TORCH_THREAD, torch_threads

PARTS = (
    "1-bit weights",
    "weight scales",
    "activation scales",
    "shifts",
    "attention bias",
    "patch embedding",
    "position embedding and tokens",
    "heads",
    "norms",
    "biases",
    "activation functions",
    "branches",
    "float weights",
)
"""What the bytes and operations of a model are counted by."""


class PackedViT:
    """A packed binary vision transformer; `pack` makes it of a model, `load` of a file.

    Args:
        blueprint: what is no tensor.
        tensors: the tensors as a packed file holds them.
        exact: take the exact path.
        model: what `Blueprint.build` has returned, of which the packed one is made; None builds it.

    Attributes:
        blueprint: what is no tensor: scheme, shape, class names, normalization.
        tensors: everything else, by name.
        exact: the logits equal the evaluation-mode model's bit for bit.
        reason: why the fast path takes generic steps for this model; empty if it does not.
    """

    @on_cpu()
    def __init__(
        self,
        blueprint: Blueprint,
        tensors: Mapping[str, Tensor],
        exact: bool = False,
        model: VisionTransformer | None = None,
    ) -> None:
        self.blueprint, self.tensors, self.exact = blueprint, dict(tensors), bool(exact)
        self._model = build_exact(blueprint, tensors, model)
        self._fast, self.reason = None, ""
        if not self.exact:
            try:
                self._fast = FastPath(self._model)
            except NotFoldable as error:
                self.reason = str(error)

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names; empty where they are not known."""
        return self.blueprint.classes

    @property
    def nbytes(self) -> dict[str, int]:
        """Bytes of the stored tensors by part, a key of `PARTS`."""
        sizes = dict.fromkeys(PARTS, 0)
        for name, tensor in self.tensors.items():
            sizes[part_of(name, tensor)] += tensor.numel() * tensor.element_size()
        return {part: size for part, size in sizes.items() if size}

    @overload
    def __call__(self, images: Tensor, threads: int | None = None) -> Tensor: ...
    @overload
    def __call__(self, images: np.ndarray, threads: int | None = None) -> np.ndarray: ...
    def __call__(self, images: Tensor | np.ndarray, threads: int | None = None) -> Tensor | np.ndarray:
        """Compute the logits of normalized images.

        Args:
            images: float32 (B, C, H, W), a torch tensor or a numpy array.
            threads: how many threads the kernels use; by default as many as torch, which follows OMP_NUM_THREADS, but
                one where small images are so few that it takes longer to wake others. Not more than
                `binvit.bits.set_threads` said.

        Returns:
            float32 (B, classes), of the same kind; NaN for an image with pixels that are not finite.

        Raises:
            ValueError: if the images have another shape or type.
        """
        with bits.use_threads(threads):
            return self._logits(images, threads)

    def _logits(self, images: Tensor | np.ndarray, threads: int | None) -> Tensor | np.ndarray:
        is_tensor, given = isinstance(images, Tensor), images
        images = as_tensor(images)
        if images.device.type != "cpu" or images.layout != torch.strided:
            raise ValueError(f"Images must be a dense tensor on the CPU, got {images.layout} on {images.device}.")
        shape = self.blueprint.image_shape
        if tuple(images.shape[1:]) != shape or images.dtype != torch.float32:
            raise ValueError(
                f"Images must be float32 of shape (B, {', '.join(map(str, shape))}), got {given.dtype} of shape "
                f"{tuple(images.shape)}."
            )
        with torch.inference_mode(), on_cpu():
            logits = self._run(images.detach().resolve_neg(), threads)
        return logits.clone() if is_tensor else logits.numpy()

    def _run(self, images: Tensor, threads: int | None) -> Tensor:
        if not len(images):
            vit: Any = self._model
            tokens = torch.zeros(1, vit.patch_embed.num_patches + vit.num_prefix_tokens, vit.embed_dim)
            return vit.forward_head(tokens.float())[:0]
        if self._fast is None or not self._fast.takes(len(images)):
            with bits.use_threads(1 if forked() else None):  # numba ends a forked process that asks for OpenMP
                return self._model(images)
        with ONE_TORCH_THREAD:
            finite = math.isfinite(images.sum().item())  # one pass; a sum beyond float32 only takes the longer way
            clean = images if finite else images.nan_to_num(0, 0, 0)
        most = min(torch_threads() if threads is None else threads, bits.get_threads())
        logits = self._fast(clean, self._fast.worth(len(images), most) if threads is None else most)
        if finite:
            return logits
        with ONE_TORCH_THREAD:
            return poison(logits, images)

    def preprocess(self, images: Source | Sequence[Source]) -> Tensor:
        """Turn images into what the model reads, as training did: decoded, resized, cut and normalized.

        Args:
            images: one image or several: PIL images, paths, encoded bytes, or uint8 arrays (H, W) or (H, W, 3).

        Returns:
            float32 (B, C, height, width).

        Raises:
            FileNotFoundError: if an image is missing.
            ValueError: if something is no image, or the model does not say how its images are normalized.
        """
        plan, (channels, *size) = self.blueprint, self.blueprint.image_shape
        if not plan.mean or channels not in (1, 3):
            raise ValueError(
                f"The model takes images of {channels} channels with the means {plan.mean}; images need 3 channels or "
                "1, and a known normalization, which pack() takes as mean and std."
            )
        sources = cast("list[Source]", list(images) if isinstance(images, list | tuple) else [images])
        pixels = np.empty((len(sources), *size, channels), np.uint8)
        for i, source in enumerate(sources):
            pixels[i] = to_pixels(source, channels, plan.vit.img_size, plan.resize, plan.interpolation)
        with ONE_TORCH_THREAD:
            return normalize(pixels, plan.mean, plan.std)

    def predict(
        self, images: Tensor | Source | Sequence[Source], top: int = 5, threads: int | None = None
    ) -> list[list[tuple[str, float]]]:
        """Find the likeliest classes of images.

        Args:
            images: what a call takes, float32 (B, C, H, W), or what `preprocess` takes.
            top: how many classes to return for an image.
            threads: as for a call.

        Returns:
            For every image its `top` classes, likeliest first, as pairs of name and probability.

        Raises:
            FileNotFoundError: if an image is missing.
            ValueError: if the images do not fit or hold pixels that are not finite, or the model has no classes.
        """
        count = self.blueprint.vit.num_classes
        if not isinstance(top, int | np.integer) or isinstance(top, bool) or top < 1:
            raise ValueError(f"The number of classes, top, must be a whole number of at least 1, got {show(top)}.")
        if isinstance(images, Tensor) or (isinstance(images, np.ndarray) and images.dtype == np.float32):
            batch = as_tensor(images)
        else:
            batch = self.preprocess(images)
        logits = self(batch, threads)
        if not count or logits.ndim != 2:
            raise ValueError("The model has no head that tells classes; a call gives its features.")
        if (unknown := logits.isnan().any(-1)).any():
            raise ValueError(
                f"Images need finite pixels, but those of image {int(unknown.nonzero()[0])} in the batch are not."
            )
        names = self.classes or tuple(f"class {number}" for number in range(count))
        with ONE_TORCH_THREAD:
            probabilities, numbers = logits.softmax(-1).topk(min(int(top), count))
        return [
            [(names[number], probability) for number, probability in zip(*pair, strict=True)]
            for pair in zip(numbers.tolist(), probabilities.tolist(), strict=True)
        ]

    def warm_up(self) -> float:
        """Compile the kernels of this model, or load them from disk, so that no prediction has to wait for them.

        Returns:
            The seconds it took.
        """
        start = time.perf_counter()
        for images in (1, 2):  # what the head reads of one image lies side by side, of two it does not
            self(torch.zeros(images, *self.blueprint.image_shape, dtype=torch.float32, device="cpu"))
        return time.perf_counter() - start

    def _path(self) -> str:
        if self.exact:
            return "exact"
        return f"generic ({self.reason})" if self.reason else "fast"

    def __repr__(self) -> str:
        vit, size = self.blueprint.vit, sum(self.nbytes.values())
        channels, height, width = self.blueprint.image_shape
        lines = [
            f"scheme={self.blueprint.scheme.name!r}, path={self._path()}",
            f"images=({channels}, {height}, {width}), patch={'x'.join(map(str, vit.patch_size))}, "
            f"width={vit.embed_dim}, depth={vit.depth}, heads={vit.num_heads}, "
            f"classes={vit.num_classes}{', distilled' if vit.distilled else ''}",
            f"{_in_words(size)}: " + ", ".join(f"{part} {_in_words(n)}" for part, n in self.nbytes.items()),
            *filter(None, [str(self.blueprint.card)]),
        ]
        return "PackedViT(\n" + "".join(f"    {line}\n" for line in lines) + ")"


def as_tensor(images: Tensor | np.ndarray) -> Tensor:
    """Return images as a torch tensor; arrays that torch cannot map, such as mirrored or swapped ones, are copied."""
    if isinstance(images, Tensor):
        return images
    if not isinstance(images, np.ndarray):
        raise ValueError(f"Images must be a torch tensor or a numpy array, got {type(images).__name__}.")
    if images.dtype.kind not in "biufc" or images.dtype in (np.longdouble, np.clongdouble):
        raise ValueError(f"Images must be an array of numbers that torch knows, got {images.dtype}.")
    native = images.dtype.newbyteorder("=")
    plain = images.flags.carray and images.dtype == native
    return torch.from_numpy(images if plain else np.array(images, native, order="C"))


def _in_words(size: int) -> str:
    return f"{size / 1e6:.2f} MB" if size >= 1e6 else f"{size / 1e3:.1f} kB"


def part_of(name: str, tensor: Tensor) -> str:
    """Return the part of the model, an element of `PARTS`, that a tensor belongs to.

    Args:
        name: the tensor's name in the packed model, which is its name in the trained one.
        tensor: the tensor.
    """
    last = name.rpartition(".")[2]
    if name.startswith("patch_embed."):
        return "patch embedding"
    if name.startswith(("head.", "head_dist.", "attn_pool.")):
        return "heads"
    if "." not in name:
        return "position embedding and tokens"
    if name.endswith("attn.bias.values"):
        return "attention bias"
    if ".branches." in name:
        return "branches"
    if last == "weight_scale" or name.endswith(".post.factor"):
        return "weight scales"
    if "_binarizer." in name:
        return "activation scales"
    if last == "shift" or last.endswith("_shift"):
        return "shifts"
    if ".activation." in name:
        return "activation functions"
    if "norm" in name or ".ls1." in name or ".ls2." in name or ".scale." in name:
        return "norms"
    if last == "bias":
        return "biases"
    return "1-bit weights" if tensor.dtype == torch.uint64 else "float weights"
