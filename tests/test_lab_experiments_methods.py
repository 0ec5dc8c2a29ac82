"""Families of schemes, the claims about them, and the table of published numbers."""

import re
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from experiment_tables import table_of

import binvit
from binvit.lab.experiments import methods
from binvit.lab.experiments.design import plan

REFERENCE = Path(__file__).parents[1] / "paper_figures" / "reference.csv"


def trials(values, guessing=0.01):
    """Three seeds, half a point apart, around the accuracies given by condition."""
    table = table_of({(name, "digits"): [value, value + 0.005, value + 0.01] for name, value in values.items()})
    schemes = table["condition"].str.removesuffix(plan.WITH_BIAS)
    return methods.with_families(table.assign(scheme=schemes), {"digits": guessing})


def verdicts(values, margin=0.05):
    return [claim.verdict for claim in methods.claims(trials(values), margin)]


def test_every_scheme_has_a_family_and_a_place():
    assert {methods.family(name) for name in binvit.list_schemes()} == set(methods.FAMILIES)
    assert methods.family("mine") == "other"
    names = [condition.name for condition in methods.conditions(["gsb", "bit", "mine", "bnn", "float"])]
    assert names == ["float", "float + bias", "bnn", "bit", "gsb", "gsb + bias", "mine"]
    runs = plan.plan(methods.conditions(["all"]), "digits", [0])
    assert {run.condition for run in runs} >= set(binvit.list_schemes())
    biases = {run.condition: run.trial.get_scheme().attention_bias for run in runs}
    assert all((bias == "full") == name.endswith(plan.WITH_BIAS) for name, bias in biases.items())
    assert len(runs) == len(binvit.list_schemes()) + len(plan.BOTH_BIASES)
    assert len(methods.conditions(["all"], biased=False)) == len(binvit.list_schemes())


def test_what_does_not_train_is_shown_and_enters_nothing():
    values = {"float": 0.9, "gsb": 0.8, "bnn": 0.25, "xnor": 0.7, "bibert": 0.75}
    table = trials(values, guessing=0.1)
    assert table.loc[table["condition"] == "bnn", "family"].unique().tolist() == ["does not train"]
    claims = {claim.sentence: claim for claim in methods.claims(table)}
    average = next(claim for sentence, claim in claims.items() if "on average" in sentence)
    assert average.estimate.mean == pytest.approx(0.05)  # with bnn it would be more
    (untrained,) = [
        c for c in methods.claims(trials({"float": 0.9, "gsb": 0.2}, 0.1)) if c.sentence.startswith("GSB stays")
    ]
    assert (untrained.verdict, untrained.evidence) == ("undecided", "no trial of 'gsb' was run")


def test_chance_and_the_heading_stand_in_the_figure():
    runs = plan.plan(methods.conditions(["float"]), "digits", [0])
    assert plan.chance(runs) == {"digits": 0.1}
    figure = methods.draw(trials({"float": 0.9, "bnn": 0.2, "gsb": 0.8}, 0.1), {"digits": 0.1})
    (ax,) = figure.axes
    assert {"chance"} <= {text.get_text() for text in ax.texts}
    assert "does not train" in [label.get_text() for label in ax.get_yticklabels()]
    assert any(set(np.ravel(line.get_xdata())) == {10.0} for line in ax.lines)
    plt.close("all")


def test_the_figure_counts_trainings_that_learned_nothing_though_their_mean_did():
    table = table_of({("float", "digits"): [0.9, 0.9], ("bit", "digits"): [0.1, 0.9], ("bnn", "digits"): [0.1, 0.2]})
    guessing = {"digits": 0.1}
    figure = methods.draw(methods.with_families(table.assign(scheme=table["condition"]), guessing), guessing)
    assert [text.get_text() for text in figure.axes[0].texts] == ["90.0", "50.0, 1 of 2 do not train", "15.0", "chance"]
    plt.close("all")


def test_unknown_schemes_are_refused():
    methods.check_scheme("all")
    methods.check_scheme("gsb")
    with pytest.raises(ValueError, match="Unknown scheme 'al'; valid are"):
        methods.check_scheme("al")


def test_claims_hold_and_fail():
    holds = {
        "float": 0.9,
        "gsb": 0.88,
        "elastic": 0.7,
        "bit": 0.7,
        "bibert": 0.6,
        "bivit": 0.8,
        "bnn": 0.3,
        "xnor": 0.4,
    }
    holds |= {"float + bias": 0.97, "gsb + bias": 0.96, "elastic + bias": 0.9}
    assert verdicts(holds) == ["yes"] * 9
    fails = {
        "float": 0.9,
        "gsb": 0.6,
        "elastic": 0.8,
        "bit": 0.7,
        "bibert": 0.6,
        "bivit": 0.5,
        "bnn": 0.88,
        "xnor": 0.88,
    }
    fails |= {"float + bias": 0.89, "gsb + bias": 0.7, "elastic + bias": 0.9}
    assert verdicts(fails) == ["no"] * 9


def test_the_sentences_of_the_paper_are_confirmatory():
    claims = methods.claims(trials({"float": 0.9, "gsb": 0.8}))
    assert [claim.kind for claim in claims] == ["confirmatory"] * 3 + ["exploratory"] * 6
    assert all(claim.source.startswith("Gao et al. 2024, abstract: ") for claim in claims[:3])


def test_one_rival_that_is_better_is_enough():
    claim = methods.claims(trials({"float": 0.9, "gsb": 0.8, "bit": 0.7, "xnor": 0.85}))[1]
    assert claim.verdict == "no"
    assert "gsb - xnor: -5.0 points" in claim.evidence


def test_what_was_not_run_is_undecided():
    assert verdicts({"float": 0.9}) == ["undecided"] * 9
    assert verdicts({"bit": 0.9, "bnn": 0.5})[7] == "yes"


def test_one_partner_alone_does_not_decide_about_two():
    claim = methods.claims(trials({"float": 0.8, "gsb": 0.8}))[-1]
    assert (claim.verdict, claim.evidence) == ("undecided", "2 of 2 are undecided: no trial of 'bivit' was run")
    claim = methods.claims(trials({"float": 0.9, "bivit": 0.8, "bit": 0.5}))[-1]
    assert (claim.verdict, claim.evidence) == ("undecided", "1 of 2 is undecided: no trial of 'bibert' was run")


def test_sentences_say_whether_all_schemes_were_run():
    def sentences(names):
        return [claim.sentence for claim in methods.claims(trials(dict.fromkeys(names, 0.8)))]

    assert not any("run" in sentence for sentence in sentences(binvit.list_schemes()))
    some = sentences(["float", "bit", "bnn", "gsb"])
    assert some[1] == "GSB is more accurate than every other 1-bit scheme that was run."
    assert [i for i, sentence in enumerate(some) if " that were run " in sentence] == [0, 7]
    networks = [name for name in binvit.list_schemes() if methods.family(name) == methods.CNN]
    some = sentences(["float", "bit", "gsb", *networks])
    assert [i for i, sentence in enumerate(some) if re.search(" that w(as|ere) run", sentence)] == [1, 7]


def test_published_numbers_carry_source_and_grade():
    table = pd.read_csv(REFERENCE, dtype=str, keep_default_na=False)
    assert tuple(table.columns) == methods.PUBLISHED
    assert set(table["notebook"]) == {"02", "04", "05"}
    assert (table["source"] != "").all()
    assert set(table["scheme"]) <= {"", *binvit.list_schemes()}
    known = table["top1"] != ""
    assert set(table.loc[known, "grade"]) <= {"P", "S"}
    assert table.loc[known, "top1"].astype(float).between(1, 100).all()
    # What could not be read has a row of its own that says so.
    assert table.loc[~known, "source"].str.contains("could not be read").all()
    assert len(table[~known]) == 3


def test_published_numbers_stand_beside_ours():
    summary = pd.DataFrame({"condition": ["float", "gsb", "xnor"], "mean": [0.9, 0.8, 0.7]})
    texts = methods.beside(summary, REFERENCE, "04")["published elsewhere"].tolist()
    number, what = "80.57 (Tiny-ImageNet, Swin-T", "full precision; P)"
    assert texts[0] == f"{number}, {what}; 80.31 (Tiny-ImageNet, NesT-T, {what}"
    assert texts[1:] == ["91.20 (CIFAR-10, DeiT-S, 1-bit weights and activations; S)", ""]
    (hybrid,) = methods.beside(pd.DataFrame({"condition": ["bhvit-qd"]}), REFERENCE, "04")["published elsewhere"]
    assert "68.4 (ImageNet-1k, BHViT-S, 1-bit; " in hybrid
    assert "70.1 (ImageNet-1k, BHViT-S, 1-bit with some layers float; " in hybrid
    assert methods.published(REFERENCE, "05")["what"].tolist()[:2] == ["one-step training", "two-step training"]


def test_a_wrong_table_of_published_numbers(tmp_path):
    with pytest.raises(FileNotFoundError, match="no table of published numbers"):
        methods.published(tmp_path / "none.csv", "04")
    (tmp_path / "wrong.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="has the columns a, b, not notebook, data"):
        methods.published(tmp_path / "wrong.csv", "04")


def test_gsb_is_not_compared_twice_with_its_baseline_alone():
    (best,) = [
        c for c in methods.claims(trials({"float": 0.9, "elastic": 0.7, "gsb": 0.8})) if "every other" in c.sentence
    ]
    assert (best.verdict, best.p) == ("undecided", None)
    assert best.evidence.endswith("was run")
