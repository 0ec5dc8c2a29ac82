"""Lost information: one tensor at a time in several trained models, the claims about it and the pictures."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from binvit.lab.analysis.attention import attention_tensors, binarized_views, query_rows, share_of_extreme
from binvit.lab.analysis.claims import Claim, all_of, check_pair, confirm, not_run
from binvit.lab.analysis.statistics import summarize
from binvit.lab.analysis.tensor_losses import (
    SUPERPOSED,
    TENSORS,
    one_tensor_at_a_time,
    sample_images,
    single_tensor_options,
)
from binvit.lab.analysis.verdicts import LOSS_IS_ATTENTION, SUPERPOSITION_HELPS
from binvit.lab.data.datasets import ImageData, load_data
from binvit.lab.experiments.design.plan import Condition, Run, archive_dir, notebook_runs
from binvit.lab.experiments.quickstart import one_per_class
from binvit.lab.figures.attention_maps import attention_maps
from binvit.lab.figures.histogram import distributions
from binvit.lab.figures.panels import nothing, save
from binvit.lab.figures.style import (
    FEWEST,
    INK,
    SCHEME_COLORS,
    caption,
    interval_caption,
    readable,
    require_columns,
    save_figure,
    styled,
)
from binvit.lab.trials.measurements import FOLDER, add_measurements, measured_with, read_measurements
from binvit.lab.trials.trained import load_trained
from binvit.lab.trials.trial import Trial

LOSSES_TABLE = "03_losses"  # of the archive
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
        conditions for `plan.plan`; binary ones are called "value, GSB" and so on.
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
    archive: str | Path | None = None,
) -> pd.DataFrame:
    """Measure what each tensor loses in the float model of every seed, or read what an archive has.

    Args:
        runs: the plan of `conditions`.
        trained: the table of `plan.train`, which kept the float models.
        results_dir: where they are kept.
        images: how many set the scales and how many errors are measured on.
        thresholds: of GSB's groups.
        reduce: the set over which GSB's maxima run.
        least_squares: as in `tensor_losses.binarize_tensor`.
        archive: folder of archived measurements; nothing is measured then, and what is not there has no row.

    Returns:
        One row per data, seed, tensor and binarizer: the columns of `tensor_losses.one_tensor_at_a_time`, and
        trained_drop, what a model loses that was trained with this one binary tensor, if such models were trained.
    """
    options: dict[str, Any] = {"thresholds": thresholds, "reduce": reduce, "least_squares": least_squares}
    if archive:
        losses = _archived(trained, archive, images, options)
    else:
        parts = []
        for run in runs:
            if run.condition == "float":
                model = load_trained(run.trial, results_dir).model
                table = one_tensor_at_a_time(model, trial_data(run.trial), images, **options)
                parts.append(table.assign(data=run.data, seed=run.trial.seed))
        losses = pd.concat(parts, ignore_index=True)
    reached = trained.set_index(["data", "seed", "condition"])["test_accuracy"].to_dict()
    if {condition for _, _, condition in reached} != {"float"}:
        keys = zip(losses["data"], losses["seed"], losses["tensor"], losses["binarizer"], strict=True)
        losses["trained_drop"] = [
            reached.get((data, seed, "float"), math.nan) - reached.get((data, seed, f"{tensor}, {binarizer}"), math.nan)
            for data, seed, tensor, binarizer in keys
        ]
    return losses


def _told(images: int, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a measurement as columns."""
    thresholds = " ".join(f"{threshold:g}" for threshold in options["thresholds"])
    return {"images": images, **options, "thresholds": thresholds}


def _archived(trained: pd.DataFrame, archive: str | Path, images: int, options: Mapping[str, Any]) -> pd.DataFrame:
    columns = ["tensor", "binarizer", *(name for name in LOSSES if name != "trained_drop")]
    known = measured_with(read_measurements(archive, LOSSES_TABLE), _told(images, options))
    known = known.reindex(columns=["id", *columns])
    floats = trained.loc[trained["condition"] == "float", ["id", "data", "seed"]]
    return floats.merge(known, on="id")[["data", "seed", *columns]]


def take_measurements(p: Any, results_dir: str | Path, archive: str | Path) -> int:
    """Measure the kept float models of a notebook's trials, draw the first one's pictures, and archive both.

    Args:
        p: the notebook's parameters.
        results_dir: where the models are; trials without one are left out.
        archive: folder of the archive.

    Returns:
        How many models were measured.
    """
    options: dict[str, Any] = {"thresholds": p.thresholds, "reduce": p.reduce, "least_squares": p.least_squares}
    told = _told(p.measured, options)
    known = set(measured_with(read_measurements(archive, LOSSES_TABLE), told).get("id", ()))
    chosen, count = runs(p), 0
    for run in chosen:
        try:
            if run.condition != "float" or run.trial.id in known:
                continue
            model = load_trained(run.trial, results_dir).model
        except FileNotFoundError:  # its images or its model
            continue
        table = one_tensor_at_a_time(model, trial_data(run.trial), p.measured, **options)
        add_measurements(
            archive, LOSSES_TABLE, table.assign(id=run.trial.id, **told), ["id", *told, "tensor", "binarizer"]
        )
        count += 1
        if run == chosen[0]:
            for name, figure in pictures(run, results_dir, p).items():
                save_figure(figure, name, Path(archive) / FOLDER)
    return count


def pictures(run: Run, results_dir: str | Path, p: Any) -> dict[str, Figure]:
    """Return, by file name, drawings of one trained model's attention maps, and of the values of its map and value.

    Args:
        run: a run of the float scheme.
        results_dir: where its model is.
        p: the notebook's parameters.
    """
    trained, data = load_trained(run.trial, results_dir), trial_data(run.trial)
    groups: dict[str, Any] = {"thresholds": tuple(p.thresholds), "reduce": p.reduce}
    chosen = [data.test[i] for i in one_per_class(data.test.labels, p.pictures)]
    shown, names = [picture for picture, _ in chosen], [data.classes[label] for _, label in chosen]
    weights, _ = attention_tensors(trained.model, trained.tensor(shown))
    views = binarized_views(weights, "attention map", **groups)
    maps = {name: query_rows(view[:, p.head % view.shape[1]], trained.grid) for name, view in views.items()}
    weights, value = attention_tensors(trained.model, sample_images(data, "test", p.measured))
    shares = {
        "attention weight / maximum of its " + p.reduce: share_of_extreme(weights, p.reduce),
        "value / extreme of its head": share_of_extreme(value, "head" if p.reduce == "row" else p.reduce),
    }
    return {
        "03_attention_maps": attention_maps(shown, maps, trained.grid, names),
        "03_distributions": distributions(shares, p.thresholds),
    }


def claims(losses: pd.DataFrame, groups: int = 3) -> list[Claim]:
    """Check what the paper says about lost information, on the measurements of one data set.

    Args:
        losses: the result of `measure`, rows of one data set.
        groups: how many groups GSB superposed, one more than its thresholds.

    Returns:
        The claims; a tensor that costs more than several others is compared with each of them, and claims about
        trained models are undecided if none were trained.
    """
    after = losses.dropna(subset=["trained_drop"]) if "trained_drop" in losses else losses.head(0)
    single = losses[losses["binarizer"] == "1-bit"]
    several = f"{groups} groups"
    named = losses.assign(groups=losses["binarizer"].map({"1-bit": "1 group", "GSB": several}))

    def costs_more(sentence: str, value: str, tensor: str, others: Iterable[str]) -> Claim:
        part = after[after["binarizer"] == "1-bit"] if value == "trained_drop" else single
        pairs = [check_pair(f"{tensor} exceeds {o}", part, tensor, o, on="tensor", value=value) for o in others]
        return all_of(sentence, pairs)

    checked = []
    for tensor in SUPERPOSED:
        for words, others in _PRODUCTS.items():
            sentence = f"Without further training, a 1-bit {tensor} costs more accuracy than {words}."
            checked.append(costs_more(sentence, "accuracy_drop", tensor, others))
    for tensor in SUPERPOSED:
        sentence = f"After training with it, a 1-bit {tensor} costs more accuracy than any but map and value."
        if len(after):
            rest = [other for other in TENSORS if other not in SUPERPOSED]  # the paper names both at once
            checked += confirm(LOSS_IS_ATTENTION, costs_more(sentence, "trained_drop", tensor, rest))
        else:
            checked += confirm(LOSS_IS_ATTENTION, not_run(sentence))
    for tensor in SUPERPOSED:
        part = named[named["tensor"] == tensor]
        sentence = f"After training with it, the {tensor} with {several} loses less accuracy than with one."
        trained = not_run(sentence)
        if len(after):
            trained = check_pair(
                sentence, part.dropna(subset=["trained_drop"]), "1 group", several, on="groups", value="trained_drop"
            )
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
    if not parts:
        return nothing()
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
    factor, rows = LOSSES[measure][1], summarize(table.dropna(subset=[measure]), ["tensor", "binarizer"], measure)
    ax.text(0.5, 0.5, "" if len(rows) else "not run", transform=ax.transAxes, ha="center", va="center", color=INK)
    for row in rows.to_dict("records"):
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


def show_picture(name: str, run: Run, results_dir: str | Path, p: Any) -> None:
    """Show one of the `pictures` in a notebook: drawn from the kept model, or as the archive has it.

    Args:
        name: the picture's file name without ending.
        run: a run of the float scheme.
        results_dir: where its model is.
        p: the notebook's parameters.
    """
    from IPython.display import Image, display

    if (archive := archive_dir(p)) is None:
        figure = pictures(run, results_dir, p)[name]
        save(p.figures_dir, name, figure)
        display(figure)
        plt.close("all")  # a notebook shows open figures once more
    elif (path := archive / FOLDER / f"{name}.png").is_file():
        display(Image(path))
    else:
        print("not drawn yet")
