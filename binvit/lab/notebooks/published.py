"""What is published from the archive: measurements taken, figures and tables redrawn, trials that can be checked."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd

from binvit.files import atomic_write
from binvit.lab.experiments import efficiency
from binvit.lab.experiments.design.plan import archive_dir
from binvit.lab.notebooks.first_page import around_results, results_table, write_results
from binvit.lab.notebooks.grid import notebook_runs
from binvit.lab.notebooks.plan import Job, checked_values
from binvit.lab.notebooks.report import RETRAINED
from binvit.lab.project import folder
from binvit.lab.trials.archive import find, is_present, read_data
from binvit.lab.trials.retrain import Archived, choose, retrain
from binvit.lab.trials.store import read_result_file, result_path
from binvit.lab.trials.trial import Trial, teacher_trial


def reading(jobs: Sequence[Job]) -> Iterator[tuple[Job, Any, Path]]:
    """Return the jobs that read an archive instead of training, with their parameters and the archive's folder.

    Args:
        jobs: notebooks with their parameters.
    """
    for job in jobs:
        p = checked_values(job)
        if getattr(p, "archive", "") and hasattr(p, "seeds"):
            archive = archive_dir(p)
            assert archive is not None
            yield job, p, archive


def archived_trials(jobs: Sequence[Job]) -> list[Archived]:
    """Return the archived trials that notebooks show and whose images are here, so that they can be trained again.

    Args:
        jobs: notebooks with their parameters.
    """
    found = []
    for job, _, archive in reading(jobs):
        chances = {data.fingerprint: 1 / int(data.classes) for data in read_data(archive) if int(data.classes or 0)}
        for run in notebook_runs(job):
            result = find(run.trial, archive)
            if result is not None and is_present(run.trial.dataset, run.trial.root):
                cost = result.seconds * result.threads + _teacher(run.trial, archive, result.seconds * result.threads)
                chance = chances.get(result.fingerprint, 0.0)
                found.append(Archived(job.notebook.name[:2], run.trial, result, cost, chance))
    return found


def _teacher(trial: Trial, archive: Path, otherwise: float) -> float:
    if not trial.get_recipe().trains_teacher:
        return 0.0
    teacher = find(teacher_trial(trial), archive)
    return otherwise if teacher is None else teacher.seconds * teacher.threads


def seconds_trained(jobs: Sequence[Job], since: float) -> float:
    """Return how long notebooks have trained, in seconds on two cores, by the results that they have written.

    Args:
        jobs: notebooks with their parameters.
        since: seconds of the epoch; results that were there before do not count.

    Raises:
        ValueError: a result that was written meanwhile is damaged.
    """
    from_archive = {job.notebook for job, _, _ in reading(jobs)}
    paths = {
        result_path(run.trial, folder(values.results_dir))
        for job in jobs
        if job.notebook not in from_archive and hasattr(values := checked_values(job), "results_dir")
        for run in notebook_runs(job)
    }
    results = [read_result_file(path) for path in paths if path.is_file() and path.stat().st_mtime >= since]
    return sum(result.seconds * result.threads for result in results) / 2


def check_sample(
    jobs: Sequence[Job],
    out: Path,
    seed: int = 0,
    count: int | None = None,
    progress: bool = False,
    trained: float = 0.0,
) -> pd.DataFrame:
    """Train a sample of the archived trials of notebooks again, and write how they compare.

    Args:
        jobs: notebooks with their parameters; those that read no archive have no sample.
        out: folder of the report; the trials go to its folder retrained, the table to retrained.csv.
        seed: decides the sample.
        count: how many; None takes one for each notebook and goes on until training has taken minutes, as
            `retrain.retrain` says.
        progress: show a progress bar.
        trained: seconds on two cores that the notebooks themselves have trained in, which count to these minutes.

    Returns:
        The table of `retrain.retrain`; without rows if there is no sample.
    """
    (out / RETRAINED).unlink(missing_ok=True)  # of an earlier sample, which must not pass for this one
    candidates = archived_trials(jobs) if count != 0 else []
    chosen, further = choose(candidates, seed, count)
    table = retrain(chosen, [item.result for item in candidates], out / "retrained", progress, further, trained)
    if len(table):
        atomic_write(out / RETRAINED, table.to_csv(index=False, lineterminator="\n"))
    return table


def take_measurements(jobs: Sequence[Job], results_dir: str | Path, archive: str | Path) -> int:
    """Archive what notebooks measure on trained models, for the models that a results folder keeps.

    Args:
        jobs: notebooks with their parameters.
        results_dir: folder of results and models.
        archive: folder of the archive.

    Returns:
        How many models, or sets of images, were measured.
    """
    count = 0
    for job, p, _ in reading(jobs):
        experiment = importlib.import_module(f"binvit.lab.experiments.{job.notebook.stem[3:]}")
        if hasattr(experiment, "take_measurements"):
            count += experiment.take_measurements(p, results_dir, archive)
    return count


def redraw(job: Job, out: str | Path) -> dict[str, Any]:
    """Run a notebook's cells here, without a kernel, and have it write its figures and tables.

    Args:
        job: a notebook with its parameters.
        out: folder of the figures.

    Returns:
        The names that its cells have left, such as the claims as ``found``.
    """
    names: dict[str, Any] = {"__name__": "__main__", "display": lambda *objects: None}
    before = plt.get_backend()
    plt.switch_backend("Agg")
    try:
        for cell in json.loads(job.notebook.read_text(encoding="utf-8"))["cells"]:
            if cell["cell_type"] == "code":
                with contextlib.redirect_stdout(io.StringIO()):
                    exec("".join(cell["source"]), names)
                if "parameters" in cell["metadata"].get("tags", []):
                    names |= dict(job.values, figures_dir=str(out))
                plt.close("all")
    finally:
        plt.switch_backend(before)
    return names


def redraw_all(jobs: Sequence[Job], archive: Path, out: Path, readme: Path) -> dict[str, dict[str, Any]]:
    """Draw the figures and tables of all notebooks that read an archive, and those of measured times.

    Args:
        jobs: notebooks with their parameters.
        archive: folder of the archive.
        out: folder of the figures.
        readme: file whose table of results is written.

    Returns:
        Number of a notebook -> the names that its cells have left.

    Raises:
        FileNotFoundError: there is no such archive or file.
        ValueError: the file has no place for the table.
    """
    read_data(archive)
    around_results(readme)  # before minutes of drawing
    found: dict[str, Any] = {}
    for job, _, _ in reading(jobs):
        values = dict(job.values, archive=str(archive.absolute()))
        found[job.notebook.name[:2]] = redraw(Job(job.notebook, values), out.absolute())
    efficiency.redraw(archive, out)
    plt.close("all")
    write_results(readme, results_table(found))
    return found
