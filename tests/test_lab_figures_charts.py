"""Colours that can be told apart, labels that do not overlap, files with stable bytes, and clear refusals."""

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
from PIL import Image

from binvit.lab.analysis import statistics
from binvit.lab.benchmark import roofline
from binvit.lab.figures import attention_maps, charts, histogram, style

# What a person without the green or the red receptor sees, in linear RGB (Machado, Oliveira, Fernandes 2009).
VISION = {
    "normal": np.eye(3),
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
}
LMS = [[0.4122, 0.5363, 0.0514], [0.2119, 0.6807, 0.1074], [0.0883, 0.2817, 0.63]]
OKLAB = [[0.2105, 0.7936, -0.0041], [1.978, -2.4286, 0.4506], [0.0259, 0.7828, -0.8087]]


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


@pytest.fixture(scope="module")
def history() -> pd.DataFrame:
    rows = [(s, k, e, 0.1 * e, 2.0 / e) for s in ("float", "gsb") for k in range(2) for e in range(1, 6)]
    df = pd.DataFrame(rows, columns=["scheme", "seed", "epoch", "test_accuracy", "train_loss"])
    df.loc[df["epoch"] % 2 == 0, "test_accuracy"] = np.nan  # epochs without an evaluation
    return df


def texts(fig) -> list[str]:
    return [t.get_text() for t in fig.findobj(plt.Text) if t.get_text()]


def perceived(color: str, matrix) -> np.ndarray:
    rgb = np.array(to_rgb(color))
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    return np.cbrt(np.clip(np.array(matrix) @ linear, 0, 1) @ np.array(LMS).T) @ np.array(OKLAB).T


# -------------------------------------------------------------------------------------------------------------- colours


@pytest.mark.parametrize("vision", VISION)
def test_any_two_schemes_differ_in_colour(vision):
    seen = {name: perceived(color, VISION[vision]) for name, color in style.SCHEME_COLORS.items()}
    distance = {(a, b): np.linalg.norm(seen[a] - seen[b]) for a, b in itertools.combinations(seen, 2)}
    assert min(distance.values()) > 0.09, min(distance, key=distance.get)


def test_unknown_schemes_have_no_colour():
    assert style.scheme_color("gsb") == "#d55e00"
    with pytest.raises(ValueError, match="No colour is fixed for the scheme 'gbs'; there are colours for float, bnn"):
        style.scheme_color("gbs")


def test_other_names_get_colours_that_no_present_scheme_has():
    colors = style.colors_of(["gsb", "row", "batch", "elastic", "row"])
    assert colors["gsb"] == style.scheme_color("gsb")
    assert len(set(colors.values())) == 4


@pytest.mark.parametrize("name", style.SCHEME_COLORS)
def test_text_in_a_schemes_colour_can_be_read(name):
    rgb = np.array(to_rgb(style.readable(style.scheme_color(name))))
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    assert 1.05 / (linear @ [0.2126, 0.7152, 0.0722] + 0.05) > 3.5


# --------------------------------------------------------------------------------------------------------------- labels


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


# --------------------------------------------------------------------------------------------------------------- charts


def test_learning_curves_skip_epochs_without_evaluation(history):
    fig = charts.learning_curves(history, ["train_loss", "test_accuracy"], title="It learns")
    assert {"It learns", "float 50.0", "gsb 50.0", "gsb 0.40", "training loss"} <= set(texts(fig))
    assert "thin: single seeds, bold: mean over 2 seeds" in texts(fig)
    assert all(len(line.get_xdata()) == 3 for line in fig.axes[1].lines)


def test_a_single_evaluation_is_drawn(history):
    fig = charts.learning_curves(history[history["epoch"] == 1])
    assert any(line.get_marker() == "o" for line in fig.axes[0].lines)


def test_drawing_keeps_what_a_notebooks_backend_switches_on():
    try:
        style.styled(lambda: plt.interactive(True))()
        assert plt.isinteractive()
    finally:
        plt.interactive(False)


def test_lines_name_themselves_and_their_seeds(trials):
    summary = statistics.summarize(trials, by=["scheme", "samples_per_class"])
    fig = charts.lines(summary, "samples_per_class", log_x=True)
    assert {"float", "elastic", "gsb", "5", "10", "mean and 95 % interval over 3 seeds"} <= set(texts(fig))
    assert fig.axes[0].get_xscale() == "log"


def test_intervals_at_a_single_number_are_bars(trials):
    summary = statistics.summarize(trials, by=["scheme", "samples_per_class"])
    summary = summary[summary["samples_per_class"] == summary["samples_per_class"].min()]
    fig = charts.lines(summary, "samples_per_class", log_x=True)
    drawn = [bar.get_segments()[0][:, 1] for bar in fig.axes[0].collections]
    np.testing.assert_allclose(drawn, 100 * summary[["low", "high"]].to_numpy())


def test_dots_write_numbers_and_sort(trials):
    few = trials[trials["samples_per_class"] == 5]
    fig = charts.dots(statistics.summarize(few), reference="float", trials=few)
    assert [t.get_text() for t in fig.axes[0].get_yticklabels()] == ["float", "gsb", "elastic"]
    assert sum("±" in t for t in texts(fig)) == 3


def test_dots_of_differences_carry_a_sign(trials):
    few = trials[trials["samples_per_class"] == 5]
    fig = charts.dots(statistics.compare(few, "elastic"), reference="0", xlabel="difference (points)")
    assert all(t.startswith("+") for t in texts(fig) if "±" in t)


def test_dots_in_groups_and_without_intervals(trials):
    one = trials[trials["seed"] == 0]
    summary = statistics.summarize(one, by=["samples_per_class", "scheme"])
    fig = charts.dots(summary, group="samples_per_class", sort=False)
    labels = [t.get_text() for t in fig.axes[0].get_yticklabels()]
    assert labels == ["5", "float", "elastic", "gsb", "10", "float", "elastic", "gsb"]
    assert "one seed, so no interval" in texts(fig)
    assert not any("±" in t for t in texts(fig))


def test_dots_take_the_colour_of_a_scheme_that_a_column_names(trials):
    few = trials[trials["samples_per_class"] == 5].assign(what=lambda t: "variant of " + t["scheme"])
    summary = statistics.summarize(few, by=["what", "scheme"])
    for scheme, expected in ((None, ["elastic"] * 3), ("scheme", list(summary["scheme"]))):
        fig = charts.dots(summary, "what", sort=False, scheme=scheme)
        drawn = [line.get_color() for line in fig.axes[0].lines if line.get_marker() == "o"]
        assert drawn == [style.scheme_color(name) for name in expected]
    with pytest.raises(ValueError, match="column"):
        charts.dots(summary, "what", scheme="family")


def test_heat_writes_every_cell(trials):
    fig = charts.heat(statistics.summarize(trials, by=["scheme", "samples_per_class"]), "scheme", "samples_per_class")
    assert sum("± " in t for t in texts(fig)) == 6
    assert fig.axes[0].collections[0].get_array().size == 6


def test_roofline_draws_points_and_limits():
    points = pd.DataFrame({"name": ["kernel", "torch"], "intensity": [100.0, 20.0], "rate": [2000.0, 130.0]})
    fig = roofline.roofline(points, {"popcount": 2600.0}, bandwidth=40.0)
    assert {"kernel", "torch", "popcount"} <= set(texts(fig))


def test_figures_go_into_given_axes(trials):
    fig, axes = plt.subplots(1, 2)
    few = statistics.summarize(trials[trials["samples_per_class"] == 5])
    assert charts.dots(few, ax=axes[0]) is fig
    assert histogram.value_histogram(np.arange(5.0), {"0": 0.0}, ax=axes[1]) is fig


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda t: charts.learning_curves(t), "needs a column 'epoch'; the table has scheme"),
        (lambda t: charts.lines(t, "samples_per_class"), "needs a column 'mean'"),
        (
            lambda t: charts.dots(statistics.summarize(t.query("samples_per_class == 5")), reference="x"),
            "'x' is no row",
        ),
        (
            lambda t: charts.heat(
                statistics.summarize(t, by=["scheme", "samples_per_class"]).assign(y=0), "scheme", "y"
            ),
            "needs one row",
        ),
    ],
)
def test_tables_that_cannot_be_drawn_are_refused(trials, draw, message):
    with pytest.raises(ValueError, match=message):
        draw(trials)


# ------------------------------------------------------------------------------------------------------------- pictures


def tokens(count: int = 18, batch: int = 2) -> np.ndarray:
    return np.random.default_rng(0).random((batch, count, count))


def test_attention_takes_token_maps_and_patch_maps():
    images = np.zeros((2, 8, 8, 3), np.uint8)
    fig = attention_maps.attention_maps(
        images, {"float": tokens(), "gsb": np.ones((2, 4, 4))}, (4, 4), names=["a", "b"]
    )
    assert len(fig.axes) == 6
    assert {"image", "float", "gsb", "a", "b"} <= set(texts(fig))


def test_the_class_tokens_row_dyes_its_patch():
    m = np.zeros((18, 18))
    m[0, 2 + 5] = 1.0  # two tokens stand before the patches; patch 5 is in row 1, column 1
    m[3, :] = 1.0  # other queries are not shown
    fig = attention_maps.attention_maps(np.ones((8, 8, 3)), {"gsb": m}, (4, 4))
    drawn = fig.axes[1].images[0].get_array()
    dyed = np.argwhere(np.ptp(np.asarray(drawn), axis=-1) > 0.1) // (len(drawn) // 4)
    assert {tuple(p) for p in dyed} == {(1, 1)}


def test_without_a_class_token_all_queries_count():
    m = np.zeros((16, 16))
    m[3, 6] = 1.0
    fig = attention_maps.attention_maps(np.ones((8, 8, 3)), {"gsb": m}, (4, 4))
    drawn = np.asarray(fig.axes[1].images[0].get_array())
    assert {tuple(p) for p in np.argwhere(np.ptp(drawn, axis=-1) > 0.1) // (len(drawn) // 4)} == {(1, 2)}


def test_attention_over_a_single_pil_image_and_an_empty_map():
    fig = attention_maps.attention_maps(Image.new("L", (6, 9)), {"elastic": np.zeros((3, 2))}, (3, 2))
    assert len(fig.axes) == 2


@pytest.mark.parametrize(
    ("images", "maps", "message"),
    [
        (np.zeros((8, 8)), np.ones((4, 4)), "An image to draw has the shape"),
        (np.zeros((8, 8, 3)), np.ones((3, 4, 4)), "1 two-dimensional maps were expected"),
        (np.zeros((8, 8, 3)), np.ones((5, 5)), "fits neither the 4 x 4 patches"),
        (np.zeros((8, 8, 3)), -np.ones((4, 4)), "negative"),
        (np.zeros((8, 8, 3)), np.full((4, 4), np.nan), "not finite"),
    ],
)
def test_maps_that_do_not_fit_are_refused(images, maps, message):
    with pytest.raises(ValueError, match=message):
        attention_maps.attention_maps(images, {"float": maps}, (4, 4))


def test_each_image_needs_one_name():
    with pytest.raises(ValueError, match="1 images and 2 names"):
        attention_maps.attention_maps(np.zeros((8, 8, 3)), {"float": np.ones((4, 4))}, (4, 4), names=["a", "b"])


def test_histograms_deepen_beyond_each_threshold():
    values = np.linspace(-1, 1, 2001)
    fig = histogram.value_histogram(values, {"0.7 max": 0.7, "0.9 max": 0.9, "0.7 min": -0.7, "0": 0.0})
    shades = {}
    for bar in fig.axes[0].patches:
        shades.setdefault(bar.get_facecolor(), []).append(bar.get_x() + bar.get_width() / 2)
    middle, second, third = sorted(shades.values(), key=lambda xs: np.mean(np.abs(xs)))
    assert max(map(abs, middle)) < 0.7
    assert min(map(abs, second)) > 0.7
    assert min(third) > 0.9
    assert sum(bar.get_height() * bar.get_width() for bar in fig.axes[0].patches) == pytest.approx(1)


@pytest.mark.parametrize("values", [[], [np.nan, 1.0]])
def test_histograms_need_finite_values(values):
    with pytest.raises(ValueError, match="at least one value and only finite"):
        histogram.value_histogram(values, {})


def test_histogram_of_a_constant_on_a_log_scale():
    assert histogram.value_histogram(np.zeros(10), {"0": 0.0}, log=True).axes


# ---------------------------------------------------------------------------------------------------------------- files


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
