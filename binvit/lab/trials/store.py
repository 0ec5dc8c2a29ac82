"""Results as files: written once, read instead of trained again, set aside when they cannot be used."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
import warnings
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field, SkipValidation

from binvit.config import Config, Number, Text, Whole, read_json, show
from binvit.files import atomic_write, set_aside
from binvit.images import require_regular
from binvit.lab.training.checkpoint import load_checkpoint, read_checkpoint
from binvit.lab.training.model import CheckpointInfo
from binvit.lab.training.recipe import Recipe, Share, decisive
from binvit.lab.trials.history import Epoch
from binvit.lab.trials.identity import counted
from binvit.lab.trials.trial import Trial, options_text
from binvit.nn.schemes import Scheme


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
    """Return a finished trial's result; a file that cannot be parsed or is outdated is set aside, and None returned.

    Raises:
        OSError: the file cannot be read; that says nothing of its content, which stays where it is.
    """
    _tell_of_old_results(Path(results_dir))
    try:
        result = read_result(trial, results_dir)
    except FileNotFoundError:
        return None
    except ValueError as error:
        outdated = isinstance(error, OutdatedResult)
        label = "outdated" if outdated else "foreign" if isinstance(error, ForeignResult) else "corrupt"
        try:
            kept = set_aside(result_path(trial, results_dir), label)
        except FileNotFoundError:  # another process was faster
            return None
        if outdated and model_path(trial, results_dir).exists():  # a model says nothing of a damaged result
            set_aside(model_path(trial, results_dir), "outdated")
        warnings.warn(f"{error} It is kept as {kept.name}, and the trial is run again.", stacklevel=3)
        return None
    return result if not keep_model or _keeps_model(trial, results_dir) else None


@functools.cache
def _tell_of_old_results(folder: Path) -> None:
    """Say once that results which do not name their images are not read."""
    old = [path.name for path in sorted(folder.glob("*.json")) if re.fullmatch(r".+-\d+-[0-9a-f]{12}\.json", path.name)]
    if old:
        warnings.warn(
            f"The folder {folder} holds {len(old)} results of an earlier release, such as {old[0]}; they do not say "
            "which images they belong to, so they are not read and their trials are run again.",
            stacklevel=4,
        )


def _keeps_model(trial: Trial, results_dir: str | Path) -> bool:
    """Say whether the trial's checkpoint is there, sound and its own."""
    try:
        info, _ = read_checkpoint(model_path(trial, results_dir))
    except (FileNotFoundError, ValueError):
        return False
    return _is_record(info.trial, trial)


def _is_record(record: Any, trial: Trial) -> bool:
    """Say whether a checkpoint's record is of this trial on these images."""
    return isinstance(record, dict) and record.get("id") == trial.id


_FORMAT = "binvit result 2"  # 1 did not say which images a result belongs to


class TrialResult(Config):
    """What a finished trial measured."""

    trial: Trial
    """Its configuration."""
    test_accuracy: Share
    """Share of test images classified rightly; of validation images where the trial is evaluated on those."""
    train_accuracy: Share
    """Share of training images classified as labelled, without augmentation."""
    clean_train_accuracy: Share | None
    """Share of training images classified as their true class; None without label noise."""
    memorized: Share | None
    """Share of wrongly labelled training images classified as their wrong label; None without label noise."""
    seconds: Annotated[Number, Field(ge=0)]
    """Time of training and evaluation."""
    parameters: Annotated[Whole, Field(ge=1)]
    """Trained numbers of the model."""
    history: Annotated[tuple[Epoch, ...], Field(min_length=1)]
    """One record per epoch: stage, epoch, train_loss, train_accuracy (of the augmented batches), test_accuracy (None
    where not evaluated), lr."""
    recipe: Recipe
    """The recipe in full."""
    scheme: Scheme
    """The scheme in full."""
    versions: dict[str, Text]
    """Of python, torch, timm, numpy and binvit."""
    threads: Annotated[Whole, Field(ge=1)]
    """Torch threads that trained."""
    device: Text
    """"cpu" or "cuda"."""
    fingerprint: Text
    """Of the data set; "sampled:..." says that only a part of its images was hashed."""
    cpu: Text
    """Kind of CPU."""
    id: Text
    """The identity of the trial on its data when it was trained; a rate chosen later may change the trial's own."""
    vectors: Text = ""
    """The CPU's vector extensions, of which its kind says little on a virtual machine; "" in older results, unknown."""
    products: Text = "torch"
    """What multiplied floats in the steps: "oneDNN", or "torch" as in older results; see
    `binvit.nn.fused.float_products`."""
    model: Annotated[SkipValidation[torch.nn.Module | None], Field(exclude=True)] = field(
        default=None, compare=False, repr=False
    )
    """The trained model in evaluation mode; None if the result was read from a file."""
    info: Annotated[SkipValidation[CheckpointInfo | None], Field(exclude=True)] = field(
        default=None, compare=False, repr=False
    )
    """What `save_checkpoint` needs beside the model; None if the result was read from a file."""

    @property
    def environment(self) -> dict[str, str]:
        """What may have changed its last digits; see `training.resume.environment`."""
        cpu = {"cpu": self.cpu, "vectors": self.vectors or "unknown", "products": self.products}
        return self.versions | {"device": self.device} | cpu | {"threads": str(self.threads)}

    def to_row(self) -> dict[str, Any]:
        """Return one row of the table of results: the trial's fields and the measured numbers."""
        row = trial_row(self.trial)
        missing = {"clean_train_accuracy": self.clean_train_accuracy, "memorized": self.memorized}
        row |= {"test_accuracy": self.test_accuracy, "train_accuracy": self.train_accuracy}
        row |= {name: math.nan if value is None else value for name, value in missing.items()}
        return row | {"parameters": self.parameters, "seconds": self.seconds, "id": self.id}


def trial_row(trial: Trial) -> dict[str, Any]:
    """Return a trial's fields as the table of results holds them."""
    row = {name: getattr(trial, name) for name in Trial.field_names()}
    return row | {name: options_text(row[name]) for name in ("scheme_options", "recipe_options")}


def result_path(trial: Trial, results_dir: str | Path = "results") -> Path:
    """Return the file that keeps a trial's result."""
    return Path(results_dir) / f"{trial.id}.json"


def write_result(result: TrialResult, results_dir: str | Path = "results") -> Path:
    """Write a result's file in one step."""
    values = {"format": _FORMAT, "id": result.id} | result.to_dict()
    return atomic_write(Path(results_dir) / f"{result.id}.json", json.dumps(values, indent=1) + "\n")


def read_result_file(path: Path) -> TrialResult:
    """Read the result that a file holds, whichever trial it is of.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is corrupt, or of another release.
    """
    require_regular(path, "result file")
    try:
        values = read_json(path.read_bytes(), "it")
        form = values.pop("format", None) if isinstance(values, dict) else None
        if form != _FORMAT and re.fullmatch(r"binvit result \d{1,9}", str(form)):
            raise ForeignResult(f"The result file {path} has the format {form!r}, and this release reads {_FORMAT!r}.")
        if form != _FORMAT:
            raise ValueError(f"its format is {show(form)}, expected {_FORMAT!r}.")
        result = TrialResult.from_dict(values)
        if result.id != path.stem:
            raise ValueError("it belongs to another trial.")
    except ValueError as error:
        foreign = isinstance(error, ForeignResult)
        raise (error if foreign else ValueError(f"The result file {path} is corrupt: {error}")) from None
    return result


def read_results(results_dir: str | Path) -> tuple[list[TrialResult], list[str]]:
    """Read all results of a folder.

    Returns:
        The results, in the order of their names, and a sentence for each file that is corrupt.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    folder = Path(results_dir)
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no results folder {folder}.")
    _tell_of_old_results(folder)
    found, damaged = [], []
    for path in sorted(folder.glob("*.json")):
        if re.fullmatch(r".+-\d+-[0-9a-f]{16}\.json", path.name):
            try:
                found.append(read_result_file(path))
            except ValueError as error:
                damaged.append(str(error))
    return found, damaged


class ForeignResult(ValueError):
    """A result file is of another release."""


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
    try:
        result = read_result_file(path)
    except FileNotFoundError:
        sentence = f"There is no result of the trial {trial.describe()} ({path}); run it by run_trials."
        raise FileNotFoundError(sentence) from None
    check_current(result, trial, trial.fingerprint, f"The result file {path}")
    return dataclasses.replace(result, trial=trial)  # the same images may lie elsewhere


def check_current(result: TrialResult, trial: Trial, fingerprint: str, what: str) -> None:
    """Refuse a stored result that is not of a trial on images of this fingerprint as they are meant today.

    Raises:
        ValueError: it is of another trial, whatever its name says.
        OutdatedResult: a registered recipe or scheme meant something else when it was made.
    """
    own = [fingerprint, *(getattr(trial, name) for name in counted(trial))]
    if own != [result.fingerprint, *(getattr(result.trial, name) for name in counted(trial))]:
        raise ValueError(f"{what} is corrupt: it belongs to another trial.")
    for kind, stored, now in (
        ("recipe", result.recipe, trial.get_recipe()),
        ("scheme", result.scheme, trial.get_scheme()),
    ):
        for name in decisive(stored):
            before, after = getattr(stored, name), getattr(now, name)
            if before != after:
                text = f"its {name} was {before!r}, now {after!r}"
                raise OutdatedResult(f"{what} was made with another {kind}: {text}.")
