"""Trained models reloaded: the model that a trial has kept, and the curves of its training."""

from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path

import pandas as pd

from binvit.lab.training.evaluation import Classifier
from binvit.lab.trials.store import load_kept, read_result
from binvit.lab.trials.trial import Trial, options_text


def load_trained(trial: Trial, results_dir: str | Path) -> Classifier:
    """Return the model that a trial has trained, ready for pictures.

    Args:
        trial: a trial that was run with `keep_models`.
        results_dir: the folder `run_trials` wrote to.

    Returns:
        The model with what its pictures need.

    Raises:
        FileNotFoundError: no model of this trial is kept there.
        ValueError: the checkpoint is damaged.
    """
    model, info = load_kept(trial, results_dir)
    return Classifier(model, info.classes, info.image_size, info.mean, info.std)


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
