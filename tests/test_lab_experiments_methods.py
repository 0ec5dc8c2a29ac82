"""Families of schemes, the claims about them, and the table of published numbers."""

from pathlib import Path

import pandas as pd
import pytest
from experiment_tables import table_of

import binvit
from binvit.lab.experiments import methods, plan

REFERENCE = Path(__file__).parents[1] / "paper_figures" / "reference.csv"


def verdicts(values, margin=0.05):
    """Verdicts of three seeds, half a point apart, around the accuracies given by scheme."""
    table = table_of({(name, "digits"): [value, value + 0.005, value + 0.01] for name, value in values.items()})
    return [claim.verdict for claim in methods.check_claims(table, margin)]


def test_every_scheme_has_a_family_and_a_place():
    assert {methods.family(name) for name in binvit.list_schemes()} == set(methods.FAMILIES)
    assert methods.family("mine") == "other"
    design = methods.design(["gsb", "bit", "mine", "bnn", "float"])
    assert [condition.name for condition in design] == ["float", "bnn", "bit", "gsb", "mine"]
    runs = plan.plan(methods.design(["all"]), "digits", [0])
    assert [run.trial.scheme for run in runs] == [run.condition for run in runs]
    assert {run.condition for run in runs} == set(binvit.list_schemes())


def test_unknown_schemes_are_refused():
    methods.check_scheme("all")
    methods.check_scheme("gsb")
    with pytest.raises(ValueError, match="Unknown scheme 'al'; valid are"):
        methods.check_scheme("al")


def test_claims_hold_and_fail():
    holds = {"float": 0.9, "gsb": 0.88, "bit": 0.7, "bibert": 0.6, "bivit": 0.8, "bnn": 0.3, "xnor": 0.4}
    assert verdicts(holds) == ["yes"] * 5
    fails = {"float": 0.9, "gsb": 0.6, "bit": 0.7, "bibert": 0.6, "bivit": 0.5, "bnn": 0.88, "xnor": 0.88}
    assert verdicts(fails) == ["no"] * 5


def test_one_rival_that_is_better_is_enough():
    values = {"float": 0.9, "gsb": 0.8, "bit": 0.7, "xnor": 0.85}
    table = table_of({(name, "digits"): [value] * 3 for name, value in values.items()})
    claim = methods.check_claims(table)[0]
    assert claim.verdict == "no"
    assert "gsb - xnor: -5.0 points" in claim.evidence


def test_what_was_not_run_is_undecided():
    assert verdicts({"float": 0.9}) == ["undecided"] * 5
    assert verdicts({"bit": 0.9, "bnn": 0.5})[3] == "yes"


def test_one_partner_alone_does_not_decide_about_two():
    claim = methods.check_claims(table_of({(name, "digits"): [0.8] * 3 for name in ("float", "gsb")}))[4]
    assert (claim.verdict, claim.evidence) == ("undecided", "2 of 2 are undecided: no trial of 'bivit' was run")
    values = {"float": 0.9, "bivit": 0.8, "bit": 0.5}
    claim = methods.check_claims(table_of({(name, "digits"): [value] * 3 for name, value in values.items()}))[4]
    assert (claim.verdict, claim.evidence) == ("undecided", "1 of 2 is undecided: no trial of 'bibert' was run")


def test_sentences_say_whether_all_schemes_were_run():
    def sentences(names):
        table = table_of({(name, "digits"): [0.8] * 3 for name in names})
        return [claim.sentence for claim in methods.check_claims(table)]

    assert not any("run" in sentence for sentence in sentences(binvit.list_schemes()))
    some = sentences(["float", "bit", "bnn", "gsb"])
    assert some[0] == "GSB is more accurate than every other 1-bit scheme that was run."
    assert [" that were run " in sentence for sentence in some] == [False, False, True, True, False]


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
    assert texts[0] == "80.57 (Tiny-ImageNet, Swin-T; P); 80.31 (Tiny-ImageNet, NesT-T; P)"
    assert texts[1:] == ["91.20 (CIFAR-10, DeiT-S; S)", ""]
    assert methods.published(REFERENCE, "05")["what"].tolist()[:2] == ["one-step training", "two-step training"]


def test_a_wrong_table_of_published_numbers(tmp_path):
    with pytest.raises(FileNotFoundError, match="no table of published numbers"):
        methods.published(tmp_path / "none.csv", "04")
    (tmp_path / "wrong.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="has the columns a, b, not notebook, data"):
        methods.published(tmp_path / "wrong.csv", "04")
