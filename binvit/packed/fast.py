"""The fast path: folded blocks, run by the kernels of `binvit.packed.kernels`.

Folded bits are exactly the model's bits; what is left to rounding are the sums of LayerNorm and softmax. Every block
must have binary steps that the kernels know. Otherwise the model takes the exact path's generic steps: scales per token
(`xnor-k`), shortcuts and residuals inside a layer (`binaryvit`, `bhvit-qd`), a norm of query, key or hidden layer, RMS
norms, parts left in float, heads wider than 254 channels, and GSB's maximum over the batch when several images come.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from binvit import bits
from binvit.bits.bias import Bias
from binvit.bits.head import Workspace
from binvit.packed.folding import NotFoldable, fold_block, over_batch
from binvit.packed.kernels import SAMPLE, Layers, Scratch, make_scratch, run_images, run_together
from binvit.packed.softmax import torch_lanes

_SHARED = ("shares", "inclusive", "value_shares", "proj_sums")


class FastBlocks:
    """The blocks of a packed model, folded.

    Args:
        model: What `binvit.packed.exact.build_exact` returned.

    Raises:
        NotFoldable: If a block has a step without a fused form.
    """

    def __init__(self, model: nn.Module) -> None:
        with torch.inference_mode():
            where = model.patch_embed.grid_size, model.num_prefix_tokens
            folded = [fold_block(block, *where) for block in model.blocks]
        if not folded:
            raise NotFoldable("there are no blocks")
        self.over_batch = any(over_batch(block) for block in model.blocks)
        first = folded[0]
        for block in folded[1:]:
            if any(block[name] != value for name, value in first.items() if isinstance(value, int)):
                raise NotFoldable("the blocks differ")
        stacked = {
            name: _stack([block[name] for block in folded])
            for name, value in first.items()
            if isinstance(value, np.ndarray) and name not in _SHARED
        }
        biases = [block["bias"] for block in folded]
        arrays = {name: _stack([getattr(bias, name) for bias in biases]) for name in Bias._fields if name != "width"}
        self.bias = Bias(**arrays, width=biases[0].width)
        self.layers = Layers(
            **{name: value for name, value in (first | stacked).items() if name != "bias"}, lanes=torch_lanes()
        )
        self._scratch: dict[tuple[int, ...], tuple[Scratch, Workspace]] = {}

    def takes(self, images: int) -> bool:
        """Tell whether so many images can be run: a maximum over the batch needs all of them at once."""
        return images == 1 or not self.over_batch

    def __call__(self, x: Tensor) -> Tensor:
        """Run tokens (B, T, D), float32 and contiguous, through all blocks; they are overwritten."""
        tokens, threads = x.numpy(), bits.get_threads()
        whole = SAMPLE in (self.layers.map_reduce, self.layers.value_reduce)
        together = len(tokens) == 1 and threads > 1 and not whole
        tasks = 1 if together else min(threads, len(tokens))
        slots = min(threads, self.layers.heads) if together else self.layers.heads if whole else 1
        biased = self.bias.full.size + self.bias.runs.size > 0
        key = (biased, tokens.shape[1], tasks, slots)
        # Taken out while it is in use, so that Python threads do not share it; one size is kept.
        scratch = self._scratch.pop(key, None) or make_scratch(self.layers, *key)
        if together:
            run_together(self.layers, self.bias, tokens[0], *scratch)
        else:
            run_images(self.layers, self.bias, tokens, *scratch)
        self._scratch = {key: scratch}
        return x


def _stack(arrays: list[np.ndarray]) -> np.ndarray:
    stacked = bits.aligned_empty((len(arrays), *arrays[0].shape), arrays[0].dtype)
    for i, array in enumerate(arrays):
        stacked[i] = array
    return stacked
