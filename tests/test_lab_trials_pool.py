import contextlib
import dataclasses
import errno
import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import pytest
import torch
from forks import Program
from hypothesis import given
from hypothesis import strategies as st
from tqdm.auto import tqdm

import binvit
from binvit import files, lab
from binvit.lab.training.recipe import Stage
from binvit.lab.trials import pool, train_trial, trained
from binvit.lab.trials.archive import add
from binvit.lab.trials.pool import TrialsFailed, run_trials
from binvit.lab.trials.store import OutdatedResult, finished_result, load_model, model_path, read_result, result_path
from binvit.lab.trials.trial import Trial, teacher_trial
from binvit.threads import cores

TINY = {"width": 16, "depth": 1, "heads": 2, "epochs": 2, "batch_size": 256, "eval_every": 1}


def tiny(scheme="float", seed=0, **options):
    return Trial("digits", scheme, seed=seed, samples_per_class=10, recipe_options=TINY | options)


PROGRAM = """
import json, signal, sys, torch
from binvit.lab import Trial, run_trials
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored behind a shell's &
torch.set_num_threads(1)
trials = [Trial.from_dict(item) for item in json.loads(sys.argv[1])]
print(run_trials(trials, sys.argv[2], progress=False, **json.loads(sys.argv[3])).to_json(orient="records"))
"""


def program(*trials, results_dir, **options):
    """Run trials in a process of their own, which prints their table."""
    return Program(PROGRAM, json.dumps([trial.to_dict() for trial in trials]), results_dir, json.dumps(options))


numbers = st.integers(-9, 9) | st.floats(0, 1)


@given(
    st.builds(
        Trial,
        dataset=st.sampled_from(["digits", "cifar100", "parquet:some/where.parquet", "folder:x"]),
        scheme=st.sampled_from(["float", "elastic", "gsb"]),
        recipe=st.sampled_from(["smoke", "cpu", "paper"]),
        seed=st.integers(0, 2**31),
        samples_per_class=st.none() | st.integers(1, 500),
        label_noise=st.floats(0, 0.99),
        noise=st.sampled_from(["symmetric", "pairs", [[0, 1], [0.5, 0.5]]]),
        scheme_options=st.fixed_dictionaries(
            {},
            optional={
                "reduce": st.sampled_from(["batch", "row"]),
                "thresholds": st.sampled_from([[], [0.5], (0.7, 0.9)]),
                "components": st.sampled_from([["mlp"], ["mhsa", "mlp"]]),
            },
        ),
        recipe_options=st.fixed_dictionaries(
            {},
            optional={
                "epochs": st.integers(1, 50),
                "lr": numbers.filter(lambda x: x >= 0),
                "stages": st.lists(st.builds(Stage, st.integers(1, 9), st.just({"components": ["mlp"]})), max_size=2),
            },
        ),
        root=st.none() | st.just("somewhere"),
    )
)
def test_every_trial_survives_json(trial):
    again = Trial.from_dict(json.loads(json.dumps(trial.to_dict())))
    assert again == trial
    assert hash(again) == hash(trial)
    assert again.identity("sha256:0") == trial.identity("sha256:0")


def test_identity_is_of_values_and_not_of_spelling():
    spelled = [
        Trial("digits", scheme_options={"reduce": "row", "thresholds": [0.5]}, recipe_options={"lr": 1, "epochs": 2}),
        Trial(
            "digits", scheme_options=(("thresholds", (0.5,)), ("reduce", "row")), recipe_options={"epochs": 2, "lr": 1}
        ),
        Trial(
            "digits",
            scheme_options={"thresholds": (0.5,), "reduce": "row"},
            recipe_options=[("lr", 1.0), ("epochs", 2)],
        ),
        Trial(
            "digits", scheme_options={"reduce": "row", "thresholds": [0.5]}, recipe_options={"lr": 1.0, "epochs": 2.0}
        ),
    ]
    assert len(set(spelled)) == len({trial.id for trial in spelled}) == 1
    assert Trial("digits", root="a").id == Trial("digits", root="b").id


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"dataset": "digit"}, "Unknown data set 'digit'; valid names are digits"),
        ({"dataset": 3}, "dataset must be a text, got 3"),
        ({"scheme": "gbs"}, "Unknown scheme 'gbs'; valid are .*gsb"),
        ({"recipe": "tiny"}, "Unknown recipe 'tiny'; valid recipes are"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"seed": 10**5000}, "seed must be below .*, got a whole number of about 5000 digits"),
        ({"seed": True}, "seed must be a whole number"),
        ({"samples_per_class": 0}, "samples_per_class must be at least 1, got 0"),
        ({"label_noise": 1.0}, "label_noise must be below 1, got 1.0"),
        ({"label_noise": "0.1"}, "label_noise must be a number, got '0.1'"),
        ({"label_noise": float("nan")}, "label_noise must be a finite number, got nan"),
        ({"noise": "loud"}, "noise must be 'symmetric', 'pairs' or a square confusion matrix"),
        ({"noise": [[1, 2]]}, "square confusion matrix"),
        ({"noise": [[1, float("nan")], [1, 2]]}, "square confusion matrix of numbers from 0"),
        ({"root": 3}, "root must be a text, got 3"),
        ({"scheme_options": {"reduced": "row"}}, "Unknown scheme field 'reduced'; valid fields are"),
        ({"scheme_options": 3}, "scheme_options must be a mapping"),
        ({"recipe_options": {"epoch": 3}}, "Unknown recipe field 'epoch'; valid fields are"),
        ({"recipe_options": {"name": "mine"}}, "registered name"),
    ],
)
def test_bad_trials_get_one_sentence(fields, words):
    with pytest.raises(ValueError, match=words):
        Trial(**({"dataset": "digits"} | fields))


def test_numbers_of_numpy_are_taken():
    trial = Trial(
        "digits",
        seed=np.arange(3)[1],
        samples_per_class=np.int64(5),
        label_noise=np.float64(0.2),
        noise=np.eye(10),
        scheme_options={"thresholds": np.array([0.5])},
        recipe_options={"epochs": np.int64(3), "lr": np.float32(0.5)},
    )
    identity = [[float(row == column) for column in range(10)] for row in range(10)]
    options = {"scheme_options": {"thresholds": [0.5]}, "recipe_options": {"epochs": 3, "lr": 0.5}}
    same = Trial("digits", seed=1, samples_per_class=5, label_noise=0.2, noise=identity, **options)
    assert (trial, trial.id) == (same, same.id)
    assert json.loads(json.dumps(trial.to_dict())) == same.to_dict()


def test_unknown_fields_of_a_file_get_one_sentence():
    with pytest.raises(ValueError, match="Unknown trial field 'sceme'; valid fields are dataset, scheme"):
        Trial.from_dict({"dataset": "digits", "sceme": "gsb"})
    with pytest.raises(ValueError, match="needs the field dataset"):
        Trial.from_dict({})


def test_table_has_every_field_and_finished_trials_are_read(tmp_path):
    noisy = Trial("digits", "elastic", samples_per_class=10, label_noise=0.3, recipe_options=TINY)
    trials = [tiny(), noisy, tiny()]
    table = run_trials(trials, tmp_path, progress=False)
    assert list(table["scheme"]) == ["float", "elastic", "float"]
    for name in ("dataset", "recipe", "seed", "samples_per_class", "label_noise", "noise", "root", "scheme_options"):
        assert name in table
    assert table["recipe_options"][0].startswith("batch_size=256, depth=1")
    assert table["test_accuracy"].between(0, 1).all()
    assert list(table["memorized"].notna()) == list(table["clean_train_accuracy"].notna()) == [False, True, False]
    assert len(list(tmp_path.glob("*.json"))) == 2
    pd.testing.assert_frame_equal(run_trials(trials, tmp_path, progress=False), table)  # seconds included
    record = json.loads(result_path(noisy, tmp_path).read_text())
    assert [entry["epoch"] for entry in record["history"]] == [1, 2]
    assert {"python", "torch", "timm", "binvit"} <= set(record["versions"])
    assert record["recipe"]["width"] == 16
    assert record["scheme"]["name"] == "elastic"


@pytest.mark.parametrize(
    ("form", "sentence", "label"),
    [
        ("binvit result 3", "has the format 'binvit result 3', and this release reads 'binvit result 2'.", "foreign"),
        ("weights 1", "is corrupt: its format is 'weights 1', expected 'binvit result 2'.", "corrupt"),
    ],
)
def test_a_result_of_another_format_is_named_so_in_whole_sentences(tmp_path, form, sentence, label):
    path = result_path(tiny(), tmp_path)
    path.write_text(json.dumps({"format": form}))
    with pytest.warns(UserWarning, match=re.escape(f"{path} {sentence} It is kept as {path.name}.{label}, and")):
        assert finished_result(tiny(), tmp_path, False) is None
    assert path.with_name(f"{path.name}.{label}").is_file()


@pytest.mark.parametrize("damage", ["", "{", "[]", "{}", '{"format": "binvit result", "id": "x", "trial": {}}', None])
def test_corrupt_results_are_kept_aside_and_run_again(tmp_path, damage):
    trial = tiny()
    table = run_trials([trial], tmp_path, progress=False)
    path = result_path(trial, tmp_path)
    path.write_text(path.read_text()[:200] if damage is None else damage)
    with pytest.raises(ValueError, match="corrupt"):
        read_result(trial, tmp_path)
    with pytest.warns(UserWarning, match="corrupt.*kept as .*json.corrupt, and the trial is run again"):
        again = run_trials([trial], tmp_path, progress=False)
    pd.testing.assert_frame_equal(again.drop(columns="seconds"), table.drop(columns="seconds"))
    assert path.with_name(path.name + ".corrupt").is_file()


@pytest.mark.parametrize(
    "wrong", [{"recipe": None}, {"scheme": []}, {"history": [1]}, {"history": {}}, {"history": [{}]}]
)
def test_results_with_records_of_another_kind_are_corrupt(tmp_path, wrong):
    trial = tiny(epochs=1)
    run_trials([trial], tmp_path, progress=False)
    path = result_path(trial, tmp_path)
    path.write_text(json.dumps(json.loads(path.read_text()) | wrong))
    with pytest.raises(ValueError, match=f"corrupt.*{next(iter(wrong))}.* must be |corrupt.*needs the field history"):
        read_result(trial, tmp_path)


def test_results_of_another_recipe_are_not_taken_for_this_one(tmp_path):
    trial = tiny()
    run_trials([trial], tmp_path, progress=False)
    path = result_path(trial, tmp_path)
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | {"recipe": values["recipe"] | {"weight_decay": 0.3}}))
    with pytest.raises(OutdatedResult, match=r"weight_decay was 0\.3, now 0\.05"):
        read_result(trial, tmp_path)
    with pytest.warns(UserWarning, match=r"kept as .*\.outdated"):
        run_trials([trial], tmp_path, progress=False)
    del values["recipe"]["workers"], values["scheme"]["own_input"]  # fields that a later release added
    path.write_text(json.dumps(values))
    assert read_result(trial, tmp_path).trial == trial
    del values["recipe"]["eval_every"]  # a field that a later release added and set in this trial
    path.write_text(json.dumps(values))
    changed = tiny(eval_every=5)
    path.rename(result_path(changed, tmp_path))
    values |= {"id": changed.id, "trial": changed.to_dict()}
    result_path(changed, tmp_path).write_text(json.dumps(values))
    with pytest.raises(OutdatedResult, match="eval_every was 1, now 5"):
        read_result(changed, tmp_path)


def test_missing_results_and_models_say_what_to_do(tmp_path):
    trial = tiny()
    with pytest.raises(FileNotFoundError, match="no result of the trial digits, float"):
        read_result(trial, tmp_path)
    run_trials([trial], tmp_path, progress=False)
    with pytest.raises(FileNotFoundError, match="keep_models=True"):
        load_model(trial, tmp_path)


def test_models_are_kept_on_request(tmp_path):
    trial = tiny("gsb")
    run_trials([trial], tmp_path, progress=False)
    table = run_trials([trial], tmp_path, keep_models=True, progress=False)  # trained again, since no model was kept
    model = load_model(trial, tmp_path)
    assert model.scheme == binvit.scheme("gsb")
    assert not model.training
    data = lab.load_data("digits")
    images = torch.from_numpy(data.test.pixels()).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(item).view(1, 3, 1, 1) for item in load_info(trial, tmp_path))
    with torch.inference_mode():
        right = (model((images - mean) / std).argmax(1).numpy() == data.test.labels).mean()
    assert right == pytest.approx(table["test_accuracy"][0], abs=2e-3)
    model_path(trial, tmp_path).write_bytes(b"damaged")
    with pytest.raises(ValueError, match="truncated or no safetensors"):
        load_model(trial, tmp_path)


def test_the_model_of_another_trial_is_none(tmp_path):
    trial, other = tiny(epochs=1), tiny(epochs=1, seed=1)
    run_trials([trial, other], tmp_path, keep_models=True, progress=False)
    own = load_model(trial, tmp_path).state_dict()
    model_path(other, tmp_path).replace(model_path(trial, tmp_path))
    with pytest.raises(FileNotFoundError, match="no model of the trial digits, float, smoke, seed 0"):
        load_model(trial, tmp_path)
    with pytest.raises(FileNotFoundError, match="no model of the trial"):
        trained.load_trained(trial, tmp_path)
    elsewhere = dataclasses.replace(trial, root="elsewhere")
    run_trials([elsewhere], tmp_path, keep_models=True, progress=False)  # trained again
    again = load_model(trial, tmp_path).state_dict()
    assert all(torch.equal(again[name], own[name]) for name in own)
    written = model_path(trial, tmp_path).stat().st_mtime_ns
    run_trials([trial], tmp_path, keep_models=True, progress=False)
    assert model_path(trial, tmp_path).stat().st_mtime_ns == written


def load_info(trial, results_dir):
    _, info = lab.load_checkpoint(model_path(trial, results_dir))
    return info.mean, info.std


def test_several_jobs_give_the_same_numbers_and_survive_failures(tmp_path):
    trials = [tiny("gsb", seed) for seed in (0, 1)]
    crowded = Trial("digits", "float", samples_per_class=5000, recipe_options=TINY)
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, cores() // 2))
    here = run_trials(trials, tmp_path / "here", progress=False)
    torch.set_num_threads(threads)
    with pytest.raises(TrialsFailed, match=r"1 of 3 trials failed: .*has only") as caught:
        run_trials([crowded, *trials], tmp_path / "there", jobs=2, progress=False)
    assert caught.value.wrong_input
    there = run_trials(trials, tmp_path / "there", jobs=2, progress=False)
    pd.testing.assert_frame_equal(here.drop(columns="seconds"), there.drop(columns="seconds"))


STARTED: list[Program] = []


@pytest.fixture(autouse=True)
def nothing_is_left_behind():
    """End what a failed test has left: its trainings would slow down all tests that follow."""
    yield
    while STARTED:
        parent = STARTED.pop()
        if parent.poll() is None:
            for process in [*psutil.Process(parent.pid).children(recursive=True), parent]:
                process.kill()
            parent.communicate()


def started(trials, results_dir, **options):
    """Start trials in two children of a process of their own; return it and the children, once all have begun."""
    parent = program(*trials, results_dir=results_dir, jobs=2, **options)
    STARTED.append(parent)
    states = [results_dir / ".running" / f"{trial.id}.state" for trial in trials]
    until = time.monotonic() + 200
    while not all(state.exists() for state in states):
        time.sleep(0.02)
        if parent.poll() is not None or time.monotonic() > until:
            parent.kill()
            raise AssertionError(f"The trials have not begun: {parent.communicate()[1]}")
    children = psutil.Process(parent.pid).children(recursive=True)
    return parent, [child for child in children if any("lock" in file.path for file in child.open_files())]


def test_a_killed_child_takes_only_its_trial_with_it(tmp_path):
    survivor, victim = [tiny("gsb", epochs=epochs, checkpoint_minutes=0.0, eval_every=80) for epochs in (80, 8000)]
    parent, children = started([survivor, victim], tmp_path)
    (first,) = [child for child in children if any(victim.id in file.path for file in child.open_files())]
    (second,) = set(children) - {first}
    first.kill()
    message = parent.communicate(timeout=120)[1]
    assert f"1 of 2 trials failed: {victim.describe()}: its process was killed or crashed (SIGKILL" in message
    assert len(read_result(survivor, tmp_path).history) == 80
    assert not result_path(victim, tmp_path).exists()
    assert not psutil.wait_procs([second], timeout=20)[1]


def test_a_process_killed_after_the_result_was_written_has_finished(tmp_path):
    done, not_done = tiny(seed=0), tiny(seed=1)
    run_trials([done], tmp_path, progress=False)
    with tqdm(disable=True) as bar:
        queue = pool._Queue([done, not_done], tmp_path, False, bar)
        for trial in (done, not_done):
            queue.close(trial, False, "its process was killed or crashed (SIGKILL)")
    assert [trial for trial, _, _ in queue.failures] == [not_done]


@pytest.mark.parametrize(("number", "count"), [(signal.SIGINT, 2), (signal.SIGKILL, 1)])
def test_the_end_of_the_parent_ends_all_children(tmp_path, number, count):
    trials = [tiny("gsb", seed, epochs=5000, checkpoint_minutes=0.0) for seed in range(count)]
    parent, children = started(trials, tmp_path)
    everyone = psutil.Process(parent.pid).children(recursive=True)
    assert set(children) <= set(everyone)
    parent.send_signal(number)
    parent.communicate(timeout=60)
    assert not psutil.wait_procs(everyone, timeout=20)[1]


@pytest.mark.parametrize(
    "error", [RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."), MemoryError()]
)
def test_failed_work_takes_only_its_trial_with_it(tmp_path, monkeypatch, error, capsys):
    run = train_trial.train_trial

    def failing(trial, **options):
        if trial.seed == 1:
            raise error
        return run(trial, **options)

    monkeypatch.setattr(train_trial, "train_trial", failing)
    with pytest.raises(TrialsFailed, match=f"1 of 2 trials failed: .*seed 1.*: {type(error).__name__}") as caught:
        run_trials([tiny(seed=1, epochs=1), tiny(epochs=1)], tmp_path, progress=False)
    assert not caught.value.wrong_input
    assert read_result(tiny(epochs=1), tmp_path).test_accuracy > 0


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds the loader's process, which is forked")
def test_a_killed_loader_takes_only_its_trial_with_it(tmp_path):
    me = psutil.Process()
    here = set(me.children())

    def kill_loader():
        while not found.wait(0.02):
            with contextlib.suppress(psutil.Error):
                for child in set(me.children()) - here:
                    if child.cmdline() == me.cmdline():
                        child.kill()
                        found.set()

    found = threading.Event()  # torch tells it wherever the training is, even in the middle of loading weights
    thread = threading.Thread(target=kill_loader)
    thread.start()
    try:
        with pytest.raises(TrialsFailed, match=r"(?s)^1 of 2 trials failed: .*seed 1.*DataLoader worker"):
            run_trials([tiny(seed=1, epochs=5000, crop=0.5, workers=1), tiny(epochs=1)], tmp_path, progress=False)
    finally:
        found.set()
        thread.join()
    assert read_result(tiny(epochs=1), tmp_path).test_accuracy > 0


def test_an_error_of_reading_is_no_corruption(tmp_path, monkeypatch):
    trial, read = tiny(epochs=1), Path.read_bytes
    table = run_trials([trial], tmp_path, keep_models=True, progress=False)
    before = {path.name: read(path) for path in tmp_path.glob("digits*")}

    def crowded(path):
        if path.suffix in (".json", ".safetensors"):
            raise OSError(errno.EMFILE, "Too many open files")
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", crowded)
    with pytest.raises(OSError, match="Too many open files"):
        read_result(trial, tmp_path)
    with pytest.raises(TrialsFailed, match="Too many open files"):
        run_trials([trial], tmp_path, keep_models=True, progress=False)
    monkeypatch.undo()
    assert {path.name: read(path) for path in tmp_path.glob("digits*")} == before
    pd.testing.assert_frame_equal(run_trials([trial], tmp_path, keep_models=True, progress=False), table)


@pytest.mark.parametrize("damage", ["", "{", "[" * 100_000])
def test_a_model_outlives_its_result(tmp_path, damage):
    trial = tiny(epochs=1)
    run_trials([trial], tmp_path, keep_models=True, progress=False)
    model = model_path(trial, tmp_path).read_bytes()
    result_path(trial, tmp_path).write_text(damage)
    with pytest.warns(UserWarning, match="is corrupt"):
        run_trials([trial], tmp_path, progress=False)
    assert model_path(trial, tmp_path).read_bytes() == model


def test_files_of_killed_writers_are_removed(tmp_path):
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    (tmp_path / ".running").mkdir()
    name = f".x.{files._machine()}.{child.pid}.00000000.tmp"
    for place in (tmp_path, tmp_path / ".running"):
        (place / name).write_text("half of a resu")
    run_trials([tiny(epochs=1)], tmp_path, progress=False)
    assert not list(tmp_path.rglob("*.tmp"))
    # Where nothing is left to train, either; a state as well, whose process was killed right after the result.
    state = tmp_path / ".running" / f"{tiny(epochs=1).id}.state"
    for path in (tmp_path / name, state):
        path.write_text("half of a resu")
    run_trials([tiny(epochs=1)], tmp_path, progress=False)
    assert not list(tmp_path.rglob("*.tmp"))
    assert not state.exists()


@pytest.mark.parametrize("jobs", [1, 2])
def test_refused_trials_leave_no_folder(tmp_path, jobs):
    refused = [tiny(seed=seed, patch_size=3) for seed in range(3 - jobs)]  # one child is enough
    with pytest.raises(TrialsFailed, match=f"{len(refused)} of {len(refused)} trials failed") as caught:
        run_trials(refused, tmp_path / "a" / "b" / "c", jobs=jobs, progress=False)
    assert caught.value.wrong_input
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_model_is_trained_again(tmp_path):
    trial = tiny(epochs=1)
    run_trials([trial], tmp_path, keep_models=True, progress=False)
    path = model_path(trial, tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:])
    run_trials([trial], tmp_path, keep_models=True, progress=False)
    assert path.read_bytes() == whole  # two trainings, one file


def test_results_of_another_environment_are_told(tmp_path):
    trial = tiny(epochs=1)
    table = run_trials([trial], tmp_path, progress=False)
    path = result_path(trial, tmp_path)
    values = json.loads(path.read_text())
    values |= {"versions": values["versions"] | {"torch": "1.0"}, "threads": 77, "device": "cuda"}
    path.write_text(json.dumps(values))
    told = r"1 stored result was made with torch 1\.0 \(now .*\), device cuda \(now cpu\), threads 77 \(now \d+\); "
    with pytest.warns(UserWarning, match=told):
        again = run_trials([trial], tmp_path, progress=False)
    pd.testing.assert_frame_equal(again, table)


def test_devices_that_are_not_there_get_one_sentence(tmp_path):
    for device, words in (
        ("gpu", "A device is cpu, cuda, mps or one GPU"),
        ("cuda:99", "There is no device 'cuda:99'"),
    ):
        with pytest.raises(ValueError, match=words):
            run_trials([tiny()], tmp_path, device=device)
    assert not list(tmp_path.iterdir())


def test_one_failure_leaves_the_others_and_is_named(tmp_path):
    hopeless = tiny(lr=1e30, clip_grad=0.0, warmup=0.0)
    crowded = Trial("digits", "float", samples_per_class=5000, recipe_options=TINY)
    with pytest.raises(TrialsFailed, match=r"2 of 3 trials failed: digits, float.*class 0.*has only") as caught:
        run_trials([crowded, hopeless, tiny()], tmp_path, progress=False)
    assert "learning rate" in str(caught.value)
    assert not caught.value.wrong_input
    with pytest.raises(TrialsFailed, match="1 of 1 trials failed") as caught:
        run_trials([crowded], tmp_path, progress=False)
    assert caught.value.wrong_input
    assert read_result(tiny(), tmp_path).test_accuracy > 0
    assert len(list(tmp_path.glob("*.json"))) == 1


@pytest.mark.parametrize("archived", [False, True])
def test_damaged_images_fail_alone(tmp_path, archived):
    (tmp_path / "damaged.parquet").write_bytes(b"damaged")
    damaged = Trial("parquet:damaged.parquet", "float", root=tmp_path, recipe_options=TINY)
    archive = tmp_path / "archive" if archived else None
    if archive:
        add([], archive)
    with pytest.raises(TrialsFailed, match=r"^1 of 2 trials failed: parquet:damaged\.parquet.*: ") as caught:
        run_trials([damaged, tiny(epochs=1)], tmp_path / "results", progress=False, archive=archive)
    assert caught.value.wrong_input
    assert [trial for trial, _ in caught.value.failures] == [damaged]
    assert read_result(tiny(epochs=1), tmp_path / "results").test_accuracy > 0


@pytest.mark.parametrize(("jobs", "trials"), [(0, [tiny()]), (1.5, [tiny()]), (True, [tiny()]), (1, ["digits"])])
def test_bad_arguments_get_one_sentence(tmp_path, jobs, trials):
    with pytest.raises(ValueError, match=r"number of jobs must be|Expected a Trial"):
        run_trials(trials, tmp_path, jobs=jobs)


def test_no_trials_make_an_empty_table(tmp_path):
    assert run_trials([], tmp_path).empty


def test_concurrent_processes_share_a_folder(tmp_path):
    trials = [tiny("float", seed) for seed in range(3)]
    running = [program(*trials, results_dir=tmp_path) for _ in range(2)]
    first, second = (child.communicate(timeout=120)[0] for child in running)
    assert [child.poll() for child in running] == [0, 0]
    assert first == second  # seconds included: each trial was trained once
    assert len(list(tmp_path.glob("*.json"))) == 3
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize("options", [{}, {"similarity": 0.5, "teacher_epochs": 1}])
def test_killed_run_continues_with_the_same_bits(tmp_path, options):
    trial = tiny("gsb", epochs=40, checkpoint_minutes=0.0, eval_every=40, **options)
    child = program(trial, results_dir=tmp_path)
    state = tmp_path / ".running" / f"{trial.id}.state"
    until = time.monotonic() + 120
    while not state.exists() and time.monotonic() < until:
        time.sleep(0.01)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    assert state.exists()
    assert not result_path(trial, tmp_path).exists()
    done = torch.load(io.BytesIO(state.read_bytes()[32:]), weights_only=True)["position"]
    assert 0 < done["epoch"] < 40
    seen = []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    train_trial.run_trial(trial, tmp_path, report=lambda done, total, record: seen.append(done))
    whole = lab.train_trial(trial)
    torch.set_num_threads(threads)
    assert seen[0] > 1  # it did not start over
    assert seen[-1] == 40
    assert not state.exists()
    assert read_result(trial, tmp_path).history == whole.history


def test_teacher_has_the_students_shape_and_no_teacher():
    student = Trial(
        "digits",
        "gsb",
        scheme_options={"reduce": "row"},
        recipe_options={"distillation": "soft", "epochs": 7, "width": 24, "stages": [{"epochs": 3}], "alpha": 0.3},
    )
    taught = teacher_trial(student)
    recipe = taught.get_recipe()
    assert (taught.scheme, taught.scheme_options) == ("float", {})
    assert (recipe.distillation, recipe.stages, recipe.epochs, recipe.width) == ("none", (), 10, 24)
    assert teacher_trial(Trial("digits", "elastic", recipe_options=student.recipe_options)) == taught
    paper = teacher_trial(Trial("digits", recipe="paper")).get_recipe()
    assert (paper.epochs, paper.pretrained, paper.distillation) == (300, True, "none")


def test_teacher_is_trained_once_for_all_students(tmp_path):
    students = [tiny(scheme, distillation="hard") for scheme in ("elastic", "gsb")]
    run_trials(students, tmp_path, progress=False)
    assert len(list(tmp_path.glob("*.json"))) == 3
    assert load_model(teacher_trial(students[0]), tmp_path).scheme.name == "float"


def test_fast_epochs_are_not_all_shown(tmp_path):
    shown = []

    class Bar:
        def set_postfix_str(self, text, refresh):
            shown.append((text, refresh))

    queue = pool._Queue([], tmp_path, False, Bar())
    for epoch in range(1000):  # each would be messages of a widget; sockets drop what they cannot hold
        queue.report(tiny("elastic"), epoch + 1, 1000)
    assert shown[-1] == ("elastic, seed 0: epoch 1000/1000", False)
    assert sum(refresh for _, refresh in shown) <= 2
