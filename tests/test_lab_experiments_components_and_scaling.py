"""The design and the claims about components and factors."""

import matplotlib.pyplot as plt
import pandas as pd
import pytest
import torch
from experiment_tables import table_of

import binvit
from binvit.lab.experiments import components_and_scaling
from binvit.lab.experiments.design import plan

NAMES = [
    f"{part}, {factor}"
    for part in (*components_and_scaling.COMPONENTS, components_and_scaling.PATCHES)
    for factor in components_and_scaling.FACTORS
]


def accuracies(**changed):
    """Every condition at 80 %, with seeds half a point apart, except those that are given by name."""
    values = dict.fromkeys(["nothing", *NAMES], 0.8) | {name.replace("_", " "): v for name, v in changed.items()}
    table = table_of({(name, "digits"): [value, value + 0.005, value + 0.01] for name, value in values.items()})
    return components_and_scaling.with_factors(table)


def verdicts(table, margin=0.05):
    return [claim.verdict for claim in components_and_scaling.claims(table, margin)]


def test_conditions_cross_components_and_factors():
    design = components_and_scaling.conditions()
    assert [condition.name for condition in design] == ["nothing", *NAMES]
    runs = plan.plan(design, "digits", [0])
    assert len({run.trial for run in runs}) == len(NAMES) + 1
    schemes = {run.condition: run.trial.get_scheme() for run in runs}
    assert schemes["MHSA, weights"].components == ("mhsa",)
    assert schemes["both, no factor"].weight == "sign_open"
    patches = schemes["patch embedding, weights and inputs"]
    assert (patches.components, patches.patch_weight, patches.patch_input) == (
        ("patch_embed",),
        "sign_mean_constant",
        "sign_mean",
    )


def test_nothing_but_the_factor_changes():
    runs = plan.plan(components_and_scaling.conditions(["both"]), "digits", [0])
    schemes = [run.trial.get_scheme() for run in runs if run.condition.startswith("both")]
    places = {"weight", "input", "hidden", "query", "key", "attention", "value", "patch_weight", "patch_input"}
    records = [{k: v for k, v in scheme.to_dict().items() if k not in places} for scheme in schemes]
    assert all(record == records[0] for record in records)
    assert {scheme.rule("weight").center for scheme in schemes} == {False}
    assert len({run.trial.get_recipe() for run in runs if run.condition != "nothing"}) == 1


def test_learned_factors_start_at_the_computed_ones():
    torch.manual_seed(0)
    x, g = torch.randn(5, 7), torch.randn(5, 7)
    computed, learned = (
        binvit.scheme("xnor", **components_and_scaling.FACTORS[name]).rule("weight") for name in ("weights", "learned")
    )
    (scale,) = learned.initial(x)
    torch.testing.assert_close(scale, x.abs().mean(1, keepdim=True))
    for a, b in zip(computed.planes(x), learned.planes(x, scale), strict=True):
        torch.testing.assert_close(a.levels * a.scale, b.levels * b.scale)
    torch.testing.assert_close(computed.backward(x, g)[0], learned.backward(x, g, scale)[0])


def test_fewer_components_and_factors():
    design = components_and_scaling.conditions(["MLP"], ["learned"])
    assert [condition.name for condition in design] == ["nothing", "MLP, learned", "patch embedding, learned"]


def test_float_stands_once_in_table_and_figure():
    table = accuracies(nothing=0.9)
    assert (table["component"] == "nothing").sum() == 3
    figure = components_and_scaling.draw(table)
    (ax,) = figure.axes
    assert ax.get_title(loc="left") == "digits: float 90.5 %, nothing 1-bit"
    assert [label.get_text() for label in ax.get_yticklabels()] == ["MLP", "MHSA", "both"]
    assert figure.get_supxlabel().startswith("test accuracy (%)")
    plt.close("all")


def test_the_patch_embedding_stands_beside_float():
    table = components_and_scaling.patch_embedding(accuracies(nothing=0.9))
    assert list(table["factor"].unique()) == ["nothing", *components_and_scaling.FACTORS]
    assert len(table) == 3 * 5
    assert table["test_accuracy"].max() == 0.91
    alone = accuracies().query("component == 'nothing'").assign(data="photographs")
    both = components_and_scaling.patch_embedding(pd.concat([accuracies(), alone]))
    assert set(both["data"]) == {"digits"}  # nothing stands beside the float models of photographs


def test_nothing_is_better_where_nothing_differs():
    assert verdicts(accuracies()) == ["no"] * 2 + ["undecided"] * 10 + ["yes"]


def test_claims_fail_where_factors_harm():
    harm = {"no factor": 0.0, "weights": -0.02, "weights and inputs": -0.04, "learned": -0.06}
    parts = ("MLP", "MHSA", "both", "patch embedding")
    values = {f"{part}, {factor}": 0.7 + harm[factor] for part in parts for factor in harm}
    assert verdicts(accuracies(**values, nothing=0.78)) == ["no"] * 13


def test_claims_hold_where_the_papers_are_right():
    gain = {"no factor": 0.0, "weights": 0.02, "weights and inputs": 0.04, "learned": 0.06}
    values = {f"{part}, {factor}": 0.7 + gain[factor] for part in ("MLP", "MHSA") for factor in gain}
    values |= {f"both, {factor}": 0.5 + gain[factor] for factor in gain}
    values |= {f"patch embedding, {factor}": 0.7 + gain[factor] for factor in gain}
    assert verdicts(accuracies(**values, nothing=0.78)) == ["yes"] * 13


def test_what_was_not_run_is_undecided():
    table = accuracies()
    fewer = table[table["component"].isin(["nothing", "MLP"]) & table["factor"].isin(["weights"])]
    assert verdicts(fewer) == ["undecided"] * 13


def test_components_are_not_averaged():
    claims = components_and_scaling.claims(accuracies(**{"MHSA, weights and inputs": 0.9}))
    found = {claim.sentence: claim.verdict for claim in claims if "help" in claim.sentence}
    assert [name for name, verdict in found.items() if verdict == "yes"] == [
        "Factors of weights and inputs help a 1-bit MHSA.",
        "With a 1-bit MHSA, a factor of the inputs helps beside that of the weights.",
    ]
    assert [claim.kind for claim in claims] == ["confirmatory"] * 6 + ["exploratory"] * 7
    assert all(("Sato" in claim.source) == (claim.kind == "confirmatory") for claim in claims)


@pytest.mark.parametrize("seeds", [1, 2])
def test_intervals_count_seeds_alone(seeds):
    table = accuracies()
    claims = components_and_scaling.claims(table[table["seed"] < seeds])
    assert all(f"{seeds} seed" in claim.evidence for claim in claims)
