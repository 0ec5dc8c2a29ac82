"""The trials of notebooks as a grid: what each one is called and costs, written for clusters."""

from __future__ import annotations

import importlib
import inspect
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pandas as pd

from binvit.config import read_json, show
from binvit.files import atomic_write
from binvit.lab.data.datasets import ImageData, blank_data, load_data
from binvit.lab.data.fingerprint import require_present
from binvit.lab.experiments.design.plan import Run, archive_dir
from binvit.lab.notebooks.plan import Job, checked_values
from binvit.lab.trials.archive import counted_data
from binvit.lab.trials.cost import Cost, cost
from binvit.lab.trials.trial import Trial, teacher_trial


@dataclass(frozen=True)
class Planned:
    """A trial of a grid.

    Args:
        trial: the configuration.
        id: its identity; None where its images are not there.
        notebooks: numbers of the notebooks that look at it.
        keep_model: whether one of them looks into the model, or a student learns from it.
        needs: the teacher's identity, if there is one that is trained first.
        cost: what it takes.
    """

    trial: Trial
    id: str | None
    notebooks: tuple[str, ...]
    keep_model: bool
    needs: tuple[str, ...]
    cost: Cost

    def to_line(self) -> str:
        """Return the trial's line of a plan."""
        values = {"id": self.id, "notebooks": self.notebooks, "keep_model": self.keep_model, "needs": self.needs}
        return json.dumps(values | vars(self.cost) | {"trial": self.trial.to_dict()})


def notebook_runs(job: Job) -> list[Run]:
    """Return what a notebook trains with the parameters of a job.

    It is what the function `runs` of the experiment with the notebook's name returns; without such a function a
    notebook trains nothing. Blank images stand for official data sets that are not there.
    """
    name = f"binvit.lab.experiments.{job.notebook.stem[3:]}"
    if find_spec(name) is None or not hasattr(experiment := importlib.import_module(name), "runs"):
        return []
    p = checked_values(job)
    counts = "load" in inspect.signature(experiment.runs).parameters and not p.archive  # which has its own counts
    return experiment.runs(p, load=_images) if counts else experiment.runs(p)


def _images(
    dataset: str,
    samples_per_class: int | None = None,
    *,
    root: str | Path | None = None,
    image_size: int | None = None,
    archive: Path | None = None,
) -> ImageData:
    if archive is not None and not _is_there(dataset, root):
        return counted_data(dataset, samples_per_class, root=root, image_size=image_size, archive=archive)
    load = load_data if _is_there(dataset, root) else blank_data
    return load(dataset, samples_per_class, root=root, image_size=image_size)


def _is_there(dataset: str, root: str | Path | None) -> bool:
    try:
        require_present(dataset, root)
    except FileNotFoundError:
        return False
    return True


def grid(jobs: Iterable[Job]) -> list[Planned]:
    """Return every trial of notebooks once, teachers before their students.

    Args:
        jobs: notebooks with their parameters, as `plan` returns them.

    Raises:
        ValueError: a notebook refuses a value.
        FileNotFoundError: images are not there, and their number is not known.
    """
    found: dict[Any, Planned] = {}
    loaded: dict[Any, ImageData] = {}

    def add(trial: Trial, number: str, keep_model: bool, archive: Path | None) -> str | None:
        recipe = trial.get_recipe()
        needs: tuple[str, ...] = ()
        if recipe.trains_teacher:
            teacher = add(teacher_trial(trial), number, True, archive)
            needs = () if teacher is None else (teacher,)
        identity = trial.id if _is_there(trial.dataset, trial.root) else None
        key = identity or trial
        if (known := found.get(key)) is not None:
            keep_model = keep_model or known.keep_model
            numbers = tuple(dict.fromkeys((*known.notebooks, number)))
        else:
            numbers = (number,)
        images = trial.dataset, trial.samples_per_class, trial.root, recipe.image_size, archive
        if images not in loaded:
            loaded[images] = _images(*images[:2], root=images[2], image_size=images[3], archive=archive)
        price = cost(trial, loaded[images], keep_model)
        found[key] = Planned(known.trial if known else trial, identity, numbers, keep_model, needs, price)
        return identity

    for job in jobs:
        runs = notebook_runs(job)
        archive = archive_dir(p) if runs and hasattr(p := checked_values(job), "archive") else None
        for run in runs:
            add(run.trial, job.notebook.name[:2], run.keep_model, archive)
    return list(found.values())


def totals(trials: Sequence[Planned], teraflops: float) -> pd.DataFrame:
    """Return what the trials of each notebook cost, and all of them; a trial of several notebooks counts once in all.

    Args:
        trials: the result of `grid`.
        teraflops: 1e12 operations per second that one GPU sustains.

    Returns:
        One row per notebook and "all": trials, epochs, FLOP, GPU hours and bytes.
    """
    numbers = sorted({number for planned in trials for number in planned.notebooks})
    parts = {number: [planned for planned in trials if number in planned.notebooks] for number in numbers}
    rows = {}
    for name, part in (parts | {"all": list(trials)}).items():
        flop = sum(planned.cost.flop for planned in part)
        rows[name] = {
            "trials": len(part),
            "epochs": sum(planned.cost.epochs for planned in part),
            "FLOP": float(flop),
            "GPU hours": flop / (3600e12 * teraflops),
            "bytes": sum(planned.cost.bytes for planned in part),
        }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("notebook")


def written(table: pd.DataFrame) -> str:
    """Return the table of `totals` as text."""
    forms = {"FLOP": "{:.2e}".format, "GPU hours": "{:,.1f}".format, "bytes": "{:,d}".format}
    return table.to_string(formatters=forms)


def write_plan(path: Path, jobs: Sequence[Job], trials: Sequence[Planned]) -> bool:
    """Write a plan: a line for each notebook with its parameters, then a line for each trial.

    Args:
        path: the file; one that says the same already is left as it is.
        jobs: notebooks with their parameters.
        trials: the result of `grid`.

    Returns:
        Whether the file has changed.

    Raises:
        FileNotFoundError: images are not there, so that trials have no identity.
    """
    for planned in trials:
        if planned.id is None:
            require_present(planned.trial.dataset, planned.trial.root)
    heads = [{"notebook": job.notebook.name[:2], "size": job.size, "parameters": dict(job.values)} for job in jobs]
    text = "".join(f"{line}\n" for line in (*map(json.dumps, heads), *(planned.to_line() for planned in trials)))
    if path.is_file() and path.read_text(encoding="utf-8") == text:
        return False
    atomic_write(path, text)
    return True


def read_planned(path: Path, identity: str | None = None) -> tuple[Trial, bool]:
    """Read a trial from a file: a plan, a result or a trial as JSON.

    Args:
        path: the file.
        identity: which trial of a plan; None takes the only one.

    Returns:
        The trial, and whether its model is kept, which a plan alone can deny.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds no such trial, or the images have changed since it was planned.
    """
    if not path.is_file():
        raise FileNotFoundError(f"There is no file of trials {path}.")
    found = [entry for entry in _entries(path) if identity in (None, entry.get("id"))]
    if len(found) != 1:
        which = f"no trial {show(identity)}" if identity else f"{len(found)} trials; name one with --id"
        raise ValueError(f"The file {path} holds {which}.")
    (entry,) = found
    trial = Trial.from_dict(entry.get("trial", entry))
    keep_model = entry.get("keep_model", True)
    if not isinstance(keep_model, bool):
        raise ValueError(f"The trial's keep_model in {path} must be true or false, got {show(keep_model)}.")
    if entry.get("id") not in (None, trial.id):
        raise ValueError(
            f"The trial {show(entry['id'])} of {path} is {trial.id} now: its images, recipe or scheme have changed "
            "since; make the plan anew."
        )
    return trial, keep_model


def _entries(path: Path) -> list[Mapping[str, Any]]:
    """Return the trials of a file, which is one JSON object or a line for each."""
    text = path.read_bytes()
    try:
        values = [read_json(text, str(path))]
    except ValueError:
        values = [read_json(line, str(path)) for line in text.splitlines() if line.strip()]
    entries = [value for value in values if isinstance(value, dict)]
    return [entry for entry in entries if "trial" in entry or "dataset" in entry]
