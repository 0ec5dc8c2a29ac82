"""The fast path: a folded model, run by the kernels of `binvit.packed.fast.forward`.

Folded bits are exactly the model's bits, and float sums are rounded as torch rounds them: on CPUs whose torch adds as
`binvit.packed.fast.layernorm`, `softmax` and `patches` do (x86 with AVX2 or AVX-512) the logits are the exact path's to
the last bit. Elsewhere a bit may flip where a sum lies within rounding of its threshold. It may flip everywhere where
an activation saturates, so that its result is within rounding of zero, and a plain sign follows it (the tanh
approximation of GELU near -5.1): there torch's own scalar and vector code differ.

Every block must have binary steps that the kernels know. Otherwise the model takes the exact path's generic steps:
scales per token (`xnor-k`), shortcuts and residuals inside a layer (`binaryvit`, `bhvit-qd`), a norm of query, key or
hidden layer, RMS norms, parts left in float, heads wider than 254 channels, and GSB's maximum over the batch when
several images come.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from binvit import bits
from binvit.bits.attention.bias import Bias, in_halves
from binvit.bits.attention.head import Workspace
from binvit.packed.fast.fold import NotFoldable, fold_block, over_batch
from binvit.packed.fast.forward import run_whole_images, share_image, shared_counters
from binvit.packed.fast.head import fold_heads, run_heads
from binvit.packed.fast.layout import SAMPLE, Layers, Scratch, make_scratch
from binvit.packed.fast.patches import fold_patches
from binvit.packed.fast.softmax import torch_lanes
from binvit.packed.fast.threads import ONE_TORCH_THREAD, TEAM, Pool

_KEPT = 1 + (os.cpu_count() or 1)  # memory of passes: that of images which threads share, and a thread's own
_HAND_OVER = 200.0  # microseconds of work from which on a second thread gains more than waking it takes
_SHARED = ("shares", "inclusive", "value_shares", "proj_sums")


class FastPath:
    """The folded model: patches, blocks, head.

    Args:
        model: what `binvit.packed.exact.build_exact` returned.

    Raises:
        NotFoldable: if a block has a step without a fused form.
    """

    def __init__(self, model: VisionTransformer) -> None:
        self._model = model
        with torch.inference_mode():
            where = model.patch_embed.grid_size, model.num_prefix_tokens
            folded = [fold_block(block, *where) for block in model.blocks]
            self.patches, self._heads = fold_patches(model), fold_heads(model)
        if not folded:
            raise NotFoldable("there are no blocks")
        self.over_batch = any(over_batch(block) for block in model.blocks)
        first = folded[0]
        for block in folded[1:]:
            if any(block[name] != value for name, value in first.items() if isinstance(value, int)):
                raise NotFoldable("the blocks differ")
        entries: dict[str, Any] = {
            name: _stack([block[name] for block in folded])
            if isinstance(value, np.ndarray) and name not in _SHARED
            else value
            for name, value in first.items()
            if name != "bias"
        }
        self.layers = Layers(**entries, lanes=torch_lanes())
        biases = [block["bias"] for block in folded]
        arrays = {name: _stack([getattr(bias, name) for bias in biases]) for name in Bias._fields if name != "width"}
        self.bias = in_halves(Bias(**arrays, width=biases[0].width))
        self._scratch: Pool[tuple[Scratch, Workspace]] = Pool(_KEPT)
        tokens, width = model.patch_embed.num_patches + model.num_prefix_tokens, model.embed_dim
        products = tokens * (4 * width**2 + 2 * width * self.layers.hidden + 2 * tokens * width)
        self._microseconds = len(folded) * (20 + 1e-6 * products)  # of an image on one thread, a rough estimate

    def takes(self, images: int) -> bool:
        """Tell whether so many images can be run: a maximum over the batch needs all of them at once."""
        return images == 1 or not self.over_batch

    def worth(self, images: int, threads: int) -> int:
        """Return how many of the threads so many images are worth: one where they take less time than waking others."""
        return threads if images * self._microseconds > _HAND_OVER else 1

    def __call__(self, images: Tensor, threads: int) -> Tensor:
        """Compute the logits of images (B, C, H, W) with a number of threads."""
        model = self._model
        if len(self.patches.weights):
            pixels = images.contiguous().numpy()
            tokens = len(self.patches.prefix) + len(self.patches.positions)
            stream = torch.empty(len(pixels), tokens, model.embed_dim, dtype=torch.float32)
            x = stream.numpy()
        else:
            with ONE_TORCH_THREAD if threads == 1 else nullcontext():
                stream = model.norm_pre(model._pos_embed(model.patch_embed(images)))
            x = stream.contiguous().numpy()
            pixels = np.zeros((len(x), 0, 0, 0), np.float32)
        if SAMPLE in (self.layers.map_reduce, self.layers.value_reduce):
            self._run_whole(pixels, x, min(threads, len(x)))
        else:
            self._run(pixels, x, threads)
        if not stream.is_contiguous():
            # A mean adds in the order of the strides, and tokens of a float convolution are strided up to the head.
            stream.copy_(torch.from_numpy(x))
        return self._finish(stream)

    def _run(self, pixels: np.ndarray, x: np.ndarray, threads: int) -> None:
        """Run one image after the other on every thread, and the last ones on all: who is done begins with them."""
        shared = len(x) % threads or 1 if threads > 1 else len(x)
        alone, size = range(len(x) - shared), shared_counters(len(self.layers.norms))
        counters, left = np.zeros((shared, size), np.int64), iter(alone)  # an iterator gives every number once

        def run_one(image: int, *arguments: Any) -> None:
            share_image(self.layers, self.bias, self.patches, pixels[image], x[image], *arguments)

        def run(task: int, tasks: int) -> None:
            if alone:
                with self._borrow(x.shape[1], 1, 1) as own:
                    for image in left:
                        run_one(image, *own, 0, 1, np.zeros(size, np.int64))
            for image, counts in enumerate(counters, len(alone)):
                run_one(image, *scratch, task, tasks, counts)

        with self._borrow(x.shape[1], 1, threads) as scratch:
            TEAM.run(run, threads)

    def _run_whole(self, pixels: np.ndarray, x: np.ndarray, threads: int) -> None:
        """Run one image after the other on every thread, for maxima over all heads."""
        counter = np.zeros(1, np.int64)

        def run(task: int, tasks: int) -> None:
            run_whole_images(self.layers, self.bias, self.patches, pixels, x, *scratch, task, counter)

        with self._borrow(x.shape[1], threads, self.layers.heads) as scratch:
            TEAM.run(run, threads)

    def _borrow(self, *key: int) -> AbstractContextManager[tuple[Scratch, Workspace]]:
        return self._scratch.borrow(key, lambda: make_scratch(self.layers, self.bias, *key))

    def _finish(self, x: Tensor) -> Tensor:
        """Turn the residual stream into logits."""
        model = self._model
        if model.global_pool == "token":  # the head reads class and distillation token alone
            x = x[:, : model.num_prefix_tokens]
        with ONE_TORCH_THREAD:
            normed = model.norm(x)
            return run_heads(self._heads, normed) if self._heads else model.forward_head(normed)


def _stack(arrays: list[np.ndarray]) -> np.ndarray:
    stacked = bits.aligned_empty((len(arrays), *arrays[0].shape), arrays[0].dtype)
    for i, array in enumerate(arrays):
        stacked[i] = array
    return stacked
