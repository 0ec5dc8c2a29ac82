"""The roofline: what memory and population counts allow, and what the products reach."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from binvit import bits
from binvit.jit import JIT
from binvit.lab.benchmark.timing import interleave
from binvit.lab.figures.style import GREY, colors_of, figure_with, readable, require_columns, scheme_color, styled


def memory_bandwidth() -> float:
    """Measure the bytes a second that this machine copies, read and written, by one large copy."""
    source = np.ones(64 * 2**20, np.uint8)
    target = np.empty_like(source)
    times = interleave({"copy": functools.partial(np.copyto, target, source)}, 0.3)["copy"]
    return 2 * source.nbytes / float(np.median(times))


_COLORS = {
    "torch float32": scheme_color("float"),
    "torch bfloat16": scheme_color("elastic"),
    "torch int8": scheme_color("xnor"),
    "binvit 1-bit": scheme_color("gsb"),
}


def draw_roofline(kernels: pd.DataFrame, title: str | None = None) -> Figure:
    """Draw the kernels' rates below the limits of memory and of the population count.

    Args:
        kernels: what `benchmark_kernels` returned.
        title: what the figure says.

    Returns:
        The figure.
    """
    bytes_per_value = {"torch float32": 4, "torch bfloat16": 2, "torch int8": 1, "binvit 1-bit": 1 / 8}
    size = kernels["contender"].map(bytes_per_value)
    output = kernels["contender"].map({"torch bfloat16": 2}).fillna(4)
    m, k, n = (kernels[c] for c in "mkn")
    moved = size * (m * k + n * k) + output * m * n
    points = pd.DataFrame({"family": kernels["contender"], "intensity": m * k * n / moved, "rate": kernels["rate"]})
    points["name"] = kernels.get("layer", "")
    threads = int(kernels["threads"].iloc[0])
    limits = {"population count": bits.popcount_limit(threads) / 1e9} if JIT else {}
    return roofline(points, limits, memory_bandwidth() / 1e9, title=title, colors=_COLORS)


@styled
def roofline(
    points: pd.DataFrame,
    compute_limits: Mapping[str, float],
    bandwidth: float,
    xlabel: str = "multiply-adds per byte moved",
    ylabel: str = "billion multiply-adds per second",
    title: str | None = None,
    colors: Mapping[str, str] | None = None,
    ax: Axes | None = None,
) -> Figure:
    """Draw measured rates below the limits that memory and arithmetic set.

    Args:
        points: the columns ``name``, ``intensity`` (operations per byte) and ``rate`` (billions a second), one row per
            measurement; an optional column ``family`` sets the colour, and its names stand in the lower right corner.
        compute_limits: what a limit is -> its rate.
        bandwidth: bytes that memory delivers, in billions a second.
        xlabel: what the intensity is.
        ylabel: what the rate is.
        title: what the figure says.
        colors: family -> colour; by default one of the palette each.
        ax: where to draw; by default a new figure.

    Returns:
        The figure.
    """
    require_columns(points, ["name", "intensity", "rate"])
    fig, ax = figure_with(ax, 6.0, 3.6)
    families = points["family"] if "family" in points else points["name"]
    palette = colors or colors_of(families)
    highest = max([*compute_limits.values(), points["rate"].max()])
    ridge = highest / bandwidth
    left = min(points["intensity"].min(), ridge) / 2
    right = max(points["intensity"].max(), ridge) * 4
    for name, limit in compute_limits.items():
        x = np.array([left, limit / bandwidth, right])
        ax.plot(x, np.minimum(limit, x * bandwidth), color=GREY, lw=1.1, zorder=1, solid_joinstyle="miter")
        ax.annotate(name, (right, limit), (-2, 3), textcoords="offset points", ha="right", fontsize=7, color=GREY)
    for (_, point), family in zip(points.iterrows(), families, strict=True):
        ax.plot(point["intensity"], point["rate"], "o", color=palette[family], ms=6.5, mec="white", mew=0.9)
        ax.annotate(
            point["name"],
            (point["intensity"], point["rate"]),
            (6, -1),
            textcoords="offset points",
            va="center",
            size=6,
            color=readable(palette[family]),
        )
    ax.set(xscale="log", yscale="log", xlim=(left, right), xlabel=xlabel, ylabel=ylabel, title=title)
    ax.set_ylim(points["rate"].min() / 3, highest * 2)
    named = points.groupby(families)["rate"].max().sort_values().index if "family" in points else ()
    for line, family in enumerate(named):
        place: dict[str, Any] = {"xycoords": "axes fraction", "textcoords": "offset points", "ha": "right", "size": 8}
        ax.annotate(family, (1, 0), (-6, 8 + 12 * line), color=readable(palette[family]), weight="bold", **place)
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,g}"))
        axis.set_minor_formatter(NullFormatter())
    return fig
