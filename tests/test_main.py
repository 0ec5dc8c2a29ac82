import csv
import dataclasses
import errno
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import notebook_maker
import numpy as np
import packed_models
import pytest
import timm
import torch
from image_files import image_folder
from PIL import Image

import binvit
from binvit.__main__ import main
from binvit.lab import predict
from binvit.lab.notebooks import published
from binvit.lab.training.loop import TrainingDiverged
from binvit.lab.trials import train_trial
from binvit.packed import PackedViT


def run(capsys, *arguments: object) -> tuple[int, str, str]:
    """Return exit code, stdout and stderr of a command."""
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    return stopped.value.code, *capsys.readouterr()


def refused(capsys, *arguments: object) -> str:
    """Return the sentence a command is refused with."""
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("Error: ")
    assert err.count("\n") == 1, err
    return err.removeprefix("Error: ").strip()


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A checkpoint that the command line has trained."""
    out = tmp_path_factory.mktemp("trained")
    with pytest.raises(SystemExit) as stopped:
        main(f"train --scheme bit --seed 5 --samples-per-class 2 --out {out}".split())
    assert stopped.value.code == 0
    (checkpoint,) = out.glob("*.safetensors")
    return checkpoint


def test_help_is_cheap_and_module_and_script_are_the_same():
    code = "import sys; from binvit.__main__ import main\ntry: main(['--help'])\nfinally: print('torch' in sys.modules)"
    by_function = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    by_module = subprocess.run([sys.executable, "-m", "binvit", "--help"], capture_output=True, text=True, check=True)
    assert by_function == by_module.stdout + "False\n"
    for command in ("reproduce", "train", "archive", "data", "pack", "predict", "schemes"):
        assert command in by_module.stdout


def test_version(capsys):
    assert run(capsys, "--version") == (0, f"binvit, version {binvit.__version__}\n", "")


def test_without_a_command_the_help_is_shown_as_it_is(capsys):
    code, out, err = run(capsys)
    assert (code, out) == (2, "")
    assert err == run(capsys, "--help")[1]


@pytest.mark.parametrize("closed", [("stderr",), ("stdout",), ("stdout", "stderr")])
def test_closed_streams_swallow_what_is_written_to_them(capsys, monkeypatch, closed):
    for name in closed:
        monkeypatch.setattr(sys, name, None)
    with pytest.raises(SystemExit) as stopped:
        main(["audit", "nowhere"])
    assert stopped.value.code == 2
    for name in closed:
        getattr(sys, name).write("nothing")
        getattr(sys, name).close()


def test_schemes_lists_all_with_description_and_reference(capsys):
    code, out, err = run(capsys, "schemes")
    assert (code, err) == (0, "")
    for name in binvit.list_schemes():
        assert any(line.split()[:1] == [name] for line in out.splitlines())
        assert binvit.scheme(name).description in out
        assert binvit.scheme(name).reference in out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("train --scheme gbs", "gsb"),
        ("train --dataset digit", "digits"),
        ("train --recipe huge", "smoke"),
        ("train --label-noise 1.0", "label_noise must be below 1, got 1.0"),
        ("train --seed -1", "seed"),
        ("train --seed one", "'one' is not a valid integer"),
        ("train --samples-per-class 100000", "samples_per_class is 100000"),
        ("train --dataset parquet:missing.parquet", "missing.parquet"),
        ("train --dataset folder:missing", "missing"),
        (
            "train --image-size 100000",
            "64 images of 100000 pixels a side, which are held at once, take at least 7152.6",
        ),
        (
            "train --image-size 31",
            "31 pixels cannot be divided into patches of equal size; give another side",
        ),
        (
            "train --image-size 33 --model deit_tiny_patch16_224",
            "not divisible by the patch size 16; give another",
        ),
        ("train --model resnet10t", "timm cannot build 'resnet10t' for images of 8 pixels"),
        ("train --model deit_tiny", "timm knows no model named 'deit_tiny'"),
        ("train --model=", "timm knows no model named ''"),
        ("train --set optimizer=adahessian", "'adahessian' needs second derivatives"),
        ("train --set optimizer=Lookahead_AdaHessian", "'Lookahead_AdaHessian' needs second derivatives"),
        ("train --pretrained", "need a timm model name"),
        ("train --weights missing.pth", "missing.pth does not exist"),
        ("train --weights .", "is no regular file"),
        ("train --set epochs", "must be NAME=VALUE, such as epochs=20, got 'epochs'"),
        ("train --set epoch=3", "Unknown recipe field 'epoch'; valid fields are name, model"),
        ("train --set epochs=0", "epochs must be at least 1"),
        ("train --set epochs=many", "epochs must be a whole number, got 'many'"),
        ("train --set lr=nan", "lr must be a finite number"),
        ("train --set stages=[}", "The value of the recipe's stages is no readable YAML"),
        ("train --set epochs=1 --set epochs=2", "epochs is set twice"),
        ("train --set image_size=8 --image-size 8", "image_size is given twice"),
        ("train --sceme gsb", "No such option '--sceme'"),
        ("predict missing.safetensors missing.png", "missing.png"),
        ("predict", "Missing argument"),
        ("predit", "No such command 'predit'"),
        ("bench --seconds nan", "must be a positive number of seconds, got nan"),
        ("bench --seconds inf", "must be a positive number of seconds, got inf"),
        ("bench --seconds 0", "0.0 is not in the range"),
        ("bench --seconds -1", "-1.0 is not in the range"),
        ("data digits --out a.parquet", "no official data set 'digits'"),
        ("data flowers102", "Missing option '--out'"),
        ("data flowers102 --size 0 --out a.parquet", "0 is not in the range"),
        ("reproduce --size huge", "archive, smoke, cpu, paper"),
        ("reproduce --jobs 0", "0 is not in the range"),
        ("reproduce --notebooks missing", "There are no notebooks in missing"),
        ("reproduce -f missing.yaml", "There is no parameter file missing.yaml"),
        ("reproduce -p count", "requires 2 arguments"),
        ("reproduce --only 01 -p dataset digit", "01_quickstart.ipynb: The parameter dataset does not fit"),
        ("reproduce --only 01 -p changes stages:[}", "is no name with a value"),
        ("reproduce --only 04 -p schemes [gbs]", "Unknown scheme 'gbs'"),
        ("reproduce --size smoke --only 06 -p dataset parquet:no.parquet", "no.parquet) does not exist"),
    ],
)
def test_wrong_input_is_refused_with_one_sentence_and_nothing_is_written(
    capsys, tmp_path, monkeypatch, arguments, sentence
):
    monkeypatch.chdir(tmp_path)
    assert sentence in refused(capsys, *arguments.split())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "work"),
    [
        ("plan 04 --out .", "binvit.lab.notebooks.plan.plan"),
        ("tune --rates .", "binvit.lab.trials.tune.tune"),
        ("pack nowhere --out .", "binvit.lab.predict.pack_checkpoint"),
        ("export nowhere .", "binvit.lab.predict.open_packed"),
        ("data pets --out .", "binvit.lab.data.write.write_parquet"),
    ],
)
def test_a_target_that_cannot_be_written_is_told_before_the_work(capsys, tmp_path, monkeypatch, arguments, work):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(work, lambda *_, **__: pytest.fail("it works"))
    assert refused(capsys, *arguments.split()).startswith("Expected a plain file to write to, but . is a folder")


@pytest.mark.parametrize(("content", "sentence"), [(None, "does not exist"), (b"# A", "no lines"), (b"\xff", "UTF-8")])
def test_a_readme_without_a_place_for_results_is_told_before_anything_is_drawn(tmp_path, content, sentence):
    (tmp_path / "data.csv").write_text("name,fingerprint,classes,train,val,test,command\n")
    if content is not None:
        (tmp_path / "README.md").write_bytes(content)
    with pytest.raises((FileNotFoundError, ValueError), match=sentence):
        published.redraw_all([], tmp_path, tmp_path / "out", tmp_path / "README.md")
    assert not (tmp_path / "out").exists()


def test_train_keeps_a_model_and_reads_it_back(capsys, model):
    out = model.parent
    before = model.stat().st_mtime_ns
    code, shown, err = run(capsys, *f"train --scheme bit --seed 5 --samples-per-class 2 --out {out}".split())
    assert (code, err) == (0, "")
    assert f"The model is {model}." in shown
    assert shown.startswith("test accuracy 0.")
    assert model.stat().st_mtime_ns == before


def test_archive_adds_finished_trials_once_and_names_what_is_damaged(capsys, model, tmp_path):
    assert run(capsys, "archive", model.parent, "--out", tmp_path) == (
        0,
        f"1 trials are new in {tmp_path}, 0 were there.\n",
        "",
    )
    (line,) = (tmp_path / "trials" / "digits.jsonl").read_text().splitlines()
    assert model.stem in line
    assert (tmp_path / "data.csv").read_text().splitlines()[1].startswith("digits,sha256:")
    shutil.copytree(model.parent, tmp_path / "results")
    damaged = tmp_path / "results" / model.with_suffix(".json").name
    damaged.write_text("{")
    code, out, err = run(capsys, "archive", tmp_path / "results", "--out", tmp_path)
    assert (code, out) == (1, f"0 trials are new in {tmp_path}, 0 were there.\n")
    assert f"The result file {damaged} is corrupt" in err
    assert "no results folder" in refused(capsys, "archive", tmp_path / "none")


@pytest.mark.parametrize(
    ("error", "told", "code"),
    [
        (TrainingDiverged("The training loss became nan."), "The training loss became nan.", 1),
        (OSError(errno.ENOSPC, "No space left on device", "out"), "No space left on device: out", 1),
        (ValueError("The images are no images."), "The images are no images.", 2),
        (FileNotFoundError("The images are missing."), "The images are missing.", 2),
    ],
)
def test_failed_training_and_wrong_input_have_codes_of_their_own(capsys, tmp_path, monkeypatch, error, told, code):
    def fail(*arguments, **options):
        raise error

    monkeypatch.setattr(train_trial, "train_trial", fail)
    found, out, err = run(capsys, "train", "--out", tmp_path)
    assert (found, out) == (code, "")
    assert err == f"Error: 1 of 1 trials failed: digits, gsb, smoke, seed 0: {told}\n"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EFBIG])
def test_a_full_disk_is_no_wrong_input(capsys, tmp_path, monkeypatch, number):
    def fail(*arguments):
        raise OSError(number, os.strerror(number), "model.packed.safetensors")

    monkeypatch.setattr(predict, "pack_checkpoint", fail)
    found = run(capsys, "pack", tmp_path / "model.safetensors")
    assert found == (1, "", f"Error: {os.strerror(number)}: model.packed.safetensors.\n")


def test_predict_prints_probabilities_of_a_file_and_of_a_folder(capsys, model, tmp_path):
    images = [tmp_path / "a.png", tmp_path / "deeper" / "b.JPG"]
    images[1].parent.mkdir()
    for shade, image in enumerate(images):
        Image.new("L", (11, 9), 100 * shade).save(image)
    (tmp_path / "notes.txt").write_text("no image")
    code, single, err = run(capsys, "predict", model, images[0], "--top", 99)
    assert (code, err) == (0, "")
    guesses = dict(guess.split() for guess in single.split(": ")[1].split(", "))
    assert sorted(guesses) == [str(digit) for digit in range(10)]
    assert sum(map(float, guesses.values())) == pytest.approx(1, abs=0.01)
    assert list(map(float, guesses.values())) == sorted(map(float, guesses.values()), reverse=True)
    code, both, _ = run(capsys, "predict", model, tmp_path, "--top", 99)
    assert both.splitlines()[0] == single.strip()
    assert both.splitlines()[1].startswith(f"{images[1]}: ")
    assert len(both.splitlines()) == 2


def test_predict_writes_tables_and_json_and_skips_what_is_no_image_with_a_word(capsys, model, tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    (tmp_path / "elsewhere").mkdir()
    (folder / "more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(folder)
    places = [folder / f"{number:02}.png" for number in range(40)] + [folder / "more" / "a,b.gif"]
    for shade, place in enumerate(places):
        Image.new("L", (8, 8), 6 * shade).save(place)
    (folder / "broken.png").write_bytes(places[0].read_bytes()[:30])
    (folder / "notes.txt").write_text("no image")
    (folder / "Thumbs.db").write_text("hidden")
    if hasattr(os, "mkfifo"):
        os.mkfifo(folder / "pipe.png")

    code, table, err = run(capsys, "predict", model, folder, "--csv", "--top", 2)
    assert code == 0
    assert f"Skipped {folder / 'broken.png'}: The image {folder / 'broken.png'} cannot be decoded" in err
    assert "notes.txt" in err
    rows = list(csv.DictReader(io.StringIO(table)))
    assert [row["image"] for row in rows] == [str(place) for place in places for _ in range(2)]
    assert [row["rank"] for row in rows] == ["1", "2"] * 41

    code, text, _ = run(capsys, "predict", model, folder, "--json", "--top", 2)
    records = json.loads(text)
    assert [(found["image"], len(found["classes"])) for found in records] == [(str(place), 2) for place in places]
    flat = [guess for found in records for guess in found["classes"]]
    assert [(guess["class"], f"{guess['probability']:.6f}") for guess in flat] == [
        (row["class"], row["probability"]) for row in rows
    ]
    single = json.loads(run(capsys, "predict", model, places[7], "--json", "--top", 2)[1])[0]["classes"]
    assert [guess["class"] for guess in single] == [guess["class"] for guess in records[7]["classes"]]
    assert single[0]["probability"] == pytest.approx(records[7]["classes"][0]["probability"], abs=1e-5)


def test_an_image_that_may_not_be_read_is_skipped_in_words(capsys, model, tmp_path, monkeypatch):
    for name in ("a.png", "b.png"):
        Image.new("L", (8, 8)).save(tmp_path / name)
    load = predict.open_image

    def refuse(path):
        if path.name == "b.png":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return load(path)

    monkeypatch.setattr(predict, "open_image", refuse)
    code, _, err = run(capsys, "predict", model, tmp_path)
    assert (code, err) == (0, f"Skipped {tmp_path / 'b.png'}: Permission denied.\n")


def test_predict_writes_one_form(capsys, model, tmp_path):
    for forms in (("--csv", "--json"), ("--json", "--csv")):
        assert refused(capsys, "predict", model, tmp_path, *forms) == "Give --csv or --json, not both."


def test_predict_refuses_a_folder_of_damaged_images_and_a_pipe(capsys, model, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no image")
    code, out, err = run(capsys, "predict", model, tmp_path)
    assert (code, out) == (2, "")
    assert err.endswith("Error: None of the images can be read.\n")
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
        assert "is no regular file" in refused(capsys, "predict", model, tmp_path / "pipe")


def test_home_and_environment_variables_in_paths(capsys, model, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("MODELS", str(model.parent))
    Image.new("L", (8, 8)).save(tmp_path / "a.png")
    assert run(capsys, "predict", f"$MODELS/{model.name}", "~/a.png")[0] == 0


def test_packed_model_predicts_the_same(capsys, model, tmp_path):
    image = tmp_path / "a.png"
    Image.linear_gradient("L").resize((8, 8)).save(image)
    code, shown, err = run(capsys, "pack", model, "--exact")
    packed = model.with_suffix(".packed.safetensors")
    assert (code, err) == (0, "")
    assert f"The packed model is {packed}, " in shown
    assert packed.stat().st_size < model.stat().st_size
    trained, exact = (run(capsys, "predict", file, image, "--top", 10) for file in (model, packed))
    assert trained == exact
    code, _, _ = run(capsys, "pack", model, "--out", tmp_path / "fast.safetensors")
    assert code == 0
    assert run(capsys, "predict", tmp_path / "fast.safetensors", image)[1].split()[1] == trained[1].split()[1]
    assert run(capsys, "pack", model, "--float16", "--out", tmp_path / "halves.safetensors")[0] == 0
    assert (tmp_path / "halves.safetensors").stat().st_size < (tmp_path / "fast.safetensors").stat().st_size


def test_a_packed_model_tells_its_accuracy_without_its_images(capsys, tmp_path):
    image_folder(tmp_path / "photos")
    sizes = ("--set", "epochs=1", "--set", "depth=1", "--out", tmp_path / "results")
    code, out, _ = run(capsys, "train", "--dataset", "folder:photos", "--root", tmp_path, *sizes)
    assert code == 0
    accuracy = float(re.search(r"test accuracy ([\d.]+)", out)[1])
    shutil.rmtree(tmp_path / "photos")
    (kept,) = (tmp_path / "results").glob("*.safetensors")
    code, shown, _ = run(capsys, "pack", kept)
    assert code == 0
    assert f"accuracy: {accuracy:.2%}" in shown


def test_pack_refuses_what_it_cannot_pack(capsys, model, tmp_path):
    assert "choose another --out" in refused(capsys, "pack", model, "--out", model)
    assert "There is no checkpoint" in refused(capsys, "pack", tmp_path / "gone.safetensors")
    (tmp_path / "text.safetensors").write_text("no model")
    assert "text.safetensors is truncated" in refused(capsys, "pack", tmp_path / "text.safetensors")
    assert not list(tmp_path.glob("*.packed.*"))


def test_export_writes_onnx_that_answers_alike(capsys, tmp_path):
    runtime, _ = pytest.importorskip("onnxruntime"), pytest.importorskip("onnxscript")
    packed = binvit.pack(packed_models.trained("bit", steps=1, depth=1))
    binvit.save(packed, tmp_path / "packed.safetensors")
    path = tmp_path / "new" / "model.onnx"
    code, out, err = run(capsys, "export", tmp_path / "packed.safetensors", path)
    assert (code, out, err) == (0, f"The exported model is {path}, {path.stat().st_size / 1e6:.2f} MB.\n", "")
    x = packed_models.images(3).numpy()
    (logits,) = runtime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(["logits"], {"images": x})
    np.testing.assert_allclose(logits, packed(x), rtol=1e-4, atol=1e-4)


def test_export_refuses_what_it_cannot_export(capsys, model, tmp_path, monkeypatch):
    before, out = model.read_bytes(), tmp_path / "model.onnx"
    (tmp_path / "text.safetensors").write_text("no model")
    assert "There is no model" in refused(capsys, "export", tmp_path / "gone.safetensors", out)
    assert "text.safetensors is truncated" in refused(capsys, "export", tmp_path / "text.safetensors", out)
    assert "would replace the model" in refused(
        capsys, "export", model, model.parent / ".." / model.parent.name / model.name
    )
    assert "Missing argument 'MODEL.onnx'" in refused(capsys, "export", model)
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    sentence = "onnxscript is not installed (pip install binvit[export])."
    assert refused(capsys, "export", model, out) == sentence
    assert not out.exists()
    assert model.read_bytes() == before


def test_predict_refuses_what_it_cannot_read(capsys, model, tmp_path):
    picture = tmp_path / "picture.png"
    Image.new("RGB", (8, 8)).save(picture)
    broken = tmp_path / "broken.png"
    broken.write_bytes(picture.read_bytes()[:30])
    truncated = tmp_path / "truncated.safetensors"
    truncated.write_bytes(model.read_bytes()[:-100])
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "broken.png cannot be decoded" in refused(capsys, "predict", model, broken)
    assert "truncated.safetensors is truncated" in refused(capsys, "predict", truncated, picture)
    assert "picture.png" in refused(capsys, "predict", picture, picture)
    assert "There is no model" in refused(capsys, "predict", tmp_path / "gone.safetensors", picture)
    assert "holds no image" in refused(capsys, "predict", model, empty)
    told = refused(capsys, "predict", model, tmp_path / "two\nlines\x1b[31m.png")
    assert r"two\nlines\x1b[31m.png" in told


def test_reproduce_writes_a_report_and_fails_at_the_end_if_a_notebook_failed(capsys, tmp_path):
    folder, out = tmp_path / "notebooks", tmp_path / "out"
    notebook_maker.write(folder / "01_bad.ipynb", claims="raise ValueError('bad luck')")
    notebook_maker.write(folder / "02_good.ipynb")
    (tmp_path / "more.yaml").write_text("count: 3\nnames: [b]")
    options = ("reproduce", "--notebooks", folder, "--out", out)
    code, shown, err = run(capsys, *options, "-f", tmp_path / "more.yaml", "-p", "count", "4")
    assert code == 1
    assert "s to compile or to load" in shown
    assert f"The report is {out / 'index.html'}." in shown
    assert "01_bad failed: ValueError: bad luck" in err
    assert "1 of 2 notebooks failed." in err
    assert "count is 4." in (out / "02_good.html").read_text()
    code, shown, err = run(capsys, *options, "--only", "2")
    assert (code, err) == (0, "")
    assert "count is 2." in (out / "02_good.html").read_text()


def test_reproduce_checks_parameters_of_all_notebooks_before_it_runs_one(capsys, tmp_path):
    folder, out = tmp_path / "notebooks", tmp_path / "out"
    notebook_maker.write(folder / "01_good.ipynb")
    odd = notebook_maker.notebook()
    odd["cells"][1]["source"] = "other: int = 1"
    notebook_maker.clean.write(odd, folder / "02_odd.ipynb")
    sentence = refused(capsys, "reproduce", "--notebooks", folder, "--out", out, "-p", "count", "4")
    assert "02_odd.ipynb has no parameter 'count'; its parameters are other." in sentence
    assert "--only" in sentence
    assert not out.exists()


@pytest.mark.parametrize(
    "command",
    [option.split() for option in ("train", "tune", "reproduce", "figures", "bench", "archive results")],
    ids=" ".join,
)
def test_a_file_is_no_folder_to_write_into(capsys, tmp_path, command):
    file = tmp_path / "file"
    file.write_text("content")
    for out in (file, "/dev/null"):
        assert refused(capsys, *command, "--out", out).endswith(f"{out} is no folder.")
    assert file.read_text() == "content"


def test_line_breaks_in_names_stay_within_their_row_and_codes_reach_no_terminal(capsys, model, tmp_path):
    folder = tmp_path / "odd"
    folder.mkdir()
    Image.new("RGB", (8, 8)).save(folder / "a\nb.png")
    (folder / "bad\x1b]0;pwn\x07\nname.png").write_bytes(b"no image")
    code, table, err = run(capsys, "predict", model, folder, "--csv", "--top", 1)
    rows = list(csv.reader(io.StringIO(table)))
    assert (code, len(rows), rows[1][0]) == (0, 2, str(folder / "a\nb.png"))
    assert "\x1b" not in err
    assert err.count("\n") == 1
    code, text, _ = run(capsys, "predict", model, folder)
    assert (code, text.count("\n")) == (0, 1)


def test_a_packed_model_without_classes_or_numbers_predicts_nothing(capsys, tmp_path):
    image = tmp_path / "image.png"
    Image.new("RGB", (8, 8)).save(image)
    packed = binvit.load("gsb-digits")
    wide = dataclasses.replace(packed.blueprint, mean=(1e300,) * 3)
    binvit.save(PackedViT(wide, packed.tensors), tmp_path / "wide.safetensors")
    assert "gives no numbers" in refused(capsys, "predict", tmp_path / "wide.safetensors", image, "--json")
    model = timm.create_model("deit_tiny_patch16_224", img_size=32, depth=1, num_classes=0)
    binary = binvit.calibrate(binvit.binarize(model, "elastic"), torch.rand(2, 3, 32, 32)).eval()
    binvit.save(binvit.pack(binary, mean=(0.5,) * 3, std=(0.5,) * 3), tmp_path / "headless.safetensors")
    assert "no head that tells classes" in refused(capsys, "predict", tmp_path / "headless.safetensors", image)


def test_numbers_and_paths_that_are_none(capsys, tmp_path):
    assert "no finite number" in refused(capsys, "plan", "01", "--size", "smoke", "--teraflops", "nan")
    assert "must not be empty" in refused(capsys, "pack", "")
    (tmp_path / "results").mkdir()
    assert "no tables of binvit bench" in refused(
        capsys, "archive", tmp_path / "results", "--out", tmp_path / "new", "--bench", tmp_path / "results"
    )
    assert not (tmp_path / "new").exists()
