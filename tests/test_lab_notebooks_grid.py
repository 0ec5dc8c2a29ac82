"""Plans of notebooks: the same trials as the notebooks run, counted right, and trained one at a time."""

import dataclasses
import json
import math
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import yaml
from click.testing import CliRunner

import binvit.lab
from binvit.__main__ import cli
from binvit.lab.experiments.design import plan as experiments_plan
from binvit.lab.experiments.design import training_budget
from binvit.lab.notebooks import grid
from binvit.lab.notebooks.plan import Job, plan
from binvit.lab.trials.store import read_results
from binvit.lab.trials.trial import Trial

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
TINY = {"schemes": ["float", "gsb"], "seeds": [0], "epochs": 1, "changes": "width 8, depth 1, heads 1"}


def runs_of_cells(job: Job, monkeypatch) -> dict[str, bool]:
    """Execute a notebook's cells up to its trainings; return the trials it would train and whether it keeps models."""
    asked: dict[str, bool] = {}

    def run_trials(trials, results_dir="results", jobs=1, keep_models=False, progress=True, **options):
        trials = list(trials)
        asked.update({trial.id: keep_models or asked.get(trial.id, False) for trial in trials})
        return pd.DataFrame([{"seed": trial.seed, "noise": trial.noise} for trial in trials])

    for module in (binvit.lab, experiments_plan, training_budget):
        monkeypatch.setattr(module, "run_trials", run_trials)
    monkeypatch.setattr("binvit.lab.experiments.width.measure", lambda *values: pd.DataFrame())  # of untrained models
    monkeypatch.setattr("binvit.lab.figures.panels.save", lambda *values, **tables: None)
    namespace = {"__name__": "__main__"}
    for cell in json.loads(job.notebook.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] != "code" or asked:
            continue
        trains = any(call in source for call in ("run_trials(", "plan.train(", "training_budget.run("))
        try:
            exec(source, namespace)
        except Exception:  # nothing was trained, so what follows in the cell has nothing to show
            if not (trains and asked):
                raise
        if "parameters" in cell["metadata"].get("tags", []):
            namespace |= dict(job.values)
    return asked


@pytest.mark.parametrize("size", ["smoke", "cpu", "paper"])
@pytest.mark.parametrize("number", ["01", "02", "03", "04", "05", "06", "07", "09"])
def test_plan_and_notebook_name_the_same_trials(size, number, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (job,) = plan(NOTEBOOKS, size, [number], {} if size == "smoke" else {"dataset": "digits"})
    planned = {item.id: item for item in grid.grid([job])}
    teachers = {teacher for item in planned.values() for teacher in item.needs}
    asked = runs_of_cells(job, monkeypatch)
    assert len(asked) >= 2
    assert set(planned) == set(asked) | teachers
    assert teachers or size != "paper"
    for identity, item in planned.items():
        assert item.keep_model == (asked.get(identity, False) or identity in teachers)
        assert item.trial.id == identity


def test_a_notebook_that_trains_nothing_has_no_trials():
    assert grid.grid(plan(NOTEBOOKS, "smoke", ["08"])) == []


def test_images_that_are_absent_are_counted_as_the_archive_knows_them(tmp_path):
    head = "name,fingerprint,classes,train,val,test,command\n"
    (tmp_path / "data.csv").write_text(f"{head}photos,sha256:1,2,40,,10,\n")
    values = TINY | {"dataset": "parquet:photos.parquet", "data_dir": str(tmp_path), "archive": str(tmp_path)}
    planned = grid.grid(plan(NOTEBOOKS, "archive", ["04"], values))
    assert {item.id for item in planned} == {None}
    with pytest.raises(FileNotFoundError, match=r"parquet:other\.parquet is not there, and how many"):
        grid.grid(plan(NOTEBOOKS, "archive", ["04"], values | {"dataset": "parquet:other.parquet"}))


def test_shared_trials_count_once_in_all():
    jobs = plan(NOTEBOOKS, "smoke", ["01", "06"], {"seeds": [0], "changes": "width 8, heads 1"})
    same = dict(jobs[0].values) | {"schemes": ["gsb"], "dataset": "digits"}  # with and without bias
    jobs.append(Job(jobs[0].notebook.with_name("04_methods.ipynb"), same))
    table = grid.totals(grid.grid(jobs), teraflops=2.0)
    assert table["trials"].to_dict() == {"01": 3, "04": 2, "06": 18, "all": 22}
    assert table["GPU hours"]["all"] == pytest.approx(table["FLOP"]["all"] / 2e12 / 3600)


def test_official_sets_that_are_absent_are_counted_and_not_written(tmp_path):
    values = {"dataset": "cifar100", "data_dir": str(tmp_path / "data"), "seeds": [0]}
    jobs = plan(NOTEBOOKS, "paper", ["07"], values)
    trials = grid.grid(jobs)
    assert len(trials) == 20  # five kinds of labels for three schemes, and a teacher for each kind
    assert {item.id for item in trials} == {None}
    with pytest.raises(FileNotFoundError, match=r"cifar-100-python .* does not exist"):
        grid.write_plan(tmp_path / "plan.jsonl", jobs, trials)
    with pytest.raises(FileNotFoundError, match=r"folder:no is not there, and how many images it has is not known"):
        grid.grid(plan(NOTEBOOKS, "paper", ["04"], values | {"dataset": "folder:no"}))
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def planned(tmp_path) -> Path:
    jobs = plan(NOTEBOOKS, "smoke", ["01"], TINY)
    assert grid.write_plan(tmp_path / "plan.jsonl", jobs, grid.grid(jobs))
    assert not grid.write_plan(tmp_path / "plan.jsonl", jobs, grid.grid(jobs))  # as it was
    return tmp_path / "plan.jsonl"


def test_a_trial_of_a_plan_is_trained_and_read_back(planned, tmp_path):
    head, *lines = map(json.loads, planned.read_text().splitlines())
    assert (head["notebook"], head["parameters"]) == ("01", TINY)
    chosen = lines[1]["id"]
    arguments = ["train", "--trial", str(planned), "--id", chosen, "--out", str(tmp_path / "results")]
    done = CliRunner().invoke(cli, arguments, catch_exceptions=False)
    assert "test accuracy" in done.output
    (result,), _ = read_results(tmp_path / "results")
    assert result.id == chosen
    assert (tmp_path / "results" / f"{chosen}.safetensors").is_file()
    trial, keep_model = grid.read_planned(tmp_path / "results" / f"{chosen}.json")
    assert (trial.id, keep_model) == (chosen, True)
    other = next(line["id"] for line in lines if line["id"] != chosen)
    several = CliRunner().invoke(cli, [*arguments, "--id", other], catch_exceptions=False).output
    assert [line.split(":")[0] for line in several.splitlines() if "test accuracy" in line] == [chosen, other]
    assert {result.id for result in read_results(tmp_path / "results")[0]} == {chosen, other}


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "holds 2 trials; name one with --id"),
        (["--id", "gsb-smoke-0-0"], "holds no trial 'gsb-smoke-0-0'"),
        (["--seed", "0"], "says all about the trial; leave out seed"),
    ],
)
def test_wrong_trials_are_refused(planned, arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        CliRunner().invoke(cli, ["train", "--trial", str(planned), *arguments], catch_exceptions=False)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"keep_model": "false"}, r"The trial's keep_model in .* must be true or false, got 'false'\.$"),
        ({"keep_model": None}, r"The trial's keep_model in .* must be true or false, got None\.$"),
        ({"id": 4000 * "x"}, r"The trial 'x{40,60}\.\.\.x{40,60}' of .* is gsb-smoke-0-.* now"),
        ({"trial": []}, r"A trial must be a mapping of field names to values, got \[\]\.$"),
    ],
)
def test_odd_lines_of_a_plan_are_refused_in_a_sentence(fields, sentence, tmp_path):
    path = tmp_path / "plan.jsonl"
    path.write_text(json.dumps({"notebook": "01"}) + "\n" + json.dumps({"trial": Trial("digits").to_dict()} | fields))
    with pytest.raises(ValueError, match=sentence):
        grid.read_planned(path)


def test_values_of_a_notebook_that_trains_nothing_are_checked_by_the_plan():
    with pytest.raises(ValueError, match=r"^08_efficiency\.ipynb: .*batches holds -1"):
        CliRunner().invoke(cli, ["plan", "08", "-p", "batches", "[-1]"], catch_exceptions=False)


def test_a_plan_of_other_images_is_refused(tmp_path):
    path = tmp_path / "one.json"
    path.write_text(json.dumps({"id": "gsb-smoke-0-0123456789abcdef", "trial": Trial("digits").to_dict()}))
    with pytest.raises(ValueError, match=r"is gsb-smoke-0-.* now: its images, recipe or scheme have changed"):
        grid.read_planned(path)
    path.write_text(json.dumps(Trial("digits").to_dict()))
    assert grid.read_planned(path) == (Trial("digits"), True)
    with pytest.raises(ValueError, match="needs the file of a plan"):
        CliRunner().invoke(cli, ["train", "--id", "x"], catch_exceptions=False)
    with pytest.raises(FileNotFoundError, match="no file of trials"):
        grid.read_planned(tmp_path / "none")


def snakemake(folder: Path, settings: dict, *arguments: str) -> str:
    """Run the Snakefile with settings and return what it says."""
    (folder / "config.yaml").write_text(json.dumps(settings))
    command = [sys.executable, "-m", "snakemake", "-s", str(NOTEBOOKS / "Snakefile"), "--cores", "2", *arguments]
    options = {"cwd": folder, "capture_output": True, "text": True, "timeout": 240}
    done = subprocess.run([*command, "--configfile", "config.yaml"], check=False, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def count_jobs(folder: Path, settings: dict, *arguments: str) -> dict[str, int]:
    """Run the Snakefile with settings and return how many jobs of each rule it has to do."""
    said = snakemake(folder, settings, *arguments)
    return {name: int(count) for name, count in re.findall(r"^(\w+) +(\d+)$", said, re.MULTILINE)}


def test_snakefile_has_a_job_per_trial_and_reruns_what_a_change_touches(tmp_path):
    values = {"seeds": [0], "schemes": ["float", "gsb"]}
    trials = {item.id for item in grid.grid(plan(NOTEBOOKS, "smoke", ["01", "06"], values))}
    assert len(trials) > 2
    # As if all had run: empty files stand for what the jobs write, and only their dates are set.
    files = [f"results/{trial}.json" for trial in trials] + [
        f"report/{number}/outcomes.json" for number in ("01", "06")
    ]
    for file in (*files, "report/index.html"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text("{}")
    settings = {"only": "01 06", "per_job": 1, "parameters": values}
    jobs = count_jobs(tmp_path, settings, "--touch", "--forceall")
    assert jobs == {"train": len(trials), "notebook": 2, "report": 1, "total": len(trials) + 3}
    lines = [json.loads(line) for line in (tmp_path / "report" / "plan.jsonl").read_text().splitlines()]
    assert {line["id"] for line in lines if "id" in line} == trials
    # A place for figures is no part of a trial; a second seed has trials of its own, and leaves the first one's.
    # Several in a job: what is trained already needs none, and the others of its seed share some.
    values |= {"figures_dir": "figures", "seeds": [0, 1]}
    gone = sorted(trials)[0]
    (tmp_path / "results" / f"{gone}.json").unlink()
    first = [line for line in lines if "id" in line]
    kept = sum(line["keep_model"] for line in first)
    del settings["per_job"]  # twelve, the default of the smoke size
    jobs = count_jobs(tmp_path, settings, "--dry-run", "--quiet", "rules")
    sets = sum(math.ceil(count / 12) for count in (kept, len(first) - kept))
    assert 2 <= sets < len(trials)
    assert jobs == {"train": 1 + sets, "notebook": 2, "report": 1, "total": 4 + sets}


def test_jobs_of_the_snakefile_get_every_parameter_also_empty_ones_and_those_with_blanks(tmp_path):
    values = {"seeds": [0], "schemes": ["float", "gsb"], "figures_dir": "my figures", "changes": "", "updates": 3}
    folder = tmp_path / "a folder"
    folder.mkdir()
    settings = {"only": "06", "parameters": values, "results": "my results", "out": "it's a report"}
    shown = snakemake(folder, settings, "--dry-run", "--printshellcmds")
    commands = [shlex.split(line) for line in shown.splitlines() if " -m binvit " in line]
    (notebook,) = [command[3:] for command in commands if "reproduce" in command]
    given = {name: value for option, name, value in zip(notebook, notebook[1:], notebook[2:], strict=False)
             if option == "-p"}  # fmt: skip
    (job,) = plan(NOTEBOOKS, "smoke", ["06"], values)
    wanted = {**dataclasses.asdict(job)["values"], "results_dir": str(folder / "my results")}
    assert {name: yaml.safe_load(text) or "" for name, text in given.items()} == wanted
    assert notebook[notebook.index("--out") + 1] == "it's a report/06"
    for command in commands:
        if "train" in command:
            assert command[command.index("--trial") + 1] == "it's a report/plan.jsonl"
            assert any(word.startswith("--id=gsb-") or word.startswith("--id=float-") for word in command)
            assert command[command.index("--out") + 1] == str(folder / "my results")


def test_a_job_of_the_snakefile_owns_no_result(tmp_path):
    # What a job owns is deleted when it fails and before it runs again, with all that had finished.
    rules = (NOTEBOOKS / "Snakefile").read_text(encoding="utf-8")
    outputs = re.findall(r"^rule (\w+):\n(?:.+\n)*?    output:\n +(.*)\n", rules, re.MULTILINE)
    assert outputs[:2] == [("report", 'f"{OUT}/index.html",'), ("train", 'touch(f"{RESULTS}/.trained/{{set}}"),')]
    assert len(outputs) == 3
