"""Trials: the configuration of one training run, its result, and the file that keeps both."""

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import binvit
from binvit.lab.data.datasets import list_datasets
from binvit.lab.training.recipe import Options, Recipe, freeze
from binvit.lab.training.recipes import recipe
from binvit.nn.schemes import Scheme


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
