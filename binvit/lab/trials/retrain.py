"""Archived trials trained again from nothing: which ones, and whether they give what the archive says."""

from __future__ import annotations

import dataclasses
import math
import random
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from scipy import special

from binvit.lab.training.resume import changes
from binvit.lab.trials.pool import TrialsFailed, run_trials
from binvit.lab.trials.store import TrialResult, read_result
from binvit.lab.trials.trial import Trial
from binvit.nn.fused.float_products import multiply_by
from binvit.threads import cores

MINUTES = 4.0  # that the trials chosen first take at most on two cores, by the archive's seconds
LEAST_MINUTES = 3.0  # that a sample trains on two cores of this machine, where there are trials enough
AIM_MINUTES = 3.1  # that further trials are chosen for: a last one alone would leave the other core idle
MOST_MINUTES = 3.4  # that no further trial leads beyond
LEAST = 0.01  # a difference of accuracy that no spread of few seeds rules out
CONFIDENCE = 0.99  # of the interval that two trainings of one condition differ by
COLUMNS = ("notebook", "verdict", "archived (%)", "here (%)", "difference", "allowed", "trial", "made with")


@dataclass(frozen=True)
class Archived:
    """An archived trial that can be trained again.

    Args:
        notebook: number of a notebook that shows it.
        trial: the configuration, with the place of its images.
        result: what the archive says.
        seconds: core seconds that it took, its teacher's included.
        chance: share of images that guessing gets right.
    """

    notebook: str
    trial: Trial
    result: TrialResult
    seconds: float
    chance: float = 0.0


def choose(
    candidates: Iterable[Archived], seed: int = 0, count: int | None = None, minutes: float = MINUTES
) -> tuple[list[Archived], list[Archived]]:
    """Choose archived trials at random.

    Args:
        candidates: trials whose images are here.
        seed: decides the choice.
        count: how many; None takes one for each notebook, as far as they take no longer than `minutes` on two cores.
        minutes: likewise.

    Returns:
        The trials, fewer than asked for if there are no more; and, if no number was given, those that `retrain` goes on
        with, in the order of the draw.
    """
    order = sorted({item.result.id: item for item in candidates}.values(), key=lambda item: item.result.id)
    if count is None:  # side by side does not help a single one
        order = [item for item in order if item.seconds <= 60 * minutes * item.result.threads]
    random.Random(seed).shuffle(order)
    if count is not None:
        return order[:count], []
    chosen: list[Archived] = []
    left, numbers = 2 * 60 * minutes, sorted({item.notebook for item in order})
    for place, number in enumerate(numbers):
        share = left / (len(numbers) - place)  # what one notebook leaves is for the next
        fits = [item for item in order if item.notebook == number and item.seconds <= share]
        chosen += fits[:1]
        left -= sum(item.seconds for item in fits[:1])
    return chosen, [item for item in order if item not in chosen]


def retrain(
    chosen: Sequence[Archived],
    known: Iterable[TrialResult],
    results_dir: str | Path,
    progress: bool = True,
    further: Sequence[Archived] = (),
    before: float = 0.0,
) -> pd.DataFrame:
    """Train archived trials again and compare their accuracies.

    What multiplied floats then does so again, where it is there. They must be equal where kind of CPU, its vectors,
    versions and threads are known to be; elsewhere they may differ by as much as two seeds of the same condition (99 %
    interval of Student's t distribution, and at least one point).

    Args:
        chosen: the trials.
        known: archived results, among them those of other seeds.
        results_dir: folder of the new results; those that are there already are read.
        progress: show a progress bar.
        further: trials to go on with, in this order, until all have trained for `LEAST_MINUTES` on two cores of this
            machine, whose speed the first ones tell; those that would lead beyond `MOST_MINUTES` are left out, and
            those that do not train side by side with most of the others.
        before: seconds on two cores that have been trained already, which count to these minutes.

    Returns:
        One row per trial with the columns `COLUMNS`; the verdict is "identical", "within the spread of n seeds", one
        that starts with "no: ", or one that starts with "undecided: " where a single seed tells no spread, or several
        spread so far that a model that has learned nothing would pass.
    """
    known, more = list(known), list(chosen)
    sample: list[Archived] = []
    failures: dict[Trial, str] = {}
    rows, seconds = [], 0.0
    while more:
        start = time.perf_counter()
        failures |= _train(more, results_dir, progress)
        seconds += time.perf_counter() - start
        sample += more
        rows += [_compare(item, known, results_dir, failures) for item in more]
        trained = [item for item in sample if item.trial not in failures]
        of_two_cores = sum(_seconds_here(item, results_dir) for item in trained) / 2  # what was there took no time now
        spent = max(seconds, of_two_cores)
        more = _next(further, sample, spent, before, sum(item.seconds for item in trained))
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _next(
    further: Sequence[Archived], done: Sequence[Archived], spent: float, before: float, archived: float
) -> list[Archived]:
    """Return the trials to train next, none if there has been enough of it.

    Args:
        further: trials in their order.
        done: those that had their turn.
        spent: seconds that their training has taken.
        before: seconds that other trainings have taken.
        archived: core seconds of the trials that had their turn, by the archive.
    """
    left = [item for item in further if item not in done]
    if not left or not archived or before + spent >= 60 * LEAST_MINUTES:
        return []
    most, _ = Counter(map(_together, left)).most_common(1)[0]  # one alone of another kind would leave a core idle
    more, ahead = [], before + spent
    for item in left:
        expected = ahead + item.seconds * spent / archived
        if ahead < 60 * AIM_MINUTES and expected <= 60 * MOST_MINUTES and _together(item) == most:
            more.append(item)
            ahead = expected
    return more


def _together(item: Archived) -> tuple[int, str]:
    """Return what trials that train side by side have in common: their threads, and what multiplies floats."""
    return item.result.threads, item.result.products


def _seconds_here(item: Archived, results_dir: str | Path) -> float:
    """Return the core seconds that a trial has taken here, its teacher's in proportion."""
    return item.seconds * read_result(item.trial, results_dir).seconds / item.result.seconds


def _train(chosen: Sequence[Archived], results_dir: str | Path, progress: bool) -> dict[Trial, str]:
    """Train trials as they were trained before, and return why some have failed."""
    failures: dict[Trial, str] = {}
    for threads, products in sorted(set(map(_together, chosen))):
        trials = [item.trial for item in chosen if _together(item) == (threads, products)]
        try:
            with multiply_by(products):
                run_trials(trials, results_dir, max(1, cores() // threads), progress=progress)
        except TrialsFailed as error:
            failures |= dict(error.failures)
    return failures


def _compare(
    item: Archived, known: Sequence[TrialResult], results_dir: str | Path, failures: dict[Trial, str]
) -> tuple[object, ...]:
    """Return the row of `COLUMNS` for a trial."""
    before, name = item.result.test_accuracy, item.trial.describe()
    if item.trial in failures:
        return item.notebook, f"no: {failures[item.trial]}", 100 * before, math.nan, math.nan, math.nan, name, ""
    again = read_result(item.trial, results_dir)
    different = changes(item.result.environment, again.environment)
    allowed, seeds = spread(item.result, known)
    difference = again.test_accuracy - before
    if difference == 0 and again.train_accuracy == item.result.train_accuracy:
        verdict = "identical"
    elif not different:
        verdict = "no: it differs, though CPU, versions and threads do not"
    elif seeds < 2:
        verdict = "undecided: one seed, no spread known"
    elif abs(difference) <= allowed and before - allowed <= item.chance:
        verdict = f"undecided: {seeds} seeds differ so much that a model that learned nothing would pass"
    else:
        verdict = f"within the spread of {seeds} seeds" if abs(difference) <= allowed else "no: beyond the spread"
    shown = 0.0 if not different else 100 * allowed
    return item.notebook, verdict, 100 * before, 100 * again.test_accuracy, 100 * difference, shown, name, different


def spread(result: TrialResult, known: Iterable[TrialResult]) -> tuple[float, int]:
    """Return by how much two trainings of a trial's condition may differ, and the number of seeds that tell it.

    Args:
        result: of the trial.
        known: results, of which those of the same condition on the same images count.
    """
    seeds = {
        other.trial.seed: other.test_accuracy
        for other in known
        if _condition(other) == _condition(result) and other.fingerprint == result.fingerprint
    }
    if len(seeds) < 2:
        return math.nan, len(seeds)
    quantile = float(special.stdtrit(len(seeds) - 1, (1 + CONFIDENCE) / 2))  # of Student's t
    return max(LEAST, quantile * math.sqrt(2) * float(pd.Series(seeds).std())), len(seeds)


def _condition(result: TrialResult) -> tuple[object, ...]:
    trial = dataclasses.replace(result.trial, seed=0, root=None, dataset="digits", recipe_options={}, scheme_options={})
    return trial, result.recipe, result.scheme
