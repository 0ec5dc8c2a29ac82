"""Lost information: one tensor at a time in several trained models, the claims about it and the pictures."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from binvit.lab.analysis.claims import Claim, all_of, check_pair, confirm
from binvit.lab.analysis.statistics import summarize
from binvit.lab.analysis.tensor_losses import SUPERPOSED, TENSORS, one_tensor_at_a_time, single_tensor_options
from binvit.lab.analysis.verdicts import LOSS_IS_ATTENTION, SUPERPOSITION_HELPS
from binvit.lab.data.datasets import ImageData, load_data
from binvit.lab.experiments.plan import Condition, Run, notebook_runs
from binvit.lab.figures.histogram import value_histogram
from binvit.lab.figures.style import (
    FEWEST,
    INK,
    SCHEME_COLORS,
    caption,
    interval_caption,
    readable,
    require_columns,
    styled,
)
from binvit.lab.trials.trained import load_trained
from binvit.lab.trials.trial import Trial

CASES = [(tensor, "1-bit") for tensor in TENSORS] + [(tensor, "GSB") for tensor in SUPERPOSED]
_PRODUCTS = {
    "a 1-bit query or key": ("query", "key"),
    "1-bit linear weights or inputs": ("linear weights", "linear inputs"),
}


def conditions(train_each: bool, thresholds: Sequence[float] = (0.7, 0.9), reduce: str = "row") -> list[Condition]:
    """Return what is trained: the float model, and if asked for each model with a single kind of binary tensor.

    Args:
        train_each: also train with every tensor binarized alone, from scratch.
        thresholds: of GSB's groups.
        reduce: the set over which GSB's maxima run.

    Returns:
        conditions for `experiments.plan`; binary ones are called "value, GSB" and so on.
    """
    groups = {"thresholds": tuple(thresholds), "reduce": reduce}
    single = [
        Condition(f"{tensor}, {binarizer}", "gsb", single_tensor_options(tensor, binarizer == "GSB", **groups))
        for tensor, binarizer in CASES
    ]
    return [Condition("float", "float"), *(single if train_each else [])]


def runs(p: Any) -> list[Run]:
    """Return what the notebook trains with these parameters."""
    return notebook_runs(conditions(p.train_each, p.thresholds, p.reduce), p, keep_models=("float",))


def trial_data(trial: Trial) -> ImageData:
    """Load the images that a trial was trained on."""
    size = trial.get_recipe().image_size
    return load_data(trial.dataset, trial.samples_per_class, seed=trial.seed, root=trial.root, image_size=size)


def measure(
    runs: Sequence[Run],
    trained: pd.DataFrame,
    results_dir: str | Path,
    images: int = 256,
    thresholds: Sequence[float] = (0.7, 0.9),
    reduce: str = "row",
    least_squares: bool = True,
) -> pd.DataFrame:
    """Measure what each tensor loses in the float model of every seed.

    Args:
        runs: the plan of `conditions`.
        trained: the table of `experiments.train`, which kept the float models.
        results_dir: where they are kept.
        images: how many set the scales and how many errors are measured on.
        thresholds: of GSB's groups.
        reduce: the set over which GSB's maxima run.
        least_squares: as in `analysis.binarize_tensor`.

    Returns:
        One row per data, seed, tensor and binarizer: the columns of `analysis.one_tensor_at_a_time`, and trained_drop,
        what a model loses that was trained with this one binary tensor, if such models were trained.
    """
    options: dict[str, Any] = {"thresholds": thresholds, "reduce": reduce, "least_squares": least_squares}
    parts = []
    for run in runs:
        if run.condition == "float":
            model = load_trained(run.trial, results_dir).model
            table = one_tensor_at_a_time(model, trial_data(run.trial), images, **options)
            parts.append(table.assign(data=run.data, seed=run.trial.seed))
    losses = pd.concat(parts, ignore_index=True)
    reached = trained.set_index(["data", "seed", "condition"])["test_accuracy"]
    if set(reached.index.get_level_values("condition")) != {"float"}:
        keys = zip(losses["data"], losses["seed"], losses["tensor"], losses["binarizer"], strict=True)
        losses["trained_drop"] = [
            reached[data, seed, "float"] - reached[data, seed, f"{tensor}, {binarizer}"]
            for data, seed, tensor, binarizer in keys
        ]
    return losses


def claims(losses: pd.DataFrame, groups: int = 3) -> list[Claim]:
    """Check what the paper says about lost information, on the measurements of one data set.

    Args:
        losses: the result of `measure`, rows of one data set.
        groups: how many groups GSB superposed, one more than its thresholds.

    Returns:
        The claims; a tensor that costs more than several others is compared with each of them, and claims about
        trained models are undecided if none were trained.
    """
    single = losses[losses["binarizer"] == "1-bit"]
    several = f"{groups} groups"
    named = losses.assign(groups=losses["binarizer"].map({"1-bit": "1 group", "GSB": several}))

    def costs_more(sentence: str, value: str, tensor: str, others: Iterable[str]) -> Claim:
        pairs = [check_pair(f"{tensor} exceeds {o}", single, tensor, o, on="tensor", value=value) for o in others]
        return all_of(sentence, pairs)

    checked = []
    for tensor in SUPERPOSED:
        for words, others in _PRODUCTS.items():
            sentence = f"Without further training, a 1-bit {tensor} costs more accuracy than {words}."
            checked.append(costs_more(sentence, "accuracy_drop", tensor, others))
    for tensor in SUPERPOSED:
        sentence = f"After training with it, a 1-bit {tensor} costs more accuracy than any other 1-bit tensor."
        if "trained_drop" in losses:
            rest = [other for other in TENSORS if other != tensor]
            checked += confirm(LOSS_IS_ATTENTION, costs_more(sentence, "trained_drop", tensor, rest))
        else:
            checked += confirm(LOSS_IS_ATTENTION, Claim(sentence, "undecided", "not run"))
    for tensor in SUPERPOSED:
        part = named[named["tensor"] == tensor]
        sentence = f"After training with it, the {tensor} with {several} loses less accuracy than with one."
        trained = Claim(sentence, "undecided", "not run")
        if "trained_drop" in losses:
            trained = check_pair(sentence, part, "1 group", several, on="groups", value="trained_drop")
        checked += confirm(SUPERPOSITION_HELPS, trained)
        less = f"With {several}, the {tensor} loses less accuracy than with one."
        closer = f"With {several}, the {tensor} is closer to the float one: the cosine grows by more than 0.02."
        richer = f"With {several}, an element of the {tensor} carries more than 0.2 bits more."
        checked += [
            check_pair(less, part, "1 group", several, on="groups", value="accuracy_drop"),
            check_pair(closer, part, several, "1 group", 0.02, on="groups", value="cosine", percent=False),
            check_pair(richer, part, several, "1 group", 0.2, on="groups", value="entropy", percent=False),
        ]
    return checked


# Column -> heading and factor of the panels of `draw`.
LOSSES = {
    "accuracy_drop": ("accuracy lost (points)", 100),
    "trained_drop": ("lost after training (points)", 100),
    "relative_error": ("relative error", 1),
    "cosine": ("cosine similarity", 1),
    "entropy": ("entropy (bits per element)", 1),
}
_BINARIZERS = {"1-bit": SCHEME_COLORS["elastic"], "GSB": SCHEME_COLORS["gsb"]}


@styled
def draw(table: pd.DataFrame, title: str | None = None) -> Figure:
    """Draw what binarizing each tensor alone loses, a panel per measure, a row of panels per data.

    Args:
        table: one row per data, seed, tensor and binarizer ("1-bit" or "GSB"), with some of the columns of `LOSSES`.
        title: what the figure says.

    Returns:
        The figure.

    Raises:
        ValueError: a column is missing.
    """
    require_columns(table, ["data", "seed", "tensor", "binarizer"])
    measures, tensors = [name for name in LOSSES if name in table], list(table["tensor"].unique())
    parts = list(table.groupby("data", sort=False))
    size = (0.9 + 1.5 * len(measures), 0.65 + len(parts) * (0.4 + 0.3 * len(tensors)))
    fig, axes = plt.subplots(len(parts), len(measures), figsize=size, sharey=True, sharex="col", squeeze=False)
    for row, (data, part) in zip(axes, parts, strict=True):
        for ax, measure in zip(row, measures, strict=True):
            _losses(ax, part, measure, tensors)
        if len(parts) > 1:
            row[0].set_title(data)
    for ax, measure in zip(axes[-1], measures, strict=True):
        ax.set_xlabel(LOSSES[measure][0])
    for x, (name, color) in zip((0.01, 0.08), _BINARIZERS.items(), strict=True):
        fig.text(x, 0.01, f"● {name}", color=readable(color), fontsize=8, fontweight="bold")
    caption(fig, interval_caption(table.groupby(["data", "tensor", "binarizer"])["seed"].nunique()))
    if title:
        fig.suptitle(title, x=0.01, ha="left", fontsize=9, fontweight="bold")
    return fig


def _losses(ax: Axes, table: pd.DataFrame, measure: str, tensors: Sequence[str]) -> None:
    factor = LOSSES[measure][1]
    for row in summarize(table.dropna(subset=[measure]), ["tensor", "binarizer"], measure).to_dict("records"):
        pair = ((table["tensor"] == row["tensor"]) & (table["binarizer"] != row["binarizer"])).any()
        y = tensors.index(row["tensor"]) + pair * (0.19 if row["binarizer"] == "GSB" else -0.19)
        color = _BINARIZERS[row["binarizer"]]
        if row["n"] >= FEWEST:
            ax.plot([factor * row["low"], factor * row["high"]], [y, y], color=color, lw=1.4)
        else:
            own = table[(table["tensor"] == row["tensor"]) & (table["binarizer"] == row["binarizer"])][measure]
            ax.plot(factor * own, [y] * len(own), "o", color=color, alpha=0.45, ms=2.6, mew=0)
        ax.plot(factor * row["mean"], y, "o", color=color, ms=5.5, mec="white", mew=0.8)
    ax.set_yticks(range(len(tensors)), tensors)
    ax.tick_params(axis="y", length=0, labelcolor=INK)
    ax.set_ylim(len(tensors) - 0.5, -0.5)
    ax.grid(axis="y", visible=False)
    ax.spines["left"].set_visible(False)
    for y in range(1, len(tensors)):
        ax.axhline(y - 0.5, color="#eeeeee", lw=0.6, zorder=0)
    if "drop" in measure:
        ax.axvline(0, color=INK, lw=0.6)


@styled
def distributions(shares: Mapping[str, Tensor], thresholds: Sequence[float], title: str | None = None) -> Figure:
    """Draw how the attention map and the value are distributed, with the thresholds of GSB's groups.

    Args:
        shares: heading -> the results of `analysis.share_of_extreme`; a tensor without negative elements is drawn on a
            logarithmic scale, as attention maps need it.
        thresholds: shares of the maximum above which groups 2, 3, ... start.
        title: what the figure says.

    Returns:
        The figure.
    """
    fig, axes = plt.subplots(1, len(shares), figsize=(3.7 * len(shares), 2.7), squeeze=False)
    for ax, (heading, share) in zip(axes[0], shares.items(), strict=True):
        signed = bool((share < 0).any())
        cuts = {f"{t:g}": t for t in thresholds}
        if signed:
            cuts = {f"−{t:g}": -t for t in reversed(thresholds)} | {"0": 0.0} | cuts
        beyond = [f"{100 * float((share.abs() > t).float().mean()):.1f} % beyond {t:g}" for t in thresholds]
        value_histogram(share, cuts, xlabel="\n".join([heading, ", ".join(beyond)]), log=not signed, ax=ax)
    if title:
        fig.suptitle(title, x=0.01, ha="left", fontsize=9, fontweight="bold")
    return fig
