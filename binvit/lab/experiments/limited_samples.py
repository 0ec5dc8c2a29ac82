"""Few images: trainings with equally many updates, and what they say about binarization as a regularizer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from binvit.lab.analysis.claims import LEAST, Claim, check_pair, confirm
from binvit.lab.analysis.statistics import change, summarize
from binvit.lab.analysis.verdicts import FEW_SAMPLES, SUPERPOSITION_HELPS
from binvit.lab.data.datasets import ImageData, load_data
from binvit.lab.experiments.design.baselines import measurements_of
from binvit.lab.experiments.design.parse import Images, parse_changes, parse_images
from binvit.lab.experiments.design.plan import Run, archive_dir, data_dir, loader, require_known, with_bias
from binvit.lab.experiments.design.training_budget import equal_updates, run_levels
from binvit.lab.figures.charts import cross_out, lines
from binvit.lab.figures.panels import subplot_grid
from binvit.lab.figures.style import caption, colors_of, styled
from binvit.lab.training.recipes import recipe as get_recipe


def claims(table: pd.DataFrame, binary: str = "gsb", single: str = "elastic", full: str = "float") -> list[Claim]:
    """Check whether binarization regularizes, on the trials of one data set.

    Args:
        table: the result of `run` with the trials of `conditions`.
        binary: the scheme that is said to regularize.
        single: the scheme with one group.
        full: the float scheme.

    Returns:
        The claims; undecided where a scheme was not run. The change from few to many holds the trainings of the gap
        once more and is exploratory, and so is the gap where both have the bias of the map.
    """
    few, many = table["samples_per_class"].min(), table["samples_per_class"].max()
    part = table[table["samples_per_class"] == few]
    gap = f"With {few} images per class, the gap between training and test is smaller for {binary} than for {full}."
    more = f"With {few} images per class, {binary} is more accurate than {single}."
    regular = confirm(FEW_SAMPLES, check_pair(gap, part, full, binary, on="condition", value="gap"))
    if few < many:
        gained = change(table, "samples_per_class", few, many, by="condition")
        for bias, beginning in (("", "From"), (" + bias", "With the bias of the map in both, from")):
            a, b = full + bias, binary + bias
            said = f"{beginning} {few} to {many} images per class, {full} gains more than {binary}"
            sentence = f"{said}: few images favour {binary}."
            if not bias or b in set(table["condition"]):
                regular.append(check_pair(sentence, gained, a, b, on="condition", value="change"))
    if (table["condition"] == f"{binary} + bias").any():
        sentence = (
            f"With the bias of the map in both and {few} images per class, {binary}'s gap is smaller than {full}'s."
        )
        regular.append(check_pair(sentence, part, f"{full} + bias", f"{binary} + bias", on="condition", value="gap"))
    return regular + confirm(SUPERPOSITION_HELPS, check_pair(more, part, binary, single, on="condition"))


def conditions(
    images: str,
    schemes: Sequence[str],
    biases: Sequence[str],
    samples_per_class: Sequence[int],
    seeds: Sequence[int],
    recipe: str = "smoke",
    changes: str = "",
    updates: int | None = None,
    data_dir: str | Path | None = None,
    load: Callable[..., ImageData] = load_data,
    archive: str | Path | None = None,
) -> list[Run]:
    """Make the trials of accuracy against the number of training images.

    Args:
        images: a text that `parse_sampled_images` understands.
        schemes: names of `binvit.list_schemes`.
        biases: of the attention map, which every scheme gets: "none", "relative" or "full", or several of them.
        samples_per_class: training images per class; counts that a data set does not have are left out for it.
        seeds: of every combination.
        recipe: of images that name none.
        changes: of the recipe; a text that `parse.parse_changes` understands.
        updates: optimizer steps of every trial, as in `equal_updates`.
        data_dir: folder of data sets that are files.
        load: what loads the images to count.
        archive: folder of archived trials; images that are absent are left out then, unless it knows their number.

    Returns:
        The trials, images by images.

    Raises:
        ValueError: a text is not understood, or a data set has fewer images per class than the smallest count.
        FileNotFoundError: the files of a data set are missing.
    """
    runs, changed = [], parse_changes(changes)
    compared = [with_bias(scheme, bias) for scheme in schemes for bias in biases]
    for part in parse_sampled_images(images):
        given = get_recipe(part.recipe or recipe, **changed)
        try:
            data = load(part.dataset, part.samples_per_class, root=data_dir, image_size=given.image_size)
        except FileNotFoundError:
            if not archive:
                raise
            continue  # an archive without a trial of these images
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
            runs += run_levels(part, _source_title(part), compared, seeds, recipe, settings)
    return require_known(runs, images, archive)


def runs(p: Any, load: Callable[..., ImageData] | None = None) -> list[Run]:
    """Return what the notebook trains with these parameters; `load` gives the images that are counted."""
    counts, budget = sorted(p.samples_per_class), (p.recipe, p.changes, p.updates or None, data_dir(p))
    source = load or loader(p), archive_dir(p)
    return conditions(p.dataset, p.schemes, p.biases, counts, p.seeds, *budget, *source)


def parse_sampled_images(text: str) -> list[Images]:
    """Read several kinds of images of which different numbers are drawn, as `parse.parse_images` does.

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


take_measurements = measurements_of(runs)


@styled
def draw(table: pd.DataFrame, title: str | None = None) -> Figure:
    """Draw test accuracy and the gap to training accuracy against the number of images, a row per kind of images.

    Means below three times chance are crossed out, where chance is known.

    Args:
        table: the result of `training_budget.run` with the trials of `conditions`.
        title: what the figure says.

    Returns:
        The figure.
    """
    panels = {"test_accuracy": "test accuracy (%)", "gap": "training − test accuracy (points)"}
    colors = colors_of(table["condition"])
    shared: dict[str, Any] = {"by": "condition", "log_x": True, "colors": colors}
    mean = table.groupby(["data", "condition", "samples_per_class"])["test_accuracy"].transform("mean")
    table = table.assign(untrained=mean < LEAST * table.get("chance", pd.Series(0.0, table.index)))

    def panel(part: pd.DataFrame, value: str, ax: Axes) -> None:
        summary = summarize(part, ["condition", "samples_per_class", "untrained"], value)
        lines(summary, "samples_per_class", ylabel=panels[value], trials=part, value=value, ax=ax, **shared)
        for row in summary[summary["untrained"]].to_dict("records"):
            cross_out(ax, row["samples_per_class"], 100 * row["mean"], colors[row["condition"]])

    fig = subplot_grid(table, list(panels), panel, title)
    if table["untrained"].any():
        caption(fig, fig.get_supxlabel() + f"\n×: mean test accuracy below {LEAST} times chance")
    return fig
