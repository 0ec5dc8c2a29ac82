"""Results as files: written once, read instead of trained again, set aside when they cannot be used."""

from __future__ import annotations

import dataclasses
import json
import math
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from binvit.files import atomic_write, set_aside
from binvit.lab.training.checkpoint import is_checkpoint, load_checkpoint
from binvit.lab.training.model import CheckpointInfo
from binvit.lab.trials.trial import Trial, options_text


def load_model(trial: Trial, results_dir: str | Path = "results") -> torch.nn.Module:
    """Return the model that a trial has trained.

    Args:
        trial: a trial that was run with `keep_models`, or as a teacher.
        results_dir: the folder `run_trials` wrote to.

    Returns:
        The binarized timm model in evaluation mode, on the CPU.

    Raises:
        FileNotFoundError: no model of this trial is kept there.
        ValueError: the checkpoint is damaged.
    """
    return load_kept(trial, results_dir)[0]


def load_kept(trial: Trial, results_dir: str | Path) -> tuple[torch.nn.Module, CheckpointInfo]:
    """Return the model that a trial has trained, as `load_model` does, and its description."""
    path = model_path(trial, results_dir)
    if path.is_file():
        model, info = load_checkpoint(path)
        if _is_record(info.trial, trial):
            return model, info
    raise FileNotFoundError(
        f"There is no model of the trial {trial.describe()} ({path}); run it by run_trials with keep_models=True."
    )


def model_path(trial: Trial, results_dir: str | Path = "results") -> Path:
    """Return the checkpoint that keeps a trial's model."""
    return result_path(trial, results_dir).with_suffix(".safetensors")


def finished_result(trial: Trial, results_dir: str | Path, keep_model: bool) -> TrialResult | None:
    """Return a finished trial's result; a file that cannot be used is set aside, and None returned."""
    try:
        result = read_result(trial, results_dir)
    except FileNotFoundError:
        return None
    except ValueError as error:
        label = "outdated" if isinstance(error, OutdatedResult) else "corrupt"
        try:
            kept = set_aside(result_path(trial, results_dir), label)
        except FileNotFoundError:  # another process was faster
            return None
        model_path(trial, results_dir).unlink(missing_ok=True)
        warnings.warn(f"{error} It is kept as {kept.name}, and the trial is run again.", stacklevel=3)
        return None
    return result if not keep_model or _keeps_model(trial, results_dir) else None


def _keeps_model(trial: Trial, results_dir: str | Path) -> bool:
    """Say whether the trial's checkpoint is there and its own, without reading its tensors."""
    path = model_path(trial, results_dir)
    if not is_checkpoint(path):
        return False
    try:
        with safe_open(path, framework="pt") as file:
            return _is_record(json.loads(file.metadata().get("trial", "null")), trial)
    except ValueError:
        return False


def _is_record(record: Any, trial: Trial) -> bool:
    """Say whether a file's record is of this trial; the root may differ from machine to machine."""
    return isinstance(record, dict) and record | {"root": None} == trial.to_dict() | {"root": None}


_FORMAT = "binvit result"
_EPOCH = {"stage", "epoch", "train_loss", "train_accuracy", "test_accuracy", "lr"}  # fields of a history's record


@dataclass(frozen=True)
class TrialResult:
    """What a finished trial measured.

    Args:
        trial: its configuration.
        test_accuracy: share of test images classified rightly, 0 to 1.
        train_accuracy: share of training images classified as labelled, 0 to 1, without augmentation.
        clean_train_accuracy: share of training images classified as their true class; None without label noise.
        memorized: share of wrongly labelled training images classified as their wrong label; None without label noise.
        seconds: time of training and evaluation.
        parameters: trained numbers of the model.
        history: one record per epoch: stage, epoch, train_loss, train_accuracy (of the augmented batches),
            test_accuracy (None where not evaluated), lr.
        recipe: the recipe in full, as JSON types.
        scheme: the scheme in full, as JSON types.
        versions: of python, torch, timm, numpy and binvit.
        threads: torch threads that trained.
        device: "cpu" or "cuda".
        model: the trained model in evaluation mode; None if the result was read from a file.
        info: what `save_checkpoint` needs beside the model; None if the result was read from a file.
    """

    trial: Trial
    test_accuracy: float
    train_accuracy: float
    clean_train_accuracy: float | None
    memorized: float | None
    seconds: float
    parameters: int
    history: list[dict[str, Any]]
    recipe: dict[str, Any]
    scheme: dict[str, Any]
    versions: dict[str, str]
    threads: int
    device: str
    model: torch.nn.Module | None = field(default=None, compare=False, repr=False)
    info: CheckpointInfo | None = field(default=None, compare=False, repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Return the result as JSON types, without the model."""
        values = {item.name: getattr(self, item.name) for item in dataclasses.fields(self) if item.compare}
        return {"format": _FORMAT, "id": self.trial.id} | values | {"trial": self.trial.to_dict()}

    def to_row(self) -> dict[str, Any]:
        """Return one row of the table of results: the trial's fields and the measured numbers."""
        row = {item.name: getattr(self.trial, item.name) for item in dataclasses.fields(Trial)}
        row |= {name: options_text(row[name]) for name in ("scheme_options", "recipe_options")}
        missing = {"clean_train_accuracy": self.clean_train_accuracy, "memorized": self.memorized}
        row |= {"test_accuracy": self.test_accuracy, "train_accuracy": self.train_accuracy}
        row |= {name: math.nan if value is None else value for name, value in missing.items()}
        return row | {"parameters": self.parameters, "seconds": self.seconds, "id": self.trial.id}


def result_path(trial: Trial, results_dir: str | Path = "results") -> Path:
    """Return the file that keeps a trial's result."""
    return Path(results_dir) / f"{trial.id}.json"


def write_result(result: TrialResult, results_dir: str | Path = "results") -> Path:
    """Write a result's file in one step."""
    return atomic_write(result_path(result.trial, results_dir), json.dumps(result.to_dict(), indent=1) + "\n")


class OutdatedResult(ValueError):
    """A result file is sound but its recipe or scheme has changed since."""


def read_result(trial: Trial, results_dir: str | Path = "results") -> TrialResult:
    """Read a trial's result.

    Args:
        trial: its configuration.
        results_dir: the folder `run_trials` wrote to.

    Returns:
        The result, without the model.

    Raises:
        FileNotFoundError: the trial has not been run there.
        OutdatedResult: a registered recipe or scheme of that name meant something else when the trial ran.
        ValueError: the file is corrupt.
    """
    path = result_path(trial, results_dir)
    if not path.is_file():
        raise FileNotFoundError(f"There is no result of the trial {trial.describe()} ({path}); run it by run_trials.")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if (
            values.pop("format") != _FORMAT
            or values.pop("id") != trial.id
            or values.pop("trial") != _as_stored(trial, path)
        ):
            raise ValueError("it belongs to another trial")
        result = TrialResult(trial=trial, **values)
        _check_records(result)
    except (OSError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"The result file {path} is corrupt ({type(error).__name__}: {error}).") from None
    for what, stored, record in (
        ("recipe", result.recipe, trial.get_recipe()),
        ("scheme", result.scheme, trial.get_scheme()),
    ):
        current = json.loads(json.dumps(record.to_dict()))
        # A field that came later than the result had its default then.
        stored = _defaults(type(record)) | stored
        for name in stored.keys() & current.keys() - {"description", "reference"}:
            if stored[name] != current[name]:
                raise OutdatedResult(
                    f"The result file {path} was made with another {what}: its {name} was {stored[name]!r}, "
                    f"now {current[name]!r}."
                )
    return result


def _check_records(result: TrialResult) -> None:
    """Raise a ValueError or TypeError if a result's records or numbers are not those of a training."""
    for name in ("recipe", "scheme", "versions"):
        if not isinstance(getattr(result, name), dict):
            raise ValueError(f"its {name} is no record")
    if not isinstance(result.history, list) or not result.history:
        raise ValueError("its history is no list of epochs")
    if not all(isinstance(epoch, dict) and epoch.keys() >= _EPOCH for epoch in result.history):
        raise ValueError("an epoch of its history is no record")
    if not all(0 <= value <= 1 for value in (result.test_accuracy, result.train_accuracy)):
        raise ValueError("its numbers are out of range")


def _defaults(record: type) -> dict[str, Any]:
    """Return the defaults of a dataclass's fields as JSON types."""
    given = {item.name: item.default for item in dataclasses.fields(record) if item.default is not dataclasses.MISSING}
    return json.loads(json.dumps(given))


def _as_stored(trial: Trial, path: Path) -> dict[str, Any]:
    """Return the trial's record as its file has it: the root may differ from machine to machine."""
    stored = json.loads(path.read_text(encoding="utf-8"))["trial"]
    return trial.to_dict() | {"root": stored["root"]}
