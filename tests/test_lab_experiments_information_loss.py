"""Lost information over several seeds: the table is complete, its claims can fail, the pictures show single queries."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

import binvit
from binvit.lab.analysis import attention
from binvit.lab.experiments import information_loss
from binvit.lab.experiments.design import plan
from binvit.lab.experiments.information_loss import LOSSES, distributions, draw
from binvit.lab.notebooks.plan import Job, check
from binvit.lab.training.evaluation import Classifier
from binvit.lab.trials import measurements
from binvit.lab.trials.trial import Trial


def table(worst: str = "linear weights", superposed: float = -0.1, trained: bool = False) -> pd.DataFrame:
    rows = []
    for seed in range(3):
        for tensor, binarizer in information_loss.CASES:
            drop = (0.5 if tensor in worst else 0.2) + (superposed if binarizer == "GSB" else 0.0) + 0.001 * seed
            row = {"data": "digits", "seed": seed, "tensor": tensor, "binarizer": binarizer, "accuracy_drop": drop}
            row |= {"relative_error": drop, "cosine": 1 - drop, "entropy": 1 - 5 * drop}
            rows.append(row | ({"trained_drop": drop} if trained else {}))
    return pd.DataFrame(rows)


def test_conditions_are_the_float_model_and_each_tensor():
    assert [c.name for c in information_loss.conditions(False)] == ["float"]
    named = {c.name: c for c in information_loss.conditions(True, thresholds=(0.5,), reduce="head")}
    assert len(named) == 1 + len(information_loss.CASES)
    scheme = binvit.scheme("gsb", **named["value, GSB"].scheme_options)
    assert (scheme.value, scheme.attention, scheme.thresholds, scheme.reduce) == ("gsb", "float", (0.5,), "head")


def test_measured_losses_of_trained_models(tmp_path):
    short = {"width": 16, "depth": 1, "heads": 2, "epochs": 1, "warmup": 0}
    trial = Trial("digits", "float", samples_per_class=5, recipe_options=short)
    runs = [plan.Run("float", "digits", dataclasses.replace(trial, seed=seed), keep_model=True) for seed in (0, 1)]
    trained = plan.train(runs, tmp_path, progress=False)
    found = information_loss.measure(runs, trained, tmp_path, images=32)
    assert len(found) == 2 * len(information_loss.CASES)
    assert "trained_drop" not in found
    assert set(found.seed) == {0, 1}
    assert set(LOSSES) - set(found) == {"trained_drop"}
    with_each = pd.concat([trained, trained.iloc[[0]].assign(condition="value, 1-bit", test_accuracy=0.01)])
    known = information_loss.measure(runs, with_each, tmp_path, images=32).dropna(subset=["trained_drop"])
    assert known[["seed", "tensor", "binarizer"]].to_numpy().tolist() == [[0, "value", "1-bit"]]  # the one trained


def test_a_model_is_measured_once_with_each_choice_of_options(tmp_path, monkeypatch):
    short = {"width": 16, "depth": 1, "heads": 2, "epochs": 1, "warmup": 0}
    runs = [plan.Run("float", "digits", Trial("digits", "float", samples_per_class=5, recipe_options=short), True)]
    trained = plan.train(runs, tmp_path, progress=False)
    monkeypatch.setattr(information_loss, "runs", lambda p: runs)
    monkeypatch.setattr(information_loss, "pictures", lambda *args: {})
    first = {"images": 32, "thresholds": [0.7, 0.9], "reduce": "row", "least_squares": True}
    others = [{"images": 16}, {"thresholds": [0.5]}, {"thresholds": []}, {"reduce": "head"}, {"least_squares": False}]
    for changed in ({}, *others):
        options = first | changed
        p = SimpleNamespace(**options, measured=options["images"])
        assert information_loss.take_measurements(p, tmp_path, tmp_path) == 1
        assert information_loss.take_measurements(p, tmp_path, tmp_path) == 0
    for changed in ({}, *others):  # none has taken another's place
        shown = information_loss.measure(runs, trained, tmp_path, **first | changed, archive=tmp_path)
        assert sorted(zip(shown["tensor"], shown["binarizer"], strict=True)) == sorted(information_loss.CASES)


def test_the_measurements_of_the_archive_are_of_the_notebook_s_options():
    archive = Path(__file__).parents[1] / "paper_figures"
    known = measurements.read_measurements(archive, information_loss.LOSSES_TABLE)
    told = information_loss._told(128, {"thresholds": [0.7, 0.9], "reduce": "row", "least_squares": True})
    assert len(known) > 0
    assert measurements.measured_with(known, told).equals(known)


def test_trained_losses_are_paired_by_seed(monkeypatch):
    reached = {"float": 0.9} | {f"{tensor}, {binarizer}": 0.7 for tensor, binarizer in information_loss.CASES}
    rows = [
        {"data": "digits", "seed": k, "condition": c, "test_accuracy": a - 0.1 * k}
        for k in (0, 1)
        for c, a in reached.items()
    ]
    rows[1]["test_accuracy"] = 0.6
    plain = table()[["tensor", "binarizer", "accuracy_drop"]].head(len(information_loss.CASES))
    monkeypatch.setattr(information_loss, "one_tensor_at_a_time", lambda *args, **options: plain)
    monkeypatch.setattr(information_loss, "load_trained", lambda *args: Classifier(None, (), 8, (), ()))
    runs = [plan.Run("float", "digits", Trial("digits", "float", seed=seed)) for seed in (0, 1)]
    found = information_loss.measure(runs, pd.DataFrame(rows), "nowhere")
    np.testing.assert_allclose(found["trained_drop"], [0.3] + [0.2] * (2 * len(information_loss.CASES) - 1))


def test_claims_can_come_out_either_way():
    paper = information_loss.claims(table(worst="attention map and value", trained=True))
    assert len(paper) == 14
    assert {c.verdict for c in paper if not c.sentence.startswith("After")} == {"yes"}
    assert {c.kind for c in paper if c.sentence.startswith("After")} == {"confirmatory"}
    assert {c.kind for c in paper if not c.sentence.startswith("After")} == {"exploratory"}
    other = information_loss.claims(table(worst="query linear weights", superposed=0.1, trained=True))
    assert {c.verdict for c in other} == {"no"}
    untrained = information_loss.claims(table())
    assert [c.verdict for c in untrained if c.sentence.startswith("After")] == ["undecided"] * 4
    assert {c.verdict for c in information_loss.claims(table().query("seed == 0"))} == {"undecided"}


@pytest.mark.parametrize(
    ("worst", "verdicts"),
    [("attention map and value", ["yes", "yes"]), ("attention map", ["yes", "undecided"]), ("query", ["no", "no"])],
)
def test_map_and_value_are_compared_with_all_others_but_each_other(worst, verdicts):
    found = [c for c in information_loss.claims(table(worst, trained=True)) if c.sentence.endswith("map and value.")]
    assert [c.verdict for c in found] == verdicts
    assert all(" of 4 fails" in c.evidence for c in found if c.verdict == "no")


def test_rivals_are_compared_one_by_one():
    losing = table()
    for tensor, sign in (("query", 1), ("key", -1)):  # alike on average, and another one is worse in each seed
        rows = losing["tensor"] == tensor
        losing.loc[rows, "accuracy_drop"] = 0.2 + sign * losing["seed"].map({0: 0.1, 1: -0.1, 2: 0.05})[rows]
    losing.loc[losing["tensor"] == "attention map", "accuracy_drop"] = 0.2
    first = information_loss.claims(losing)[0]
    assert first.verdict == "undecided"
    assert "2 of 2 are undecided: attention map - query: -1.7 points" in first.evidence


def test_claims_name_the_number_of_groups():
    assert sum("ith 3 groups" in c.sentence for c in information_loss.claims(table())) == 8
    two = [c for c in information_loss.claims(table(), groups=2) if "With 2 groups" in c.sentence]
    assert len(two) == 6
    assert two[0].evidence.startswith("1 group - 2 groups: ")


def test_the_notebook_refuses_thresholds_that_do_not_increase():
    path = Path(__file__).parents[1] / "notebooks" / "03_information_loss.ipynb"
    check([Job(path, {"thresholds": [0.5]})], files=False)
    for wrong in ([0.9, 0.7], [0.7, 1.0]):
        with pytest.raises(ValueError, match="thresholds must increase strictly and lie between 0 and 1"):
            check([Job(path, {"thresholds": wrong})], files=False)


def test_pictures_show_one_query():
    maps = torch.arange(2 * 17 * 17.0).view(2, 17, 17)
    rows = attention.query_rows(maps, (4, 4))
    assert rows.shape == (2, 4, 4)
    np.testing.assert_array_equal(rows[1].ravel(), maps[1, 0, 1:])
    without_class = torch.arange(16 * 16.0).view(1, 16, 16)
    np.testing.assert_array_equal(attention.query_rows(without_class, (4, 4))[0].ravel(), without_class[0, 10])


def test_figures_draw_what_was_measured():
    import matplotlib.pyplot as plt

    assert len(draw(table()).axes) == 4
    both = pd.concat([table(trained=True), table(trained=True).assign(data="cifar100")])
    assert len(draw(both).axes) == 10
    half = pd.concat([table(trained=True), table().assign(data="cifar100", trained_drop=np.nan)])
    assert [[text.get_text() for text in ax.texts] for ax in draw(half).axes].count(["not run"]) == 1
    value = torch.randn(2, 2, 9, 4).clamp(-1, 1)
    figure = distributions({"map": torch.rand(2, 2, 9, 9), "value": value}, (0.7, 0.9))
    assert [ax.get_yscale() for ax in figure.axes] == ["log", "linear"]
    assert "beyond 0.9" in figure.axes[0].get_xlabel()
    plt.close("all")
