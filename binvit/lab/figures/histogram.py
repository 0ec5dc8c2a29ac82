"""Histograms of a tensor's values with thresholds drawn in."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from torch import Tensor

from binvit.lab.figures.style import GREY, INK, SCHEME_COLORS, figure_with, spread_apart, styled


@styled
def value_histogram(
    values: Any,
    thresholds: Mapping[str, float],
    xlabel: str = "value",
    color: str = SCHEME_COLORS["gsb"],
    log: bool = False,
    title: str | None = None,
    ax: Axes | None = None,
) -> Figure:
    """Draw how values are distributed and where thresholds cut them; each further group gets a deeper colour.

    Args:
        values: the numbers, an array or tensor of any shape.
        thresholds: label -> position. A value belongs to one more group for each positive threshold that it exceeds and
            each negative one that it falls below; zero only gets its line.
        xlabel: what the values are.
        color: the colour of the highest group.
        log: show the density logarithmically, as for attention maps, where few weights are large.
        title: what the figure says.
        ax: where to draw; by default a new figure.

    Returns:
        The figure.

    Raises:
        ValueError: if there is no finite value.
    """
    x = as_array(values).ravel()
    if x.size == 0 or not np.isfinite(x).all():
        raise ValueError("A histogram needs at least one value and only finite ones.")
    fig, ax = figure_with(ax, 5.0, 2.6)
    low, high = min(x.min(), *thresholds.values(), 0), max(x.max(), *thresholds.values())
    if low == high:
        low, high = low - 0.5, high + 0.5
    cuts = list(thresholds.values())
    stops = np.unique([low, high, *cuts])  # bins never straddle a threshold
    parts = [np.linspace(a, b, 1 + max(1, round(72 * (b - a) / (high - low)))) for a, b in pairwise(stops)]
    edges = np.concatenate([*(part[:-1] for part in parts), [high]])
    density, edges = np.histogram(x, edges, density=True)
    centers = (edges[1:] + edges[:-1]) / 2
    level = sum(((centers > t) if t > 0 else (centers < t)) for t in cuts if t != 0) + np.zeros(len(centers), int)
    shades = LinearSegmentedColormap.from_list("groups", ["#d3d3d3", color])
    ax.bar(edges[:-1], density, np.diff(edges), align="edge", color=shades(level / max(level.max(), 1)), lw=0)
    if log:
        ax.set_yscale("log")
        ax.set_ylim(density[density > 0].min() / 2)
    ax.set_xlim(low, high)
    ax.grid(visible=False)
    ax.set(xlabel=xlabel, ylabel="density (log scale)" if log else "density")
    ax.set_yticks([])
    ax.yaxis.set_minor_locator(plt.NullLocator())
    ax.spines["left"].set_visible(False)
    fig.draw_without_rendering()
    points = 72 / fig.dpi
    wanted = [ax.transData.transform((t, 1))[0] * points for t in cuts]
    left, right = (edge * points for edge in ax.bbox.intervalx)
    placed = spread_apart(wanted, 7 + 4.2 * max((len(name) for name in thresholds), default=0), left, right)
    for (name, t), place, want in zip(thresholds.items(), placed, wanted, strict=True):
        ax.axvline(t, color=INK, lw=0.8, ls=(0, (3, 2)))
        ax.annotate(
            name,
            (t, 1),
            (place - want, 8),
            ("data", "axes fraction"),
            "offset points",
            ha="center",
            va="bottom",
            fontsize=7,
            color=INK,
            arrowprops={"arrowstyle": "-", "color": GREY, "lw": 0.5, "shrinkA": 0, "shrinkB": 0},
        )
    if title:
        ax.set_title(title, pad=22)
    return fig


def as_array(values: Any) -> np.ndarray:
    """Return a float64 array of an array, tensor or sequence; tensors are detached without importing torch."""
    if hasattr(values, "detach"):
        values = values.detach().float().cpu().numpy()
    return np.asarray(values, dtype=np.float64)


@styled
def distributions(shares: Mapping[str, Tensor], thresholds: Sequence[float], title: str | None = None) -> Figure:
    """Draw how the attention map and the value are distributed, with the thresholds of GSB's groups.

    Args:
        shares: heading -> the results of `attention.share_of_extreme`; a tensor without negative elements is drawn on a
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
