"""Figures made of several panels: what single tensors lose, accuracy against images and against wrong labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from binvit.lab.figures import BLUES, lines, value_histogram
from binvit.lab.statistics import summarize
from binvit.lab.style import INK, SCHEME_COLORS, caption, colors_of, interval_caption, readable, require_columns, styled

# Column -> heading and factor of the panels of `loss_panels`.
LOSSES = {
    "accuracy_drop": ("accuracy lost (points)", 100),
    "trained_drop": ("lost after training (points)", 100),
    "relative_error": ("relative error", 1),
    "cosine": ("cosine similarity", 1),
    "entropy": ("entropy (bits per element)", 1),
}
_BINARIZERS = {"1-bit": SCHEME_COLORS["bit"], "GSB": SCHEME_COLORS["gsb"]}


@styled
def loss_panels(table: pd.DataFrame, title: str | None = None) -> Figure:
    """Draw what binarizing each tensor alone loses, a panel per measure, a row of panels per data.

    Args:
        table: one row per data, seed, tensor and binarizer ("1-bit" or "GSB"), with some of the columns of `LOSSES`.
        title: what the figure says.

    Returns:
        the figure.

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
        ax.plot([factor * row["low"], factor * row["high"]], [y, y], color=color, lw=1.4)
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
        the figure.
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


@styled
def sample_curves(table: pd.DataFrame, title: str | None = None) -> Figure:
    """Draw test accuracy and the gap to training accuracy against the number of images, a row per kind of images.

    Args:
        table: the result of `robustness.run` with the trials of `sample_runs`.
        title: what the figure says.

    Returns:
        the figure.
    """
    panels = {"test_accuracy": "test accuracy (%)", "gap": "training − test accuracy (points)"}

    def draw(part: pd.DataFrame, value: str, ax: Axes) -> None:
        summary = summarize(part, ["scheme", "samples_per_class"], value)
        if value == "test_accuracy":
            _limit_to_shares(ax, summary)
        lines(summary, "samples_per_class", ylabel=panels[value], log_x=True, ax=ax)

    return _grid(table, list(panels), draw, title)


@styled
def noise_curves(table: pd.DataFrame, title: str | None = None) -> Figure:
    """Draw test accuracy and memorized wrong labels against the share of wrong labels, a row per kind of images.

    Lines are symmetric noise; hollow diamonds are class-conditional noise.

    Args:
        table: the result of `robustness.run` with the trials of `noise_runs`.
        title: what the figure says.

    Returns:
        the figure.
    """
    panels = {"test_accuracy": "test accuracy (%)", "memorized": "wrong labels memorized (%)"}

    colors = colors_of(table["scheme"])

    def draw(part: pd.DataFrame, value: str, ax: Axes) -> None:
        part = part.dropna(subset=[value])
        if part.empty:
            ax.set_axis_off()
            return
        alike = part["labels"] == "class-conditional"
        _limit_to_shares(ax, summarize(part, ["scheme", "label_noise", "labels"], value))
        if not part[~alike].empty:
            lines(summarize(part[~alike], ["scheme", "label_noise"], value), "label_noise", ylabel=panels[value], ax=ax)
        if not part[alike].empty:
            shift = 0.022 * (part["label_noise"].max() - part["label_noise"].min() or 1)
            for i, row in enumerate(summarize(part[alike], ["scheme", "label_noise"], value).to_dict("records")):
                x = row["label_noise"] + shift * (i % part["scheme"].nunique() + 1)
                color = colors[row["scheme"]]
                ax.plot([x, x], [100 * row["low"], 100 * row["high"]], color=color, lw=0.9)
                ax.plot(x, 100 * row["mean"], "D", color="white", mec=color, mew=1.3, ms=5, zorder=3)

    fig = _grid(table, list(panels), draw, title)
    if (table["labels"] == "class-conditional").any():
        caption(fig, fig._supxlabel.get_text() + "; line: symmetric noise, ◇: class-conditional noise")
    return fig


def _limit_to_shares(ax: Axes, summary: pd.DataFrame) -> None:
    """Keep an axis within 0 and 100 %, which the intervals of few seeds exceed."""
    known = summary[["mean", "low", "high"]]
    low, high = 100 * known.min(axis=None), 100 * known.max(axis=None)
    room = 0.05 * (high - low) or 1.0
    ax.set_ylim(max(low, 0) - room, min(high, 100) + room)


def _grid(table: pd.DataFrame, values: Sequence[str], draw, title: str | None) -> Figure:
    parts = list(table.groupby("data", sort=False))
    fig, axes = plt.subplots(len(parts), len(values), figsize=(7.4, 0.4 + 2.7 * len(parts)), squeeze=False)
    for row, (data, part) in zip(axes, parts, strict=True):
        for ax, value in zip(row, values, strict=True):
            draw(part, value, ax)
        if len(parts) > 1:
            row[0].set_title(data)
    caption(fig, interval_caption(table.groupby(["data", "scheme"])["seed"].nunique()))
    if title:
        fig.suptitle(title, x=0.01, ha="left", fontsize=9, fontweight="bold")
    return fig


@styled
def confusion_map(matrix: Sequence[Sequence[float]], classes: Sequence[str], title: str | None = None) -> Figure:
    """Draw where wrong labels go: the shares of a confusion matrix off its diagonal.

    Args:
        matrix: (C, C), row by true class.
        classes: names; written where there are few.
        title: what the figure says.

    Returns:
        the figure.
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
