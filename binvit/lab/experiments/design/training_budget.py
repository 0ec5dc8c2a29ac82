"""What few images and wrong labels have in common: conditions with equally many updates, and their table."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from binvit.lab.data.datasets import ImageData, load_data
from binvit.lab.data.label_noise import Matrix
from binvit.lab.experiments.design.parse import Images
from binvit.lab.experiments.design.plan import Condition, Run, chance, changed, read_archive
from binvit.lab.training.recipe import Recipe
from binvit.lab.trials.pool import run_trials
from binvit.lab.trials.trial import Trial


def equal_updates(recipe: Recipe, updates: int | None, images: int) -> dict[str, Any]:
    """Return the options that make a recipe take a number of optimizer steps, whatever the number of images.

    A recipe counts epochs, and an epoch over a tenth of the images is a tenth of the steps: without this, few images
    would also mean little training. Only the last epoch is evaluated.

    Args:
        recipe: how models are trained.
        updates: optimizer steps of the last stage; None keeps the recipe's epochs.
        images: training images.

    Returns:
        fields for a trial's `recipe_options`.
    """
    if updates is None:
        return {}
    steps = images // min(recipe.batch_size, images)  # a last batch that is not full is left out
    epochs = max(1, round(updates / steps))
    return {"epochs": epochs, "eval_every": epochs}


def run_levels(
    part: Images, title: str, conditions: Sequence[Condition], seeds: Sequence[int], recipe: str, settings: dict
) -> list[Run]:
    """Return one run per seed and condition with the same settings."""
    runs = []
    for condition in conditions:
        plain = Trial(part.dataset, condition.scheme, part.recipe or recipe, **settings)
        trial = dataclasses.replace(plain, scheme_options=changed(condition.scheme_options, plain.get_scheme()))
        runs.append([Run(condition.name, title, dataclasses.replace(trial, seed=s)) for s in seeds[: part.seeds]])
    return [run for same_seed in zip(*runs, strict=True) for run in same_seed]


def plan_table(runs: Sequence[Run], load: Callable[..., ImageData] = load_data) -> pd.DataFrame:
    """Return how much each training will see, a row for all trainings that see equally much.

    Args:
        runs: the result of `limited_samples.conditions` or `label_noise.conditions`.
        load: what loads the images to count.

    Returns:
        data, training images, how labels go wrong and how many do, epochs and optimizer steps of the last stage, and
        the number of trainings.
    """
    sizes, rows = {}, []
    for item in runs:
        trial, given = item.trial, item.trial.get_recipe()
        key = trial.dataset, trial.samples_per_class
        if key not in sizes:
            sizes[key] = len(load(*key, root=trial.root, image_size=given.image_size).train)
        count = sizes[key]
        kind, wrong = _kind(trial.noise) if trial.label_noise else "", math.floor(trial.label_noise * count + 0.5)
        steps = given.epochs * (count // min(given.batch_size, count))
        rows.append((item.data, count, kind, wrong, given.epochs, steps))
    columns = ["data", "training images", "noise", "wrong labels", "epochs", "steps"]
    table = pd.DataFrame(rows, columns=columns)
    return table.groupby(columns, sort=False).size().rename("trainings").reset_index().set_index("data")


def _kind(noise: str | Matrix) -> str:
    return noise if isinstance(noise, str) else "class-conditional"


def run(runs: Sequence[Run], results_dir: str | Path, jobs: int = 1, archive: str | Path | None = None) -> pd.DataFrame:
    """Train what has not been trained yet, or read what an archive has, and return the experiment's table.

    Args:
        runs: the result of `limited_samples.conditions` or `label_noise.conditions`.
        results_dir: folder of the results.
        jobs: trainings side by side.
        archive: as for `plan.train`.

    Returns:
        The columns of `run_trials`, with "condition", "data", the images' name, "chance", the accuracy of guessing,
        "labels", how they go wrong ("symmetric" or "class-conditional"), and "gap", training minus test accuracy.
    """
    if archive:
        table = read_archive(runs, archive)
    else:
        names = {"condition": [item.condition for item in runs], "data": [item.data for item in runs]}
        table = run_trials([item.trial for item in runs], results_dir, jobs).assign(**names)
        table["chance"] = table["data"].map(chance(runs))
    kinds = [_kind(noise) for noise in table["noise"]]
    return table.assign(labels=kinds, gap=table["train_accuracy"] - table["test_accuracy"])
