"""Looking into trained models: their curves, what their attention multiplies the value with, what they predict."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image
from timm.layers.attention import Attention
from torch import Tensor, nn

from binvit.lab.checkpoint import CheckpointInfo
from binvit.lab.runner import load_kept
from binvit.lab.transforms import eval_transform
from binvit.lab.trials import Trial, options_text, read_result
from binvit.nn.layers import BinaryAttention


@dataclass(frozen=True)
class Trained:
    """A trained model with what is needed to use it on pictures.

    Args:
        model: in evaluation mode.
        info: its classes, image size and statistics.
    """

    model: nn.Module
    info: CheckpointInfo

    def tensor(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Turn RGB pictures into the model's input, float32 (B, 3, H, W)."""
        transform = eval_transform(self.info.image_size, self.info.mean, self.info.std)
        return torch.stack([transform(picture) for picture in pictures])

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return tuple(self.model.patch_embed.grid_size)


def load_trained(trial: Trial, results_dir: str | Path) -> Trained:
    """Return the model that a trial has trained, ready for pictures.

    Args:
        trial: a trial that was run with `keep_models`.
        results_dir: the folder `run_trials` wrote to.

    Returns:
        The model and its description.

    Raises:
        FileNotFoundError: no model of this trial is kept there.
        ValueError: the checkpoint is damaged.
    """
    return Trained(*load_kept(trial, results_dir))


def histories(trials: Iterable[Trial], results_dir: str | Path) -> pd.DataFrame:
    """Return the records of all epochs of finished trials.

    Args:
        trials: trials that `run_trials` has finished.
        results_dir: the folder it wrote to.

    Returns:
        One row per trial and epoch: every field of `Trial` (options as text) but its root, then stage, epoch,
        train_loss, train_accuracy, test_accuracy (NaN where not evaluated) and lr.

    Raises:
        FileNotFoundError: a trial has not been run there.
    """
    rows = []
    for trial in trials:
        settings = {item.name: getattr(trial, item.name) for item in fields(trial) if item.name != "root"}
        settings |= {name: options_text(settings[name]) for name in ("scheme_options", "recipe_options")}
        rows += [settings | record for record in read_result(trial, results_dir).history]
    return pd.DataFrame(rows).astype({"test_accuracy": float})


@torch.no_grad()
def attention_weights(model: nn.Module, images: Tensor) -> Tensor:
    """Return what each block of a model multiplies the value with.

    Args:
        model: a timm vision transformer, binarized or not, in evaluation mode.
        images: the model's input, (B, 3, H, W).

    Returns:
        (blocks, B, heads, N, N): the softmax of a float block, the binarized and scaled map of a binary one.
    """
    layers = [block.attn for block in model.blocks]
    found: list[Tensor | None] = [None] * len(layers)

    def keep(index: int, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        found[index] = _softmax_map(layer, inputs[0])

    hooks = []
    for index, layer in enumerate(layers):
        if isinstance(layer, BinaryAttention):
            layer.record = True
        else:
            hooks.append(layer.register_forward_pre_hook(lambda layer, inputs, i=index: keep(i, layer, inputs)))
    try:
        model(images)
        for index, layer in enumerate(layers):
            if isinstance(layer, BinaryAttention):
                found[index] = layer.last_attention["binary"]
    finally:
        for hook in hooks:
            hook.remove()
        for layer in layers:
            if isinstance(layer, BinaryAttention):
                layer.record, layer.last_attention = False, {}
    return torch.stack(found)


def _softmax_map(layer: Attention, x: Tensor) -> Tensor:
    """Return the map that timm's fused attention does not show, (B, heads, N, N)."""
    b, n, _ = x.shape
    q, k, _ = layer.qkv(x).view(b, n, 3, layer.num_heads, layer.head_dim).permute(2, 0, 3, 1, 4)
    return (layer.q_norm(q) @ layer.k_norm(k).mT * layer.scale).softmax(dim=-1)


def levels(weights: Tensor) -> int:
    """Return how many different numbers occur at most in one block's attention weights.

    Args:
        weights: the result of `attention_weights`, (blocks, B, heads, N, N).

    Returns:
        At most 2 for 1-bit maps and at most 2 G for maps of G superposed groups, whose thresholds are nested.
    """
    return max(block.unique().numel() for block in weights)


@torch.inference_mode()
def predictions(models: Mapping[str, Trained], picture: Image.Image) -> pd.DataFrame:
    """Classify one picture with several models.

    Args:
        models: name -> trained model.
        picture: an RGB picture of any size.

    Returns:
        One row per model: its name as ``model``, the likeliest class as ``class`` and its ``probability``.
    """
    rows = []
    for name, trained in models.items():
        probabilities = trained.model(trained.tensor([picture])).softmax(dim=1)[0]
        best = int(probabilities.argmax())
        rows.append((name, trained.info.classes[best], float(probabilities[best])))
    return pd.DataFrame(rows, columns=["model", "class", "probability"])


def one_per_class(labels: np.ndarray, count: int) -> list[int]:
    """Return the index of the first image of each of the first classes that occur.

    Args:
        labels: labels of a set of images, (N,).
        count: how many images to choose, at most one per class.

    Returns:
        Indices in the order of the classes.
    """
    _, first = np.unique(labels, return_index=True)
    return first[:count].tolist()
