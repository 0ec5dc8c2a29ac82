"""Experiments: conditions that are trained on the same images with the same seeds, their table and their claims."""

import dataclasses
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from binvit.files import atomic_write
from binvit.lab.claims import Claim
from binvit.lab.figures import dots
from binvit.lab.notebook import folder
from binvit.lab.recipes import Recipe, freeze
from binvit.lab.recipes import recipe as get_recipe
from binvit.lab.runner import run_trials
from binvit.lab.settings import parse_changes, parse_images, refuse_twice
from binvit.lab.style import save_figure, styled
from binvit.lab.trials import Trial


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


@dataclass(frozen=True)
class Run:
    """A trial with the names it has in the experiment's table."""

    condition: str
    data: str
    trial: Trial


def plan(
    conditions: Iterable[Condition],
    images: str,
    seeds: Sequence[int],
    recipe: str = "smoke",
    epochs: int = 0,
    samples_per_class: int = 0,
    changes: str = "",
    data_dir: str | Path | None = None,
) -> list[Run]:
    """Make the trials of an experiment: every condition on all images with every seed.

    Options that say what the scheme or the recipe says anyway are left out, so that the same training has the same
    trial in every experiment, and is read back instead of run again.

    Args:
        conditions: what is compared.
        images: a text that `parse_images` understands.
        seeds: one training per seed; differences are paired by them.
        recipe: of images that name none.
        epochs: passes over the training images; 0 as the recipe says.
        samples_per_class: training images of each class, of images that name no number; 0 takes all.
        changes: of the recipe, for all conditions; a text that `parse_changes` understands.
        data_dir: folder of data sets that are files.

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
            options = {
                "scheme_options": _changed(condition.scheme_options, plain.get_scheme()),
                "recipe_options": _changed({**shared, **own}, base),
            }
            for seed in seeds[: part.seeds]:
                trial = dataclasses.replace(
                    plain,
                    seed=seed,
                    samples_per_class=part.samples_per_class or samples_per_class or None,
                    root=str(data_dir) if data_dir else None,
                    **options,
                )
                runs.append(Run(condition.name, part.title, trial))
    return runs


def _changed(options: Mapping[str, Any], record: Any) -> dict[str, Any]:
    """Return the options that differ from a scheme or a recipe; unknown names are kept for the trial to refuse."""
    return {name: value for name, value in options.items() if freeze(value) != freeze(getattr(record, name, options))}


def train(
    runs: Sequence[Run], results_dir: str | Path, jobs: int = 1, keep_models: Container[str] = (), progress: bool = True
) -> pd.DataFrame:
    """Train what has not been trained yet and return the experiment's table.

    Args:
        runs: the result of `plan`.
        results_dir: folder of the results.
        jobs: trainings side by side.
        keep_models: names of the conditions whose trained models are kept.
        progress: show a progress bar.

    Returns:
        One row per run: condition and data, then the columns of `run_trials`.
    """
    kept = [run for run in runs if run.condition in keep_models]
    others = [run for run in runs if run.condition not in keep_models]
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
    return table.iloc[pd.Series(rows).argsort()].reset_index(drop=True)


def averaged(table: pd.DataFrame, keep: str | Sequence[str], value: str = "test_accuracy") -> pd.DataFrame:
    """Average a table over everything but some columns, within each data set and seed.

    What remains has one number per seed, so that intervals and pairs count seeds and nothing else.

    Args:
        table: the result of `train`.
        keep: the columns to compare by.
        value: the column to average.

    Returns:
        The columns kept, data, seed and value.
    """
    keep = [keep] if isinstance(keep, str) else list(keep)
    return table.groupby([*keep, "data", "seed"], sort=False, as_index=False, dropna=False)[value].mean()


def for_each_data(table: pd.DataFrame, check: Callable[[pd.DataFrame], Sequence[Claim]]) -> list[Claim]:
    """Check the same claims on all images one after the other; with several, each sentence names its own.

    Args:
        table: the result of `train`.
        check: rows of one kind of images -> claims.

    Returns:
        All claims, those of the first images first.
    """
    parts = list(table.groupby("data", sort=False))
    if len(parts) == 1:
        return list(check(table))
    named = lambda claim, data: dataclasses.replace(claim, sentence=f"On {data}: {claim.sentence}")  # noqa: E731
    return [named(claim, data) for data, part in parts for claim in check(part)]


def all_of(sentence: str, parts: Sequence[Claim]) -> Claim:
    """Check the claim that several claims hold at once.

    Args:
        sentence: what is claimed.
        parts: the single claims.

    Returns:
        "no" if one of them fails, else "undecided" if one of them is, else "yes"; the evidence names those that decide.
    """
    for verdict, words in (("no", ("fails", "fail")), ("undecided", ("is undecided", "are undecided"))):
        found = [part for part in parts if part.verdict == verdict]
        if found:
            word = words[len(found) > 1]
            return Claim(sentence, verdict, f"{len(found)} of {len(parts)} {word}: {found[0].evidence}")
    if not parts:
        return Claim(sentence, "undecided", "nothing to compare was run")
    return Claim(sentence, "yes", "; ".join(part.evidence for part in parts))


def save(directory: str | Path, name: str, figure: Figure | None = None, **tables: pd.DataFrame) -> None:
    """Write a figure as PDF and PNG, and tables as CSV.

    Args:
        directory: folder of the project to write to; nothing is written if it is empty.
        name: the figure's file name without ending.
        figure: what to write.
        **tables: written as NAME_KEY.csv, without an index and without the column root, a folder of this machine.
    """
    if not directory:
        return
    if figure is not None:
        save_figure(figure, name, folder(directory))
    for key, table in tables.items():
        text = table.drop(columns="root", errors="ignore").to_csv(index=False, lineterminator="\n")
        atomic_write(folder(directory) / f"{name}_{key}.csv", text)


@styled
def panels(table: pd.DataFrame, draw: Callable[[pd.DataFrame, Axes], Any], width: float, height: float) -> Figure:
    """Draw one panel for each kind of images, side by side.

    Args:
        table: rows with the column data.
        draw: draws the rows of one kind of images into axes.
        width: of a panel, in inches.
        height: of the figure, in inches.

    Returns:
        The figure; panels are titled if there are several.
    """
    parts = list(table.groupby("data", sort=False))
    fig, axes = plt.subplots(1, len(parts), figsize=(width * len(parts), height), squeeze=False)
    for ax, (data, part) in zip(axes[0], parts, strict=True):
        draw(part, ax)
        if len(parts) > 1:
            ax.set_title(data)
    return fig


def dot_panels(
    summary: pd.DataFrame,
    trials: pd.DataFrame,
    label: str,
    group: str | None = None,
    reference: str | None = None,
    value: str = "test_accuracy",
    sort: bool = True,
    scheme: str | None = None,
    xlabel: str = "test accuracy (%)",
) -> Figure:
    """Draw means as dots with 95 % intervals and single seeds as faint ones, a panel for each kind of images.

    Args:
        summary: means of `statistics.summarize` by data, group and label.
        trials: the single trials, with the same columns and `value`.
        label: the column that names the rows.
        group: a column that puts rows under headings.
        reference: the row whose mean is drawn as a line, if it is there; "0" draws the line at zero.
        value: the column of the single trials to draw.
        sort: put the largest mean on top, within its group.
        scheme: a column that names the scheme whose colour a row has; by default the label, if it names schemes.
        xlabel: what the mean is.

    Returns:
        The figure.
    """
    rows = max(part[label].size + (part[group].nunique() if group else 0) for _, part in summary.groupby("data"))

    def draw(part: pd.DataFrame, ax: Axes) -> None:
        own = trials[trials["data"] == part["data"].iloc[0]]
        line = reference if reference == "0" or reference in set(part[label]) else None
        dots(part, label, group, xlabel, reference=line, trials=own, value=value, sort=sort, scheme=scheme, ax=ax)

    return panels(summary, draw, 6.0, 0.75 + 0.23 * rows)
