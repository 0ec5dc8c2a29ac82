"""Several panels in one figure, and what they share."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from binvit.files import atomic_write
from binvit.lab.figures.charts import dots
from binvit.lab.figures.style import GREY, caption, interval_caption, save_figure, styled
from binvit.lab.project import folder

_MARGIN = 4  # rows that a panel's title and the label of its axis take
_PAGE = 12  # inches that panels may take beside each other: text gets too small in wider figures


def nothing() -> Figure:
    """Return a figure that says that nothing was run."""
    fig, ax = plt.subplots(figsize=(3, 0.6))
    ax.text(0, 0.5, "not run", color=GREY)
    ax.set_axis_off()
    return fig


@styled
def subplot_grid(
    table: pd.DataFrame, values: Sequence[str], draw: Callable[[pd.DataFrame, str, Axes], None], title: str | None
) -> Figure:
    """Draw one row of panels per data set and one column per value."""
    parts = list(table.groupby("data", sort=False))
    if not parts:
        return nothing()
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


def save(directory: str | Path, name: str, figure: Figure | None = None, **tables: pd.DataFrame) -> None:
    """Write a figure as PDF and PNG, and tables as CSV.

    Args:
        directory: folder of the project to write to; nothing is written if it is empty.
        name: the figure's file name without ending.
        figure: what to write.
        **tables: written as NAME_KEY.csv, without an index and without the column root, a folder of this machine.
    """
    if not directory:
        return
    if figure is not None:
        save_figure(figure, name, folder(directory))
    for key, table in tables.items():
        text = table.drop(columns="root", errors="ignore").to_csv(index=False, lineterminator="\n")
        atomic_write(folder(directory) / f"{name}_{key}.csv", text)


@styled
def panels(table: pd.DataFrame, draw: Callable[[pd.DataFrame, Axes], Any], width: float, height: float) -> Figure:
    """Draw one panel for each kind of images, side by side as far as a page is wide.

    Args:
        table: rows with the column data.
        draw: draws the rows of one kind of images into axes.
        width: of a panel, in inches.
        height: of a panel, in inches.

    Returns:
        The figure; panels are titled if there are several.
    """
    parts = list(table.groupby("data", sort=False))
    if not parts:
        return nothing()
    columns = min(len(parts), max(1, int(_PAGE / width)))
    rows = math.ceil(len(parts) / columns)
    fig, axes = plt.subplots(rows, columns, figsize=(width * columns, height * rows), squeeze=False)
    for ax in axes.flat[len(parts) :]:
        ax.remove()
    for ax, (data, part) in zip(axes.flat, parts, strict=False):
        draw(part, ax)
        if len(parts) > 1 and not ax.get_title(loc="left"):
            ax.set_title(data)
    return fig


@styled
def dot_panels(
    summary: pd.DataFrame,
    trials: pd.DataFrame,
    label: str,
    group: str | None = None,
    reference: str | None = None,
    value: str = "test_accuracy",
    sort: bool = True,
    scheme: str | None = None,
    xlabel: str = "test accuracy (%)",
    floor: float | None = None,
) -> Figure:
    """Draw means as dots with intervals and single seeds as faint ones, a panel for each kind of images.

    Panels stand in two columns: each in the one that is shorter so far, as high as its rows need.

    Args:
        summary: means of `statistics.summarize` by data, group and label.
        trials: the single trials, with the same columns and `value`.
        label: the column that names the rows.
        group: a column that puts rows under headings.
        reference: the row whose mean is drawn as a line, if it is there; "0" draws the line at zero.
        value: the column of the single trials to draw.
        sort: put the largest mean on top, within its group.
        scheme: a column that names the scheme whose colour a row has; by default the label, if it names schemes.
        xlabel: what the mean is.
        floor: where the axis is cut: seeds and means below it are drawn as triangles at it.

    Returns:
        The figure.
    """
    parts = list(summary.groupby("data", sort=False))
    if not parts:
        return nothing()
    columns: list[list[int]] = [[] for _ in parts[:2]]  # rows of each panel
    places = []
    for _, part in parts:
        shortest = min(range(len(columns)), key=lambda column: sum(columns[column]))
        places.append((shortest, len(columns[shortest])))
        columns[shortest].append(part[label].size + (part[group].nunique() if group else 0) + _MARGIN)
    fig = plt.figure(figsize=(6.0 * len(columns), 0.23 * max(map(sum, columns))))
    grid = fig.add_gridspec(1, len(columns))
    cells = [grid[i].subgridspec(len(rows), 1, height_ratios=rows) for i, rows in enumerate(columns)]
    shared: dict[str, Any] = {"value": value, "sort": sort, "scheme": scheme, "floor": floor}
    for (data, part), (column, place) in zip(parts, places, strict=True):
        own, ax = trials[trials["data"] == data], fig.add_subplot(cells[column][place])
        line = reference if reference == "0" or reference in set(part[label]) else None
        dots(part, label, group, xlabel, reference=line, trials=own, ax=ax, **shared)
        if len(parts) > 1:
            ax.set_title(data)
    cut = floor is not None and bool((trials[value] < floor).any())
    text = interval_caption(summary["n"]) + ("; triangles lie further left" if cut else "")
    caption(fig, text)  # of all panels: each one has written its own in the same place
    return fig
