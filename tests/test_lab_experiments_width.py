"""Models of equal cost: conditions, interpolation between float models, claims and figure."""

from types import SimpleNamespace

import archive_maker
import numpy as np
import pandas as pd
import pytest
from image_files import parquet_file

from binvit.lab.benchmark.machine import kernels_version
from binvit.lab.benchmark.timing import interleave
from binvit.lab.data.datasets import load_data
from binvit.lab.experiments import width
from binvit.lab.experiments.design import plan
from binvit.lab.notebooks.plan import checked_values
from binvit.lab.trials.measurements import read_measurements
from binvit.lab.trials.trial import Trial

RUNS = [plan.Run(name, "digits", Trial("digits", name, recipe_options={"lr": 0.25})) for name in ("float", "gsb")]


def table(gsb, floats=(0.5, 0.7), costs=(1000, 4000), seeds=6, own_cost=2000):
    """Two float models and a 1-bit model between them; accuracies differ a little from seed to seed."""
    rows = []
    for seed in range(seeds):
        extra = 0.001 * seed
        for place, (accuracy, cost) in enumerate(zip(floats, costs, strict=True)):
            rows.append(("float", 16 * (place + 1), seed, accuracy + extra, cost))
        rows.append(("gsb", 64, seed, gsb + extra + 0.002 * (seed % 2), own_cost))
    frame = pd.DataFrame(rows, columns=["scheme", "width", "seed", "test_accuracy", "bytes"])
    costs = {"ms": frame["bytes"] / 1e4, "train_accuracy": 0.875}
    return frame.assign(data="digits", condition=frame["scheme"], **costs)


def test_models_stand_on_equal_terms_and_heads_divide_their_width():
    made = plan.plan(width.conditions([16, 48], [32, 96], ["gsb"]), "digits, recipe cpu", [0, 1])
    assert len({run.trial for run in made}) == len(made) == 8
    for run in made:
        recipe, scheme = run.trial.get_recipe(), run.trial.get_scheme()
        assert recipe.width % recipe.heads == 0
        assert (scheme.attention_bias, scheme.activation_limit) == ("none", None)
    widths = width.with_widths(pd.DataFrame({"condition": [run.condition for run in made]}))["width"]
    assert list(widths) == [run.trial.get_recipe().width for run in made]


def test_accuracy_of_float_runs_straight_over_the_logarithm_of_the_cost():
    # 2000 lies halfway between 1000 and 4000 on a logarithmic scale: float has 60 % there.
    found = width.gains(table(gsb=0.65), "gsb", "bytes")
    np.testing.assert_allclose(found, [0.05 + 0.002 * (seed % 2) for seed in range(6)])
    assert width.gains(table(gsb=0.65, own_cost=999), "gsb", "bytes").empty  # nothing is extrapolated
    assert width.gains(table(gsb=0.65, own_cost=4001), "gsb", "ms").empty


@pytest.mark.parametrize(("gsb", "verdict"), [(0.65, "yes"), (0.5, "no"), (0.599, "undecided")])
def test_claims_can_come_out_any_way(gsb, verdict):
    found = width.claims(table(gsb))
    assert [claim.verdict for claim in found] == [verdict] * 2
    assert {claim.kind for claim in found} == {"exploratory"}
    assert all("gsb - float: " in claim.evidence and " points" in claim.evidence for claim in found)
    assert all(claim.evidence.endswith("; 1 of 1 widths overlap") for claim in found)


def told(claims):
    return [(claim.verdict, claim.evidence) for claim in claims]


def test_claims_without_overlap_are_undecided():
    cheaper = "no sizes overlap: each of gsb costs less than the smallest of float"
    assert told(width.claims(table(0.9, own_cost=10))) == [("undecided", cheaper)] * 2
    assert told(width.claims(table(0.9, own_cost=9999))) == [("undecided", "no sizes overlap")] * 2
    single = width.claims(table(0.9, floats=[0.5], costs=[2000]))
    assert {claim.verdict for claim in single} == {"undecided"}
    assert all(claim.evidence.startswith("one width of float was run") for claim in single)


def test_what_was_not_measured_is_told_from_what_does_not_overlap():
    unknown = width.with_costs(table(0.9).drop(columns=["bytes", "ms"]), pd.DataFrame())
    assert told(width.claims(unknown)) == [("undecided", "costs not measured")] * 2
    assert set(width.accuracies(unknown, RUNS)["bytes"]) == {"costs not measured"}
    assert width.unmeasured(unknown) == "costs not measured: digits"
    partly = table(0.9)
    partly.loc[partly["scheme"] == "gsb", "ms"] = np.nan
    assert told(width.claims(partly))[1] == ("undecided", "costs not measured")
    assert width.unmeasured(partly) == "costs not measured: digits (gsb)"
    told_of = width.accuracies(partly, RUNS)
    assert "2,000" in set(told_of["bytes"])
    assert (set(told_of["rate"]), set(told_of["training"])) == ({"0.25"}, {"87.5"})
    assert width.unmeasured(table(0.9)) == ""


@pytest.mark.parametrize(("spread", "verdict"), [(1.05, "yes"), (1.9, "undecided"), (10, "undecided")])
def test_a_verdict_about_times_holds_throughout_their_quartiles(spread, verdict):
    # gsb is 4 points above float where both take the median times; a slower gsb meets a more accurate float.
    measured = table(0.64)
    measured = measured.assign(ms_low=measured["ms"] / spread, ms_high=measured["ms"] * spread)
    of_bytes, of_time = width.claims(measured)
    assert (of_bytes.verdict, of_time.verdict) == ("yes", verdict)
    assert ("not throughout the quartiles" in of_time.evidence) == (verdict == "undecided")


def test_images_are_measured_at_their_own_size_and_absent_ones_not_at_all(tmp_path, monkeypatch):
    monkeypatch.setattr(width, "interleave", lambda contenders, seconds: interleave(contenders, 0.01))
    photos = parquet_file(tmp_path / "photos.parquet")
    values = {"dataset": "parquet:photos.parquet", "data_dir": str(tmp_path), "changes": "depth 1", "seeds": [0]}
    values |= {"float_widths": [16], "binary_widths": [16], "schemes": ["gsb"]}
    jobs = archive_maker.jobs(tmp_path, ["09"], **values)
    archive_maker.fill(tmp_path, jobs)
    p = checked_values(jobs[0])
    away = photos.rename(tmp_path / "away.parquet")
    assert width.take_measurements(p, tmp_path, tmp_path) == 0
    assert read_measurements(tmp_path, width.TABLE).empty
    away.rename(photos)
    assert width.take_measurements(p, tmp_path, tmp_path) == 1
    assert load_data("parquet:photos.parquet", root=tmp_path).image_size == 8
    expected = width.measure(width.runs(p), load_data, 0.01)
    assert read_measurements(tmp_path, width.TABLE)["bytes"].tolist() == expected["bytes"].tolist()
    assert width.take_measurements(p, tmp_path, tmp_path) == 0  # this kind of CPU has measured them
    monkeypatch.setattr(width, "kernels_version", lambda: "sha256:later")
    assert width.take_measurements(p, tmp_path, tmp_path) == 1  # with kernels that are not today's
    assert set(read_measurements(tmp_path, width.TABLE)["kernels"]) == {"sha256:later"}
    wider = SimpleNamespace(**vars(p) | {"binary_widths": [*p.binary_widths, 40]})
    assert width.take_measurements(wider, tmp_path, tmp_path) == 1
    assert 40 in set(read_measurements(tmp_path, width.TABLE)["width"])


def test_packed_models_are_smaller_than_float_ones_of_their_width():
    runs = plan.plan(width.conditions([48], [48], ["gsb"]), "digits", [0, 1], changes="depth 1")
    measured = width.measure(runs, load_data, seconds=0.01).set_index("scheme")
    assert len(measured) == 2
    assert measured.loc["gsb", "bytes"] < measured.loc["float", "bytes"] / 3
    assert (measured["ms"] > 0).all()
    assert (measured["low"] <= measured["high"]).all()
    costly = width.with_costs(table(0.6).drop(columns=["bytes", "ms"]).assign(width=48), measured.reset_index())
    assert set(costly.loc[costly["scheme"] == "gsb", "bytes"]) == {measured.loc["gsb", "bytes"]}


def test_figure_has_a_panel_for_each_cost():
    figure = width.draw(table(0.65))
    assert [ax.get_xlabel() for ax in figure.axes] == ["kB of the file", "ms for one image, one thread"]
    assert all(ax.get_xscale() == "log" for ax in figure.axes)


def test_seeds_far_below_the_lowest_mean_are_marked_at_the_edge():
    own = table(0.65)
    own.loc[own.index[own["scheme"] == "gsb"][0], "test_accuracy"] = 0.1
    axes = width.draw(own).axes[0]
    (low,) = (line for line in axes.lines if line.get_marker() == "v" and len(line.get_xdata()))
    assert low.get_ydata()[0] == pytest.approx(
        100 * (own.groupby(["scheme", "bytes"])["test_accuracy"].mean().min() - 0.03)
    )
    assert axes.get_ylim()[0] > 10


def test_models_that_were_not_measured_have_no_panel_but_are_named():
    measured = table(0.65).assign(cpu="one kind", kernels=kernels_version())
    unmeasured = measured.assign(data="photographs", bytes=float("nan"), ms=float("nan"), cpu=float("nan"))
    figure = width.draw(pd.concat([measured, unmeasured], ignore_index=True))
    assert len(figure.axes) == 2
    assert figure.get_supxlabel().endswith("\nmilliseconds of digits: one kind\ncosts not measured: photographs")
    older = width.draw(measured.assign(kernels=""))
    assert older.get_supxlabel().endswith("\nmilliseconds of digits: one kind (kernels of another version)")


def test_each_kind_of_images_has_the_costs_of_the_first_cpu_that_measured_it():
    sizes = pd.DataFrame(
        [("digits", "gsb", 64, 10, 0.5, 0.4, 0.6, 0.0, "old"), ("photos", "gsb", 64, 20, 2.0, 1.0, 3.0, 0.0, "new")],
        columns=["data", "scheme", "width", "bytes", "ms", "low", "high", "others", "cpu"],
    )
    trials = pd.DataFrame({"data": ["digits", "photos", "none"], "scheme": "gsb", "width": 64})
    found = width.with_costs(trials, pd.concat([sizes, sizes.assign(cpu="last", bytes=99)]))
    assert found["bytes"].fillna(0).tolist() == [10, 20, 0]
    assert found["ms_high"].fillna(0).tolist() == [0.6, 3.0, 0]
    assert found["cpu"].fillna("").tolist() == ["old", "new", ""]
