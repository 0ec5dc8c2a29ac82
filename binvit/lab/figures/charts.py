"""The charts of the notebooks: curves, lines, dots and heat maps, with intervals drawn and lines labelled directly."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import seaborn
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator

from binvit.lab.figures.style import (
    BIASED,
    FEWEST,
    GREY,
    INK,
    SCHEME_COLORS,
    axis_name,
    caption,
    colors_of,
    count_seeds,
    figure_with,
    interval_caption,
    label_ends,
    require_columns,
    scheme_color,
    styled,
)

CURVE = 3  # points from which a line is drawn through them
BLUES = LinearSegmentedColormap.from_list("blues", ["#f3f6f9", "#b5d0e6", "#5f9fcb", "#0072b2", "#013a5c"])


@styled
def learning_curves(
    history: pd.DataFrame,
    value: str | Sequence[str] = "test_accuracy",
    by: str = "scheme",
    title: str | None = None,
) -> Figure:
    """Draw a quantity against the epoch: one thin line per seed, their mean in bold, named where it ends.

    Args:
        history: one row per epoch of each trial, with the columns ``epoch``, ``seed``, ``by`` and ``value``; rows
            without a value (epochs that were not evaluated) are left out.
        value: the quantity, or several for panels side by side. Accuracies (0 to 1) are drawn in percent.
        by: the column that is told apart by colour.
        title: what the figure says.

    Returns:
        The figure.
    """
    values = [value] if isinstance(value, str) else list(value)
    require_columns(history, ["epoch", "seed", by, *values])
    fig, axes = plt.subplots(1, len(values), figsize=(5.6 if len(values) == 1 else 7.4, 3.0), squeeze=False)
    colors = colors_of(history[by])
    for ax, name in zip(axes[0], values, strict=True):
        table = history.dropna(subset=[name])
        factor = 100 if name.endswith("accuracy") else 1
        ends, texts = {}, {}
        for series, part in table.groupby(by, sort=False):
            mean = factor * part.groupby("epoch")[name].mean()
            curve = {"ls": "-"} if len(mean) >= CURVE else {"ls": "none", "marker": "o"}
            for _, run in part.groupby("seed"):
                ax.plot(run["epoch"], factor * run[name], color=colors[series], lw=0.7, ms=2.6, alpha=0.35, **curve)
            ax.plot(mean.index, mean, color=colors[series], clip_on=False, **curve)
            ends[series] = (mean.index[-1], mean.iloc[-1])
            texts[series] = f"{series} {mean.iloc[-1]:{'.1f' if factor == 100 else '.2f'}}"
        ax.set_xlim(min(history["epoch"].min(), history["epoch"].max() - 1), history["epoch"].max())
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.set(xlabel="epoch", ylabel=axis_name(name))
        label_ends(ax, ends, colors, texts)
    caption(fig, f"thin: single seeds, bold: mean over {count_seeds(history.groupby(by)['seed'].nunique())}")
    if title:
        axes[0, 0].set_title(title)
    return fig


@styled
def lines(
    summary: pd.DataFrame,
    x: str,
    by: str = "scheme",
    ylabel: str = "test accuracy (%)",
    xlabel: str | None = None,
    percent: bool = True,
    log_x: bool = False,
    trials: pd.DataFrame | None = None,
    value: str = "test_accuracy",
    title: str | None = None,
    colors: Mapping[object, str] | None = None,
    ax: Axes | None = None,
) -> Figure:
    """Draw means against a number, one line per series with its 95 % interval as a band, named where it ends.

    Fewer than three numbers on the horizontal axis have no lines: then the intervals are bars. Fewer than five seeds
    have no intervals: then the single trials are faint dots. Series whose name ends with "+ bias" are dashed.

    Args:
        summary: the columns ``by``, ``x``, ``mean``, ``low``, ``high``, ``n``, as `statistics.summarize` gives them.
        x: the numeric column on the horizontal axis; its values become the ticks.
        by: the column that is told apart by colour.
        ylabel: what the mean is.
        xlabel: what ``x`` is; by default its name in words.
        percent: draw the mean in percent.
        log_x: space the horizontal axis logarithmically.
        trials: single trials, with the columns ``by``, ``x`` and ``value``.
        value: the column of the single trials to draw.
        title: what the figure says.
        colors: series -> colour, the same in all panels of a figure; by default as `colors_of` says.
        ax: where to draw; by default a new figure.

    Returns:
        The figure.
    """
    require_columns(summary, [by, x, "mean", "low", "high", "n"])
    fig, ax = figure_with(ax, 5.6, 3.2)
    colors, factor = dict(colors or colors_of(summary[by])), 100 if percent else 1
    ends, texts = {}, {}
    ticks, count = sorted(summary[x].unique()), summary[by].nunique()
    single, curve = len(ticks) == 1, len(ticks) >= CURVE
    for number, (series, part) in enumerate(summary.groupby(by, sort=False)):
        part = part.sort_values(x)
        low, high, at = factor * part["low"], factor * part["high"], part[x]
        if single:
            at = at + 0.03 * (number - (count - 1) / 2)  # of an axis that is 1 wide
        if (part["n"] >= FEWEST).all():
            if curve:
                ax.fill_between(at, low, high, color=colors[series], alpha=0.13, lw=0, zorder=1)
            else:
                ax.vlines(at, low, high, color=colors[series], alpha=0.5, lw=1.6, zorder=1)
        elif trials is not None:
            own = trials[trials[by] == series]
            places = own[x] + (at.iloc[0] - ticks[0] if single else 0)
            ax.plot(places, factor * own[value], "o", color=colors[series], alpha=0.45, ms=2.6, mew=0)
        style = ("--" if str(series).endswith(BIASED) else "-") if curve else "none"
        ax.plot(at, factor * part["mean"], color=colors[series], ls=style, marker="o", mec="white", mew=0.8, ms=6)
        last = part[x].iloc[-1] + 0.03 * (count - 1) / 2 if single else part[x].iloc[-1]
        ends[series] = (last, factor * part["mean"].iloc[-1])
        texts[series] = str(series)
    if single:
        ax.set_xlim(ticks[0] - 0.5, ticks[0] + 0.5)
    elif log_x:
        ax.set_xscale("log")
    ax.set_xticks(ticks, [f"{t:g}" for t in ticks])
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set(xlabel=xlabel or axis_name(x), ylabel=ylabel)
    label_ends(ax, ends, colors, texts)
    caption(fig, interval_caption(summary["n"]))
    if title:
        ax.set_title(title)
    return fig


@styled
def dots(
    summary: pd.DataFrame,
    label: str = "scheme",
    group: str | None = None,
    xlabel: str = "test accuracy (%)",
    percent: bool = True,
    reference: str | None = None,
    trials: pd.DataFrame | None = None,
    value: str = "test_accuracy",
    sort: bool = True,
    scheme: str | None = None,
    title: str | None = None,
    floor: float | None = None,
    ax: Axes | None = None,
) -> Figure:
    """Draw means as dots, from five seeds on with 95 % intervals, one row each, the numbers written at the right.

    Args:
        summary: the columns ``label``, ``mean``, ``low``, ``high``, ``n``, as `statistics.summarize` gives them; where
            there is a column ``note``, its texts follow the numbers.
        label: the column that names the rows.
        group: a column that puts rows under headings; groups keep their order.
        xlabel: what the mean is.
        percent: draw the mean in percent.
        reference: the row whose mean is drawn as a line through all rows; "0" draws the line at zero.
        trials: single trials, drawn as faint dots, with the columns of the summary and ``value``.
        value: the column of the single trials to draw.
        sort: put the largest mean on top (within its group); otherwise keep the order.
        scheme: a column that names the scheme whose colour a row has; by default the label, if it names schemes.
        title: what the figure says.
        floor: seeds and means below it are drawn as triangles at it, so that they do not squeeze all others.
        ax: where to draw; by default a new figure, as high as its rows need.

    Returns:
        The figure.

    Raises:
        ValueError: if a column is missing or the reference is no row.
    """
    require_columns(summary, [label, "mean", "low", "high", "n", *filter(None, (group, scheme))])
    if reference not in (None, "0") and reference not in set(summary[label]):
        raise ValueError(f"The reference {reference!r} is no row; the rows are {', '.join(map(str, summary[label]))}.")
    factor = 100 if percent else 1
    rows: list[tuple[str, pd.Series | None]] = []
    for heading, part in summary.groupby(group, sort=False) if group else [(None, summary)]:
        if heading is not None:
            rows.append((str(heading), None))
        part = part.sort_values("mean", ascending=False, kind="stable") if sort else part
        rows += [(str(row[label]), row) for _, row in part.iterrows()]
    fig, ax = figure_with(ax, 6.0, 0.75 + 0.23 * len(rows))
    scheme = label if scheme is None and set(summary[label]) <= set(SCHEME_COLORS) else scheme
    edge = -math.inf if floor is None else floor
    if reference is not None:
        at = 0.0 if reference == "0" else factor * summary.loc[summary[label] == reference, "mean"].iloc[0]
        ax.axvline(at, color=GREY, lw=0.8, ls=(0, (4, 3)), zorder=1)
    for y, (_, row) in enumerate(rows):
        if row is None:
            continue
        color = scheme_color(row[scheme] if scheme else "elastic")
        if trials is not None:
            mask = (trials[label] == row[label]) & ((trials[group] == row[group]) if group else True)
            seeds = trials.loc[mask, value]
            for shown, marker, size in ((seeds[seeds >= edge], "o", 2.6), (seeds[seeds < edge], "<", 4)):
                if len(shown):
                    places = factor * shown.clip(lower=edge), [y + 0.3] * len(shown)
                    ax.plot(*places, marker, color=color, alpha=0.45, ms=size, mew=0)
        if row["n"] >= FEWEST and row["high"] > edge:
            ax.plot([factor * max(row["low"], edge), factor * row["high"]], [y, y], color=color, lw=1.5)
        marker = "<" if row["mean"] < edge else "o"
        ax.plot(factor * max(row["mean"], edge), y, marker, color=color, ms=6.5, mec="white", mew=0.9)
        half = factor * half_width(row) if row["n"] >= FEWEST else math.nan
        spec = ".1f" if percent else ".3g"
        sign = "+" if reference == "0" else ""
        text = f"{factor * row['mean']:{sign}{spec}}" + ("" if math.isnan(half) else f" ± {half:{spec}}")
        text += str(row.get("note", ""))
        ax.annotate(
            text, (1, y), (6, 0), ("axes fraction", "data"), "offset points", va="center", fontsize=7.5, color=INK
        )
    ax.set_yticks(range(len(rows)), [name for name, _ in rows])
    for tick, (_, row) in zip(ax.get_yticklabels(), rows, strict=True):
        tick.set(color=INK, fontsize=8, fontweight="bold" if row is None else "normal")
    ax.set_ylim(len(rows) - 0.4, -0.6)
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)
    ax.grid(axis="y", visible=False)
    ax.set_xlabel(xlabel)
    caption(fig, interval_caption(summary["n"]))
    if title:
        ax.set_title(title)
    return fig


def half_width(row: pd.Series) -> float:
    """Return half the width of an interval that may be cut off at one end, where a share can go no further."""
    return max(row["high"] - row["mean"], row["mean"] - row["low"])


def cross_out(ax: Axes, x: float, y: float, color: str) -> None:
    """Draw a mean as a hollow dot with a cross: that of a model that does not train."""
    style: dict[str, Any] = {"color": "white", "mec": color, "zorder": 3}
    ax.plot(x, y, "o", mew=1.3, ms=6, **style)
    ax.plot(x, y, "x", ms=4, **style)


def mark(ax: Axes, x: float, name: str) -> None:
    """Draw a dotted line at a number of the horizontal axis and write what it is along it."""
    ax.axvline(x, color=GREY, lw=0.8, ls=":", zorder=1)
    style: dict[str, Any] = {"fontsize": 6.5, "color": GREY, "rotation": 90, "va": "top"}
    ax.annotate(name, (x, 1), (2, -2), ("data", "axes fraction"), "offset points", **style)


@styled
def heat(
    summary: pd.DataFrame,
    x: str,
    y: str,
    percent: bool = True,
    title: str | None = None,
    xlabel: str | None = None,
    ylabel: str | None = None,
    what: str = "test accuracy (%)",
    ax: Axes | None = None,
) -> Figure:
    """Draw means as a heat map, each cell with its mean and, from five seeds on, half the width of its 95 % interval.

    Args:
        summary: the columns ``x``, ``y``, ``mean``, ``low``, ``high``, ``n``, one row per cell.
        x: the column that names the map's columns, in the order of appearance.
        y: the column that names the map's rows, in the order of appearance.
        percent: write the mean in percent.
        title: what the figure says.
        xlabel, ylabel: what the columns and the rows are.
        what: what the mean is.
        ax: where to draw; by default a new figure, sized by its cells.

    Returns:
        The figure.

    Raises:
        ValueError: if a column is missing or a cell has two rows.
    """
    require_columns(summary, [x, y, "mean", "low", "high", "n"])
    if summary.duplicated([x, y]).any():
        raise ValueError(f"Each cell of a heat map needs one row, and some pairs of {x!r} and {y!r} have several.")
    columns, rows = list(summary[x].unique()), list(summary[y].unique())
    fig, ax = figure_with(ax, 1.4 + 1.0 * len(columns), 0.9 + 0.5 * len(rows))
    factor, spec = (100, ".1f") if percent else (1, ".3g")
    half = summary.apply(half_width, axis=1).where(summary["n"] >= FEWEST)
    spread = half.map(lambda h: "" if math.isnan(h) else f"\n± {factor * h:{spec}}")
    cells = summary.assign(text=summary["mean"].map(lambda mean: f"{factor * mean:{spec}}") + spread)
    means, texts = (
        cells.pivot_table(index=y, columns=x, values=v, aggfunc="first").reindex(index=rows, columns=columns)
        for v in ("mean", "text")
    )
    seaborn.heatmap(
        means.astype(float), annot=texts.fillna("").to_numpy(), fmt="", cmap=BLUES, cbar=False, linewidths=2, ax=ax
    )
    ax.set(xlabel=xlabel, ylabel=ylabel)
    ax.tick_params(length=0, rotation=0)
    caption(fig, f"{what}: {interval_caption(summary['n'], points=False)}")
    if title:
        ax.set_title(title)
    return fig
