"""Many trials: finished ones are read, the others trained, here or in several processes."""

import functools
import os
import re
import signal
import threading
import time
import traceback
import warnings
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from loky import ProcessPoolExecutor
from loky.process_executor import BrokenProcessPool
from tqdm.auto import tqdm

from binvit.config import show
from binvit.files import made_folders, remove_leftovers
from binvit.lab.training.devices import Team, give_back_memory, keep_freed_memory, spread
from binvit.lab.training.resume import changes, environment
from binvit.lab.trials.archive import find, read_data
from binvit.lab.trials.store import TrialResult, finished_result, read_result, trial_row
from binvit.lab.trials.train_trial import Report, is_wrong_input, run_trial
from binvit.lab.trials.trial import Trial
from binvit.threads import cores


class TrialsFailed(ValueError):
    """Some trials failed while the others finished.

    Args:
        message: which trials failed and why.
        wrong_input: whether every failure is one of the input (a wrong value or a missing file) and none of the work.
        failures: the trials with the reason of each.
    """

    def __init__(self, message: str, wrong_input: bool = False, failures: Sequence[tuple[Trial, str]] = ()):
        super().__init__(message)
        self.wrong_input, self.failures = wrong_input, tuple(failures)


_SECONDS_PER_REPORT = 2.0


def run_trials(
    trials: Iterable[Trial],
    results_dir: str | Path = "results",
    jobs: int = 1,
    keep_models: bool = False,
    progress: bool = True,
    archive: str | Path | None = None,
    device: str | None = None,
) -> pd.DataFrame:
    """Run trials and return their table; a trial whose result lies in the folder is read instead of run again.

    Several processes may use the same folder at the same time: each trial is run by one of them.

    Args:
        trials: the configurations; equal ones are run once.
        results_dir: folder of one JSON file per trial.
        jobs: processes that train side by side. Above 1, each gets an equal share of the cores as threads; 1 trains in
            this process with its own number of torch threads.
        keep_models: also keep each trained model, as a checkpoint that `load_model` reads.
        progress: show a progress bar.
        archive: folder of archived trials, such as paper_figures, which is looked into after the results folder, also
            where the data are absent; None looks into none. It keeps no models.
        device: where to train: "cpu", "cuda", "mps" or one GPU, such as "cuda:1"; None takes a GPU if there is one.
            Several jobs on "cuda" are spread over all GPUs.

    Returns:
        One row per trial in the order given: every field of `Trial` (options as text), test_accuracy, train_accuracy,
        clean_train_accuracy and memorized (NaN without label noise), all from 0 to 1, parameters, seconds and id.

    Raises:
        FileNotFoundError: there is no such archive.
        ValueError: `jobs` is no whole number of at least 1, or the device is not there.
        TrialsFailed: a ValueError that says which trials failed and why, after all others have finished.
    """
    trials = list(trials)
    for trial in trials:
        if not isinstance(trial, Trial):
            raise ValueError(f"Expected a Trial, got {show(trial)}.")
    if not isinstance(jobs, int) or isinstance(jobs, bool) or jobs < 1:
        raise ValueError(f"The number of jobs must be a whole number of at least 1, got {show(jobs)}.")
    team = Team(device)
    if team.size > 1 and jobs > 1:
        raise ValueError(
            f"All {team.size} processes of torchrun train each trial together; jobs must be 1, got {jobs}."
        )
    if archive is not None:
        read_data(archive)
    folder = Path(results_dir)
    stored: dict[Trial, TrialResult | None] = {}
    if team.leads:
        stored = {trial: _stored(trial, folder, keep_models) for trial in trials}
        compared = [result for result in stored.values() if result]
        _remove_leftovers(folder, compared)
        if archive is not None and not keep_models:
            missing = [trial for trial, result in stored.items() if result is None and not _is_unreadable(trial)]
            archived = {trial: find(trial, archive) for trial in missing}
            stored |= archived
            if not all(stored.values()):  # archived results beside those that are trained now
                compared += [result for result in archived.values() if result]
        _tell_changes(compared, team, jobs)
    results: dict[Trial, TrialResult | None] = team.share(stored)
    pending = [trial for trial, result in results.items() if result is None]
    pending.sort(key=_length, reverse=True)  # the short ones last, so that no process idles for long at the end
    if pending:
        shown = tqdm(total=len(pending), unit="trial", disable=not (progress and team.leads))
        with made_folders(folder / ".running"), shown as bar:  # which go again if all trials are refused
            queue = _Queue(pending, folder, keep_models, bar)
            failures = queue.run_here(device) if jobs == 1 else queue.run_in_children(jobs, device)
            if failures:
                reasons = "; ".join(f"{trial.describe()}: {reason}" for trial, reason, _ in failures)
                raise TrialsFailed(
                    f"{len(failures)} of {len(results)} trials failed: {reasons}",
                    wrong_input=all(wrong_input for _, _, wrong_input in failures),
                    failures=[(trial, reason) for trial, reason, _ in failures],
                )
        results = {trial: result or read_result(trial, results_dir) for trial, result in results.items()}
    return pd.DataFrame([result.to_row() | {"root": trial.root} for trial in trials if (result := results[trial])])


def read_trials(trials: Iterable[Trial], archive: str | Path) -> pd.DataFrame:
    """Return the table of archived trials, and train nothing.

    Args:
        trials: the configurations; their data may be absent.
        archive: folder of archived trials, such as paper_figures.

    Returns:
        The table of `run_trials` with one row per trial in the order given; those that the archive lacks have a row in
        which everything measured and the id are missing.

    Raises:
        FileNotFoundError: there is no such archive.
        ValueError: a file of the archive is damaged.
    """
    read_data(archive)
    trials = list(trials)
    found = {trial: find(trial, archive) for trial in dict.fromkeys(trials)}
    rows = [result.to_row() if (result := found[trial]) else trial_row(trial) for trial in trials]
    table = pd.DataFrame([row | {"root": trial.root} for row, trial in zip(rows, trials, strict=True)])
    return table.reindex(columns=[*table.columns, *(name for name in ("id", "test_accuracy") if name not in table)])


def _stored(trial: Trial, folder: Path, keep_model: bool) -> TrialResult | None:
    try:
        return finished_result(trial, folder, keep_model)
    except (OSError, ValueError):  # it stays pending, and fails alone if this lasts or its images are damaged
        return None


def _is_unreadable(trial: Trial) -> bool:
    """Say whether the images of a trial are there but cannot be read, so that no archive can know them."""
    try:
        return not trial.fingerprint
    except FileNotFoundError:
        return False
    except (OSError, ValueError):
        return True


def _remove_leftovers(folder: Path, finished: list[TrialResult]) -> None:
    """Remove what killed processes have left: temporary files, and states of trials that had just been finished."""
    for place in (folder, folder / ".running"):
        remove_leftovers(place)
    for result in finished:
        with suppress(OSError):  # a folder to read from is enough for reading
            (folder / ".running" / f"{result.id}.state").unlink(missing_ok=True)


def _tell_changes(results: list[TrialResult], team: Team, jobs: int) -> None:
    """Warn of stored results that were made in another environment than trials that would be run now."""
    now = environment(team) | ({} if jobs == 1 else {"threads": str(max(1, cores() // jobs))})
    counts = Counter(text for result in results if (text := changes(result.environment, now)))
    for text, count in counts.items():
        were = "stored result was" if count == 1 else "stored results were"
        warnings.warn(f"{count} {were} made with {text}; training now may give other last digits.", stacklevel=3)


def _length(trial: Trial) -> int:
    """Return how long a training takes, roughly: epochs of all stages, twice as many for 1-bit models."""
    recipe = trial.get_recipe()
    epochs = recipe.epochs + sum(stage.epochs for stage in recipe.stages)
    return epochs if trial.scheme == "float" else 2 * epochs


class _Queue:
    """The trials still to run."""

    def __init__(self, trials: list[Trial], results_dir: Path, keep_models: bool, bar: tqdm):
        self.waiting = deque((trial, False) for trial in trials)  # with: wait for a process that already runs it
        self.results_dir, self.keep_models, self.bar = results_dir.absolute(), keep_models, bar
        self.failures: list[tuple[Trial, str, bool]] = []  # with: whether the input was wrong
        self.shown = 0.0

    def run_here(self, device: str | None) -> list[tuple[Trial, str, bool]]:
        """Train one trial after the other in this process."""
        while self.waiting:
            trial, wait = self.waiting.popleft()
            report = functools.partial(self.report, trial)
            self.close(trial, *_run(trial, self.results_dir, self.keep_models, wait, device, report))
        return self.failures

    def run_in_children(self, jobs: int, device: str | None) -> list[tuple[Trial, str, bool]]:
        """Train side by side; a child that dies takes only its trial with it, and an interrupt ends all children."""
        threads = max(1, cores() // jobs)
        children = [_Child(threads, place) for place in spread(device, min(jobs, len(self.waiting)))]
        try:
            while True:
                for child in children:
                    if child.future is None and self.waiting:
                        child.start(*self.waiting.popleft(), self.results_dir, self.keep_models)
                busy = [child.future for child in children if child.future is not None]
                if not busy:
                    return self.failures
                wait(busy, timeout=_SECONDS_PER_REPORT, return_when=FIRST_COMPLETED)
                for child in children:
                    if child.trial is not None and (epoch := child.epoch()):
                        self.report(child.trial, *epoch)
                    if child.trial is not None and (answer := child.answer()):
                        self.close(*answer)
        finally:
            for child in children:
                child.stop()

    def report(self, trial: Trial, done: int, total: int, record: object = None) -> None:
        # A widget sends messages for each change, and a reader that is slower than epochs would lose some.
        due = time.monotonic() - self.shown > _SECONDS_PER_REPORT
        self.shown = time.monotonic() if due else self.shown
        self.bar.set_postfix_str(f"{trial.scheme}, seed {trial.seed}: epoch {done}/{total}", refresh=due)

    def close(self, trial: Trial, finished: bool, failure: str | None = None, wrong_input: bool = False) -> None:
        if not finished and failure is None:
            self.waiting.append((trial, True))  # the others first, then wait for whoever runs this one
            return
        # A process that was killed after it had written its result has finished all the same.
        if failure is not None and _stored(trial, self.results_dir, self.keep_models) is None:
            self.failures.append((trial, failure, wrong_input))
        self.bar.update()


class _Child:
    """One process after the other, each in a pool of its own: a dead process breaks its pool and no other."""

    def __init__(self, threads: int, device: str):
        self.threads, self.device = threads, device
        self.pool: ProcessPoolExecutor | None = None
        self.future: Future | None = None
        self.trial: Trial | None = None

    def start(self, trial: Trial, wait: bool, results_dir: Path, keep_model: bool) -> None:
        if self.pool is None:
            self.epochs, theirs = Pipe(duplex=False)
            names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")
            environment = dict.fromkeys(names, str(self.threads))
            begin = {"initializer": _begin, "initargs": (theirs, self.threads, os.getpid())}
            self.pool = ProcessPoolExecutor(1, env=environment, **begin)
        self.trial = trial
        self.future = self.pool.submit(_run_in_child, trial, results_dir, keep_model, wait, self.device)

    def epoch(self) -> tuple[int, int] | None:
        """Return the last epoch that the child has reported since this was asked last."""
        last = None
        while self.epochs.poll():
            last = self.epochs.recv()
        return last

    def answer(self) -> tuple[Trial, bool, str | None, bool] | None:
        """Return how the trial has ended, None if it has not."""
        if self.future is None or self.trial is None or not self.future.done():
            return None
        trial, future, self.trial, self.future = self.trial, self.future, None, None
        try:
            return trial, *future.result()
        except BrokenProcessPool as error:
            self.stop()
            self.pool = None
            code = re.search(r"\{(.*)\}", str(error))
            return trial, False, f"its process was killed or crashed ({code[1] if code else error})", False

    def stop(self) -> None:
        """End the process and all that it has started."""
        if self.pool is not None:
            self.pool.shutdown(kill_workers=True)


_epochs: Connection | None = None  # of a child: where it reports


def _begin(epochs: Connection, threads: int, parent: int) -> None:
    """Prepare a child process, which ends when its parent does."""
    global _epochs
    _epochs = epochs
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a keyboard's interrupt is for the parent, which ends its children
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    torch.set_num_threads(threads)
    keep_freed_memory()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)  # loky's own workers would wait for ever for a lock that a killed parent held


def _report(done: int, total: int, record: object = None) -> None:
    if _epochs is not None:
        with suppress(OSError):  # the parent was killed: the trial is finished all the same
            _epochs.send((done, total))


def _run_in_child(*arguments: Any) -> tuple[bool, str | None, bool]:
    """Run a trial as `_run` does, and keep no memory for the next one, which loky would take for a leak."""
    try:
        return _run(*arguments)
    finally:
        give_back_memory()


def _run(
    trial: Trial, results_dir: Path, keep_model: bool, wait: bool, device: str | None, report: Report = _report
) -> tuple[bool, str | None, bool]:
    """Run a trial and return whether its result exists, why it failed, and whether wrong input was the reason."""
    several = Team(device).size > 1
    try:
        return run_trial(trial, results_dir, keep_model, report, wait, device), None, False
    except Exception as error:
        if several:  # the other processes may wait for this one, and only its end ends them
            raise
        if isinstance(error, ValueError):
            return False, str(error), is_wrong_input(error)
        if not isinstance(error, OSError):
            traceback.print_exc()  # out of memory, a killed worker of the loader, or a fault of ours
            return False, f"{type(error).__name__}: {error}", is_wrong_input(error)
        where = f": {error.filename}" if error.filename else ""
        return False, f"{error.strerror}{where}" if error.strerror else str(error), is_wrong_input(error)
