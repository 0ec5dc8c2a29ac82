"""Trials: the configuration of one training run."""

import dataclasses
import functools
import os
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PlainSerializer, PlainValidator, field_validator

import binvit
from binvit.config import Config, Number, Options, OptionsField, Text, Whole, show, thaw
from binvit.lab.data.fingerprint import fingerprint
from binvit.lab.data.sources import split_name
from binvit.lab.training.rates import tuned_rate
from binvit.lab.training.recipe import Count, Recipe
from binvit.lab.training.recipes import recipe as get_recipe
from binvit.lab.training.weights import file_hash
from binvit.lab.trials.identity import identity
from binvit.nn.schemes import Scheme

TEACHER_FIELDS = ("teacher", "teacher_hash", "teacher_epochs", "teacher_pretrained")
"""Fields of a recipe that mean nothing without a teacher."""

Confusion = tuple[tuple[float, ...], ...]


def _noise(noise: Any) -> str | Confusion:
    if isinstance(noise, str) and noise in ("symmetric", "pairs"):
        return noise
    try:
        rows = tuple(tuple(float(value) for value in row) for row in noise)
    except (OverflowError, TypeError, ValueError):
        rows = ()
    square = not isinstance(noise, str) and rows and all(len(row) == len(rows) for row in rows)
    if not square or not all(0 <= value < float("inf") for row in rows for value in row):
        wanted = "'symmetric', 'pairs' or a square confusion matrix of numbers from 0"
        raise ValueError(f"The trial's noise must be {wanted}, got {show(noise)}.")
    return rows


def _path(path: Any) -> Any:
    return os.fspath(path) if isinstance(path, os.PathLike) else path


class Trial(Config):
    """One training run: a model, a data set and a seed."""

    dataset: Text
    """A name that `load_data` knows."""
    scheme: Text = "gsb"
    """A name of `binvit.list_schemes`."""
    recipe: Text = "smoke"
    """A name of `list_recipes`."""
    seed: Annotated[Whole, Field(ge=0, lt=2**63)] = 0
    """Decides initialization, order, augmentation, sampling of images and wrong labels."""
    samples_per_class: Count | None = None
    """Training images drawn per class; None takes all."""
    label_noise: Annotated[Number, Field(ge=0, lt=1)] = 0.0
    """Share of wrong training labels."""
    noise: Annotated[str | Confusion, PlainValidator(_noise), PlainSerializer(thaw)] = "symmetric"
    """How labels go wrong: "symmetric", "pairs" or a confusion matrix, as `load_data` takes it."""
    scheme_options: OptionsField = Options()
    """Fields of the scheme to change, a mapping or pairs."""
    recipe_options: OptionsField = Options()
    """Fields of the recipe to change, the same."""
    root: Annotated[Text | None, BeforeValidator(_path)] = None
    """Folder of data sets that are files; no part of the trial's identity, which the images themselves belong to."""
    evaluate_on: Literal["test", "val"] = "test"
    """The images that the model is measured on; with "val" the test images are hashed for the identity and never
    looked at, and a part of the training images stands for validation images where the data set has none."""

    @field_validator("dataset")
    @classmethod
    def _known_dataset(cls, name: str) -> str:
        split_name(name)
        return name

    def __post_init__(self) -> None:
        for name, what in (("weights", "weights"), ("teacher", "the teacher")):
            path = self.recipe_options.get(name)
            if isinstance(path, str) and path and f"{name}_hash" not in self.recipe_options:
                known = {**self.recipe_options, f"{name}_hash": file_hash(path, what)}
                object.__setattr__(self, "recipe_options", Options(known))
        # The records coerce the values: 1 and 1.0, list and tuple are the same trial.
        for name, record in (("scheme_options", self._scheme), ("recipe_options", self._recipe)):
            object.__setattr__(self, name, Options({key: getattr(record, key) for key in getattr(self, name)}))
        unused = [name for name in TEACHER_FIELDS if self.recipe_options.get(name)]
        if unused and not self._recipe.has_teacher:
            raise ValueError(
                f"The recipe's {unused[0]} is of a teacher, and without distillation or similarity the training has "
                "none; set distillation to 'soft' or 'hard', or similarity above 0."
            )

    # Checked records take a millisecond, and thousands of trials are compared and looked for: each is made once.
    @functools.cached_property
    def _scheme(self) -> Scheme:
        return binvit.scheme(self.scheme, **self.scheme_options)

    @functools.cached_property
    def _recipe(self) -> Recipe:
        return get_recipe(self.recipe, **self.recipe_options)

    def get_scheme(self, **overrides: Any) -> Scheme:
        """Return the scheme with this trial's options, then `overrides`, applied."""
        return dataclasses.replace(self._scheme, **overrides) if overrides else self._scheme

    def get_recipe(self) -> Recipe:
        """Return the recipe with this trial's options applied, at the rate chosen for its scheme if they name none."""
        if "lr" in self.recipe_options:
            return self._recipe
        width = self.recipe_options.get("width")
        rate = tuned_rate(self.dataset, self.recipe, self.scheme, self._scheme.attention_bias, width)
        return self._recipe if rate is None else _at_rate(self._recipe, rate)

    @property
    def fingerprint(self) -> str:
        """The fingerprint of the trial's data set."""
        return fingerprint(self.dataset, self.root)

    @property
    def id(self) -> str:
        """A file name that is the same for the same training on the same data, on every machine."""
        return self.identity(self.fingerprint)

    def identity(self, fingerprint: str) -> str:
        """Return the trial's identity on images of this fingerprint, wherever they lie."""
        teacher = teacher_trial(self).identity(fingerprint) if self.get_recipe().trains_teacher else ""
        return identity(self, self.get_recipe(), self.get_scheme(), fingerprint, teacher)

    def untaught_identity(self, fingerprint: str) -> str:
        """Return the identity that does not say which teacher is trained first, as it was in older archives."""
        return identity(self, self.get_recipe(), self.get_scheme(), fingerprint)

    def describe(self) -> str:
        """Return a short text for progress bars and errors."""
        parts = [self.dataset, self.scheme, self.recipe, f"seed {self.seed}"]
        if self.samples_per_class is not None:
            parts.append(f"{self.samples_per_class} per class")
        if self.label_noise:
            kind = self.noise if isinstance(self.noise, str) else "confusion"
            parts.append(f"{self.label_noise:g} {kind} noise")
        if self.evaluate_on != "test":
            parts.append("on validation images")
        parts += [text for options in (self.scheme_options, self.recipe_options) if (text := options_text(options))]
        return ", ".join(parts)


@functools.lru_cache(maxsize=4096)
def _at_rate(recipe: Recipe, rate: float) -> Recipe:
    return dataclasses.replace(recipe, lr=rate)


def options_text(options: Mapping[str, Any]) -> str:
    """Return options as "name=value, name=value"."""
    return ", ".join(f"{name}={value}" for name, value in options.items())


def teacher_trial(trial: Trial) -> Trial:
    """Return the trial that trains the float teacher of a distilled trial: the same shape, data and seed.

    Args:
        trial: a trial whose recipe distils from a teacher that is trained first.

    Returns:
        A trial of the scheme "float" without distillation and stages.
    """
    given = trial.get_recipe()
    taught = ("distillation", "temperature", "alpha", "similarity", "teacher_epochs", "teacher_pretrained")
    dropped = (*taught, "stages", "lr")
    options = {name: value for name, value in trial.recipe_options.items() if name not in dropped}
    options |= {
        "distillation": "none",
        "stages": (),
        "epochs": given.teacher_epochs or given.epochs + sum(stage.epochs for stage in given.stages),
        "pretrained": given.teacher_pretrained,
    }
    return dataclasses.replace(trial, scheme="float", scheme_options={}, recipe_options=options)
