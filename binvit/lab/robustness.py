"""Few images and wrong labels: the trials of both experiments, and how their tables are read."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from binvit.lab.claims import Claim, check_pair
from binvit.lab.data import ImageData, load_data
from binvit.lab.experiments import Images, Run, parse_images
from binvit.lab.images import resize_square
from binvit.lab.recipes import recipe as recipe_of
from binvit.lab.runner import run_trials
from binvit.lab.statistics import compare
from binvit.lab.trials import Trial

Matrix = tuple[tuple[float, ...], ...]


def equal_updates(recipe: str, updates: int | None, images: int) -> dict[str, Any]:
    """Return the options that make a recipe take a number of optimizer steps, whatever the number of images.

    A recipe counts epochs, and an epoch over a tenth of the images is a tenth of the steps: without this, few images
    would also mean little training. Only the last epoch is evaluated.

    Args:
        recipe: a name of `list_recipes`.
        updates: optimizer steps of the last stage; None keeps the recipe's epochs.
        images: training images.

    Returns:
        fields for a trial's `recipe_options`.
    """
    if updates is None:
        return {}
    given = recipe_of(recipe)
    steps = images // min(given.batch_size, images)  # a last batch that is not full is left out
    epochs = max(1, round(updates / steps))
    return {"epochs": epochs, "eval_every": epochs}


def sample_runs(
    images: str,
    schemes: Sequence[str],
    samples_per_class: Sequence[int],
    seeds: Sequence[int],
    recipe: str = "smoke",
    updates: int | None = None,
    data_dir: str | Path | None = None,
) -> list[Run]:
    """Make the trials of accuracy against the number of training images.

    Args:
        images: a text that `experiments.parse_images` understands.
        schemes: names of `binvit.list_schemes`.
        samples_per_class: training images per class; counts that a data set does not have are left out for it.
        seeds: of every combination.
        recipe: of images that name none.
        updates: optimizer steps of every trial, as in `equal_updates`.
        data_dir: folder of data sets that are files.

    Returns:
        the trials, images by images.

    Raises:
        ValueError: a text is not understood, or a data set has fewer images per class than the smallest count.
        FileNotFoundError: the files of a data set are missing.
    """
    runs = []
    for part in parse_images(images):
        data = load_data(part.dataset, part.samples_per_class, root=data_dir)
        most = int(np.bincount(data.train.labels, minlength=len(data.classes)).min())
        counts = [count for count in samples_per_class if count <= most]
        if not counts:
            raise ValueError(
                f"{part.title} has {most} training images in its smallest class, fewer than the "
                f"{min(samples_per_class)} asked for by samples_per_class."
            )
        for count in counts:
            length = equal_updates(part.recipe or recipe, updates, count * len(data.classes))
            settings = {"samples_per_class": count, "recipe_options": length, "root": data_dir}
            runs += _runs(part, schemes, seeds, recipe, settings)
    return runs


def noise_runs(
    images: str,
    schemes: Sequence[str],
    label_noises: Sequence[float],
    confused_noises: Sequence[float],
    seeds: Sequence[int],
    recipe: str = "smoke",
    updates: int | None = None,
    samples_per_class: int = 0,
    data_dir: str | Path | None = None,
) -> list[Run]:
    """Make the trials of accuracy against the share of wrong training labels.

    Args:
        images: a text that `experiments.parse_images` understands.
        schemes: names of `binvit.list_schemes`.
        label_noises: shares of labels that become any other class.
        confused_noises: shares of labels that become a class that looks alike, as `pixel_confusion` says; 0 is the
            same as no noise and left out.
        seeds: of every combination.
        recipe: of images that name none.
        updates: optimizer steps of every trial, as in `equal_updates`.
        samples_per_class: training images of each class, of images that name no number; 0 takes all.
        data_dir: folder of data sets that are files.

    Returns:
        the trials, images by images.

    Raises:
        ValueError: a text is not understood, or a data set has too few images per class.
        FileNotFoundError: the files of a data set are missing.
    """
    runs = []
    for part in parse_images(images):
        kinds: list[dict[str, Any]] = [{"label_noise": share} for share in label_noises]
        data = load_data(part.dataset, root=data_dir)
        each = part.samples_per_class or samples_per_class or None
        count = len(data.train) if each is None else each * len(data.classes)
        if any(confused_noises):
            matrix = pixel_confusion(data)
            kinds += [{"label_noise": share, "noise": matrix} for share in confused_noises if share]
        length = equal_updates(part.recipe or recipe, updates, count)
        settings = {"samples_per_class": each, "recipe_options": length, "root": data_dir}
        for kind in kinds:
            runs += _runs(part, schemes, seeds, recipe, settings | kind)
    return runs


def _runs(part: Images, schemes: Sequence[str], seeds: Sequence[int], recipe: str, settings: dict) -> list[Run]:
    title = dataclasses.replace(part, samples_per_class=None).title
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
            sizes[key] = len(load_data(*key, root=trial.root).train)
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


def change(
    df: pd.DataFrame, column: str, start: float, end: float, value: str = "test_accuracy", name: str = "change"
) -> pd.DataFrame:
    """Return how a measured value changes between two settings, trial by trial of the same scheme and seed.

    Args:
        df: the table of one data set, one row per trial.
        column: the setting, such as "label_noise".
        start: its first value.
        end: its second value.
        value: what is measured.
        name: the new column.

    Returns:
        scheme, seed and the new column: the value at `end` minus the value at `start`.

    Raises:
        ValueError: a setting has no trials, or several of one scheme and seed.
    """
    sides = []
    for at in (start, end):
        side = df[df[column] == at]
        if side.empty:
            raise ValueError(f"No trial has {column} = {at:g}; there are {sorted(df[column].unique())}.")
        if side.duplicated(["scheme", "seed"]).any():
            raise ValueError(f"Several trials of one scheme and seed have {column} = {at:g}; select one data set.")
        sides.append(side.set_index(["scheme", "seed"])[value])
    return (sides[1] - sides[0]).dropna().rename(name).reset_index()


def differences(table: pd.DataFrame, column: str, reference: str = "float") -> pd.DataFrame:
    """Return how much more accurate each scheme is than a reference, setting by setting, paired by seed.

    Args:
        table: the result of `run`.
        column: the setting, such as "samples_per_class".
        reference: a scheme.

    Returns:
        data, the setting, scheme, mean, low, high and n; no rows if the reference was not run.
    """
    columns = ["data", column, "scheme", "mean", "low", "high", "n"]
    parts = [
        compare(part, reference).assign(data=data, **{column: at})
        for (data, at), part in table.groupby(["data", column], sort=False)
        if reference in set(part["scheme"])
    ]
    return pd.concat(parts, ignore_index=True)[columns] if parts else pd.DataFrame(columns=columns)


def sample_claims(table: pd.DataFrame, binary: str = "gsb", single: str = "bit", full: str = "float") -> list[Claim]:
    """Check whether binarization regularizes, on the trials of one data set.

    Args:
        table: the result of `run` with the trials of `sample_runs`.
        binary: the scheme that is said to regularize.
        single: the scheme with one group.
        full: the float scheme.

    Returns:
        the claims; undecided where a scheme was not run.
    """
    few, many = table["samples_per_class"].min(), table["samples_per_class"].max()
    part = table[table["samples_per_class"] == few]
    found = [
        check_pair(f"With {few} images per class, {binary} is more accurate than {full}.", part, binary, full),
        check_pair(f"With {few} images per class, {binary} is more accurate than {single}.", part, binary, single),
        check_pair(
            f"With {few} images per class, the gap between training and test is smaller for {binary} than for {full}.",
            part,
            full,
            binary,
            value="gap",
        ),
    ]
    if few < many:
        gained = change(table, "samples_per_class", few, many)
        sentence = (
            f"From {few} to {many} images per class, {full} gains more than {binary}: few images favour {binary}."
        )
        found.append(check_pair(sentence, gained, full, binary, value="change"))
    return found


def noise_claims(table: pd.DataFrame, binary: str = "gsb", single: str = "bit", full: str = "float") -> list[Claim]:
    """Check whether binarization resists wrong labels, on the trials of one data set.

    Args:
        table: the result of `run` with the trials of `noise_runs`.
        binary: the scheme that is said to resist.
        single: the scheme with one group.
        full: the float scheme.

    Returns:
        the claims; undecided where a scheme was not run.
    """
    found = []
    for kind in ("symmetric", "class-conditional"):
        part = table[(table["labels"] == kind) & (table["label_noise"] > 0)]
        if part.empty:
            continue
        part = part[part["label_noise"] == part["label_noise"].max()]
        where = f"With {part['label_noise'].iloc[0]:.0%} {kind} noise"
        found += [
            check_pair(f"{where}, {binary} is more accurate than {full}.", part, binary, full),
            check_pair(f"{where}, {binary} is more accurate than {single}.", part, binary, single),
            check_pair(
                f"{where}, {binary} memorizes a smaller share of the wrong labels than {full}.",
                part,
                full,
                binary,
                value="memorized",
            ),
        ]
    symmetric = table[table["labels"] == "symmetric"]
    most = symmetric["label_noise"].max() if len(symmetric) else 0
    if most > 0 and (symmetric["label_noise"] == 0).any():
        lost = change(symmetric, "label_noise", 0, most)
        sentence = f"From right labels to {most:.0%} symmetric noise, {binary} loses less accuracy than {full}."
        found.append(check_pair(sentence, lost, binary, full, value="change"))
    return found
