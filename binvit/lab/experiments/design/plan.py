"""Experiments: conditions that are trained on the same images with the same seeds, their table and their claims."""

import dataclasses
import functools
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from binvit.config import freeze
from binvit.lab.analysis.statistics import MEASURED
from binvit.lab.data.datasets import ImageData, load_data
from binvit.lab.experiments.design.parse import parse_changes, parse_images, refuse_twice
from binvit.lab.figures.style import BIASED as WITH_BIAS
from binvit.lab.project import folder
from binvit.lab.training.recipe import Recipe
from binvit.lab.training.recipes import recipe as get_recipe
from binvit.lab.trials.archive import counted_data, read_data
from binvit.lab.trials.pool import read_trials, run_trials
from binvit.lab.trials.trial import TEACHER_FIELDS, Trial
from binvit.lab.trials.tune import equal_terms


@dataclass(frozen=True)
class Condition:
    """One thing that an experiment compares.

    Args:
        name: what tables and figures call it.
        scheme: a name of `binvit.list_schemes`.
        scheme_options: fields of the scheme that differ.
        recipe_options: fields of the recipe that differ, or a function of the recipe that returns them.
    """

    name: str
    scheme: str
    scheme_options: Mapping[str, Any] = field(default_factory=dict)
    recipe_options: Mapping[str, Any] | Callable[[Recipe], Mapping[str, Any]] = field(default_factory=dict)


ALL = "all conditions"
BIASES = ("none", "relative", "full")
BOTH_BIASES = ("float", "elastic", "gsb", "reactnet", "bivit")  # shown with and without the bias of the map


def with_bias(scheme: str, bias: str = "none") -> Condition:
    """Return a scheme on equal terms: with a learned bias of the map or without one, and no limit of activations.

    What was published with a scheme does not matter here: a comparison gives such extras to all schemes or to none.

    Args:
        scheme: a name of `binvit.list_schemes`.
        bias: "none", "relative" or "full", as the scheme's field attention_bias.
    """
    return Condition(scheme + (WITH_BIAS if bias != "none" else ""), scheme, equal_terms(bias))


@dataclass(frozen=True)
class Run:
    """A trial with the names it has in the experiment's table."""

    condition: str
    data: str
    trial: Trial
    keep_model: bool = False
    """Whether the experiment looks into the trained model."""


def plan(
    conditions: Iterable[Condition],
    images: str,
    seeds: Sequence[int],
    recipe: str = "smoke",
    epochs: int = 0,
    samples_per_class: int = 0,
    changes: str = "",
    data_dir: str | Path | None = None,
    keep_models: Container[str] = (),
) -> list[Run]:
    """Make the trials of an experiment: every condition on all images with every seed.

    Options that say what the scheme or the recipe says anyway are left out, all but a rate, so that the same training
    has the same trial in every experiment, and is read back instead of run again.

    Args:
        conditions: what is compared.
        images: a text that `parse_images` understands.
        seeds: one training per seed; differences are paired by them.
        recipe: of images that name none.
        epochs: passes over the training images; 0 as the recipe says.
        samples_per_class: training images of each class, of images that name no number; 0 takes all.
        changes: of the recipe, for all conditions; a text that `parse_changes` understands.
        data_dir: folder of data sets that are files.
        keep_models: names of the conditions whose trained models are kept.

    Returns:
        The trials in the order of images, conditions and seeds.

    Raises:
        ValueError: a name is unknown, an option is wrong, or two conditions or images have the same name.
    """
    conditions, chosen = list(conditions), parse_images(images)
    refuse_twice([condition.name for condition in conditions], "conditions")
    runs = []
    for part in chosen:
        base = get_recipe(part.recipe or recipe)
        shared = parse_changes(changes) | ({"epochs": epochs} if epochs else {})
        given = dataclasses.replace(base, **shared)
        for condition in conditions:
            own = condition.recipe_options
            own = own(given) if callable(own) else own
            plain = Trial(part.dataset, condition.scheme, base.name)
            learns = {name: {**shared, **own}.get(name, getattr(base, name)) for name in ("distillation", "similarity")}
            dropped = TEACHER_FIELDS if learns == {"distillation": "none", "similarity": 0} else ()  # others have one
            common = {name: value for name, value in shared.items() if name not in dropped}
            options: dict[str, Any] = {
                "scheme_options": changed(condition.scheme_options, plain.get_scheme()),
                "recipe_options": changed({**common, **own}, base),
            }
            for seed in seeds[: part.seeds]:
                trial = dataclasses.replace(
                    plain,
                    seed=seed,
                    samples_per_class=part.samples_per_class or samples_per_class or None,
                    root=str(data_dir) if data_dir else None,
                    **options,
                )
                runs.append(Run(condition.name, part.title, trial, condition.name in keep_models))
    return runs


def notebook_runs(conditions: Iterable[Condition], p: Any, keep_models: Container[str] = ()) -> list[Run]:
    """Make the trials of a notebook's conditions from its checked parameters, as `plan` does."""
    changes = getattr(p, "changes", "")
    return plan(
        conditions, p.dataset, p.seeds, p.recipe, p.epochs, p.samples_per_class, changes, data_dir(p), keep_models
    )


def data_dir(p: Any) -> Path | None:
    """Return the folder of a notebook's data sets, None if its parameters name none."""
    return folder(p.data_dir) if p.data_dir else None


def loader(p: Any) -> Callable[..., ImageData]:
    """Return what loads the images that a notebook counts: blank ones if they are absent and its archive knows them."""
    return functools.partial(counted_data, archive=archive) if (archive := archive_dir(p)) else load_data


def chance(runs: Sequence[Run], load: Callable[..., ImageData] = load_data) -> dict[str, float]:
    """Return the accuracy of guessing by the name of the images; those that nobody knows are left out.

    Args:
        runs: the result of `plan`.
        load: what loads the images.
    """
    found = {}
    for data, trial in {run.data: run.trial for run in reversed(runs)}.items():
        with suppress(FileNotFoundError):  # without images and archived trials there is nothing to compare with it
            images = load(trial.dataset, root=trial.root, image_size=trial.get_recipe().image_size)
            found[data] = 1 / len(images.classes)
    return found


def archive_dir(p: Any) -> Path | None:
    """Return the folder of the archive that a notebook reads instead of training, None if it trains.

    Raises:
        FileNotFoundError: there is no such archive.
    """
    if not p.archive:
        return None
    archive = folder(p.archive)
    read_data(archive)
    return archive


def changed(options: Mapping[str, Any], record: Any) -> dict[str, Any]:
    """Return the options that differ from a scheme or a recipe; unknown names are kept for the trial to refuse.

    A rate is kept, too: a trial that names none takes the tuned one, whatever its recipe says.
    """
    return {
        name: value
        for name, value in options.items()
        if name == "lr" or freeze(value) != freeze(getattr(record, name, options))
    }


def train(
    runs: Sequence[Run],
    results_dir: str | Path,
    jobs: int = 1,
    progress: bool = True,
    archive: str | Path | None = None,
) -> pd.DataFrame:
    """Train what has not been trained yet, or read what an archive has, and return the experiment's table.

    Args:
        runs: the result of `plan`.
        results_dir: folder of the results.
        jobs: trainings side by side.
        progress: show a progress bar.
        archive: folder of archived trials; nothing is trained then, and runs that are not there have no row
            (`not_run` names them).

    Returns:
        One row per run: condition and data, then the columns of `run_trials`, then chance, the accuracy of guessing.
    """
    if archive:
        return read_archive(runs, archive)
    kept = [run for run in runs if run.keep_model]
    others = [run for run in runs if not run.keep_model]
    parts = []
    for part, keep in ((kept, True), (others, False)):  # in this order: a trial of both kinds is trained once
        if part:
            table = run_trials([run.trial for run in part], results_dir, jobs, keep, progress)
            table.insert(0, "data", [run.data for run in part])
            table.insert(0, "condition", [run.condition for run in part])
            parts.append(table)
    table = pd.concat(parts, ignore_index=True)
    order = {(run.condition, run.data, run.trial.seed): row for row, run in enumerate(runs)}
    rows = [order[row] for row in zip(table["condition"], table["data"], table["seed"], strict=True)]
    table = table.iloc[pd.Series(rows).argsort()].reset_index(drop=True)
    return table.assign(chance=table["data"].map(chance(runs)))


def read_archive(runs: Sequence[Run], archive: str | Path) -> pd.DataFrame:
    """Return the table of an experiment as far as an archive holds its trials.

    Args:
        runs: the result of `plan`.
        archive: folder of archived trials.

    Returns:
        The table of `train` without the runs that are not there.
    """
    table = read_trials([run.trial for run in runs], folder(archive))
    table.insert(0, "data", [run.data for run in runs])
    table.insert(0, "condition", [run.condition for run in runs])
    measured = [*MEASURED, "clean_train_accuracy", "memorized", "parameters", "id"]
    table = table.reindex(columns=list(dict.fromkeys([*table.columns, *measured])))
    guessing = chance(runs, functools.partial(counted_data, archive=folder(archive)))
    return table.assign(chance=table["data"].map(guessing))[table["id"].notna()].reset_index(drop=True)


def require_known(runs: list[Run], images: str, archive: str | Path | None) -> list[Run]:
    """Return the runs, unless there is none because an archive knows none of the images.

    Raises:
        ValueError: there is none.
    """
    if not runs:
        raise ValueError(
            f"The archive {archive} knows none of the images {images!r}; with an empty archive all is trained."
        )
    return runs


def not_run(runs: Sequence[Run], table: pd.DataFrame, images: str = "") -> str:
    """Return what an experiment lacks, as text: conditions without trials, and how many trials others have.

    Args:
        runs: the result of `plan`.
        table: the result of `train`.
        images: a text that `parse_images` understands, if there may be images without a run.

    Returns:
        A line for each kind of images that is not complete, or a sentence that all are.
    """
    counts = table.groupby(["data", "condition"]).size()
    asked = pd.Series([(run.data, run.condition) for run in runs]).value_counts(sort=False)
    lines = {part.title: ALL for part in (parse_images(images) if images else [])}
    for data in dict.fromkeys(run.data for run in runs):
        wanted = {condition: n for (title, condition), n in asked.items() if title == data}
        got = {condition: int(counts.get((data, condition), 0)) for condition in wanted}
        parts = [] if any(got.values()) else [ALL]
        parts += [_listed(name for name in wanted if not got[name])] if any(got.values()) else []
        for have, n in dict.fromkeys((got[name], wanted[name]) for name in wanted if 0 < got[name] < wanted[name]):
            names = _listed(name for name in wanted if (got[name], wanted[name]) == (have, n))
            parts.append(f"{n - have} of {n} trials of {names}")
        lines[data] = "; ".join(filter(None, parts))
    lacking = [f"Not run on {data}: {text}." for data, text in lines.items() if text]
    return "\n".join(lacking) or f"All {len(runs)} trials are there."


def _listed(names: Iterable[str]) -> str:
    """Return names side by side, those in quotes that hold a comma themselves."""
    return ", ".join(f'"{name}"' if "," in name else name for name in names)
