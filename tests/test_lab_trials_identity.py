import dataclasses
import json
import shutil

import numpy as np
import pytest
from image_files import image_folder, parquet_file

from binvit import lab
from binvit.lab.data import images as image_module
from binvit.lab.data.datasets import load_data
from binvit.lab.data.sources import read_source
from binvit.lab.experiments.design.plan import Condition
from binvit.lab.experiments.design.plan import plan as notebook_plan
from binvit.lab.training.checkpoint import save_checkpoint
from binvit.lab.trials.pool import run_trials
from binvit.lab.trials.store import finished_result, load_kept, model_path, read_result, result_path
from binvit.lab.trials.train_trial import run_trial, train_trial
from binvit.lab.trials.trial import Trial, teacher_trial

TINY = {"width": 16, "depth": 1, "heads": 2, "epochs": 1, "batch_size": 64}


def of(root, name="folder:images", **fields):
    return Trial(name, "xnor", root=str(root), recipe_options=TINY, **fields)


def test_other_images_under_the_same_name_are_another_trial(tmp_path):
    image_folder(tmp_path / "A" / "images")
    image_folder(tmp_path / "B" / "images", classes=("ant", "bee", "fly"))
    trials = [of(tmp_path / "A"), of(tmp_path / "B")]
    options = {"results_dir": tmp_path / "results", "keep_models": True, "progress": False}
    table = run_trials(trials, **options)
    assert len(set(table["id"])) == 2
    assert [load_kept(trial, tmp_path / "results")[1].classes for trial in trials] == [
        ("cat", "dog"),
        ("ant", "bee", "fly"),
    ]
    one_by_one = [run_trials([trial], **options)["seconds"][0] for trial in trials]
    assert one_by_one == list(table["seconds"])  # read, each its own


def test_the_same_images_at_another_path_are_the_same_trial(tmp_path):
    image_folder(tmp_path / "A" / "images")
    shutil.copytree(tmp_path / "A", tmp_path / "B")
    shutil.copytree(tmp_path / "A" / "images", tmp_path / "photos")
    first = run_trials([of(tmp_path / "A")], tmp_path, keep_models=True, progress=False)
    for trial in (of(tmp_path / "B"), of(None, f"folder:{tmp_path / 'photos'}"), of(tmp_path, "folder:photos")):
        again = run_trials([trial], tmp_path, keep_models=True, progress=False)
        assert list(again["seconds"]) == list(first["seconds"])
        assert (again["dataset"][0], again["root"][0]) == (trial.dataset, trial.root)
        assert read_result(trial, tmp_path).trial == trial
    assert len(list(tmp_path.glob("*.json"))) == 1


def test_replaced_images_are_trained_anew_and_the_old_ones_are_still_known(tmp_path):
    path = parquet_file(tmp_path / "a.parquet")
    trial, kept = of(tmp_path, "parquet:a.parquet"), path.read_bytes()
    before = run_trials([trial], tmp_path, progress=False)
    parquet_file(path, seed=1)
    assert finished_result(trial, tmp_path, keep_model=False) is None
    after = run_trials([trial], tmp_path, progress=False)
    assert after["id"][0] != before["id"][0]
    path.write_bytes(kept)
    assert list(run_trials([trial], tmp_path, progress=False)["seconds"]) == list(before["seconds"])


def test_images_that_change_during_a_training_have_no_result(tmp_path):
    path = parquet_file(tmp_path / "a.parquet")
    options = TINY | {"checkpoint_minutes": 0.0}  # a state after every epoch
    trial = dataclasses.replace(of(tmp_path, "parquet:a.parquet"), recipe_options=options)

    def replaced(done, total, record):
        parquet_file(path, seed=1)

    with pytest.raises(ValueError, match=r"images of parquet:a\.parquet have changed while a model was trained"):
        run_trial(trial, tmp_path / "results", keep_model=True, report=replaced)
    with pytest.raises(ValueError, match="have changed while"):
        train_trial(trial, progress=lambda *values: parquet_file(path, seed=2))
    assert not [path for path in (tmp_path / "results").rglob("*") if path.is_file()]  # no state, either


def test_a_result_or_model_under_another_name_is_refused(tmp_path):
    trial, other = (Trial("digits", "float", seed=seed, recipe_options=TINY) for seed in (0, 1))
    run_trials([trial], tmp_path, keep_models=True, progress=False)
    result_path(trial, tmp_path).rename(result_path(other, tmp_path))
    model_path(trial, tmp_path).rename(model_path(other, tmp_path))
    with pytest.raises(ValueError, match="is corrupt: it belongs to another trial"):
        read_result(other, tmp_path)
    with pytest.raises(FileNotFoundError, match="no model of the trial"):
        load_kept(other, tmp_path)
    with pytest.warns(UserWarning, match="belongs to another trial"):
        assert finished_result(other, tmp_path, keep_model=True) is None
    assert model_path(other, tmp_path).is_file()  # nothing is deleted


def test_identity_is_of_what_is_trained_and_not_of_how_it_was_written():
    plain = Trial("digits", "gsb")
    same = [
        Trial("digits", "gsb", recipe_options={"lr": plain.get_recipe().lr}, scheme_options={"thresholds": [0.7, 0.9]}),
        Trial("digits", "gsb", recipe_options={"workers": 3, "checkpoint_minutes": 1}),
        Trial("digits", "gsb", noise="pairs"),  # of no labels
        dataclasses.replace(plain, root="elsewhere"),
    ]
    assert {trial.id for trial in same} == {plain.id}
    others = [
        {"scheme": "float"},
        {"recipe": "cpu"},
        {"seed": 1},
        {"samples_per_class": 3},
        {"label_noise": 0.1},
        {"label_noise": 0.1, "noise": "pairs"},
        {"evaluate_on": "val"},
        {"scheme_options": {"reduce": "batch"}},
        {"recipe_options": {"lr": 5e-3}},
        {"recipe_options": {"stages": [{"epochs": 1}]}},
    ]
    found = {Trial(**({"dataset": "digits"} | fields)).id for fields in others}
    assert len(found | {plain.id}) == len(others) + 1
    assert plain.identity("sha256:0") != plain.identity("sha256:1")
    assert all(name.startswith(f"{trial.scheme}-{trial.recipe}-") for trial in same if (name := trial.id))


def student(scheme="gsb", **options):
    return Trial("digits", scheme, recipe_options=TINY | {"lr": 1e-3, "distillation": "hard"} | options)


def test_another_teacher_makes_another_trial(monkeypatch):
    trial, alone = student(), student(distillation="none")
    before = trial.id, alone.id
    others = [
        student(teacher_epochs=2),
        dataclasses.replace(trial, seed=1),
        dataclasses.replace(trial, label_noise=0.1),
    ]
    assert len({trial.id, *(other.id for other in others)}) == 4
    assert trial.identity("sha256:0") != trial.identity("sha256:1")
    # A rate that was chosen anew for float models: nothing that the student itself is trained with has changed.
    monkeypatch.setattr("binvit.lab.trials.trial.tuned_rate", lambda *_: 0.0123)
    assert teacher_trial(trial).get_recipe().lr == 0.0123
    assert trial.get_recipe().lr == alone.get_recipe().lr == 1e-3
    assert trial.id != before[0]
    assert alone.id == before[1]


def test_the_content_of_a_teachers_file_counts_and_not_its_place(tmp_path):
    paths = [tmp_path / f"{seed}.safetensors" for seed in range(2)]
    for seed, path in enumerate(paths):
        taught = train_trial(Trial("digits", "float", seed=seed, samples_per_class=2, recipe_options=TINY))
        save_checkpoint(path, taught.model, taught.info)
    first, second = (student(teacher=str(path)) for path in paths)
    assert len({first.id, second.id, student().id}) == 3
    shutil.copy(paths[0], tmp_path / "elsewhere.safetensors")
    assert student(teacher=str(tmp_path / "elsewhere.safetensors")).id == first.id
    assert Trial.from_dict(first.to_dict()).id == first.id
    losses = [train_trial(trial).history[0]["train_loss"] for trial in (first, second)]
    assert losses[0] != losses[1]
    shutil.copy(paths[1], paths[0])
    assert student(teacher=str(paths[0])).id == second.id
    with pytest.raises(
        ValueError, match=r"0\.safetensors is not the one that the trial names: its hash is not sha256:"
    ):
        train_trial(first)
    with pytest.raises(FileNotFoundError, match=r"learns from a teacher with the hash sha256:.*; give its file"):
        train_trial(student(teacher_hash=first.get_recipe().teacher_hash))


def test_results_that_do_not_name_their_images_are_told_of_once_and_left_alone(tmp_path):
    old = tmp_path / "digits-float-smoke-0-56579f0a4110.json"
    old.write_text(json.dumps({"format": "binvit result", "test_accuracy": 1.0}))
    trial = Trial("digits", "float", recipe_options=TINY)
    with pytest.warns(UserWarning, match=r"holds 1 results of an earlier release, such as digits-float.*not read"):
        assert finished_result(trial, tmp_path, keep_model=False) is None
    assert finished_result(trial, tmp_path, keep_model=False) is None
    assert old.is_file()


def test_validation_images_are_a_fifth_of_the_training_images_and_never_the_same(tmp_path):
    whole = load_data("digits")
    parts = [load_data("digits", evaluate_on="val", seed=seed) for seed in (0, 1)]
    for part in parts:
        assert len(part.test) == 0
        assert part.evaluated is part.val
        held = np.bincount(part.val.labels) / np.bincount(whole.train.labels)
        np.testing.assert_allclose(held, 0.2, atol=0.01)
        rows = [set(images.rows) for images in (part.train, part.val)]
        assert rows[0].isdisjoint(rows[1])
        assert rows[0] | rows[1] == set(whole.train.rows)
        assert rows[1].isdisjoint(whole.test.rows)
    assert list(parts[0].val.rows) == list(parts[1].val.rows)
    few = load_data("digits", samples_per_class=5, label_noise=0.4, seed=3, evaluate_on="val")
    assert list(few.val.rows) == list(parts[0].val.rows)
    assert set(few.train.rows) <= set(parts[0].train.rows)
    assert (few.val.labels == few.val.clean_labels).all()
    with pytest.raises(ValueError, match="evaluate_on must be 'test' or 'val', but 'train' was given"):
        load_data("digits", evaluate_on="train")


def test_official_validation_images_are_taken_where_there_are_some(tmp_path):
    parquet_file(tmp_path / "a.parquet", splits=("train", "val", "test"))
    data = load_data("parquet:a.parquet", root=tmp_path, evaluate_on="val")
    assert (len(data.train), len(data.val), len(data.test)) == (12, 12, 0)
    assert len(load_data("parquet:a.parquet", root=tmp_path).test) == 12


@pytest.mark.parametrize("kind", ["folder", "parquet"])
def test_a_tuning_trial_never_loads_a_test_image(tmp_path, monkeypatch, kind):
    if kind == "folder":
        image_folder(tmp_path / "images")
        trial = of(tmp_path, evaluate_on="val", seed=4)
    else:
        parquet_file(tmp_path / "a.parquet")
        trial = of(tmp_path, "parquet:a.parquet", evaluate_on="val", seed=4)
    assert trial.fingerprint  # hashed before, and known by time and size
    tested = list(read_source(trial.dataset, tmp_path).splits["test"].images)
    opened = []
    for name in ("open_image", "stored_size"):
        real = getattr(image_module, name)
        monkeypatch.setattr(image_module, name, lambda source, *a, real=real: opened.append(source) or real(source, *a))
    data = load_data(trial.dataset, root=tmp_path, evaluate_on="val")
    assert not set(map(str, tested)) & {str(image) for part in (data.train, data.val) for image in part.images}
    result = lab.train_trial(trial)
    assert 0 <= result.test_accuracy <= 1
    assert opened
    assert not [source for source in opened if source in tested]
    assert teacher_trial(trial).evaluate_on == "val"


def test_images_that_stand_in_for_test_images_choose_nothing(tmp_path):
    image_folder(tmp_path / "images", splits=("train", "val"))
    data = load_data("folder:images", root=tmp_path, evaluate_on="val")
    assert len(load_data("folder:images", root=tmp_path).test) == 12
    assert (len(data.train), len(data.val)) == (10, 2)
    assert all("train" in image.parts for image in data.val.images)


def test_small_classes_keep_a_training_image(tmp_path):
    image_folder(tmp_path / "images", each=2)
    data = load_data("folder:images", root=tmp_path, evaluate_on="val")
    assert (list(data.train.labels), list(data.val.labels)) == ([0, 1], [0, 1])
    image_folder(tmp_path / "single", each=1)
    with pytest.raises(ValueError, match="no validation images, and no class has two training images"):
        load_data("folder:single", root=tmp_path, evaluate_on="val")


@pytest.mark.parametrize("name", ["teacher", "teacher_hash", "teacher_epochs", "teacher_pretrained"])
def test_a_teacher_that_nobody_learns_from_is_refused(tmp_path, name):
    (tmp_path / "teacher").write_bytes(b"weights")
    value = {"teacher": str(tmp_path / "teacher"), "teacher_hash": f"sha256:{'0' * 64}", "teacher_epochs": 3}
    options = {name: value.get(name, True)}
    with pytest.raises(ValueError, match=rf"^The recipe's {name} is of a teacher, and without"):
        Trial("digits", recipe_options=options)
    for learning in ({"distillation": "soft"}, {"similarity": 0.5}):
        assert Trial("digits", recipe_options=options | learning).recipe_options[name] == options[name]
    own = dict(teacher_trial(Trial("digits", recipe="paper")).recipe_options)  # that of "paper" has teacher_epochs
    assert (own["distillation"], own["epochs"]) == ("none", 300)


def test_a_change_of_the_teacher_reaches_the_conditions_that_have_one():
    conditions = [Condition("plain", "gsb"), Condition("distilled", "gsb", recipe_options={"distillation": "hard"})]
    plain, distilled = notebook_plan(conditions, "digits", [0], "smoke", changes="teacher_epochs 3")
    assert "teacher_epochs" not in plain.trial.recipe_options
    assert distilled.trial.recipe_options["teacher_epochs"] == 3


@pytest.mark.parametrize("name", ["recipe_options", "scheme_options"])
def test_options_in_pairs_name_each_field_once(name):
    field = {"recipe_options": "epochs", "scheme_options": "attention_bias"}[name]
    with pytest.raises(ValueError, match=rf"^The trial's {name} must be a mapping of names to values, each name once"):
        Trial("digits", **{name: [(field, 1), (field, 2)]})
