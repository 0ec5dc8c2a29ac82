"""Trials: the configuration of one training run, its result, and the file that keeps both."""

import dataclasses
import hashlib
import json
import math
import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch

import binvit
from binvit.files import atomic_write
from binvit.lab.checkpoint import CheckpointInfo
from binvit.lab.data import list_datasets
from binvit.lab.recipes import Options, Recipe, freeze, recipe
from binvit.nn.schemes import Scheme

_FORMAT = "binvit result"
_EPOCH = {"stage", "epoch", "train_loss", "train_accuracy", "test_accuracy", "lr"}  # fields of a history's record


@dataclass(frozen=True)
class Trial:
    """One training run: a model, a data set and a seed.

    Args:
        dataset: a name that `load_data` knows.
        scheme: a name of `binvit.list_schemes`.
        recipe: a name of `list_recipes`.
        seed: decides initialization, order, augmentation, sampling of images and wrong labels.
        samples_per_class: training images drawn per class; None takes all.
        label_noise: share of wrong training labels, at least 0 and below 1.
        noise: how labels go wrong: "symmetric", "pairs" or a confusion matrix, as `load_data` takes it.
        scheme_options: fields of the scheme to change, a mapping or pairs; kept as sorted pairs.
        recipe_options: fields of the recipe to change, the same.
        root: folder of data sets that are files; no part of the trial's identity.

    Raises:
        ValueError: a name is unknown, or a value has a wrong type or is out of range.
    """

    dataset: str
    scheme: str = "gsb"
    recipe: str = "smoke"
    seed: int = 0
    samples_per_class: int | None = None
    label_noise: float = 0.0
    noise: str | tuple[tuple[float, ...], ...] = "symmetric"
    scheme_options: Options = ()
    recipe_options: Options = ()
    root: str | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        for name in ("dataset", "scheme", "recipe"):
            if not isinstance(value := getattr(self, name), str):
                raise ValueError(f"A trial's {name} must be a name, got {value!r}.")
        if not _is_whole(self.seed, 0):
            raise ValueError(f"A trial's seed must be a whole number of at least 0, got {self.seed!r}.")
        if self.samples_per_class is not None and not _is_whole(self.samples_per_class, 1):
            wanted = "a whole number of at least 1 or None"
            raise ValueError(f"A trial's samples_per_class must be {wanted}, got {self.samples_per_class!r}.")
        object.__setattr__(self, "noise", _noise(self.noise))
        noise = self.label_noise
        if not isinstance(noise, (int, float)) or isinstance(noise, bool) or not 0 <= noise < 1:
            raise ValueError(f"A trial's label_noise must be a number in [0, 1), got {noise!r}.")
        object.__setattr__(self, "label_noise", float(noise))
        object.__setattr__(self, "root", None if self.root is None else str(self.root))
        _check_dataset(self.dataset)
        for name, resolve in (("scheme_options", self._scheme), ("recipe_options", self._recipe)):
            options = _pairs(getattr(self, name), name)
            record = resolve(options)
            # The record has coerced the values: 1 and 1.0, list and tuple are the same trial.
            object.__setattr__(self, name, tuple(sorted((key, freeze(getattr(record, key))) for key in options)))

    def _scheme(self, options: Mapping[str, Any]) -> Scheme:
        return binvit.scheme(self.scheme, **options)

    def _recipe(self, options: Mapping[str, Any]) -> Recipe:
        return recipe(self.recipe, **options)

    def get_scheme(self, **overrides: Any) -> Scheme:
        """Return the scheme with this trial's options, then `overrides`, applied."""
        return self._scheme(dict(self.scheme_options) | overrides)

    def get_recipe(self) -> Recipe:
        """Return the recipe with this trial's options applied."""
        return self._recipe(dict(self.recipe_options))

    def to_dict(self) -> dict[str, Any]:
        """Return the trial as JSON types."""
        values = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        values["noise"] = self.noise if isinstance(self.noise, str) else [list(row) for row in self.noise]
        given = self.get_recipe().to_dict()
        scheme_options = json.loads(json.dumps(dict(self.scheme_options)))
        recipe_options = {name: given[name] for name, _ in self.recipe_options}
        return values | {"scheme_options": scheme_options, "recipe_options": recipe_options}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Trial":
        """Build a trial from `to_dict`'s result.

        Raises:
            ValueError: a field is unknown or missing, or a value is wrong.
        """
        valid = [item.name for item in dataclasses.fields(cls)]
        for name in values:
            if name not in valid:
                raise ValueError(f"Unknown trial field {name!r}; valid fields are {', '.join(valid)}.")
        if "dataset" not in values:
            raise ValueError("A trial needs the field dataset.")
        return cls(**values)

    @property
    def id(self) -> str:
        """A file name that is the same for equal trials on every machine."""
        values = self.to_dict()
        del values["root"]
        digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]
        dataset = re.sub(r"[^a-z0-9]+", "_", Path(self.dataset).stem.lower().split(":")[-1]).strip("_")
        return f"{dataset}-{self.scheme}-{self.recipe}-{self.seed}-{digest}"

    def describe(self) -> str:
        """Return a short text for progress bars and errors."""
        parts = [self.dataset, self.scheme, self.recipe, f"seed {self.seed}"]
        if self.samples_per_class is not None:
            parts.append(f"{self.samples_per_class} per class")
        if self.label_noise:
            kind = self.noise if isinstance(self.noise, str) else "confusion"
            parts.append(f"{self.label_noise:g} {kind} noise")
        parts += [text for options in (self.scheme_options, self.recipe_options) if (text := options_text(options))]
        return ", ".join(parts)


def options_text(options: Options) -> str:
    """Return options as "name=value, name=value"."""
    return ", ".join(f"{name}={value}" for name, value in options)


def teacher_trial(trial: Trial) -> Trial:
    """Return the trial that trains the float teacher of a distilled trial: the same shape, data and seed.

    Args:
        trial: a trial whose recipe distils from a teacher that is trained first.

    Returns:
        A trial of the scheme "float" without distillation and stages.
    """
    given = trial.get_recipe()
    taught = ("distillation", "temperature", "alpha", "similarity", "teacher_epochs", "teacher_pretrained")
    dropped = (*taught, "stages", "lr_binary")
    options = {name: value for name, value in trial.recipe_options if name not in dropped}
    options |= {
        "distillation": "none",
        "stages": (),
        "epochs": given.teacher_epochs or given.epochs + sum(stage.epochs for stage in given.stages),
        "pretrained": given.teacher_pretrained,
    }
    return dataclasses.replace(trial, scheme="float", scheme_options=(), recipe_options=options)


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


def versions() -> dict[str, str]:
    """Return the versions of what computed a result."""
    modules = {"torch": torch, "timm": timm, "numpy": np, "binvit": binvit}
    return {"python": platform.python_version()} | {name: str(item.__version__) for name, item in modules.items()}


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


def _pairs(options: Any, name: str) -> dict[str, Any]:
    try:
        return dict(options)
    except (TypeError, ValueError):
        raise ValueError(f"A trial's {name} must be a mapping of field names to values, got {options!r}.") from None


def _check_dataset(name: str) -> None:
    kind, colon, path = name.partition(":")
    if kind not in list_datasets() or (colon and not path):
        raise ValueError(f"Unknown data set {name!r}; valid names are {', '.join(list_datasets())}.")


def _noise(noise: Any) -> str | tuple[tuple[float, ...], ...]:
    if noise in ("symmetric", "pairs"):
        return noise
    try:
        rows = tuple(tuple(float(value) for value in row) for row in noise)
    except (TypeError, ValueError):
        rows = ()
    if isinstance(noise, str) or not rows or any(len(row) != len(rows) for row in rows):
        raise ValueError(f"A trial's noise must be 'symmetric', 'pairs' or a square confusion matrix, got {noise!r}.")
    return rows


def _is_whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
