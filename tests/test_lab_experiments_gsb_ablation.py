"""The parts of GSB that are changed, the differences they make and the claims about them."""

import os

os.environ.setdefault("MPLBACKEND", "agg")

import matplotlib.pyplot as plt
import pandas as pd
import pytest
from experiment_tables import table_of

from binvit import lab
from binvit.lab.experiments import gsb_ablation
from binvit.lab.experiments.design import plan

RUNS = plan.plan(gsb_ablation.conditions(), "digits", [0, 1, 2])
NAMES = list(dict.fromkeys(run.condition for run in RUNS))
SAME = {run.condition for run in RUNS if run.trial.seed == 0 and run.trial == RUNS[0].trial}


def accuracies(values=None, names=NAMES):
    """All conditions at 80 %, seeds half a point apart, except those given; the levels that are GSB share its trial."""
    given = dict.fromkeys(names, 0.8) | (values or {})
    table = table_of({(name, "digits"): [value, value + 0.005, value + 0.01] for name, value in given.items()})
    own = ["same" if name in SAME else name for name in table["condition"]]
    return table.assign(id=[f"{name}-{seed}" for name, seed in zip(own, table["seed"], strict=True)])


def batches(**changes):
    rows = [(f"reduction: {name.replace('_', ' ')}", "digits", 0, c, c > 0, 8) for name, c in changes.items()]
    return gsb_ablation.with_levels(
        pd.DataFrame(rows, columns=["condition", "data", "seed", "largest_change", "flipped", "images"])
    )


def verdicts(table, measured=None):
    measured = batches(over_a_row=0.0, over_the_batch=0.5) if measured is None else measured
    return [claim.verdict for claim in gsb_ablation.claims(table, measured)]


def test_one_level_of_every_factor_is_gsb_itself():
    levels = {name.split(": ")[0] for name in SAME - {gsb_ablation.GSB}}
    factors = set(gsb_ablation.FACTORS) - {"scheme"}  # schemes stand on equal terms, not as published
    assert levels == factors
    assert len(SAME) == len(factors) + 1
    # One group is elastic in two factors, and gsb without a limit a level of two; all else is a training of its own.
    assert len({run.trial for run in RUNS}) == 3 * (len(NAMES) - len(factors) - 2)


def test_schemes_are_compared_without_a_limit():
    compared = [run.trial.get_scheme() for run in RUNS if run.condition.startswith("scheme: ")]
    assert {scheme.activation_limit for scheme in compared} == {None}


def test_stages_share_the_epochs():
    of = {run.condition: run.trial.get_recipe() for run in RUNS}
    one, two = of["training: one stage"], of["training: two stages"]
    assert (one.stages, one.epochs) == ((), lab.recipe("smoke").epochs)
    assert two.epochs + two.stages[0].epochs == one.epochs
    assert two.stages[0].epochs == pytest.approx(2 * two.epochs, abs=2)
    paper = {run.condition: run for run in plan.plan(gsb_ablation.conditions(), "cifar100", [0], "paper")}
    assert paper["training: two stages"].trial == paper[gsb_ablation.GSB].trial == paper["distillation: hard"].trial
    assert paper["training: one stage"].trial.get_recipe().epochs == 900


def test_a_result_of_two_stages_is_read_back(tmp_path):
    tiny = {"width": 8, "depth": 1, "heads": 1, "batch_size": 32, "epochs": 1}
    stages = lambda recipe: tiny | gsb_ablation.FACTORS["training"][1].recipe_options(recipe)  # noqa: E731
    runs = plan.plan([plan.Condition("a", "gsb", {}, stages)], "digits", [0], "smoke", 2, 4)
    table = plan.train(runs, tmp_path, progress=False)
    assert plan.train(runs, tmp_path, progress=False).equals(table)


def test_changes_are_differences_to_gsb_of_the_same_seed():
    table = accuracies({"gradient: masked": 0.9})
    table.loc[(table["condition"] == "gradient: masked") & (table["seed"] == 2), "test_accuracy"] += 0.1
    found = gsb_ablation.changes(table)
    masked = found[found["level"] == "masked"]
    assert masked["difference"].tolist() == pytest.approx([0.1, 0.1, 0.2])
    assert set(masked["factor"]) == {"gradient (GSB: as released)"}
    assert len(found) == 3 * (len(NAMES) - len(SAME))
    others = found[found["level"] != "masked"]
    assert others["difference"].abs().max() < 1e-12


def test_the_figure_is_cut_where_little_lies_and_counts_what_does_not_train():
    table = accuracies({"gradient: masked": 0.81, "scales: as released": 0.4}).assign(chance=0.1)
    table.loc[(table["condition"] == "scheme: elastic, without bias") & (table["seed"] == 1), "test_accuracy"] = 0.1
    figure = gsb_ablation.draw(gsb_ablation.changes(table.assign(scheme="gsb")))
    (ax,) = figure.axes
    assert ax.get_xlim()[0] == pytest.approx(-15, abs=1)
    left = [line.get_xdata() for line in ax.lines if line.get_marker() == "<" and len(line.get_xdata())]
    assert [list(places) for places in left] == [[-15] * 3, [-15], [-15], [-15]]  # seeds and mean of each
    assert [text.get_text() for text in ax.texts if "train" in text.get_text()] == ["-23.5, 1 of 3 do not train"]
    assert "triangles lie further left" in figure.get_supxlabel()
    assert "triangles" not in gsb_ablation.draw(gsb_ablation.changes(accuracies().assign(scheme="gsb"))).get_supxlabel()
    plt.close("all")


def test_claims_can_hold_and_fail():
    level = [claim.sentence for claim in gsb_ablation.claims(accuracies(), batches())]
    assert len(level) == len(set(level)) == 20
    assert verdicts(accuracies()) == ["undecided"] * 7 + ["no"] * 2 + ["yes"] * 4 + ["undecided"] * 7
    kinds = [claim.kind for claim in gsb_ablation.claims(accuracies(), batches())]
    assert kinds == ["confirmatory"] * 6 + ["exploratory"] * 14
    better = {
        "groups: 1": 0.7,
        "superposition: of neither": 0.7,
        "superposition: of the map": 0.75,
        "superposition: of the value": 0.75,
        "gradient: masked": 0.7,
        "scales: as released": 0.7,
        "bias: none": 0.7,
        "scheme: float, without bias": 0.7,
        "scheme: float, with bias": 0.75,
        "distillation: hard": 0.85,
        "distillation: soft": 0.9,
        "training: two stages": 0.85,
        "scheme: gsb, hard teacher": 0.85,
        "scheme: elastic, with bias": 0.75,
    }
    assert verdicts(accuracies(better)) == ["yes"] * 20
    worse = {"groups: 4, from 0.5, 0.7 and 0.9": 0.9, "reduction: over the batch": 0.9}
    rivals = dict.fromkeys([name for name in better if not name.startswith(("distillation", "training"))], 0.85)
    rivals |= dict.fromkeys(["superposition: of the map", "superposition: of the value"], 0.7)
    rivals |= dict.fromkeys(["distillation: hard", "training: two stages"], 0.7) | {"distillation: soft": 0.6}
    rivals["scheme: gsb, hard teacher"] = 0.7
    assert verdicts(accuracies(rivals))[:9] + verdicts(accuracies(rivals))[13:] == ["no"] * 16
    leaking = batches(over_a_row=0.1, over_the_batch=0.0)
    assert verdicts(accuracies(better | worse), leaking)[9:13] == ["no"] * 4


def test_what_was_not_run_is_undecided():
    names = [condition.name for condition in gsb_ablation.conditions(["gradient"])]
    found = verdicts(accuracies({"gradient: masked": 0.9}, names), batches())
    assert found.count("undecided") == 19
    assert found[3] == "no"


def test_the_dependence_on_the_batch_is_measured(tmp_path):
    design = gsb_ablation.conditions(["reduction", "gradient"])
    tiny = {"width": 16, "depth": 2, "heads": 2, "batch_size": 32, "epochs": 4}
    chosen = [c for c in design if c.name in ("reduction: over a row", "reduction: over the batch", "gradient: masked")]
    chosen = [plan.Condition(c.name, c.scheme, c.scheme_options, tiny) for c in chosen]
    kept = gsb_ablation.kept(chosen)
    runs = plan.plan(chosen, "digits", [0], samples_per_class=4, keep_models=kept)
    assert kept == {"reduction: over a row", "reduction: over the batch"}
    plan.train(runs, tmp_path, progress=False)
    found = gsb_ablation.measure_batches(runs, tmp_path, images=64, batch_size=8).set_index("level")
    assert found.index.tolist() == ["over a row", "over the batch"]
    assert (
        found.loc["over a row", "largest_change"]
        <= gsb_ablation.ROUNDING
        < found.loc["over the batch", "largest_change"]
    )
    assert set(found["images"]) == {64}
    few = gsb_ablation.measure_batches(runs, tmp_path, images=21).set_index("level")
    assert (
        few.loc["over a row", "largest_change"] <= gsb_ablation.ROUNDING < few.loc["over the batch", "largest_change"]
    )
    assert set(few["images"]) == {20}
