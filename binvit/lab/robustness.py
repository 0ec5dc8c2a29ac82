"""Few images and wrong labels: the trials of both experiments and their table."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from binvit.lab.data import ImageData, load_data
from binvit.lab.experiments import Run
from binvit.lab.images import resize_square
from binvit.lab.recipes import Recipe
from binvit.lab.recipes import recipe as get_recipe
from binvit.lab.runner import run_trials
from binvit.lab.settings import Images, parse_changes, parse_images
from binvit.lab.trials import Trial

Matrix = tuple[tuple[float, ...], ...]


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


def sample_runs(
    images: str,
    schemes: Sequence[str],
    samples_per_class: Sequence[int],
    seeds: Sequence[int],
    recipe: str = "smoke",
    changes: str = "",
    updates: int | None = None,
    data_dir: str | Path | None = None,
) -> list[Run]:
    """Make the trials of accuracy against the number of training images.

    Args:
        images: a text that `parse_sampled_images` understands.
        schemes: names of `binvit.list_schemes`.
        samples_per_class: training images per class; counts that a data set does not have are left out for it.
        seeds: of every combination.
        recipe: of images that name none.
        changes: of the recipe; a text that `settings.parse_changes` understands.
        updates: optimizer steps of every trial, as in `equal_updates`.
        data_dir: folder of data sets that are files.

    Returns:
        the trials, images by images.

    Raises:
        ValueError: a text is not understood, or a data set has fewer images per class than the smallest count.
        FileNotFoundError: the files of a data set are missing.
    """
    runs, changed = [], parse_changes(changes)
    for part in parse_sampled_images(images):
        given = get_recipe(part.recipe or recipe, **changed)
        data = load_data(part.dataset, part.samples_per_class, root=data_dir, image_size=given.image_size)
        most = int(np.bincount(data.train.labels, minlength=len(data.classes)).min())
        counts = [count for count in samples_per_class if count <= most]
        if not counts:
            raise ValueError(
                f"{part.title} has {most} training images in its smallest class, fewer than the "
                f"{min(samples_per_class)} asked for by samples_per_class."
            )
        for count in counts:
            options = changed | equal_updates(given, updates, count * len(data.classes))
            settings = {"samples_per_class": count, "recipe_options": options, "root": data_dir}
            runs += _runs(part, _source_title(part), schemes, seeds, recipe, settings)
    return runs


def noise_runs(
    images: str,
    schemes: Sequence[str],
    label_noises: Sequence[float],
    confused_noises: Sequence[float],
    seeds: Sequence[int],
    recipe: str = "smoke",
    changes: str = "",
    updates: int | None = None,
    samples_per_class: int = 0,
    data_dir: str | Path | None = None,
) -> list[Run]:
    """Make the trials of accuracy against the share of wrong training labels.

    Args:
        images: a text that `settings.parse_images` understands.
        schemes: names of `binvit.list_schemes`.
        label_noises: shares of labels that become any other class.
        confused_noises: shares of labels that become a class that looks alike, as `pixel_confusion` says; 0 is the
            same as no noise and left out.
        seeds: of every combination.
        recipe: of images that name none.
        changes: of the recipe; a text that `settings.parse_changes` understands.
        updates: optimizer steps of every trial, as in `equal_updates`.
        samples_per_class: training images of each class, of images that name no number; 0 takes all.
        data_dir: folder of data sets that are files.

    Returns:
        the trials, images by images.

    Raises:
        ValueError: a text is not understood, or a data set has too few images per class.
        FileNotFoundError: the files of a data set are missing.
    """
    runs, changed = [], parse_changes(changes)
    for part in parse_images(images):
        given = get_recipe(part.recipe or recipe, **changed)
        kinds: list[dict[str, Any]] = [{"label_noise": share} for share in label_noises]
        data = load_data(part.dataset, root=data_dir, image_size=given.image_size)
        each = part.samples_per_class or samples_per_class or None
        count = len(data.train) if each is None else each * len(data.classes)
        if any(confused_noises):
            matrix = pixel_confusion(data)
            kinds += [{"label_noise": share, "noise": matrix} for share in confused_noises if share]
        options = changed | equal_updates(given, updates, count)
        settings = {"samples_per_class": each, "recipe_options": options, "root": data_dir}
        for kind in kinds:
            runs += _runs(part, part.title, schemes, seeds, recipe, settings | kind)
    return runs


def parse_sampled_images(text: str) -> list[Images]:
    """Read several kinds of images of which different numbers are drawn, as `settings.parse_images` does.

    Raises:
        ValueError: a part is not understood, or two kinds differ in nothing but their number of images per class.
    """
    images = parse_images(text)
    titles = [_source_title(part) for part in images]
    for part, title in zip(images, titles, strict=True):
        if titles.count(title) > 1:
            raise ValueError(
                f"Two kinds of images of the experiment are {title!r}; it varies the number of images per class itself "
                f"(samples_per_class), so that {part.title!r} is no kind of its own."
            )
    return images


def _source_title(part: Images) -> str:
    return dataclasses.replace(part, samples_per_class=None).title


def _runs(
    part: Images, title: str, schemes: Sequence[str], seeds: Sequence[int], recipe: str, settings: dict
) -> list[Run]:
    return [
        Run(scheme, title, Trial(part.dataset, scheme, part.recipe or recipe, seed, **settings))
        for seed in seeds[: part.seeds]
        for scheme in schemes
    ]


def plan_table(runs: Sequence[Run]) -> pd.DataFrame:
    """Return how much each training will see, a row for all trainings that see equally much.

    Args:
        runs: the result of `sample_runs` or `noise_runs`.

    Returns:
        data, training images, how labels go wrong and how many do, epochs and optimizer steps of the last stage, and
        the number of trainings.
    """
    sizes, rows = {}, []
    for item in runs:
        trial, given = item.trial, item.trial.get_recipe()
        key = trial.dataset, trial.samples_per_class
        if key not in sizes:
            sizes[key] = len(load_data(*key, root=trial.root, image_size=given.image_size).train)
        count = sizes[key]
        kind, wrong = _kind(trial.noise) if trial.label_noise else "", math.floor(trial.label_noise * count + 0.5)
        steps = given.epochs * (count // min(given.batch_size, count))
        rows.append((item.data, count, kind, wrong, given.epochs, steps))
    columns = ["data", "training images", "noise", "wrong labels", "epochs", "steps"]
    table = pd.DataFrame(rows, columns=columns)
    return table.groupby(columns, sort=False).size().rename("trainings").reset_index().set_index("data")


def _kind(noise: str | Matrix) -> str:
    return noise if isinstance(noise, str) else "class-conditional"


def run(runs: Sequence[Run], results_dir: str | Path, jobs: int = 1) -> pd.DataFrame:
    """Train what has not been trained yet and return the experiment's table.

    Args:
        runs: the result of `sample_runs` or `noise_runs`.
        results_dir: folder of the results.
        jobs: trainings side by side.

    Returns:
        the columns of `run_trials`, with "data", the images' name, "labels", how they go wrong ("symmetric" or
        "class-conditional"), and "gap", training minus test accuracy.
    """
    table = run_trials([item.trial for item in runs], results_dir, jobs)
    kinds = [_kind(noise) for noise in table["noise"]]
    gap = table["train_accuracy"] - table["test_accuracy"]
    return table.assign(data=[item.data for item in runs], labels=kinds, gap=gap)


def pixel_confusion(data: ImageData, side: int = 8) -> Matrix:
    """Return which classes look alike: how often an image lies nearer to the mean image of another class.

    The model behind it is the weakest there is, the nearest class mean of small thumbnails; an image's own class mean
    is taken without it. It needs no training, so the matrix is the same everywhere.

    Args:
        data: the data set; its clean training labels are used.
        side: thumbnails have side x side pixels.

    Returns:
        a row-stochastic matrix: row i holds the shares of class i's images that are nearest to each class. `load_data`
        takes it as `noise`, which makes class-conditional label noise (Patrini et al. 2017) of it.
    """
    train = data.train
    labels, classes = train.clean_labels, len(data.classes)
    x = np.stack([np.asarray(resize_square(train[i][0], side), dtype=np.float64).ravel() for i in range(len(train))])
    counts = np.bincount(labels, minlength=classes)
    sums = np.zeros((classes, x.shape[1]))
    np.add.at(sums, labels, x)
    means = sums / np.maximum(counts, 1)[:, None]
    distance = (x**2).sum(1)[:, None] - 2 * x @ means.T + (means**2).sum(1)
    distance[:, counts == 0] = math.inf
    others = counts[labels] - 1
    own = ((x - (sums[labels] - x) / np.maximum(others, 1)[:, None]) ** 2).sum(1)
    distance[np.arange(len(x)), labels] = np.where(others > 0, own, math.inf)
    confused = np.zeros((classes, classes))
    np.add.at(confused, (labels, distance.argmin(1)), 1)
    shares = np.where(counts[:, None] > 0, confused / np.maximum(counts, 1)[:, None], np.eye(classes))
    return tuple(map(tuple, shares.tolist()))
