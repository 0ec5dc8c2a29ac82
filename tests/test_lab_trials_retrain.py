"""Archived trials trained again: the sample, and what counts as the same result."""

import dataclasses

import pytest
from archive_maker import result

from binvit.lab.trials import retrain
from binvit.lab.trials.pool import TrialsFailed, run_trials
from binvit.lab.trials.retrain import Archived, choose
from binvit.lab.trials.store import read_result
from binvit.lab.trials.trial import Trial

TINY = {"width": 16, "depth": 1, "heads": 2, "epochs": 2, "batch_size": 64}


def trial(seed=0, scheme="float"):
    return Trial("digits", scheme, seed=seed, samples_per_class=8, recipe_options=TINY)


def candidates(seconds):
    made = [(number, trial(seed)) for number in ("02", "04") for seed in range(3)]
    made = [(number, dataclasses.replace(one, scheme="gsb" if number == "04" else "float")) for number, one in made]
    return [Archived(number, one, result(one), seconds) for number, one in made]


def test_one_trial_of_each_notebook_is_chosen_by_the_seed_within_the_time():
    chosen = [tuple(item.trial for item in choose(candidates(170.0), seed)[0]) for seed in range(8)]
    assert {len(trials) for trials in chosen} == {2}
    assert {tuple(one.scheme for one in trials) for trials in chosen} == {("float", "gsb")}
    assert 1 < len(set(chosen)) <= 8
    assert chosen[0] == tuple(item.trial for item in choose(reversed(candidates(170.0)), 0)[0])
    assert choose(candidates(241.0)) == ([], [])  # more than its share of two cores for four minutes
    mixed = [
        dataclasses.replace(item, seconds=238.0 if item.notebook == "04" else 120.0 + item.trial.seed)
        for item in candidates(1.0)
    ]
    assert [item.notebook for item in choose(mixed)[0]] == ["02", "04"]  # what 02 leaves is for 04
    assert {item.notebook for item in choose(mixed, minutes=2.05)[0]} == {"02"}


def test_what_was_not_chosen_comes_next_in_the_order_of_the_draw():
    chosen, further = choose(candidates(80.0), 3)
    assert [item.notebook for item in chosen] == ["02", "04"]
    assert len({item.result.id for item in (*chosen, *further)}) == 6
    assert len({tuple(item.result.id for item in choose(candidates(80.0), seed)[1]) for seed in range(4)}) > 1


@pytest.mark.parametrize(
    ("speed", "seconds", "wait", "trained"),
    [
        (1.0, 60.0, 1, 6),  # 360 core seconds; a seventh would lead to 420
        (2.0, 60.0, 1, 3),  # a slow machine: another would lead to 480
        (0.5, 60.0, 1, 13),  # a fast one: 390
        (1.0, 3.0, 1, 40),  # there are no more
        (1.0, 400.0, 1, 1),
        (1.0, 60.0, 100, 2),  # one that idles: a third would lead beyond, and 200 seconds have passed
    ],
)
def test_training_goes_on_until_it_has_taken_three_minutes_of_two_cores_here(
    monkeypatch, speed, seconds, wait, trained
):
    all_trials = [trial(seed) for seed in range(40)]
    ran = []

    def run_trials(trials, results_dir, jobs, progress):
        ran.append(len(trials))

    def read(one, results_dir):
        return dataclasses.replace(result(one), seconds=speed * result(one).seconds)

    clock = iter(range(0, 10**6, wait))
    monkeypatch.setattr(retrain.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(retrain, "run_trials", run_trials)
    monkeypatch.setattr(retrain, "read_result", read)
    items = [Archived("04", one, result(one), seconds) for one in all_trials]
    table = retrain.retrain(items[:1], [], "nowhere", False, items)
    assert len(table) == sum(ran) == trained
    assert table["trial"].is_unique
    assert len(ran) <= 2
    assert len(retrain.retrain(items[:1], [], "nowhere", False)) == 1
    assert len(retrain.retrain(items[:1], [], "nowhere", False, items, before=180.0)) == 1  # notebooks have trained
    if seconds * wait == 60.0:
        table = retrain.retrain(items[:1], [], "nowhere", False, items, before=60.0)
        assert len(table) == {1.0: 4, 2.0: 2, 0.5: 9}[speed]


def test_those_that_go_on_train_side_by_side(monkeypatch):
    ran = []
    monkeypatch.setattr(retrain, "run_trials", lambda trials, results_dir, jobs, progress: ran.append(list(trials)))
    monkeypatch.setattr(retrain, "read_result", lambda one, results_dir: result(one))
    made = [dataclasses.replace(result(trial(seed)), products="tiles" if seed % 3 else "torch") for seed in range(12)]
    items = [Archived("04", one.trial, one, 60.0) for one in made]
    table = retrain.retrain(items[:2], [], "nowhere", False, items)
    first, second, further = ran
    assert [one.seed for one in (*first, *second)] == [1, 0]  # what multiplies is chosen for each kind
    assert [one.seed for one in further] == [2, 4, 5, 7]
    assert len(table) == 6


def test_nothing_goes_on_where_all_have_failed(monkeypatch):
    def run_trials(trials, results_dir, jobs, progress):
        raise TrialsFailed("no", failures=[(one, "no images") for one in trials])

    monkeypatch.setattr(retrain, "run_trials", run_trials)
    items = [Archived("04", trial(seed), result(trial(seed)), 1.0) for seed in range(3)]
    table = retrain.retrain(items[:1], [], "nowhere", False, items[1:])
    assert table["verdict"].tolist() == ["no: no images"]


def test_any_number_is_chosen_whatever_the_time():
    assert len(choose(candidates(1e6), count=4)[0]) == 4
    assert len(choose(candidates(1e6), count=40)[0]) == 6
    assert choose(candidates(1.0), count=0) == ([], [])
    assert choose(candidates(1.0), count=2)[1] == []


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    run_trials([trial(0), trial(1)], folder, progress=False)
    return folder


@pytest.fixture
def made(folder):
    return [read_result(trial(seed), folder) for seed in (0, 1)]


@pytest.mark.parametrize(
    ("cpu", "shift", "known", "verdict"),
    [
        ("", 0.0, 2, "identical"),
        ("", 0.001, 2, "no: it differs, though CPU, versions and threads do not"),
        ("another", 0.0, 2, "identical"),
        ("another", 0.001, 2, "within the spread of 2 seeds"),
        ("another", 0.001, 1, "undecided: one seed, no spread known"),
        ("another", -0.5, 3, "no: beyond the spread"),
    ],
)
def test_what_comes_out_again_is_compared(made, folder, cpu, shift, known, verdict):
    first = made[0]
    changed = {"test_accuracy": max(0.0, first.test_accuracy + shift), "cpu": cpu or first.cpu}
    archived = dataclasses.replace(first, **changed)
    alike = [dataclasses.replace(archived, trial=dataclasses.replace(first.trial, seed=seed)) for seed in range(known)]
    alike = alike[:1] + [dataclasses.replace(one, test_accuracy=one.test_accuracy + 0.0005) for one in alike[1:]]
    if shift == -0.5:
        alike = [dataclasses.replace(one, test_accuracy=0.1 + 0.001 * one.trial.seed) for one in alike]
    table = retrain.retrain([Archived("04", first.trial, archived, 1.0)], alike, folder, progress=False)
    assert tuple(table.columns) == retrain.COLUMNS
    (row,) = table.to_dict("records")
    assert row["verdict"] == verdict
    assert row["here (%)"] == pytest.approx(100 * first.test_accuracy)
    assert row["difference"] == pytest.approx(100 * (first.test_accuracy - archived.test_accuracy))
    assert row["made with"] == (f"cpu another (now {first.cpu})" if cpu else "")


def test_a_spread_down_to_what_guessing_gets_right_tells_nothing(made, folder):
    """Some seeds of a condition learn, others do not: then any accuracy is within their spread."""
    first = made[0]
    archived = dataclasses.replace(first, test_accuracy=0.8, cpu="another")
    accuracies = (0.8, 0.8, 0.1)
    known = [
        dataclasses.replace(archived, trial=dataclasses.replace(first.trial, seed=seed), test_accuracy=accuracy)
        for seed, accuracy in enumerate(accuracies)
    ]
    for chance, verdict in ((0.1, "undecided: 3 seeds differ so much"), (-5.0, "within the spread of 3 seeds")):
        item = Archived("04", first.trial, archived, 1.0, chance)
        table = retrain.retrain([item], known, folder, progress=False)
        assert table["verdict"][0].startswith(verdict)


@pytest.mark.parametrize("vectors", ["SSE2", ""])
def test_a_cpu_of_the_same_kind_with_other_or_unknown_vectors_is_another(made, folder, vectors):
    first, second = made
    assert first.vectors
    archived = dataclasses.replace(first, test_accuracy=first.test_accuracy - 0.001, vectors=vectors)
    table = retrain.retrain([Archived("04", first.trial, archived, 1.0)], [archived, second], folder, progress=False)
    assert table["verdict"][0] == "within the spread of 2 seeds"
    assert table["made with"][0] == f"vectors {vectors or 'unknown'} (now {first.vectors})"


def test_the_spread_is_that_of_other_seeds_of_the_same_condition(made):
    other = dataclasses.replace(made[1], test_accuracy=made[0].test_accuracy + 0.02)
    gsb = result(trial(2, "gsb"), 0.9)
    allowed, seeds = retrain.spread(made[0], [made[0], other, gsb])
    assert seeds == 2
    assert allowed == pytest.approx(63.657 * 0.02, rel=1e-3)  # t for one degree of freedom, 99 %
    few = retrain.spread(made[0], [made[0], dataclasses.replace(other, test_accuracy=made[0].test_accuracy)])
    assert few == (retrain.LEAST, 2)
