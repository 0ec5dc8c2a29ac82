"""Plans, tables and claims that the notebooks of several conditions share."""

import pandas as pd
import pytest
from experiment_tables import table_of
from matplotlib import pyplot as plt

from binvit import lab
from binvit.lab.analysis import claims, statistics
from binvit.lab.analysis.claims import Claim
from binvit.lab.analysis.statistics import summarize
from binvit.lab.experiments.design import plan
from binvit.lab.experiments.design.plan import Condition
from binvit.lab.figures import panels
from binvit.lab.trials.tune import equal_terms


def test_a_plan_has_every_condition_image_and_seed():
    conditions = [Condition("float", "float"), Condition("one", "elastic")]
    runs = plan.plan(conditions, "digits; cifar100, 5 per class, recipe cpu, 2 seeds", [3, 4, 5], data_dir="here")
    assert [(run.data, run.condition, run.trial.seed) for run in runs] == [
        *(("digits", name, seed) for name in ("float", "one") for seed in (3, 4, 5)),
        *(("cifar100, 5 per class", name, seed) for name in ("float", "one") for seed in (3, 4)),
    ]
    assert {run.trial.recipe for run in runs[:6]} == {"smoke"}
    assert {(run.trial.recipe, run.trial.samples_per_class, run.trial.root) for run in runs[6:]} == {("cpu", 5, "here")}
    (run,) = plan.plan(conditions[:1], "cifar100", [0], samples_per_class=7)
    assert (run.trial.samples_per_class, run.trial.root) == (7, None)


def test_what_changes_nothing_is_the_same_trial():
    recipe = lab.recipe("smoke")
    conditions = [
        Condition("plain", "gsb"),
        Condition("said", "gsb", {"thresholds": [0.7, 0.9]}, {"epochs": recipe.epochs, "stages": []}),
        Condition("computed", "gsb", recipe_options=lambda base: {"epochs": base.epochs}),
        Condition("other", "gsb", {"thresholds": [0.7]}),
    ]
    plain, said, computed, other = (run.trial for run in plan.plan(conditions, "digits", [0]))
    assert plain == said == computed == lab.Trial("digits", "gsb")
    assert other != plain
    assert plan.plan(conditions[:1], "digits", [0], epochs=recipe.epochs)[0].trial == plain
    shorter = [run.trial for run in plan.plan(conditions, "digits", [0], epochs=2)]
    assert [trial.get_recipe().epochs for trial in shorter] == [2, recipe.epochs, 2, 2]


def test_a_recipe_is_changed_for_all_conditions():
    conditions = [Condition("a", "gsb"), Condition("b", "gsb", {}, {"width": 64})]
    runs = plan.plan(conditions, "digits", [0], epochs=3, changes="width 32, global_pool avg, lr 1e-2")
    recipes = [run.trial.get_recipe() for run in runs]
    assert [(recipe.width, recipe.global_pool, recipe.lr, recipe.epochs) for recipe in recipes] == [
        (32, "avg", 0.01, 3),
        (64, "avg", 0.01, 3),
    ]


@pytest.mark.parametrize("named", ["for all conditions", "by a condition"])
def test_a_rate_that_is_named_wins_over_the_tuned_one_also_where_the_recipe_says_the_same(named):
    own, changes = ({}, "lr 2e-3") if named == "for all conditions" else ({"lr": 2e-3}, "")
    conditions = [Condition(scheme, scheme, equal_terms("none"), own) for scheme in ("gsb", "float")]
    assert lab.recipe("digits").lr == 2e-3
    untold = [run.trial.get_recipe().lr for run in plan.plan([conditions[0]], "digits", [0], "digits")]
    asked = plan.plan(conditions, "digits", [0], "digits", changes=changes)
    assert [run.trial.get_recipe().lr for run in asked] == [2e-3, 2e-3]
    assert named == "by a condition" or untold != [2e-3]  # else the trial would show nothing


def test_wrong_conditions_are_refused():
    with pytest.raises(ValueError, match="Two conditions of the experiment are called 'a'"):
        plan.plan([Condition("a", "gsb"), Condition("a", "elastic")], "digits", [0])
    with pytest.raises(ValueError, match="Unknown scheme field 'tresholds'"):
        plan.plan([Condition("a", "gsb", {"tresholds": ()})], "digits", [0])
    with pytest.raises(ValueError, match="Unknown recipe field 'epoch'"):
        plan.plan([Condition("a", "gsb", {}, {"epoch": 1})], "digits", [0])


def test_training_returns_the_plan_s_order_and_keeps_models(tmp_path):
    tiny = {"width": 8, "depth": 1, "heads": 1, "batch_size": 32, "epochs": 1}
    conditions = [
        Condition("a", "elastic", {}, tiny),
        Condition("b", "float", {}, tiny),
        Condition("c", "elastic", {}, tiny),
    ]
    runs = plan.plan(conditions, "digits", [1, 0], samples_per_class=4, keep_models=("b", "c"))
    table = plan.train(runs, tmp_path, progress=False)
    assert list(zip(table["condition"], table["seed"], strict=True)) == [(c, s) for c in "abc" for s in (1, 0)]
    assert list(table["scheme"]) == ["elastic"] * 2 + ["float"] * 2 + ["elastic"] * 2
    assert table["test_accuracy"][:2].tolist() == table["test_accuracy"][4:].tolist()
    assert len(list(tmp_path.glob("*.safetensors"))) == len(list(tmp_path.glob("*.json"))) == 4
    assert plan.train(runs, tmp_path, progress=False).equals(table)


def test_averages_keep_one_number_per_seed():
    table = table_of({("a", "x"): [0.1, 0.3], ("b", "x"): [0.3, 0.7], ("a", "y"): [0.5, 0.5], ("b", "y"): [0.7, 0.9]})
    mean = statistics.averaged(table.assign(kind="all"), "kind")
    assert mean["test_accuracy"].tolist() == pytest.approx([0.2, 0.5, 0.6, 0.7])
    assert mean[["data", "seed"]].to_numpy().tolist() == [["x", 0], ["x", 1], ["y", 0], ["y", 1]]


def test_claims_name_the_images_only_if_there_are_several():
    table = table_of({("a", "x"): [0.1], ("a", "y"): [0.5]})
    check = lambda part: [Claim("It works.", "yes" if part["test_accuracy"].min() > 0.3 else "no", "seen")]  # noqa: E731
    assert claims.for_each_data(table[:1], check) == [Claim("It works.", "no", "seen")]
    assert claims.for_each_data(table, check) == [
        Claim("On x: It works.", "no", "seen"),
        Claim("On y: It works.", "yes", "seen"),
    ]


def test_images_that_compare_nothing_have_no_claims_unless_there_are_no_others():
    table = table_of({("a", "x"): [0.1], ("a", "y"): [0.5]})
    lacking = claims.not_run("It works.", "no trial of 'b' was run")

    def check(part):
        shines = "It shines."
        return [lacking, Claim(shines, "no", "seen") if part["data"].iloc[0] == "y" else claims.not_run(shines)]

    assert [claim.sentence for claim in claims.for_each_data(table, check)] == ["On y: It works.", "On y: It shines."]
    assert len(claims.for_each_data(table, lambda part: [lacking])) == 2


@pytest.mark.parametrize(
    ("verdicts", "expected", "evidence"),
    [
        (["yes", "yes"], "yes", "0; 1"),
        (["yes", "undecided", "undecided"], "undecided", "2 of 3 are undecided: 1"),
        (["undecided", "no", "yes"], "no", "1 of 3 fails: 1"),
    ],
)
def test_claims_that_have_to_hold_together(verdicts, expected, evidence):
    parts = [Claim("part", verdict, str(number)) for number, verdict in enumerate(verdicts)]
    assert claims.all_of("All.", parts) == Claim("All.", expected, evidence)
    assert claims.all_of("All.", []) == claims.not_run("All.", "nothing to compare was run")


def test_panels_have_titles_if_there_are_several():
    table = table_of({("a", "x"): [0.1], ("a", "y"): [0.5]})
    seen = []
    fig = panels.panels(table, lambda part, ax: seen.append(part["data"].tolist()), 2, 1)
    assert seen == [["x"], ["y"]]
    assert [ax.get_title(loc="left") for ax in fig.axes] == ["x", "y"]
    assert panels.panels(table[:1], lambda part, ax: None, 2, 1).axes[0].get_title(loc="left") == ""


@pytest.mark.parametrize(("count", "size"), [(1, (5, 1)), (2, (10, 1)), (3, (10, 2)), (5, (10, 3))])
def test_panels_stand_below_each_other_where_a_page_ends(count, size):
    table = pd.DataFrame({"data": [f"images {number}" for number in range(count)]})
    fig = panels.panels(table, lambda part, ax: None, 5, 1)
    assert tuple(fig.get_size_inches()) == size
    assert [ax.get_title(loc="left") for ax in fig.axes] == ([*table["data"]] if count > 1 else [""])
    plt.close("all")
    plt.close("all")


def test_dots_of_each_kind_of_images_have_a_panel():
    table = table_of({("a", "x"): [0.1, 0.2], ("b", "x"): [0.3, 0.5], ("a", "y"): [0.6, 0.7]})
    fig = panels.dot_panels(summarize(table, ["data", "condition"]), table, "condition", reference="b")
    assert [[text.get_text() for text in ax.get_yticklabels()] for ax in fig.axes] == [["b", "a"], ["a"]]
    faint = [line.get_xdata().tolist() for line in fig.axes[1].lines if line.get_alpha()]
    assert faint == [pytest.approx([60, 70])]
    plt.close(fig)


def test_figures_and_tables_are_written_where_asked(tmp_path):
    fig, _ = plt.subplots()
    panels.save("", "nothing", fig)
    panels.save(tmp_path, "some", fig, table=pd.DataFrame({"a": [1], "root": ["folder of this machine"]}))
    plt.close(fig)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["some.pdf", "some.png", "some_table.csv"]
    assert (tmp_path / "some_table.csv").read_text() == "a\n1\n"
