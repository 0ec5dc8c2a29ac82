"""The roofline: what memory and population counts allow, and what the products reach."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from matplotlib.transforms import Bbox, BboxBase

from binvit import bits
from binvit.jit import JIT
from binvit.lab.benchmark.machine import cpu_of
from binvit.lab.benchmark.timing import interleave
from binvit.lab.figures.style import GREY, colors_of, figure_with, readable, require_columns, scheme_color, styled


def memory_bandwidth() -> float:
    """Measure the bytes a second that this machine copies, read and written, by one large copy."""
    source = np.ones(64 * 2**20, np.uint8)
    target = np.empty_like(source)
    times = interleave({"copy": functools.partial(np.copyto, target, source)}, 0.3)["copy"]
    return 2 * source.nbytes / float(np.median(times))


RADII = (4.5, 9, 14, 20, 27, 35, 44, 54)  # of a name from its point, in points
ANGLES = (0, 180, 90, 270, 30, 330, 150, 210, 60, 300, 120, 240)
_COLORS = {
    "torch float32": scheme_color("float"),
    "torch bfloat16": scheme_color("elastic"),
    "torch int8": scheme_color("xnor"),
    "binvit 1-bit": scheme_color("gsb"),
}


def draw_roofline(kernels: pd.DataFrame) -> Figure:
    """Draw the kernels' rates below the limits of memory and of the population count, the kind of CPU in the title.

    Args:
        kernels: what `benchmark_kernels` returned.

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
    return roofline(points, limits, memory_bandwidth() / 1e9, title=cpu_of(kernels), colors=_COLORS)


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
    _label(ax, points, [readable(palette[family]) for family in families])
    return fig


def _label(ax: Axes, points: pd.DataFrame, colors: Sequence[str], size: float = 6) -> None:
    """Write each point's name beside it, farther away on a leader where points, other names or texts would be hit."""
    fig = cast(Figure, ax.figure)
    fig.draw_without_rendering()  # what is placed below depends on the final size of the axes
    pixels = fig.dpi / 72
    centers = ax.transData.transform(points[["intensity", "rate"]].to_numpy(float))
    taken = [Text.get_window_extent(text) for text in ax.texts]
    taken += [Bbox.from_bounds(x - 3 * pixels, y - 3 * pixels, 6 * pixels, 6 * pixels) for x, y in centers]
    for (_, point), center, color in zip(points.iterrows(), centers, colors, strict=True):
        end = (point["intensity"], point["rate"])
        style: dict[str, Any] = {"textcoords": "offset points", "ha": "center", "va": "center", "size": size}
        written = ax.annotate(point["name"], end, (0, 0), color=color, **style)
        half = np.array(Text.get_window_extent(written).size) / 2
        written.remove()
        found, box, radius = _free(center, half, taken, ax.bbox, pixels)
        taken.append(box)
        leader = {"arrowstyle": "-", "color": color, "lw": 0.4, "shrinkA": 0, "shrinkB": 3}
        ax.annotate(point["name"], end, found, color=color, arrowprops=leader if radius > RADII[0] else None, **style)


def _free(
    center: np.ndarray, half: np.ndarray, taken: Sequence[BboxBase], room: BboxBase, pixels: float
) -> tuple[tuple[float, float], Bbox, float]:
    """Return where a text next to a point hits nothing, in points from it, with the text's box and its distance.

    Where there is no such place within the largest distance, the text stands at the right.
    """
    found = []
    for radius in RADII:
        for angle in np.deg2rad(ANGLES):
            way = np.array([np.cos(angle), np.sin(angle)])
            offset = radius * pixels * way + half * np.where(np.abs(way) > 0.1, np.sign(way), 0)
            box = Bbox([center + offset - half, center + offset + half])
            found.append(((offset[0] / pixels, offset[1] / pixels), box, radius))
            inside = room.x0 <= box.x0 and box.x1 <= room.x1 and room.y0 <= box.y0 and box.y1 <= room.y1
            if inside and not any(box.overlaps(other) for other in taken):
                return found[-1]
    return found[0]
