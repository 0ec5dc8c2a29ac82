"""Archives of results that nobody trained."""

import hashlib
from pathlib import Path

import pandas as pd

from binvit.lab.notebooks import grid
from binvit.lab.notebooks.plan import Job, plan
from binvit.lab.trials.archive import add
from binvit.lab.trials.store import TrialResult

NUMBERS = ("02", "03", "04", "05", "06", "07", "09")  # of the notebooks that read an archive
NOTEBOOKS = Path(__file__).parents[1] / "notebooks"


def result(trial, accuracy=0.123456789, **fields):
    """Return a result that nobody trained."""
    record = {"stage": 0, "train_loss": 1 / 3, "train_accuracy": 2 / 3, "lr": 1.23456e-5}
    history = [record | {"epoch": epoch + 1, "test_accuracy": accuracy if epoch else None} for epoch in range(3)]
    values = {"clean_train_accuracy": None, "memorized": None, "seconds": 1.5, "parameters": 7, "history": history}
    values |= {"recipe": trial.get_recipe(), "scheme": trial.get_scheme(), "versions": {"torch": "2"}, "threads": 1}
    values |= {"device": "cpu", "cpu": "any", "fingerprint": trial.fingerprint, "id": trial.id}
    return TrialResult(trial, accuracy, 0.5, **(values | fields))


def jobs(archive, numbers=(), **values) -> list[Job]:
    """Return jobs of the committed notebooks that read this archive; by default on digits with three seeds."""
    found = []
    for job in plan(NOTEBOOKS, "archive", numbers):
        given = {"dataset": "digits", "seeds": [0, 1, 2]} | values
        own = given | {"archive": str(archive)} if job.notebook.name[:2] in NUMBERS else {}
        found.append(Job(job.notebook, own))
    return found


def training_runs(job: Job) -> list:
    """Return the runs of a job as they are where everything is trained."""
    return grid.notebook_runs(Job(job.notebook, dict(job.values) | {"archive": ""}))


def fill(archive, made: list[Job], keep=lambda run: True) -> list[TrialResult]:
    """Archive a made-up result for every run of notebooks that is to be kept; accuracies depend on the condition."""
    results = {}
    for job in made:
        for run in training_runs(job):
            if keep(run):
                digest = hashlib.sha256(run.condition.encode()).digest()
                accuracy = 0.5 + 0.4 * digest[0] / 255 + 0.01 * run.trial.seed + 0.004 * (digest[run.trial.seed] % 3)
                memorized = (
                    {"memorized": accuracy / 2, "clean_train_accuracy": accuracy} if run.trial.label_noise else {}
                )
                results[run.trial.id] = result(run.trial, accuracy, **memorized)
    add(results.values(), archive)
    return list(results.values())


def losses(archive, ids) -> None:
    """Archive made-up measurements of float models."""
    from binvit.lab.experiments.information_loss import CASES, LOSSES_TABLE
    from binvit.lab.trials.measurements import add_measurements

    told = {"images": 128, "thresholds": "0.7 0.9", "reduce": "row", "least_squares": True}
    rows = [
        {"tensor": tensor, "binarizer": binarizer, "accuracy_drop": 0.1 + 0.01 * number, "relative_error": 0.5}
        | {"cosine": 0.9, "entropy": 0.8 + number, "id": identity}
        | told
        for identity in ids
        for number, (tensor, binarizer) in enumerate(CASES)
    ]
    add_measurements(archive, LOSSES_TABLE, pd.DataFrame(rows), ["id", "tensor", "binarizer"])
