"""A sample of archived trials trained again, as `binvit reproduce` does it."""

import json
import time

import archive_maker
import pandas as pd
import pytest
from click.testing import CliRunner

from binvit.__main__ import cli
from binvit.lab.experiments import gsb_ablation, information_loss
from binvit.lab.experiments.design import plan
from binvit.lab.notebooks import grid, published
from binvit.lab.notebooks.plan import Job
from binvit.lab.trials import retrain
from binvit.lab.trials.archive import add
from binvit.lab.trials.measurements import add_measurements
from binvit.lab.trials.pool import run_trials
from binvit.lab.trials.store import read_results, write_result

TINY = {"schemes": ["float"], "biased": False, "seeds": [0, 1], "samples_per_class": 8, "epochs": 2}


@pytest.fixture
def job(tmp_path, monkeypatch):
    """A job of a notebook whose trials are archived; what is trained is trained in this process."""
    monkeypatch.setattr(retrain, "cores", lambda: 1)
    changes = {"changes": "width 16, depth 1, heads 2, eval_every 2"}
    (job,) = archive_maker.jobs(tmp_path / "archive", ["04"], **TINY, **changes)
    run_trials([run.trial for run in grid.notebook_runs(job)], tmp_path / "results", progress=False)
    add(read_results(tmp_path / "results")[0], tmp_path / "archive")
    return job


def test_archived_trials_are_trained_from_nothing_and_agree(job, tmp_path):
    assert {item.notebook for item in published.archived_trials([job])} == {"04"}
    table = published.check_sample([job], tmp_path / "out")
    assert table["verdict"].tolist() == ["identical"] * 2
    assert len(list((tmp_path / "out" / "retrained").glob("*.json"))) == 2
    assert len(published.check_sample([job], tmp_path / "out", count=1)) == 1
    assert len(pd.read_csv(tmp_path / "out" / "retrained.csv")) == 1
    assert published.check_sample([job], tmp_path / "out", count=0).empty
    assert not (tmp_path / "out" / "retrained.csv").exists()


def command(job, tmp_path, monkeypatch):
    """Return a command that trains the job's trials again, but runs no notebook."""
    monkeypatch.setattr("binvit.lab.notebooks.run.run", lambda jobs, out, processes: [])
    monkeypatch.setattr("binvit.lab.trials.train_trial.compile_kernels", lambda: 0.0)
    options = [text for name, value in dict(job.values).items() for text in ("-p", name, str(value).replace("'", ""))]
    return ["reproduce", "--only", "04", "--out", str(tmp_path / "out"), *options]


def test_what_notebooks_have_trained_counts(job, tmp_path):
    """But not what those that read the archive have in the same folder."""
    results = tmp_path / "results"
    first = Job(archive_maker.NOTEBOOKS / "01_quickstart.ipynb", {"seeds": [0, 1], "results_dir": str(results)})
    jobs = [first, Job(job.notebook, dict(job.values) | {"results_dir": str(results)})]
    assert len(read_results(results)[0]) == 2
    assert published.seconds_trained(jobs, 0.0) == 0.0
    for run in grid.notebook_runs(first)[:4]:
        write_result(archive_maker.result(run.trial, seconds=3.0), results)
    assert published.seconds_trained(jobs, 0.0) == 4 * 3.0 / 2
    assert published.seconds_trained(jobs, time.time() + 60) == 0.0


def test_only_what_tells_something_counts_as_agreement(job, tmp_path, monkeypatch):
    path = tmp_path / "archive" / "trials" / "digits.jsonl"
    line = json.loads(path.read_text().splitlines()[0]) | {"test_accuracy": 0.5, "cpu": "another"}
    path.write_text(json.dumps(line) + "\n")
    found = CliRunner().invoke(cli, command(job, tmp_path, monkeypatch))
    assert found.exit_code == 0
    assert "0 of 1 trials that were trained again agree; of 1 the seeds tell too little." in found.output


def test_another_result_ends_with_exit_code_1(job, tmp_path, monkeypatch):
    path = tmp_path / "archive" / "trials" / "digits.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(line | {"test_accuracy": 0.987}) + "\n" for line in lines))
    found = CliRunner().invoke(cli, command(job, tmp_path, monkeypatch))
    assert found.exit_code == 1
    assert "does not give what the archive says: no: it differs, though CPU" in found.output
    assert "0 of 2 trials that were trained again agree" in found.output
    assert "98.70" in (tmp_path / "out" / "index.html").read_text()


def test_what_is_measured_on_models_is_archived_and_read_back(tmp_path):
    few = {"seeds": [0], "samples_per_class": 8, "epochs": 1, "train_each": False, "measured": 16}
    (job,) = archive_maker.jobs(tmp_path, ["03"], **few)
    runs, results = archive_maker.training_runs(job), tmp_path / "results"
    trained = plan.train(runs, results, progress=False)
    add(read_results(results)[0], tmp_path)
    assert published.take_measurements([job], results, tmp_path) == 1
    assert published.take_measurements([job], results, tmp_path) == 0
    options = {"images": 16, "thresholds": (0.7, 0.9), "reduce": "row", "least_squares": True}
    made = information_loss.measure(runs, trained, results, **options)
    read = information_loss.measure(runs, trained, results, **options, archive=tmp_path)
    pd.testing.assert_frame_equal(read, made[read.columns])
    assert set(information_loss.LOSSES) & set(made) == set(information_loss.LOSSES) & set(read)
    assert information_loss.measure(runs, trained, results, **options | {"images": 17}, archive=tmp_path).empty
    drawn = {path.name for path in (tmp_path / "measurements").glob("*.png")}
    assert drawn == {"03_attention_maps.png", "03_distributions.png"}


def test_the_dependence_on_the_batch_is_read_by_the_trial(tmp_path):
    rows = [{"id": "a", "largest_change": 1 / 3, "flipped": 0.5, "images": 256}]
    add_measurements(tmp_path, gsb_ablation.BATCHES_TABLE, pd.DataFrame(rows), ["id"])
    trials = [(gsb_ablation.GSB, "a"), ("reduction: over a row", "a"), ("reduction: over a head", "b")]
    table = pd.DataFrame(trials, columns=["condition", "id"]).assign(data="digits", seed=0)
    (row,) = gsb_ablation.archived_batches(table, tmp_path).to_dict("records")
    assert (row["factor"], row["level"], row["largest_change"]) == ("reduction", "over a row", 1 / 3)
    assert gsb_ablation.archived_batches(table, tmp_path / "none").empty
