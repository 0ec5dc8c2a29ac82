"""The design and the claims about components and factors."""

import pytest
from experiment_tables import table_of

import binvit
from binvit.lab.experiments import components_and_scaling, plan

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
    return [claim.verdict for claim in components_and_scaling.check_claims(table, margin)]


def test_the_design_crosses_components_and_factors():
    design = components_and_scaling.design()
    assert [condition.name for condition in design] == ["nothing", *NAMES]
    runs = plan.plan(design, "digits", [0])
    assert len({run.trial for run in runs}) == len(NAMES) + 1
    schemes = {run.condition: run.trial.get_scheme() for run in runs}
    assert schemes["MHSA, weights"].components == ("mhsa",)
    assert schemes["both, no factor"].weight == "sign_through"
    patches = schemes["patch embedding, weights and inputs"]
    assert (patches.components, patches.patch_weight, patches.patch_input) == (
        ("patch_embed",),
        "sign_mean",
        "sign_mean",
    )


def test_fewer_components_and_factors():
    design = components_and_scaling.design(["MLP"], ["learned"])
    assert [condition.name for condition in design] == ["nothing", "MLP, learned", "patch embedding, learned"]
    assert design[1].scheme == "xnor++"
    assert all(condition.scheme in binvit.list_schemes() for condition in components_and_scaling.design())


def test_the_float_model_stands_beside_every_factor():
    table = accuracies()
    assert (table["component"] == "nothing").sum() == 3 * len(components_and_scaling.FACTORS)
    assert set(table.loc[table["component"] == "nothing", "factor"]) == set(components_and_scaling.FACTORS)
    assert list(table["component"].unique()) == [
        "nothing",
        *components_and_scaling.COMPONENTS,
        components_and_scaling.PATCHES,
    ]
    assert len(table) == 3 * (len(NAMES) + len(components_and_scaling.FACTORS))
    assert not table.duplicated(["component", "factor", "seed"]).any()


def test_the_patch_embedding_stands_beside_float():
    table = components_and_scaling.patch_embedding(accuracies(nothing=0.9))
    assert list(table["factor"].unique()) == ["nothing", *components_and_scaling.FACTORS]
    assert len(table) == 3 * 5
    assert table["test_accuracy"].max() == 0.91


def test_claims_fail_where_nothing_differs():
    assert verdicts(accuracies()) == ["no"] * 5 + ["yes"]


def test_claims_hold_where_the_papers_are_right():
    gain = {"no factor": 0.0, "weights": 0.02, "weights and inputs": 0.04, "learned": 0.06}
    values = {f"{part}, {factor}": 0.7 + gain[factor] for part in ("MLP", "MHSA") for factor in gain}
    values |= {f"both, {factor}": 0.5 + gain[factor] for factor in gain}
    values |= {f"patch embedding, {factor}": 0.7 + gain[factor] for factor in gain}
    assert verdicts(accuracies(**values, nothing=0.78)) == ["yes"] * 6


def test_what_was_not_run_is_undecided():
    table = accuracies()
    fewer = table[table["component"].isin(["nothing", "MLP"]) & table["factor"].isin(["weights"])]
    assert verdicts(fewer) == ["undecided"] * 6


@pytest.mark.parametrize("seeds", [1, 2])
def test_intervals_count_seeds_alone(seeds):
    table = accuracies()
    claims = components_and_scaling.check_claims(table[table["seed"] < seeds])
    assert all(f"{seeds} seed" in claim.evidence for claim in claims)
