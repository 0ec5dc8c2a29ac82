"""Few images: trainings with equally many updates, and what they say about binarization as a regularizer."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from binvit.lab.analysis.claims import Claim, check_pair
from binvit.lab.analysis.statistics import change, summarize
from binvit.lab.data.datasets import load_data
from binvit.lab.experiments.parse import Images, parse_changes, parse_images
from binvit.lab.experiments.plan import Run
from binvit.lab.experiments.training_budget import equal_updates, run_levels
from binvit.lab.figures.charts import lines
from binvit.lab.figures.panels import limit_to_shares, subplot_grid
from binvit.lab.figures.style import styled
from binvit.lab.training.recipes import recipe as get_recipe


def sample_claims(
    table: pd.DataFrame, binary: str = "gsb", single: str = "elastic", full: str = "float"
) -> list[Claim]:
    """Check whether binarization regularizes, on the trials of one data set.

    Args:
        table: the result of `run` with the trials of `sample_runs`.
        binary: the scheme that is said to regularize.
        single: the scheme with one group.
        full: the float scheme.

    Returns:
        The claims; undecided where a scheme was not run.
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
        The trials, images by images.

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
            runs += run_levels(part, _source_title(part), schemes, seeds, recipe, settings)
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


@styled
def sample_curves(table: pd.DataFrame, title: str | None = None) -> Figure:
    """Draw test accuracy and the gap to training accuracy against the number of images, a row per kind of images.

    Args:
        table: the result of `robustness.run` with the trials of `sample_runs`.
        title: what the figure says.

    Returns:
        The figure.
    """
    panels = {"test_accuracy": "test accuracy (%)", "gap": "training − test accuracy (points)"}

    def draw(part: pd.DataFrame, value: str, ax: Axes) -> None:
        summary = summarize(part, ["scheme", "samples_per_class"], value)
        if value == "test_accuracy":
            limit_to_shares(ax, summary)
        lines(summary, "samples_per_class", ylabel=panels[value], log_x=True, ax=ax)

    return subplot_grid(table, list(panels), draw, title)
