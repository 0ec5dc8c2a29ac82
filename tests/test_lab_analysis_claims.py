"""Claims come out as yes, no or undecided, and every check can come out as no."""

import dataclasses
import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from binvit.lab.analysis import claims
from binvit.lab.analysis.statistics import Difference, Estimate, change, estimate


def difference(low: float, high: float, n: int = 3) -> Difference:
    return Difference((low + high) / 2, low, high, n, "gsb", "elastic", "test_accuracy")


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [(0.05, 0.09, "yes"), (0.01, 0.03, "no"), (0.03, 0.07, "undecided"), (0.01, 0.04, "no"), (0.04, 0.07, "undecided")],
)
def test_the_interval_decides(low, high, verdict):
    assert claims.check_difference("Superposition helps.", difference(low, high), margin=0.04).verdict == verdict


def test_one_seed_decides_nothing():
    lone = Difference(0.5, math.nan, math.nan, 1, "gsb", "elastic", "test_accuracy")
    claim = claims.check_difference("Superposition helps.", lone)
    assert claim.verdict == "undecided"
    assert claim.evidence == "gsb - elastic: +50.0 points (interval unknown, 1 seed; more than +0.0 demanded)"


@given(st.floats(-1, 1), st.floats(0, 1), st.floats(-1, 1))
def test_a_difference_and_its_opposite_are_never_both_yes(low, width, margin):
    d = difference(low, low + width)
    opposite = difference(-d.high, -d.low)
    both = {claims.check_difference("A.", d, margin).verdict, claims.check_difference("B.", opposite, -margin).verdict}
    assert both in ({"yes", "no"}, {"undecided"}, {"no"}, {"no", "undecided"})


def test_means_are_checked_the_same_way():
    claim = claims.check_difference("Float is well tuned.", Estimate(0.95, 0.94, 0.96, 5), margin=0.93)
    assert claim.verdict == "yes"
    assert claim.evidence == "95.0 % (95 % interval 94.0 to 96.0, 5 seeds; more than 93.0 demanded)"


def trials(**schemes: list[float]) -> pd.DataFrame:
    rows = [(name, seed, x) for name, values in schemes.items() for seed, x in enumerate(values)]
    return pd.DataFrame(rows, columns=["scheme", "seed", "test_accuracy"])


@pytest.mark.parametrize(("margin", "verdict"), [(0.0, "yes"), (0.3, "no"), (0.2, "undecided")])
def test_pairs_of_trials_are_checked(margin, verdict):
    df = trials(gsb=[0.9, 0.92, 0.91], elastic=[0.7, 0.71, 0.72])
    assert claims.check_pair("Superposition helps.", df, "gsb", "elastic", margin).verdict == verdict


@pytest.mark.parametrize(("margin", "verdict"), [(0.8, "yes"), (0.95, "no"), (0.91, "undecided")])
def test_means_of_trials_are_checked(margin, verdict):
    assert claims.check_mean("It is good.", trials(gsb=[0.9, 0.92, 0.91]), "gsb", margin).verdict == verdict


def test_what_was_not_run_is_undecided():
    df = trials(gsb=[0.9, 0.92])
    assert claims.check_pair("Superposition helps.", df, "gsb", "elastic").evidence == "no trial of 'elastic' was run"
    assert claims.check_mean("Float is good.", df, "float", 0.9).verdict == "undecided"


@pytest.mark.parametrize(
    ("value", "bounds", "verdict"),
    [
        (True, {}, "yes"),
        (np.bool_(False), {}, "no"),
        (20.0, {"at_least": 20}, "yes"),
        (19.9, {"at_least": 20}, "no"),
        (3, {"at_most": 2}, "no"),
        (3, {"at_least": 2, "at_most": 4}, "yes"),
        (5, {"at_least": 2, "at_most": 4}, "no"),
        (math.nan, {"at_least": 2}, "undecided"),
        (None, {"at_least": 2}, "undecided"),
    ],
)
def test_exact_checks(value, bounds, verdict):
    assert claims.check_value("The file is small.", value, **bounds).verdict == verdict


def test_evidence_names_value_and_bound():
    assert claims.check_value("It is fast.", 12.345, at_least=6).evidence == "12.3 (at least 6 demanded)"
    assert claims.check_value("It is exact.", True, evidence="all 1,000 equal").evidence == "all 1,000 equal"


@pytest.mark.parametrize("bound", [math.inf, -math.inf, math.nan])
def test_claims_that_come_out_one_way_only_are_refused(bound):
    with pytest.raises(ValueError, match="finite number"):
        claims.check_difference("It helps.", difference(0, 1), margin=bound)
    with pytest.raises(ValueError, match="finite number"):
        claims.check_value("It is large.", 1.0, at_least=bound)


def test_bounds_belong_to_numbers():
    with pytest.raises(ValueError, match="needs at_least or at_most"):
        claims.check_value("It is large.", 1.0)
    with pytest.raises(ValueError, match="takes no bound"):
        claims.check_value("It holds.", True, at_least=1)


def test_a_claim_is_one_sentence_with_a_known_verdict():
    with pytest.raises(ValueError, match="'maybe' came"):
        claims.Claim("It helps.", "maybe", "")
    with pytest.raises(ValueError, match="one sentence"):
        claims.Claim("  ", "yes", "")


def test_tables_show_evidence_only_on_request():
    made = [claims.check_value("A.", True), claims.check_value("B.", 1.0, at_least=2)]
    assert claims.table(made).to_numpy().tolist() == [["A.", "exploratory", "yes"], ["B.", "exploratory", "no"]]
    shown = claims.table(made, evidence=True)
    assert list(shown.columns[:3]) == ["claim", "kind", "verdict"]
    assert {"uncorrected", "evidence", "low", "high", "corrected_low", "corrected_high", "p", "source"} <= set(
        shown.columns
    )
    assert list(claims.table(made).index) == [1, 2]


def test_verdicts_are_plain_text_without_numbers_of_the_machine():
    made = [claims.check_value("One bit is enough.", 0.123, at_least=0.1), claims.check_value("Long " * 30, False)]
    lines = claims.verdicts(made).splitlines()
    assert lines[0] == "yes        One bit is enough."
    assert lines[1].startswith("no         Long Long")
    assert lines[2].startswith(" " * 11 + "Long")
    assert max(map(len, lines)) <= 110


def test_shown_claims_are_escaped_html(capsys):
    pytest.importorskip("IPython")
    claims.show([claims.check_value("The error is < 1 %.", 0.5, at_most=1)])
    shown = capsys.readouterr().out
    assert "The error is &lt; 1 %.</td>" in shown
    assert "yes        The error is < 1 %. 0.5 (at most 1 demanded)" in shown


def claim(mean: float, error: float = 0.01, n: int = 5, **options) -> claims.Claim:
    half = error * float(stats.t.ppf(0.975, n - 1))
    found = claims.check_difference("It helps.", Difference(mean, mean - half, mean + half, n, "a", "b", "x"))
    return dataclasses.replace(found, kind="confirmatory", **options)


def test_holm_decides_step_by_step():
    p = [0.001, 0.02, 0.03, 0.6]  # against 0.05 / 4, / 3, / 2, / 1
    found = claims.correct([claim(0.01 * float(stats.t.isf(x / 2, 4))) for x in p])
    assert [c.verdict for c in found] == ["yes", "undecided", "undecided", "undecided"]
    assert [c.plain for c in found] == ["yes", "yes", "yes", "undecided"]
    for c, level in zip(found, (0.05 / 4, 0.05 / 3, 0.05 / 3, 0.05 / 3), strict=True):
        assert c.estimate is not None
        assert c.corrected == pytest.approx(c.estimate.interval(1 - level))


@given(st.lists(st.floats(-0.1, 0.1), min_size=1, max_size=8))
def test_correction_decides_nothing_new_and_ignores_order(means):
    found = claims.correct([claim(mean) for mean in means])
    assert all(c.verdict in (c.plain, "undecided") for c in found)
    again = claims.correct([claim(mean) for mean in reversed(means)])
    assert sorted(c.verdict for c in found) == sorted(c.verdict for c in again)


def test_exploratory_and_exact_claims_are_not_corrected():
    mixed = [claim(0.1), dataclasses.replace(claim(0.03), kind="exploratory"), claims.check_value("It is.", True)]
    alone, other, exact = claims.correct([*mixed])
    assert alone.corrected == pytest.approx(alone.estimate.interval(0.95))
    assert (other.plain, exact.plain) == (None, None)
    assert claims.confirm("the abstract", mixed[2])[0].source == "the abstract"


def test_all_of_pays_for_choosing_the_worst_part():
    barely = claim(-0.01 * float(stats.t.isf(0.02, 4)))  # p = .04 against its sentence
    assert barely.verdict == "no"
    assert claims.all_of("All help.", [barely, claim(0.1)]).verdict == "undecided"
    assert claims.all_of("All help.", [claim(-0.1), claim(0.1)]).verdict == "no"
    assert claims.all_of("All help.", [claim(0.1), claim(0.2)]).verdict == "yes"


def test_all_of_tells_parts_that_fail_before_the_correction():
    barely = claim(-0.01 * float(stats.t.isf(0.02, 4)))
    alone = claims.check_difference("alone", estimate([0.5]))
    found = claims.all_of("All help.", [barely, alone, claim(0.1)])
    assert found.verdict == "undecided"
    assert found.evidence.startswith("1 of 3 fails before correction, 1 undecided: ")


def test_all_of_takes_parts_without_a_sample_as_they_are():
    exact = claims.check_value("It is so.", True)
    (found,) = claims.correct(claims.confirm("the abstract", claims.all_of("All.", [claim(0.1), exact])))
    assert found.verdict == "yes"
    assert claims.all_of("All.", [claim(0.1), claims.check_value("It is so.", False)]).verdict == "no"
    lacking = claims.not_run("It is so.")
    assert not claims.all_of("All.", [claim(0.1), lacking]).is_not_run
    assert claims.all_of("All.", [lacking, lacking]).is_not_run
    (found,) = claims.correct(claims.confirm("the abstract", claims.all_of("All.", [claim(0.1), lacking])))
    assert found.verdict == "undecided"


def test_intervals_of_shares_end_at_all_images():
    df = pd.DataFrame({"scheme": "a", "seed": range(3), "test_accuracy": [0.97, 0.989, 0.999], "gap": [0.97, 0.989, 1]})
    found = claims.check_mean("a is good.", df, "a", 0.5)
    assert "95 % interval 94." in found.evidence
    assert "to 100.0" in found.evidence
    shown = claims.table(claims.correct(claims.confirm("the abstract", found)), evidence=True)
    assert (shown[["high", "corrected_high"]] == 1).all(axis=None)
    assert "to 102." in claims.check_mean("a is good.", df, "a", 0.5, value="gap").evidence  # no share


def test_a_change_from_a_setting_where_nothing_is_learned_is_not_compared():
    rows = [
        {"scheme": s, "seed": seed, "samples": n, "test_accuracy": a + 0.01 * seed, "chance": 0.1}
        for s, n, a in [("float", 2, 0.25), ("float", 20, 0.9), ("gsb", 2, 0.4), ("gsb", 20, 0.9)]
        for seed in range(4)
    ]
    changed = change(pd.DataFrame(rows), "samples", 2, 20)
    found = claims.check_pair("float gains more.", changed, "float", "gsb", value="change")
    assert found.verdict == "undecided"
    assert found.evidence.startswith("float below 3 times chance: 26.5 % of test images")


def test_the_table_tells_what_correction_changed():
    found = claims.correct([claim(0.01 * float(stats.t.isf(x / 2, 4))) for x in (0.03, 0.03)])
    shown = claims.table(found, evidence=True)
    assert list(shown["verdict"]) == ["undecided", "undecided"]
    assert list(shown["uncorrected"]) == ["yes", "yes"]
    assert (shown["low"] > 0).all()
    assert (shown["corrected_low"] < 0).all()
    np.testing.assert_allclose(shown["p"], 0.03)


@pytest.mark.parametrize(("values", "verdict"), [([0.0] * 3, "undecided"), ([0.1] * 3, "yes"), ([-0.1] * 3, "no")])
def test_equal_sides_say_nothing_about_which_is_larger(values, verdict):
    """Accuracies are shares of some hundred images: three seeds may well be equal by chance, which no t test knows."""
    claim = claims.check_difference("a exceeds b.", estimate(values))
    (corrected,) = claims.correct(claims.confirm("a paper", claim))
    assert (claim.verdict, corrected.verdict) == (verdict, verdict)


@pytest.mark.parametrize(("weak", "verdict"), [(0.29, "undecided"), (0.31, "yes")])
def test_what_does_not_train_is_compared_with_nothing(weak, verdict):
    rows = [(scheme, seed, value + seed / 1000) for scheme, value in (("a", 0.9), ("b", weak)) for seed in range(3)]
    df = pd.DataFrame(rows, columns=["scheme", "seed", "test_accuracy"])
    assert claims.check_pair("a exceeds b.", df, "a", "b").verdict == "yes"
    claim = claims.check_pair("a exceeds b.", df.assign(chance=0.1), "a", "b")
    assert claim.verdict == verdict
    told = "b below 3 times chance: 29.1 % of test images, 10.0 % by chance; a - b: +61.0 points"
    assert claim.evidence.startswith(told) == (weak < 0.3)
    assert (claim.estimate is None) == (weak < 0.3)  # so that no correction decides it after all
    assert claims.check_pair("b exceeds a.", df.assign(chance=0.1), "b", "a").verdict == (
        "no" if weak > 0.3 else verdict
    )


def test_the_evidence_counts_trainings_that_learned_nothing():
    df = pd.DataFrame({"scheme": ["a"] * 5 + ["b"] * 5, "seed": [*range(5)] * 2, "chance": 0.1})
    df["test_accuracy"] = [0.9] * 5 + [0.8, 0.85, 0.29, 0.1, 0.82]
    claim = claims.check_pair("A beats B.", df, "a", "b")
    assert claim.evidence.endswith("; 2 of 5 b below 3 times chance")
    assert claim.estimate.mean == pytest.approx(0.9 - df["test_accuracy"][5:].mean())  # they count all the same


def test_sides_that_are_one_training_are_not_counted_by_the_correction():
    same = claims.check_difference("Same.", Difference(0.0, 0.0, 0.0, 5, "a", "b", "test_accuracy"))
    other = claims.check_difference("Other.", estimate([0.02, 0.03, 0.04]))
    assert (same.verdict, same.p) == ("undecided", None)
    alone = claims.correct(claims.confirm("S", other))
    assert claims.correct(claims.confirm("S", same, other))[1] == alone[0]


def test_several_sides_name_the_one_that_speaks_most_clearly():
    parts = [
        dataclasses.replace(claims.check_difference(f"Part {name}.", estimate(values)), evidence=name)
        for name, values in {"weak": [-0.03, -0.04, -0.05], "clear": [-0.05, -0.051, -0.052]}.items()
    ]
    assert claims.all_of("All.", parts).evidence == "2 of 2 fail: clear"
