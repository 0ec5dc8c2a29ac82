import dataclasses
import errno
import json
import math
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
from archive_maker import result
from image_files import parquet_file

from binvit.lab.experiments.design.plan import archive_dir
from binvit.lab.notebooks.published import redraw_all
from binvit.lab.training.recipe import Recipe
from binvit.lab.trials import archive, measurements
from binvit.lab.trials.archive import add, counted_data, data_name, find, known_fingerprint, read_data
from binvit.lab.trials.identity import identity
from binvit.lab.trials.pool import TrialsFailed, read_trials, run_trials
from binvit.lab.trials.store import model_path, read_result
from binvit.lab.trials.trial import Trial, teacher_trial
from binvit.nn.schemes import Scheme

ARCHIVE = Path(__file__).parents[1] / "paper_figures"

TINY = {"width": 16, "depth": 1, "heads": 2, "epochs": 3, "batch_size": 64, "eval_every": 2}


def digits(seed=0, scheme="gsb", **fields):
    return Trial("digits", scheme, seed=seed, recipe_options=TINY, **fields)


def test_a_result_comes_back_unrounded_with_a_rounded_history(tmp_path):
    trial = digits(label_noise=0.25)
    made = result(trial, memorized=1 / 7)
    assert add([made], tmp_path) == 1
    found = find(trial, tmp_path)
    assert dataclasses.replace(found, history=made.history, scheme=made.scheme) == made
    assert [epoch["train_loss"] for epoch in found.history] == [0.3333] * 3
    assert [epoch["test_accuracy"] for epoch in found.history] == [None, 0.1235, 0.1235]
    assert [epoch["epoch"] for epoch in found.history] == [1, 2, 3]
    assert {epoch["stage"] for epoch in found.history} == {0}
    assert found.scheme == made.scheme
    (line,) = (tmp_path / "trials" / "digits.jsonl").read_text().splitlines()
    values = json.loads(line)
    columns = {"epochs": 3, "stage": 0, "train_loss": 0.3333, "train_accuracy": 0.6667}
    assert values["history"] == columns | {"test_accuracy": [None, 0.1235, 0.1235]}  # the rate follows from the recipe
    assert values["id"] == trial.id
    assert values["recipe"] == made.recipe.to_dict()  # in full


def test_archived_trials_of_a_real_training_are_read_and_not_trained(tmp_path):
    trials = [digits(), digits(1)]
    table = run_trials(trials, tmp_path / "results", progress=False)
    add([read_result(trial, tmp_path / "results") for trial in trials], tmp_path)
    again = run_trials(trials, tmp_path / "empty", progress=False, archive=tmp_path)
    pd.testing.assert_frame_equal(again, table)  # seconds included
    assert not list((tmp_path / "empty").rglob("*.json"))
    assert find(digits(2), tmp_path) is None
    kept = run_trials(trials[:1], tmp_path / "kept", keep_models=True, progress=False, archive=tmp_path)
    assert model_path(trials[0], tmp_path / "kept").is_file()  # no archive has models
    assert kept["test_accuracy"][0] == table["test_accuracy"][0]


def test_a_line_holds_a_long_curve_thinned_and_written_again_it_stays(tmp_path):
    made = result(digits())
    unseen = dict(made.history[0]) | {"test_accuracy": None}
    history = tuple(unseen | {"epoch": i, "train_loss": i / 7} for i in range(1, 1500))
    history += (unseen | {"epoch": 1500, "test_accuracy": 0.5},)
    add([dataclasses.replace(made, history=history)], tmp_path)
    written = (tmp_path / "trials" / "digits.jsonl").read_text()
    kept = find(digits(), tmp_path).history
    assert [record["epoch"] for record in kept] == [*range(6, 1500, 6), 1500]
    assert kept[1]["train_loss"] == 1.714
    assert kept[-1]["test_accuracy"] == 0.5
    add([result(digits(1))], tmp_path)
    assert (tmp_path / "trials" / "digits.jsonl").read_text().startswith(written)


def test_the_published_archive_is_small():
    sizes = [path.stat().st_size for path in (ARCHIVE / "trials").glob("*.jsonl")]
    assert sum(sizes) < 15e6


def test_archived_results_of_another_environment_are_told_beside_what_is_trained_now(tmp_path):
    run_trials([digits()], tmp_path / "results", progress=False)
    made = read_result(digits(), tmp_path / "results")
    add([dataclasses.replace(made, versions=made.versions | {"torch": "1.0"}, threads=77)], tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run_trials([digits()], tmp_path / "empty", progress=False, archive=tmp_path)  # the archive's alone
    with pytest.warns(UserWarning, match=r"1 stored result was made with torch 1\.0 \(now .*\), threads 77"):
        run_trials([digits(), digits(1)], tmp_path / "empty", progress=False, archive=tmp_path)


def test_an_archive_that_cannot_be_read_trains_nothing_anew(tmp_path, monkeypatch):
    add([result(digits())], tmp_path)
    read = Path.open

    def crowded(path, *arguments, **options):
        if path.name == "data.csv":
            raise OSError(errno.EMFILE, "Too many open files")
        return read(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", crowded)
    with pytest.raises(OSError, match="Too many open files"):
        run_trials([digits()], tmp_path / "results", progress=False, archive=tmp_path)
    assert not (tmp_path / "results").exists()


def test_a_trial_whose_rate_was_chosen_anew_is_another_and_the_old_line_stays_readable(tmp_path, monkeypatch):
    trial = Trial("digits", "gsb")
    add([result(trial)], tmp_path)
    before = trial.id
    monkeypatch.setattr("binvit.lab.trials.trial.tuned_rate", lambda *_: 0.0123)
    assert trial.id != before
    assert find(trial, tmp_path) is None
    add([result(trial, accuracy=0.7)], tmp_path)
    assert find(trial, tmp_path).test_accuracy == 0.7
    monkeypatch.undo()
    assert find(trial, tmp_path).test_accuracy == 0.123456789


def test_a_distilled_trial_of_an_older_archive_is_read_beside_the_teacher_it_had(tmp_path, monkeypatch):
    trial = Trial("digits", "gsb", recipe_options=TINY | {"lr": 1e-3, "distillation": "hard"})
    older = dataclasses.replace(result(trial), id=trial.untaught_identity(trial.fingerprint))
    assert older.id != trial.id
    add([older], tmp_path)
    assert find(trial, tmp_path) is None  # nobody knows which teacher it had
    add([result(teacher_trial(trial))], tmp_path)
    assert find(trial, tmp_path).id == older.id
    monkeypatch.setattr("binvit.lab.trials.trial.tuned_rate", lambda *_: 0.0123)  # of another teacher
    assert find(trial, tmp_path) is None


def test_published_trials_have_the_identities_that_follow_from_their_lines():
    lines = [line for path in (ARCHIVE / "trials").glob("*.jsonl") for line in path.read_text("utf-8").splitlines()]
    assert len(lines) >= 244
    for values in map(json.loads, lines):
        trial, recipe = Trial.from_dict(values["trial"]), Recipe.from_dict(values["recipe"])
        name = identity(trial, recipe, Scheme.from_dict(values["scheme"]), values["fingerprint"])
        if recipe.trains_teacher and name != values["id"]:
            fixed = dataclasses.replace(trial, recipe_options={**trial.recipe_options, "lr": recipe.lr})
            name = fixed.identity(values["fingerprint"])
        assert name == values["id"]


def test_the_results_folder_comes_first(tmp_path):
    trial = digits()
    add([result(trial)], tmp_path)
    table = run_trials([trial], tmp_path / "results", progress=False)
    assert table["test_accuracy"][0] != find(trial, tmp_path).test_accuracy
    again = run_trials([trial], tmp_path / "results", progress=False, archive=tmp_path)
    pd.testing.assert_frame_equal(again, table)


def test_lines_are_sorted_kept_and_never_doubled(tmp_path):
    path = tmp_path / "trials" / "digits.jsonl"
    assert add([result(digits(seed)) for seed in (10, 2)], tmp_path) == 2
    before = path.read_text().splitlines()
    assert add([result(digits(seed), accuracy=0.9) for seed in (2, 3)] + [result(digits(3))], tmp_path) == 1
    after = path.read_text().splitlines()
    assert [json.loads(line)["trial"]["seed"] for line in after] == [2, 3, 10]
    assert [line for line in after if line in before] == before  # a diff shows the new line alone
    assert add([result(digits(seed)) for seed in (3, 10)], tmp_path) == 0
    assert path.read_text().splitlines() == after
    assert not list(tmp_path.rglob("*.tmp"))


def test_two_that_add_at_once_lose_no_line(tmp_path, monkeypatch):
    results = [[result(digits(seed))] for seed in range(2)]
    both_have_read, read = threading.Barrier(2), archive.read_data

    def read_beside_another(folder):
        found = read(folder)
        with suppress(threading.BrokenBarrierError):  # the other waits, as it should
            both_have_read.wait(timeout=0.3)
        return found

    monkeypatch.setattr(archive, "read_data", read_beside_another)
    with ThreadPoolExecutor(2) as pool:
        new = list(pool.map(lambda made: add(made, tmp_path), results))
    assert new == [1, 1]
    assert len((tmp_path / "trials" / "digits.jsonl").read_text().splitlines()) == 2
    assert {path.name for path in tmp_path.iterdir()} <= {"data.csv", "trials", ".lock"}


def test_two_that_measure_at_once_lose_no_row(tmp_path, monkeypatch):
    both_have_read, read = threading.Barrier(2), measurements.read_measurements

    def read_beside_another(*names):
        found = read(*names)
        with suppress(threading.BrokenBarrierError):  # the other waits, as it should
            both_have_read.wait(timeout=0.3)
        return found

    monkeypatch.setattr(measurements, "read_measurements", read_beside_another)

    def measure(cpu):
        measurements.add_measurements(tmp_path, "08_models", pd.DataFrame([{"cpu": cpu, "ms": 1.5}]), ["cpu"])

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(measure, ["one", "two"]))
    assert list(read(tmp_path, "08_models")["cpu"]) == ["one", "two"]


def test_data_sets_are_named_with_fingerprint_and_counts(tmp_path):
    parquet_file(tmp_path / "Some photos_64.parquet", splits=("train", "val", "test"))
    photos = Trial("parquet:Some photos_64.parquet", root=str(tmp_path))
    add([result(digits()), result(photos)], tmp_path / "archive")
    first, second = read_data(tmp_path / "archive")
    assert dataclasses.astuple(first) == ("digits", digits().fingerprint, "10", "1078", "", "719", "")
    assert dataclasses.astuple(second)[:6] == ("some-photos-64", photos.fingerprint, "2", "12", "12", "12")
    assert data_name(photos.dataset) == "some-photos-64"
    assert (tmp_path / "archive" / "trials" / "some-photos-64.jsonl").is_file()


def test_archived_trials_are_read_where_their_data_are_absent_and_new_ones_say_what_is_missing(tmp_path):
    path = parquet_file(tmp_path / "photos.parquet")
    trial = Trial("parquet:photos.parquet", "bit", root=str(tmp_path), recipe_options=TINY)
    add([result(trial)], tmp_path)
    path.unlink()
    elsewhere = dataclasses.replace(trial, dataset="parquet:far/away/photos.parquet", root=None)
    for absent in (trial, elsewhere):
        table = run_trials([absent], tmp_path / "results", progress=False, archive=tmp_path)
        assert table["test_accuracy"][0] == 0.123456789
        assert table["dataset"][0] == absent.dataset
    new = dataclasses.replace(trial, seed=1)
    with pytest.raises((TrialsFailed, FileNotFoundError), match=r"photos.parquet .* does not exist; if the archive"):
        run_trials([new], tmp_path / "results", progress=False, archive=tmp_path)


@pytest.mark.parametrize("dataset", ["folder:nowhere/digits", "parquet:nowhere/digits.parquet", "folder:far/photos"])
def test_absent_data_do_not_read_the_results_of_another_kind_of_that_name(dataset, tmp_path):
    parquet_file(tmp_path / "photos.parquet")
    for known in (digits(), Trial("parquet:photos.parquet", root=str(tmp_path))):
        add([result(known)], tmp_path)
    absent = dataclasses.replace(digits(), dataset=dataset)
    assert known_fingerprint(absent, tmp_path) is None
    assert find(absent, tmp_path) is None
    with pytest.raises(FileNotFoundError):
        counted_data(dataset, archive=tmp_path)


def test_a_line_that_a_changed_default_has_outdated_is_replaced(tmp_path):
    trial = digits()
    made = result(trial)
    add([dataclasses.replace(made, recipe=dataclasses.replace(made.recipe, min_lr=1e-7))], tmp_path)
    assert find(trial, tmp_path) is None
    assert add([made], tmp_path) == 1
    assert find(trial, tmp_path).recipe == made.recipe
    assert add([dataclasses.replace(made, test_accuracy=0.5)], tmp_path) == 0  # one that says what its trial is stays
    assert find(trial, tmp_path).test_accuracy == made.test_accuracy


def test_other_data_under_an_archived_name_are_another_trial(tmp_path):
    trial = Trial("parquet:photos.parquet", root=str(tmp_path))
    parquet_file(tmp_path / "photos.parquet")
    before = trial.fingerprint
    add([result(trial)], tmp_path)
    parquet_file(tmp_path / "photos.parquet", seed=1)
    assert trial.fingerprint != before
    assert find(trial, tmp_path) is None
    add([result(trial, accuracy=0.5)], tmp_path)
    assert find(trial, tmp_path).test_accuracy == 0.5
    names = [item.name for item in read_data(tmp_path)]
    assert names == ["photos", f"photos-{trial.fingerprint[7:13]}"]


def _break(values, **changes):
    return json.dumps(values | changes)


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda values: "{", "Line 1 of .*digits.jsonl is no readable JSON"),
        (lambda values: "[" * 1000, "Line 1 of .*digits.jsonl is no readable JSON"),
        (lambda values: "[]", "Line 1 of .*digits.jsonl is no archived trial"),
        (lambda values: _break(values, trial=3), "Line 1 of .*digits.jsonl is no archived trial"),
        (
            lambda values: _break(values, id=f"a-{5000 * '9'}-{16 * '0'}"),
            "Line 1 of .*digits.jsonl is no archived trial",
        ),
        (lambda values: _break(values, id=3), "Line 1 of .*digits.jsonl is no archived trial"),
        (lambda values: _break(values, history=[1]), "damaged: its history must have columns of one length"),
        (lambda values: _break(values, history=values["history"] | {"lr": [1]}), "columns of one length"),
        (lambda values: _break(values, history={}), "columns of one length"),
        (lambda values: _break(values, test_accuracy=7), "test_accuracy must be at most 1, got 7"),
        (lambda values: _break(values, seconds=10**30), None),
        (lambda values: _break(values, parameters="x"), "parameters must be a whole number, got 'x'"),
        (lambda values: _break(values, fingerprint="sha256:0"), "is corrupt: it belongs to another trial"),
        (lambda values: _break(values, extra=1), "Unknown trial result field 'extra'"),
    ],
)
def test_a_damaged_line_is_named_in_one_sentence(tmp_path, damage, sentence):
    add([result(digits())], tmp_path)
    path = tmp_path / "trials" / "digits.jsonl"
    path.write_text(damage(json.loads(path.read_text())) + "\n")
    if sentence is None:
        assert find(digits(), tmp_path).seconds == 1e30
    else:
        with pytest.raises(ValueError, match=sentence):
            find(digits(), tmp_path)


def test_a_table_of_data_sets_with_other_columns_is_refused(tmp_path):
    add([result(digits())], tmp_path)
    (tmp_path / "data.csv").write_text("name,hash\ndigits,1\n")
    with pytest.raises(ValueError, match=r"data.csv must have the columns name, fingerprint"):
        find(digits(), tmp_path)


@pytest.mark.parametrize("name", ["../evil", "/evil", "a\\b", "c:evil", "a\0b", ".", "..", ""])
def test_a_name_of_data_that_leads_out_of_the_archive_is_refused(tmp_path, name):
    (tmp_path / "data.csv").write_text(f"name,fingerprint,classes,train,val,test,command\n{name},sha256:1,2,4,,4,\n")
    with pytest.raises(ValueError, match=r"data\.csv names a data set '.*', which is no plain name of a file\.$"):
        read_data(tmp_path)


@pytest.mark.parametrize(
    "read",
    [
        read_data,
        lambda archive: find(digits(), archive),
        lambda archive: read_trials([], archive),
        lambda archive: run_trials([], archive / "results", archive=archive),
        lambda archive: counted_data("parquet:photos.parquet", archive=archive),
        lambda archive: archive_dir(SimpleNamespace(archive=str(archive))),
        lambda archive: redraw_all([], archive, archive / "out", archive / "README.md"),
    ],
)
@pytest.mark.parametrize("place", ["nope", "."])
def test_who_reads_an_archive_that_is_not_there_is_told_so(tmp_path, read, place):
    with pytest.raises(FileNotFoundError, match=r"^There is no archive .*data\.csv is not there\.$"):
        read(tmp_path / place)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("damage", [b"x" * 131_073, b"d\xefgits,sha256:1,10,1078,,719,\n"])
def test_a_table_of_data_sets_that_cannot_be_read_is_named_in_one_sentence(tmp_path, damage):
    path = tmp_path / "data.csv"
    path.write_bytes(b"name,fingerprint,classes,train,val,test,command\n" + damage)
    with pytest.raises(ValueError, match=r"data\.csv is no readable table of data sets \(.*\)\.$") as error:
        read_data(tmp_path)
    assert type(error.value) is ValueError
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("column", ["classes", "train", "val", "test"])
@pytest.mark.parametrize("count", ["-1", "ten", "1e3", "9" * 9, "9" * 5000])
def test_a_count_of_images_that_is_no_number_is_named(tmp_path, column, count):
    row = {
        "name": "photos",
        "fingerprint": "sha256:1",
        "classes": "2",
        "train": "4",
        "val": "",
        "test": "4",
        "command": "",
    }
    pd.DataFrame([row | {column: count}]).to_csv(tmp_path / "data.csv", index=False)
    with pytest.raises(ValueError, match=rf"counts {column} of 'photos' as .*, expected at most 8 digits\.$") as error:
        archive.counted_data("parquet:photos.parquet", archive=tmp_path)
    assert len(str(error.value)) < 1000


def test_a_file_of_trials_that_is_no_text_is_named_in_one_sentence(tmp_path):
    add([result(digits())], tmp_path)
    path = tmp_path / "trials" / "digits.jsonl"
    path.write_bytes(path.read_bytes().replace(b"gsb", b"g\xef\xef"))
    with pytest.raises(ValueError, match=r"digits\.jsonl is no text in UTF-8 \(.*\)\.$") as error:
        find(digits(), tmp_path)
    assert type(error.value) is ValueError


def test_noise_free_columns_stay_empty(tmp_path):
    add([result(digits())], tmp_path)
    row = find(digits(), tmp_path).to_row()
    assert math.isnan(row["memorized"])
