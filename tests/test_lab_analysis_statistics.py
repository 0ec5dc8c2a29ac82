"""Intervals, pairing and the refusal of tables that would give wrong ones."""

import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from binvit.lab.analysis import claims, statistics

accuracies = st.floats(0, 1)


def trials(**schemes: list[float]) -> pd.DataFrame:
    rows = [(s, seed, x) for s, xs in schemes.items() for seed, x in enumerate(xs)]
    return pd.DataFrame(rows, columns=["scheme", "seed", "test_accuracy"])


def test_interval_is_the_textbook_one():
    e = statistics.estimate([0.1, 0.2, 0.6])
    low, high = stats.t.interval(0.95, 2, loc=0.3, scale=stats.sem([0.1, 0.2, 0.6]))
    assert (e.mean, e.low, e.high, e.n) == (pytest.approx(0.3), pytest.approx(low), pytest.approx(high), 3)


def test_interval_covers_the_mean_as_often_as_promised():
    draws = np.random.default_rng(0).normal(size=(2000, 3))
    hits = [e.low <= 0 <= e.high for e in map(statistics.estimate, draws)]
    assert 0.93 < np.mean(hits) < 0.97


def test_one_number_has_no_interval():
    e = statistics.estimate([0.5])
    assert e.mean == 0.5
    assert e.n == 1
    assert math.isnan(e.low)
    assert math.isnan(e.high)


@pytest.mark.parametrize("values", [[], [0.5, math.nan], [math.inf, 1.0]])
def test_no_interval_from_nothing_or_from_nan(values):
    with pytest.raises(ValueError, match="An interval needs"):
        statistics.estimate(values)


def test_estimates_tell_the_number_of_seeds():
    assert statistics.estimate([0.97, 0.98]).text(percent=True) == "97.5 ± 6.4 (n = 2)"
    assert statistics.estimate([2.0]).text() == "2 (n = 1)"


def test_summary_keeps_order_and_counts():
    df = trials(gsb=[0.9, 0.8], elastic=[0.5])
    s = statistics.summarize(df)
    assert list(s.columns) == ["scheme", "mean", "low", "high", "n"]
    assert list(s["scheme"]) == ["gsb", "elastic"]
    assert list(s["n"]) == [2, 1]
    assert s["mean"].tolist() == pytest.approx([0.85, 0.5])


def test_summary_by_two_columns():
    df = pd.concat([trials(gsb=[0.9, 0.8]).assign(samples=5), trials(gsb=[0.5, 0.6]).assign(samples=10)])
    s = statistics.summarize(df, by=["scheme", "samples"])
    assert s[["samples", "n"]].to_numpy().tolist() == [[5, 2], [10, 2]]


def test_summary_refuses_to_mix_configurations():
    df = pd.concat([trials(gsb=[0.9]).assign(samples=5), trials(gsb=[0.5]).assign(samples=10)])
    with pytest.raises(ValueError, match=r"2 trials have scheme = 'gsb' and seed = 0.*differ in 'samples'"):
        statistics.summarize(df)


def test_missing_columns_are_named():
    with pytest.raises(ValueError, match="no column 'colour'; its columns are 'scheme', 'seed', 'test_accuracy'"):
        statistics.summarize(trials(gsb=[1.0]), by="colour")


@given(st.lists(st.tuples(accuracies, accuracies), min_size=1, max_size=6), st.randoms())
def test_pairs_are_found_whatever_the_order(pairs, random):
    df = trials(a=[a for a, _ in pairs], b=[b for _, b in pairs])
    order = list(range(len(df)))
    random.shuffle(order)
    d = statistics.paired_difference(df.iloc[order], "a", "b")
    expected = statistics.estimate([a - b for a, b in pairs])
    assert (d.mean, d.low, d.high) == pytest.approx((expected.mean, expected.low, expected.high), nan_ok=True)
    assert (d.n, d.a, d.b, d.value) == (len(pairs), "a", "b", "test_accuracy")


@given(st.lists(st.tuples(accuracies, accuracies), min_size=2, max_size=6))
def test_the_difference_changes_sign_with_its_sides(pairs):
    df = trials(a=[a for a, _ in pairs], b=[b for _, b in pairs])
    d, e = statistics.paired_difference(df, "a", "b"), statistics.paired_difference(df, "b", "a")
    assert (d.low, d.mean, d.high) == pytest.approx((-e.high, -e.mean, -e.low))


def test_pairing_removes_what_the_seeds_share():
    seeds = np.random.default_rng(1).normal(0.5, 0.2, 5)
    noise = np.random.default_rng(2).normal(0, 0.001, 5)
    d = statistics.paired_difference(trials(a=list(seeds + 0.01 + noise), b=list(seeds)), "a", "b")
    assert 0 < d.low < 0.01 < d.high < 0.02


def test_pairs_by_several_columns():
    df = pd.concat([trials(a=[0.9, 0.8], b=[0.7, 0.6]).assign(samples=k) for k in (5, 10)])
    assert statistics.paired_difference(df, "a", "b", pair=["seed", "samples"]).n == 4


def test_lone_trials_cannot_be_paired():
    with pytest.raises(ValueError, match="cannot be paired by seed: 2 has 'a' but not 'b'"):
        statistics.paired_difference(trials(a=[1, 2, 3], b=[1, 2]), "a", "b")


def test_absent_sides_are_named():
    with pytest.raises(ValueError, match="No trial has scheme = 'c'; there are 'a', 'b'"):
        statistics.paired_difference(trials(a=[1], b=[1]), "a", "c")


def test_ambiguous_pairs_are_refused():
    df = pd.concat([trials(a=[0.9], b=[0.7]).assign(samples=k) for k in (5, 10)])
    with pytest.raises(ValueError, match="expected; they differ in 'samples'"):
        statistics.paired_difference(df, "a", "b")


def test_comparison_with_one_reference():
    c = statistics.compare(trials(elastic=[0.5, 0.6], gsb=[0.7, 0.8], float=[0.9, 0.95]), "elastic")
    assert list(c["scheme"]) == ["gsb", "float"]
    assert c["mean"].tolist() == pytest.approx([0.2, 0.375])


def test_a_reference_that_is_absent_is_the_one_that_is_named():
    with pytest.raises(ValueError, match="No trial has scheme = 'float'; there are 'gsb', 'elastic'"):
        statistics.compare(trials(gsb=[0.7, 0.8], elastic=[0.5, 0.6]), "float")
    with pytest.raises(ValueError, match="No trial has scheme = 'float'; there are none"):
        statistics.compare(trials(gsb=[0.7]).head(0), "float")


def test_readable_tables_show_seeds_and_unknown_intervals():
    t = statistics.readable(statistics.summarize(trials(gsb=[0.9, 0.9], elastic=[0.5])), name="accuracy")
    assert list(t.columns) == ["scheme", "accuracy (%)", "95 % interval", "seeds"]
    assert t.iloc[0].tolist() == ["gsb", "90.0", "90.0 to 90.0", 2]
    assert t.iloc[1].tolist() == ["elastic", "50.0", "unknown", 1]


def test_intervals_of_shares_end_at_0_and_1_and_verdicts_do_not_follow_from_that():
    df = trials(gsb=[0.5, 1.0, 1.0])
    row = statistics.summarize(df).iloc[0]
    whole = statistics.estimate(df["test_accuracy"])
    assert (row["low"], row["high"]) == (pytest.approx(max(whole.low, 0)), 1.0)
    assert whole.high > 1
    gap = statistics.summarize(df.rename(columns={"test_accuracy": "gap"}), value="gap").iloc[0]
    assert gap["high"] == pytest.approx(whole.high)
    assert claims.check_mean("It is good.", df, "gsb", 0.1).p == whole.p_values(0.1)
