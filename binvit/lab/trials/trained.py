"""Looking into trained models: their curves, what their attention multiplies the value with, what they predict."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import pandas as pd
import torch
from PIL import Image
from torch import Tensor, nn

from binvit.lab.data.transforms import eval_transform
from binvit.lab.training.model import CheckpointInfo
from binvit.lab.trials.store import load_kept, read_result
from binvit.lab.trials.trial import Trial, options_text


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
