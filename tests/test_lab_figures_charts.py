"""Charts draw what their tables say."""

import os

os.environ.setdefault("MPLBACKEND", "agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from binvit.lab.analysis import statistics
from binvit.lab.experiments import components_and_scaling
from binvit.lab.figures import charts, histogram, panels, style


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
        for seed in range(5)
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


def test_learning_curves_skip_epochs_without_evaluation(history):
    fig = charts.learning_curves(history, ["train_loss", "test_accuracy"], title="It learns")
    assert {"It learns", "float 50.0", "gsb 50.0", "gsb 0.40", "training loss"} <= set(texts(fig))
    assert "thin: single seeds, bold: mean over 2 seeds" in texts(fig)
    assert all(len(line.get_xdata()) == 3 for line in fig.axes[1].lines)


def test_a_single_evaluation_is_drawn(history):
    fig = charts.learning_curves(history[history["epoch"] == 1])
    assert any(line.get_marker() == "o" for line in fig.axes[0].lines)


def test_few_seeds_are_points_without_intervals(trials):
    few = trials[trials["seed"] < 4]
    summary = statistics.summarize(few, by=["scheme", "samples_per_class"])
    one = summary[summary["samples_per_class"] == 5]
    for fig in (
        charts.dots(one, trials=few[few["samples_per_class"] == 5]),
        charts.heat(summary, "scheme", "samples_per_class"),
        charts.lines(summary, "samples_per_class", trials=few),
    ):
        assert not any("±" in text or "interval" in text for text in texts(fig))
        assert any("mean of 4 seeds" in text for text in texts(fig))
    dots, curves = (
        charts.dots(one, trials=few[few["samples_per_class"] == 5]),
        charts.lines(summary, "samples_per_class", trials=few),
    )
    assert sum(len(line.get_xdata()) == 4 for line in dots.axes[0].lines) == 3
    assert sum(len(line.get_xdata()) == 8 for line in curves.axes[0].lines) == 3
    assert not curves.axes[0].collections


def test_intervals_of_accuracies_end_at_0_and_100(trials):
    wide = trials.assign(test_accuracy=trials["seed"].map({0: 0.0, 1: 1.0, 2: 0.9, 3: 1.0, 4: 1.0}))
    summary = statistics.summarize(wide, by=["scheme", "samples_per_class"])
    assert summary["high"].max() == 1
    for fig in (
        charts.dots(summary[summary["samples_per_class"] == 5]),
        charts.lines(summary, "samples_per_class"),
    ):
        ends = [line.get_xdata() if len(line.get_xdata()) == 2 else [50] for line in fig.axes[0].lines]
        bars = [bar.get_segments()[0][:, 1] for bar in fig.axes[0].collections]
        assert all(0 <= x <= 100 for part in (*ends, *bars) for x in part)
    low = summary["low"].iloc[0]
    half = 100 * (summary["mean"].iloc[0] - low)
    assert any(f"± {half:.1f}" in text for text in texts(charts.dots(summary[summary["samples_per_class"] == 5])))


def test_two_points_are_no_curve(trials, history):
    more = pd.concat([trials, trials[trials["samples_per_class"] == 5].assign(samples_per_class=20)])
    for table, drawn_as in ((trials, "None"), (more, "-")):
        fig = charts.lines(statistics.summarize(table, by=["scheme", "samples_per_class"]), "samples_per_class")
        drawn = [line for line in fig.axes[0].lines if line.get_marker() == "o"]
        assert {line.get_linestyle() for line in drawn} == {drawn_as}
    for epochs, drawn_as in ((3, "None"), (5, "-")):  # of which every second was evaluated
        fig = charts.learning_curves(history[history["epoch"] <= epochs])
        assert {line.get_linestyle() for line in fig.axes[0].lines} == {drawn_as}


def test_a_scheme_with_bias_has_its_colour_and_dashes():
    rows = [(s, n, k, 0.5) for s in ("gsb", "gsb + bias") for n in (1, 2, 3) for k in range(5)]
    table = pd.DataFrame(rows, columns=["condition", "samples_per_class", "seed", "test_accuracy"])
    summary = statistics.summarize(table, by=["condition", "samples_per_class"])
    fig = charts.lines(summary, "samples_per_class", "condition")
    assert {line.get_color() for line in fig.axes[0].lines} == {style.scheme_color("gsb")}
    assert {line.get_linestyle() for line in fig.axes[0].lines} == {"-", "--"}


def test_lines_name_themselves_and_their_seeds(trials):
    summary = statistics.summarize(trials, by=["scheme", "samples_per_class"])
    fig = charts.lines(summary, "samples_per_class", log_x=True)
    assert {"float", "elastic", "gsb", "5", "10", "mean and 95 % interval over 5 seeds"} <= set(texts(fig))
    assert fig.axes[0].get_xscale() == "log"


def test_names_at_the_ends_of_lines_keep_their_distance_in_several_panels(trials):
    alike = pd.concat([trials.assign(data=data) for data in ("digits", "photographs")])  # three ends close together

    def draw(part, value, ax):
        charts.lines(statistics.summarize(part, ["scheme", "samples_per_class"], value), "samples_per_class", ax=ax)
        ax.set_ylim(0, 500)

    fig = panels.subplot_grid(alike, ["test_accuracy"], draw, None)
    fig.draw_without_rendering()
    for ax in fig.axes:
        places = [text.xyann[1] + ax.transData.transform(text.xy)[1] * 72 / fig.dpi for text in ax.texts]
        assert len(places) == 3
        assert np.diff(sorted(places)) == pytest.approx(11, abs=0.2)


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


def test_the_caption_of_several_panels_counts_the_seeds_of_all(trials):
    few = trials[trials["samples_per_class"] == 5]
    both = pd.concat([few.assign(data="digits"), few[few["seed"] < 3].assign(data="flowers102")])
    counted = "mean, from 5 seeds on with the 95 % interval, of 3 to 5 seeds"
    dotted = panels.dot_panels(statistics.summarize(both, ["data", "scheme"]), both, "scheme")
    assert dotted.get_supxlabel() == f"seeds and {counted}"
    mapped = components_and_scaling.draw(both.assign(component="MLP", factor=both["scheme"]))
    assert mapped.get_supxlabel() == f"test accuracy (%): {counted}"


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


@pytest.mark.parametrize("kinds", range(1, 6))
def test_dot_panels_stand_in_two_columns_that_end_about_alike(trials, kinds):
    some = trials[trials["samples_per_class"] == 5]
    table = pd.concat([some.assign(data=f"images {i}") for i in range(kinds)])
    summary = statistics.summarize(table, ["data", "scheme"])
    fig = panels.dot_panels(summary, table, "scheme", reference="float")
    fig.canvas.draw()
    boxes = [ax.get_position() for ax in fig.axes]
    columns = {round(box.x0, 2) for box in boxes}
    assert (len(boxes), len(columns)) == (kinds, min(2, kinds))
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    titles = [ax.get_title(loc="left") for ax in fig.axes]
    assert titles == ([f"images {i}" for i in range(kinds)] if kinds > 1 else [""])
    assert fig.get_figheight() < 0.23 * (3 + 4) * (kinds + 1) / 2 + 0.01
