"""Wrong labels: trainings with confused labels, and how many of them a model memorizes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import offset_copy

from binvit.lab.analysis.claims import LEAST, UNTRAINED, Claim, check_pair
from binvit.lab.analysis.statistics import change, summarize
from binvit.lab.data.datasets import ImageData, load_data
from binvit.lab.experiments.design.parse import parse_changes, parse_images
from binvit.lab.experiments.design.plan import Run, archive_dir, data_dir, loader, require_known, with_bias
from binvit.lab.experiments.design.training_budget import equal_updates, run_levels
from binvit.lab.figures.charts import BLUES, cross_out, lines
from binvit.lab.figures.panels import subplot_grid
from binvit.lab.figures.style import FEWEST, caption, colors_of, styled
from binvit.lab.training.recipes import recipe as get_recipe
from binvit.lab.trials.archive import confusion

FITTED = 0.5  # share of the wrong labels that a model reproduces if it has fitted the noise


def claims(table: pd.DataFrame, binary: str = "gsb", single: str = "elastic", full: str = "float") -> list[Claim]:
    """Check whether binarization resists wrong labels, on the trials of one data set.

    Args:
        table: the result of `run` with the trials of `conditions`.
        binary: the scheme that is said to resist.
        single: the scheme with one group.
        full: the float scheme.

    Returns:
        The claims; undecided where a scheme was not run.
    """
    found = []
    for kind in ("symmetric", "class-conditional"):
        part = table[(table["labels"] == kind) & (table["label_noise"] > 0)]
        if part.empty:
            continue
        part = part[part["label_noise"] == part["label_noise"].max()]
        where = f"With {part['label_noise'].iloc[0]:.0%} {kind} noise"
        more = f"{where}, {binary} is more accurate than"
        memory = f"{where}, {binary} memorizes a smaller share of the wrong labels than {full}."
        found += [
            check_pair(f"{more} {full}.", part, binary, full),
            check_pair(f"{more} {single}.", part, binary, single),
            _unless_unfitted(check_pair(memory, part, full, binary, value="memorized"), part, full),
        ]
    symmetric = table[table["labels"] == "symmetric"]
    most = symmetric["label_noise"].max() if len(symmetric) else 0
    if most > 0 and (symmetric["label_noise"] == 0).any():
        lost = change(symmetric, "label_noise", 0, most)
        sentence = f"From right labels to {most:.0%} symmetric noise, {binary} loses less accuracy than {full}."
        found.append(check_pair(sentence, lost, binary, full, value="change"))
    return found


def fitted(table: pd.DataFrame, full: str = "float") -> pd.DataFrame:
    """Return how much of each noise the float model has fitted, since only what was learned can be memorized less.

    Args:
        table: the result of `run` with the trials of `conditions`.
        full: the float scheme.

    Returns:
        data, labels, label_noise, memorized (the mean over the seeds), and fitted, whether that is at least `FITTED`.
    """
    noisy = table[(table["scheme"] == full) & (table["label_noise"] > 0)]
    found = noisy.groupby(["data", "labels", "label_noise"], sort=False)["memorized"].mean().reset_index()
    return found.assign(fitted=found["memorized"] >= FITTED)


def with_training(table: pd.DataFrame) -> pd.DataFrame:
    """Add the column training, which says of what has a mean below three times chance that it does not train.

    Args:
        table: the result of `run` with the trials of `conditions`.

    Returns:
        The table; the column is empty where a scheme trains, and everywhere if chance is not known.
    """
    keys = ["data", "labels", "label_noise", "scheme"]
    mean = table.groupby(keys)["test_accuracy"].transform("mean")
    chance = table.get("chance", pd.Series(0.0, table.index))
    return table.assign(training=np.where(mean < LEAST * chance, UNTRAINED, ""))


def _unless_unfitted(claim: Claim, part: pd.DataFrame, full: str) -> Claim:
    share = part.loc[part["scheme"] == full, "memorized"].mean()
    if not share < FITTED:
        return claim
    evidence = f"{full} did not fit the noise: it reproduces {share:.0%} of the wrong labels"
    return Claim(claim.sentence, "undecided", evidence)


def conditions(
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
    bias: str = "none",
    load: Callable[..., ImageData] = load_data,
    archive: str | Path | None = None,
) -> list[Run]:
    """Make the trials of accuracy against the share of wrong training labels.

    Args:
        images: a text that `parse.parse_images` understands.
        schemes: names of `binvit.list_schemes`.
        label_noises: shares of labels that become any other class.
        confused_noises: shares of labels that become a class that looks alike, as `pixel_confusion` says; 0 is the
            same as no noise and left out.
        seeds: of every combination.
        recipe: of images that name none.
        changes: of the recipe; a text that `parse.parse_changes` understands.
        updates: optimizer steps of every trial, as in `equal_updates`.
        samples_per_class: training images of each class, of images that name no number; 0 takes all.
        data_dir: folder of data sets that are files.
        bias: of the attention map, which every scheme gets: "none", "relative" or "full".
        load: what loads the images to count and to compare.
        archive: folder of archived trials; images that are absent are left out then, unless it knows their number.

    Returns:
        The trials, images by images.

    Raises:
        ValueError: a text is not understood, or a data set has too few images per class.
        FileNotFoundError: the files of a data set are missing.
    """
    runs, changed = [], parse_changes(changes)
    compared = [with_bias(scheme, bias) for scheme in schemes]
    for part in parse_images(images):
        given = get_recipe(part.recipe or recipe, **changed)
        kinds: list[dict[str, Any]] = [{"label_noise": share} for share in label_noises]
        try:
            data = load(part.dataset, root=data_dir, image_size=given.image_size)
        except FileNotFoundError:
            if not archive:
                raise
            continue  # an archive without a trial of these images
        each = part.samples_per_class or samples_per_class or None
        count = len(data.train) if each is None else each * len(data.classes)
        matrix = confusion(part.dataset, data, archive) if any(confused_noises) else None
        if matrix:
            kinds += [{"label_noise": share, "noise": matrix} for share in confused_noises if share]
        options = changed | equal_updates(given, updates, count)
        settings = {"samples_per_class": each, "recipe_options": options, "root": data_dir}
        for kind in kinds:
            runs += run_levels(part, part.title, compared, seeds, recipe, settings | kind)
    return require_known(runs, images, archive)


def runs(p: Any, load: Callable[..., ImageData] | None = None) -> list[Run]:
    """Return what the notebook trains with these parameters; `load` gives the images that are counted and compared."""
    budget = p.seeds, p.recipe, p.changes, p.updates or None, p.samples_per_class, data_dir(p), p.bias
    source = load or loader(p), archive_dir(p)
    return conditions(p.dataset, p.schemes, p.label_noises, p.confused_noises, *budget, *source)


@styled
def draw(table: pd.DataFrame, title: str | None = None) -> Figure:
    """Draw test accuracy and memorized wrong labels against the share of wrong labels, a row per kind of images.

    Images of which one share alone was run are left out, unless there are no others.

    Lines are symmetric noise; hollow diamonds are class-conditional noise. What does not train is crossed out.

    Args:
        table: the result of `training_budget.run` with the trials of `conditions`.
        title: what the figure says.

    Returns:
        The figure.
    """
    panels = {"test_accuracy": "test accuracy (%)", "memorized": "wrong labels memorized (%)"}
    keys = ["scheme", "label_noise", "training"]
    several = table.groupby("data")["label_noise"].transform("nunique") > 1
    table = with_training(table[several] if several.any() else table)
    colors = colors_of(table["scheme"])

    def panel(part: pd.DataFrame, value: str, ax: Axes) -> None:
        part = part.dropna(subset=[value])
        if part.empty:
            ax.set_axis_off()
            return
        alike = part["labels"] == "class-conditional"
        if not part[~alike].empty:
            summary = summarize(part[~alike], keys, value)
            shown: dict[str, Any] = {"trials": part[~alike], "value": value, "colors": colors, "ax": ax}
            lines(summary, "label_noise", ylabel=panels[value], **shown)
            for row in summary[summary["training"] == UNTRAINED].to_dict("records"):
                cross_out(ax, row["label_noise"], 100 * row["mean"], colors[row["scheme"]])
        for row in summarize(part[alike], keys, value).to_dict("records"):
            color, x = colors[row["scheme"]], row["label_noise"]
            if row["n"] < FEWEST:
                own = part[alike & (part["scheme"] == row["scheme"]) & (part["label_noise"] == x)]
                left = offset_copy(ax.transData, cast(Figure, ax.figure), x=-13, units="points")
                style: dict[str, Any] = {"color": "none", "mec": color, "mew": 0.8, "ms": 2.6, "transform": left}
                ax.plot([x] * len(own), 100 * own[value], "D", **style)
                ax.update_datalim([(x, 100 * seed) for seed in own[value]])  # shifted points do not count by themselves
                ax.autoscale_view()
            else:
                ax.plot([x, x], [100 * row["low"], 100 * row["high"]], color=color, lw=0.9)
            ax.plot(x, 100 * row["mean"], "D", color="none", mec=color, mew=1.3, ms=5, zorder=3)
            if row["training"] == UNTRAINED:
                ax.plot(x, 100 * row["mean"], "x", color=color, ms=4, zorder=3)

    fig = subplot_grid(table, list(panels), panel, title)
    if (table["labels"] == "class-conditional").any():
        told = "\nline: symmetric noise, ◇: class-conditional noise, its seeds to the left where they are few"
        caption(fig, fig.get_supxlabel() + told)
    if (table["training"] == UNTRAINED).any():
        caption(fig, fig.get_supxlabel() + f"\n×: {UNTRAINED}, its mean is below {LEAST} times chance")
    return fig


@styled
def confusion_map(matrix: Sequence[Sequence[float]], classes: Sequence[str], title: str | None = None) -> Figure:
    """Draw where wrong labels go: the shares of a confusion matrix off its diagonal.

    Args:
        matrix: (C, C), row by true class.
        classes: names; written where there are few.
        title: what the figure says.

    Returns:
        The figure.
    """
    shown = np.array(matrix, dtype=np.float64)
    np.fill_diagonal(shown, 0)
    shown /= np.maximum(shown.sum(1, keepdims=True), 1e-300)
    fig, ax = plt.subplots(figsize=(3.6, 3.2))
    few = len(classes) <= 12
    texts = np.where(shown > 0, np.char.mod("%.0f", 100 * shown), "") if few else None
    names = list(classes) if few else False
    options = {"annot_kws": {"fontsize": 6}, "xticklabels": names, "yticklabels": names, "cbar": False, "square": True}
    sns.heatmap(100 * shown, cmap=BLUES, vmin=0, annot=texts, fmt="", ax=ax, **options)
    ax.tick_params(length=0, rotation=0)
    ax.set(xlabel="wrong label", ylabel="true class")
    caption(fig, "where the wrong labels of a class go (%)")
    if title:
        ax.set_title(title)
    return fig
