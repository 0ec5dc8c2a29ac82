"""The same search of the learning rate for every scheme, on validation images."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from binvit.lab.data.sources import data_name
from binvit.lab.training.loop import DIVERGED
from binvit.lab.training.rates import Bias, ChosenRate
from binvit.lab.training.recipes import recipe as get_recipe
from binvit.lab.trials.pool import TrialsFailed, run_trials
from binvit.lab.trials.store import read_result
from binvit.lab.trials.trial import Trial

GRID = (1e-3, 2e-3, 4e-3, 8e-3)
SEEDS = (0, 1)
WIDEST = 3  # how often the grid may grow at each end


def equal_terms(bias: str = "none") -> dict[str, Any]:
    """Return the fields of a scheme that every comparison sets alike, `float` included.

    Args:
        bias: learned bias of the attention map: "none", "full" or "relative".
    """
    return {"attention_bias": bias, "activation_limit": None}


def tune(
    schemes: Iterable[str],
    dataset: str = "digits",
    recipe: str = "smoke",
    *,
    biases: Sequence[Bias] = ("none",),
    grid: Sequence[float] = GRID,
    seeds: Sequence[int] = SEEDS,
    samples_per_class: int | None = None,
    recipe_options: Mapping[str, Any] | None = None,
    root: str | Path | None = None,
    results_dir: str | Path = "results",
    jobs: int = 1,
    progress: bool = True,
    device: str | None = None,
) -> list[ChosenRate]:
    """Choose the learning rate of each scheme by its mean accuracy on validation images.

    All schemes get the same grid and seeds. Where the best rate lies at an end of the grid, the grid grows there by a
    factor of two. The test images belong to the trials' identity, and nothing looks at them. Trials are kept, so that
    an interrupted search goes on.

    Args:
        schemes: names of `binvit.list_schemes`.
        dataset: a name that `load_data` knows.
        recipe: a name of `list_recipes`.
        biases: learned biases of the attention map; each is a search of its own.
        grid: the rates to try first.
        seeds: trainings per rate.
        samples_per_class: training images of each class; None takes all that are not for validation.
        recipe_options: fields of the recipe to change in all trials; a width makes the rate one of that width.
        root: folder of data sets that are files.
        results_dir: folder of the results.
        jobs: trainings side by side.
        progress: show a progress bar.
        device: where to train, as for `run_trials`.

    Returns:
        One rate per scheme and bias, with the accuracies that chose it. A training that diverges counts as accuracy 0.

    Raises:
        ValueError: a name is unknown, the grid or the seeds are empty, a rate is not positive, or something is given
            twice, which would count one training twice.
    """
    schemes = tuple(schemes)
    for what, given in (("scheme", schemes), ("bias", biases), ("rate", grid), ("seed", seeds)):
        if twice := [value for number, value in enumerate(given) if value in given[:number]]:
            raise ValueError(f"A search takes each {what} once, got {twice[0]!r} twice.")
    if not grid or not seeds or min(grid) <= 0:
        raise ValueError(f"A search needs positive rates and at least one seed, got {list(grid)} and {list(seeds)}.")

    def trial(scheme: str, bias: str, rate: float, seed: int) -> Trial:
        return Trial(
            dataset,
            scheme,
            recipe,
            seed,
            samples_per_class,
            scheme_options=equal_terms(bias),
            recipe_options={**(recipe_options or {}), "lr": rate},
            root=None if root is None else str(root),
            evaluate_on="val",
        )

    width = (recipe_options or {}).get("width")
    own = width if width != get_recipe(recipe).width else None
    pairs = [(scheme, bias) for scheme in schemes for bias in biases]
    measured: dict[tuple[str, str], dict[float, tuple[float, ...]]] = {pair: {} for pair in pairs}
    missing = {pair: sorted(grid) for pair in pairs}
    for _ in range(WIDEST + 1):
        asked = [(pair, rate) for pair, rates in missing.items() for rate in rates]
        trials = [trial(*pair, rate, seed) for pair, rate in asked for seed in seeds]
        scores = iter(_accuracies(trials, results_dir, jobs, progress, device))
        for pair, rate in asked:
            measured[pair][rate] = tuple(itertools.islice(scores, len(seeds)))
        missing = {pair: rates for pair in pairs if (rates := _beyond(measured[pair]))}
        if not missing:
            break
    return [
        ChosenRate(
            data=data_name(dataset),
            recipe=recipe,
            scheme=scheme,
            bias=bias,
            rate=best_rate(measured[scheme, bias]),
            table=tuple(sorted(measured[scheme, bias].items())),
            samples_per_class=samples_per_class,
            width=own,
        )
        for scheme, bias in pairs
    ]


def _accuracies(
    trials: Sequence[Trial], results_dir: str | Path, jobs: int, progress: bool, device: str | None
) -> list[float]:
    """Train and return the accuracy of each trial, 0 for those that diverged."""
    try:
        run_trials(trials, results_dir, jobs, progress=progress, device=device)
    except TrialsFailed as error:
        diverged = {trial for trial, reason in error.failures if reason.startswith(DIVERGED)}
        if len(diverged) < len(error.failures):
            raise
    else:
        diverged = set()
    return [0.0 if trial in diverged else read_result(trial, results_dir).test_accuracy for trial in trials]


def best_rate(measured: Mapping[float, Sequence[float]]) -> float:
    """Return the rate with the highest mean, the smallest of equal ones.

    Args:
        measured: rate -> accuracy of every seed.
    """
    return max(sorted(measured), key=lambda rate: sum(measured[rate]) / len(measured[rate]))


def _beyond(measured: Mapping[float, Sequence[float]]) -> list[float]:
    """Return the rate beyond the end of the grid at which the best one lies, if it does."""
    best = best_rate(measured)
    if best == max(measured):
        return [2 * best]
    return [best / 2] if best == min(measured) else []


def tuning_table(chosen: Sequence[ChosenRate]) -> pd.DataFrame:
    """Return the mean validation accuracy of every rate, one row per scheme and bias, with the rate that was chosen."""
    rows = [
        {"scheme": c.scheme, "bias": c.bias, "rate": c.rate} | {f"{rate:g}": sum(v) / len(v) for rate, v in c.table}
        for c in chosen
    ]
    table = pd.DataFrame(rows).set_index(["scheme", "bias"])
    return table[["rate", *sorted(set(table.columns) - {"rate"}, key=float)]]
