"""Models of equal cost: conditions, interpolation between float models, claims and figure."""

import numpy as np
import pandas as pd
import pytest

from binvit.lab.data.datasets import load_data
from binvit.lab.experiments import width
from binvit.lab.experiments.design import plan


def table(gsb, floats=(0.5, 0.7), costs=(1000, 4000), seeds=6, own_cost=2000):
    """Two float models and a 1-bit model between them; accuracies differ a little from seed to seed."""
    rows = []
    for seed in range(seeds):
        extra = 0.001 * seed
        for place, (accuracy, cost) in enumerate(zip(floats, costs, strict=True)):
            rows.append(("float", 16 * (place + 1), seed, accuracy + extra, cost))
        rows.append(("gsb", 64, seed, gsb + extra + 0.002 * (seed % 2), own_cost))
    frame = pd.DataFrame(rows, columns=["scheme", "width", "seed", "test_accuracy", "bytes"])
    return frame.assign(data="digits", ms=frame["bytes"] / 1e4, condition=frame["scheme"])


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


def test_claims_without_overlap_are_undecided():
    assert [claim.verdict for claim in width.claims(table(0.9, own_cost=10))] == ["undecided"] * 2
    unknown = width.with_costs(table(0.9).drop(columns=["bytes", "ms"]), pd.DataFrame())
    assert [claim.verdict for claim in width.claims(unknown)] == ["undecided"] * 2


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


def test_models_that_were_not_measured_have_no_panel():
    measured = table(0.65)
    unmeasured = measured.assign(data="photographs", bytes=float("nan"), ms=float("nan"))
    figure = width.draw(pd.concat([measured, unmeasured]))
    assert len(figure.axes) == 2
