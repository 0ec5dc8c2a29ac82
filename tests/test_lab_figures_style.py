"""Colours can be told apart, labels do not overlap, files are the same again."""

import itertools
import os

os.environ.setdefault("MPLBACKEND", "agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.colors import to_rgb

from binvit.lab.analysis import statistics
from binvit.lab.figures import charts, style


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    plt.close("all")


@pytest.fixture(scope="module")
def trials() -> pd.DataFrame:
    rng = np.random.default_rng(0)
    rows = [
        (scheme, samples, seed, base + 0.01 * samples + rng.normal(0, 0.01))
        for scheme, base in {"float": 0.8, "elastic": 0.7, "gsb": 0.79}.items()
        for samples in (5, 10)
        for seed in range(3)
    ]
    return pd.DataFrame(rows, columns=["scheme", "samples_per_class", "seed", "test_accuracy"])


# What a person without the green or the red receptor sees, in linear RGB (Machado, Oliveira, Fernandes 2009).
VISION = {
    "normal": np.eye(3),
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
}


LMS = [[0.4122, 0.5363, 0.0514], [0.2119, 0.6807, 0.1074], [0.0883, 0.2817, 0.63]]
OKLAB = [[0.2105, 0.7936, -0.0041], [1.978, -2.4286, 0.4506], [0.0259, 0.7828, -0.8087]]


def perceived(color: str, matrix) -> np.ndarray:
    rgb = np.array(to_rgb(color))
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    return np.cbrt(np.clip(np.array(matrix) @ linear, 0, 1) @ np.array(LMS).T) @ np.array(OKLAB).T


@pytest.mark.parametrize("vision", VISION)
def test_any_two_schemes_differ_in_colour(vision):
    seen = {name: perceived(color, VISION[vision]) for name, color in style.SCHEME_COLORS.items()}
    distance = {(a, b): np.linalg.norm(seen[a] - seen[b]) for a, b in itertools.combinations(seen, 2)}
    assert min(distance.values()) > 0.09, min(distance, key=distance.get)


def test_unknown_schemes_have_no_colour():
    assert style.scheme_color("gsb") == "#d55e00"
    with pytest.raises(ValueError, match="No colour is fixed for the scheme 'gbs'; there are colours for float, bnn"):
        style.scheme_color("gbs")


def test_other_names_get_colours_that_no_scheme_has():
    colors = style.colors_of(["gsb", "row", "batch", "elastic", "row"])
    assert colors["gsb"] == style.scheme_color("gsb")
    assert len(set(colors.values())) == 4
    others = style.colors_of(range(6))
    assert len(set(others.values())) == 6
    assert not set(others.values()) & set(style.SCHEME_COLORS.values())


@pytest.mark.parametrize("vision", VISION)
def test_no_other_name_looks_like_a_scheme(vision):
    seen, others = (
        [perceived(color, VISION[vision]) for color in colors.values()]
        for colors in (style.SCHEME_COLORS, style.colors_of(range(6)))
    )
    assert min(np.linalg.norm(a - b) for a in others for b in seen) > 0.065
    assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(others, 2)) > 0.065


@pytest.mark.parametrize("name", style.SCHEME_COLORS)
def test_text_in_a_schemes_colour_can_be_read(name):
    rgb = np.array(to_rgb(style.readable(style.scheme_color(name))))
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    assert 1.05 / (linear @ [0.2126, 0.7152, 0.0722] + 0.05) > 3.5


@given(st.lists(st.floats(0, 100), max_size=8), st.floats(0.5, 10))
def test_labels_keep_their_order_and_distance(wanted, distance):
    placed = style.spread_apart(wanted, distance)
    order = np.argsort(wanted, kind="stable")
    assert (np.diff(placed[order]) >= distance - 1e-6).all()
    if wanted:  # moving least, in the sense of least squares, leaves the centre where it was
        assert placed.mean() == pytest.approx(np.mean(wanted))


@settings(max_examples=25)
@given(st.lists(st.floats(0, 100), min_size=1, max_size=8))
def test_labels_stay_within_bounds_where_there_is_room(wanted):
    placed = style.spread_apart(wanted, 10, 0, 100)
    assert placed.min() >= -1e-9
    assert placed.max() <= 100 + 1e-9


def test_labels_of_a_drawn_figure_do_not_overlap(trials):
    same = trials.assign(test_accuracy=0.9)
    fig = charts.lines(statistics.summarize(same, by=["scheme", "samples_per_class"]), "samples_per_class")
    fig.draw_without_rendering()
    boxes = [
        plt.Text.get_window_extent(t) for t in fig.findobj(plt.Text) if t.get_text() in ("float", "elastic", "gsb")
    ]
    assert len(boxes) == 3  # an annotation's own extent would include its leader line
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))


def test_drawing_keeps_what_a_notebooks_backend_switches_on():
    try:
        style.styled(lambda: plt.interactive(True))()
        assert plt.isinteractive()
    finally:
        plt.interactive(False)


def test_saved_figures_have_stable_bytes(tmp_path, trials):
    for folder in ("a", "b"):
        fig = charts.dots(statistics.summarize(trials[trials["samples_per_class"] == 5]), title="Formula $a_1$")
        style.save_figure(fig, "01_dots", tmp_path / folder)
    for kind in ("pdf", "png"):
        assert (tmp_path / "a" / f"01_dots.{kind}").read_bytes() == (tmp_path / "b" / f"01_dots.{kind}").read_bytes()
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["01_dots.pdf", "01_dots.png"]


@pytest.mark.parametrize("name", ["", "a/b", "figure.pdf"])
def test_figure_names_are_plain(tmp_path, name):
    with pytest.raises(ValueError, match="without folder and ending"):
        style.save_figure(plt.figure(), name, tmp_path)


def test_drawing_leaves_the_callers_settings_alone(trials):
    before = dict(plt.rcParams)
    charts.dots(statistics.summarize(trials[trials["samples_per_class"] == 5]))
    assert dict(plt.rcParams) == before


@pytest.mark.parametrize(("size", "dots"), [((6, 4), 150), ((12, 40), (2.5e6 / 480) ** 0.5)])
def test_large_figures_have_fewer_dots_in_a_notebook_but_not_in_files(tmp_path, size, dots):
    fig = style.styled(lambda: plt.figure(figsize=size))()
    assert fig.get_dpi() == pytest.approx(dots)
    style.save_figure(fig, "large", tmp_path)
    assert plt.imread(tmp_path / "large.png").shape[:2] == (200 * size[1], 200 * size[0])
