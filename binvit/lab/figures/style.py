"""How every figure looks: one style file, one colour per scheme, labels beside the lines, files with stable bytes."""

import functools
import io
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import ParamSpec, TypeVar, cast

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.text import Annotation

from binvit.files import atomic_write

STYLE = Path(__file__).with_name("binvit.mplstyle")
INK, GREY = "#222222", "#7a7a7a"
BIASED = " + bias"  # ends the name of a scheme with a learned bias of the attention map
_NOTEBOOK_PIXELS = 2.5e6  # a notebook carries its figures as text; files have the dots that `save_figure` gives
_END = "end of a line"  # marks the names that `label_ends` writes
_DRAWING: list[Callable] = []  # functions that draw now, each called by the one before
_APART = 11  # points between two names
FEWEST = 5  # seeds from which figures draw an interval; fewer are drawn as points with their mean

# Chosen so that any two differ clearly, also with protanopia and deuteranopia (a test measures it).
SCHEME_COLORS = {
    "float": "#222222",
    "bnn": "#837e76",
    "xnor": "#03ddb5",
    "xnor-k": "#00a9bf",
    "xnor++": "#c6c602",
    "bireal": "#7a85fc",
    "irnet": "#c69d69",
    "reactnet": "#983268",
    "bibert": "#680063",
    "bit": "#1b18ff",
    "elastic": "#0072b2",
    "bivit": "#2c38a6",
    "bivit-head": "#99beff",
    "binaryvit": "#934900",
    "bhvit-qd": "#583300",
    "gsb": "#d55e00",
}

NAMES = {
    "test_accuracy": "test accuracy (%)",
    "train_accuracy": "training accuracy (%)",
    "train_loss": "training loss",
    "samples_per_class": "training images per class",
    "label_noise": "share of wrong training labels",
    "lr": "learning rate",
}

P = ParamSpec("P")
R = TypeVar("R")


def scheme_color(name: str) -> str:
    """Return the colour that a scheme has in every figure.

    Args:
        name: a scheme of the catalogue.

    Returns:
        The colour as ``#rrggbb``.

    Raises:
        ValueError: if no colour is fixed for the name.
    """
    if name not in SCHEME_COLORS:
        raise ValueError(
            f"No colour is fixed for the scheme {name!r}; there are colours for {', '.join(SCHEME_COLORS)}."
        )
    return SCHEME_COLORS[name]


def colors_of(names: Iterable[object]) -> dict[object, str]:
    """Return a colour for each name: the fixed one for schemes (+ bias), the style's next one for anything else.

    Args:
        names: what a figure tells apart by colour, in all its panels: other names would have other colours.

    Returns:
        Name -> colour.
    """
    unique = list(dict.fromkeys(names))
    schemes = {name: str(name).removesuffix(BIASED) for name in unique}
    found: dict[object, str] = {
        name: SCHEME_COLORS[scheme] for name, scheme in schemes.items() if scheme in SCHEME_COLORS
    }
    with plt.style.context(STYLE):
        cycle = [f"#{c.lstrip('#')}" for c in mpl.rcParams["axes.prop_cycle"].by_key()["color"]]
    others = [name for name in unique if name not in found]
    return found | {name: cycle[i % len(cycle)] for i, name in enumerate(others)}


def readable(color: str, contrast: float = 3.6) -> str:
    """Return the colour, darkened where text in it would be hard to read on white.

    Args:
        color: any colour that matplotlib knows.
        contrast: the smallest ratio of luminances, (1.05) / (L + 0.05), as web accessibility rules define it.

    Returns:
        The colour as ``#rrggbb``.
    """
    red, green, blue = to_rgb(color)
    while 1.05 / (_luminance(np.array([red, green, blue])) + 0.05) < contrast:
        red, green, blue = 0.97 * red, 0.97 * green, 0.97 * blue
    return to_hex((red, green, blue))


def _luminance(rgb: np.ndarray) -> float:
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def styled(function: Callable[P, R]) -> Callable[P, R]:
    """Run a drawing function under the style file, whatever the caller's settings are.

    The names of a figure's lines find their places when the outermost of such functions has drawn it.
    """

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        with plt.style.context(["default", STYLE]):
            _DRAWING.append(function)
            try:
                result = function(*args, **kwargs)
            finally:
                _DRAWING.pop()
            if isinstance(result, Figure) and not _DRAWING:
                _place_ends(result)
            interactive = mpl.is_interactive()
        # The first figure loads the backend, and a notebook's backend switches this on: leaving the context undoes it,
        # and no further figure would be shown.
        mpl.interactive(interactive)
        if isinstance(result, Figure):
            inches = result.get_figwidth() * result.get_figheight()
            result.set_dpi(min(result.get_dpi(), (_NOTEBOOK_PIXELS / inches) ** 0.5))
        return result

    return wrapper


@styled
def save_figure(fig: Figure, name: str, directory: str | Path) -> None:
    """Write a figure as PDF and PNG; the same figure gives the same bytes again.

    Args:
        fig: what to write.
        name: the file name without its ending.
        directory: where to write; made if absent.

    Raises:
        ValueError: if the name is a path or carries an ending.
    """
    if not name or Path(name).name != name or Path(name).suffix:
        raise ValueError(f"A figure's name is a file name without folder and ending, and {name!r} came.")
    fig.draw_without_rendering()  # one layout for both files
    engine = fig.get_layout_engine()
    if engine is not None:
        fig.set_layout_engine("none")
    try:
        for kind, metadata in {"pdf": {"CreationDate": None}, "png": {"Software": None}}.items():
            buffer = io.BytesIO()
            fig.savefig(buffer, format=kind, metadata=metadata)
            atomic_write(Path(directory) / f"{name}.{kind}", buffer.getvalue())
    finally:
        if engine is not None:
            fig.set_layout_engine(engine)


def figure_with(ax: Axes | None, width: float = 6.4, height: float = 3.2) -> tuple[Figure, Axes]:
    """Return the given axes and its figure, or new ones of the given size in inches."""
    if ax is not None:
        return cast(Figure, ax.figure), ax
    return plt.subplots(figsize=(width, height))


def caption(fig: Figure, text: str) -> None:
    """Write a small grey line below the figure, such as how many seeds a mean is taken over."""
    fig.supxlabel(text, x=0.995, ha="right", fontsize=6.5, color=GREY)


def interval_caption(n: pd.Series, points: bool = True) -> str:
    """Return what points and bars mean, with the number of seeds.

    Args:
        n: seeds of every mean.
        points: whether single seeds are drawn where they are few.
    """
    if (n == 1).all():
        return "one seed, so no interval"
    seeds = points * "seeds and "
    drawn = "mean and 95 % interval over" if (n >= FEWEST).all() else f"{seeds}mean of"
    if (n < FEWEST).any() and (n >= FEWEST).any():
        drawn = f"{seeds}mean, from {FEWEST} seeds on with the 95 % interval, of"
    return f"{drawn} {count_seeds(n)}"


def count_seeds(n: pd.Series) -> str:
    """Return how many seeds there are, as text; a range if groups differ."""
    low, high = int(n.min()), int(n.max())
    return f"{low} seed{'' if high == 1 else 's'}" if low == high else f"{low} to {high} seeds"


def axis_name(column: str) -> str:
    """Return the name of a column as an axis shows it."""
    return NAMES.get(column, column.replace("_", " "))


def require_columns(df: pd.DataFrame, columns: Sequence[str]) -> None:
    """Raise ValueError if the table lacks a column that the figure draws."""
    missing = [c for c in columns if c not in df.columns]
    if missing:
        raise ValueError(f"The figure needs a column {missing[0]!r}; the table has {', '.join(map(str, df.columns))}.")


def spread_apart(positions: Sequence[float], distance: float, low: float = -np.inf, high: float = np.inf) -> np.ndarray:
    """Move positions as little as needed (in the sense of least squares) to keep a distance between neighbours.

    Args:
        positions: wanted positions, in any order.
        distance: the smallest allowed distance.
        low: no position falls below it, where there is room.
        high: no position exceeds it, where there is room.

    Returns:
        The new positions, in the order of the old ones.
    """
    wanted = np.asarray(positions, dtype=np.float64)
    order = np.argsort(wanted, kind="stable")
    blocks: list[list[float]] = []  # sum of (wanted - rank * distance) and size: pooled neighbours share one offset
    for rank, position in enumerate(wanted[order]):
        blocks.append([position - rank * distance, 1])
        while len(blocks) > 1 and blocks[-2][0] / blocks[-2][1] > blocks[-1][0] / blocks[-1][1]:
            total, size = blocks.pop()
            blocks[-1][0] += total
            blocks[-1][1] += size
    offsets = np.concatenate([np.full(int(size), total / size) for total, size in blocks] or [np.empty(0)])
    top = high - (len(wanted) - 1) * distance  # the last position is its offset plus the span below it
    placed = np.maximum(np.minimum(offsets, top), low) + distance * np.arange(len(wanted))
    result = np.empty_like(wanted)
    result[order] = placed
    return result


def label_ends(
    ax: Axes, ends: dict[object, tuple[float, float]], colors: dict[object, str], texts: dict[object, str]
) -> None:
    """Write each line's name beside its end, moved up or down where names would overlap.

    The function that draws the figure must be `styled`, which moves them.

    Args:
        ax: where the lines are drawn, with final limits.
        ends: name -> last point of its line, in data coordinates.
        colors: name -> colour.
        texts: name -> what to write.
    """
    for name, end in ends.items():
        ax.annotate(
            texts[name],
            xy=end,
            xytext=(8, 0),
            textcoords="offset points",
            color=readable(colors[name]),
            fontsize=8,
            fontweight="bold",
            va="center",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": colors[name], "lw": 0.6, "shrinkA": 1, "shrinkB": 4}
            | {"relpos": (0, 0.5)},  # from the left end of the name, so that no line runs through another one
            gid=_END,
        )


def _place_ends(fig: Figure) -> None:
    """Move the names that `label_ends` wrote to where the figure, with all its panels and captions, has room."""
    named = [(ax, [t for t in ax.texts if isinstance(t, Annotation) and t.get_gid() == _END]) for ax in fig.axes]
    if not any(names for _, names in named):
        return
    fig.draw_without_rendering()
    points = 72 / fig.dpi
    for ax, names in named:
        heights = [ax.transData.transform(name.xy)[1] * points for name in names]
        bottom, top = (y * points for y in ax.bbox.intervaly)
        placed = spread_apart(heights, _APART, bottom + 4, top - 2)
        moved = bool(np.any(np.abs(placed - heights) > 2))
        for name, height, place in zip(names, heights, placed, strict=True):
            name.xyann = (16 if moved else 8, place - height)
            if name.arrow_patch is not None:
                name.arrow_patch.set_visible(moved)
