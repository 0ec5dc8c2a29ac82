"""Many trials: finished ones are read, the others trained, here or in several processes."""

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterable, Sequence
from pathlib import Path

import pandas as pd
from tqdm.auto import tqdm

from binvit.lab.trials.archive import stored_result
from binvit.lab.trials.store import read_result
from binvit.lab.trials.train_trial import is_wrong_input, run_trial
from binvit.lab.trials.trial import Trial


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

    Returns:
        One row per trial in the order given: every field of `Trial` (options as text), test_accuracy, train_accuracy,
        clean_train_accuracy and memorized (NaN without label noise), all from 0 to 1, parameters, seconds and id.

    Raises:
        ValueError: `jobs` is no whole number of at least 1.
        TrialsFailed: a ValueError that says which trials failed and why, after all others have finished.
    """
    trials = list(trials)
    for trial in trials:
        if not isinstance(trial, Trial):
            raise ValueError(f"Expected a Trial, got {trial!r}.")
    if not isinstance(jobs, int) or isinstance(jobs, bool) or jobs < 1:
        raise ValueError(f"The number of jobs must be a whole number of at least 1, got {jobs!r}.")
    results = {trial: stored_result(trial, results_dir, keep_models, archive) for trial in trials}
    pending = [trial for trial, result in results.items() if result is None]
    pending.sort(key=_length, reverse=True)  # the short ones last, so that no process idles for long at the end
    if pending:
        with tqdm(total=len(pending), unit="trial", disable=not progress) as bar:
            failures = _Queue(pending, Path(results_dir), keep_models, bar).run(min(jobs, len(pending)))
        if failures:
            reasons = "; ".join(f"{trial.describe()}: {reason}" for trial, reason, _ in failures)
            raise TrialsFailed(
                f"{len(failures)} of {len(results)} trials failed: {reasons}",
                wrong_input=all(wrong_input for _, _, wrong_input in failures),
                failures=[(trial, reason) for trial, reason, _ in failures],
            )
        results = {trial: result or read_result(trial, results_dir) for trial, result in results.items()}
    return pd.DataFrame([results[trial].to_row() | {"root": trial.root} for trial in trials])


def _length(trial: Trial) -> int:
    """How long a training takes, roughly: epochs of all stages, twice as many for 1-bit models."""
    recipe = trial.get_recipe()
    epochs = recipe.epochs + sum(stage.epochs for stage in recipe.stages)
    return epochs if trial.scheme == "float" else 2 * epochs


def cores() -> int:
    """Return the number of cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _Queue:
    """The trials still to run, shared by one thread per process."""

    def __init__(self, trials: list[Trial], results_dir: Path, keep_models: bool, bar: tqdm):
        self.waiting = deque((trial, False) for trial in trials)  # with: wait for a process that already runs it
        self.results_dir, self.keep_models, self.bar = results_dir, keep_models, bar
        self.failures: list[tuple[Trial, str, bool]] = []  # with: whether the input was wrong
        self.lock = threading.Lock()
        self.shown = 0.0
        self.children: set[subprocess.Popen] = set()
        self.stopped = False

    def run(self, jobs: int) -> list[tuple[Trial, str, bool]]:
        if jobs == 1:
            while (item := self._next()) is not None:
                self._train_here(*item)
            return self.failures
        threads = max(1, cores() // jobs)
        workers = [threading.Thread(target=self._serve, args=(threads,), daemon=True) for _ in range(jobs)]
        for worker in workers:
            worker.start()
        try:
            while any(worker.is_alive() for worker in workers):
                time.sleep(0.05)  # an interrupt arrives here
        finally:
            self.stopped = True
            with self.lock:
                for child in self.children:
                    child.kill()
            for worker in workers:
                worker.join()
        return self.failures

    def _next(self) -> tuple[Trial, bool] | None:
        with self.lock:
            return self.waiting.popleft() if self.waiting and not self.stopped else None

    def _report(self, trial: Trial, done: int, total: int) -> None:
        with self.lock:
            # A widget sends messages for each change, and a reader that is slower than epochs would lose some.
            due = time.monotonic() - self.shown > _SECONDS_PER_REPORT
            self.shown = time.monotonic() if due else self.shown
            self.bar.set_postfix_str(f"{trial.scheme}, seed {trial.seed}: epoch {done}/{total}", refresh=due)

    def _close(self, trial: Trial, finished: bool, failure: str | None = None, wrong_input: bool = False) -> None:
        with self.lock:
            if not finished and failure is None:
                self.waiting.append((trial, True))  # the others first, then wait for whoever runs this one
                return
            if failure is not None:
                self.failures.append((trial, failure, wrong_input))
            self.bar.update()

    def _train_here(self, trial: Trial, wait: bool) -> None:
        try:
            report = lambda done, total, record: self._report(trial, done, total)  # noqa: E731
            self._close(trial, run_trial(trial, self.results_dir, self.keep_models, report, wait))
        except (ValueError, OSError) as error:
            self._close(trial, False, str(error), is_wrong_input(error))

    def _serve(self, threads: int) -> None:
        """Hand trials to one child process after the other; a child that dies takes only its trial with it."""
        child = None
        with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log:
            try:
                while (item := self._next()) is not None:
                    if child is None or child.poll() is not None:
                        child = self._spawn(threads, log)
                    self._ask(child, *item, log)
            finally:
                if child is not None:
                    child.stdin.close()
                    child.wait()
                    child.stdout.close()
                    with self.lock:
                        self.children.discard(child)

    def _spawn(self, threads: int, log) -> subprocess.Popen:
        names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")
        environment = os.environ | dict.fromkeys(names, str(threads)) | {"PYTHONPATH": os.pathsep.join(sys.path)}
        child = subprocess.Popen(
            [sys.executable, "-m", "binvit.lab.trials.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=environment,
            start_new_session=True,  # an interrupt from the keyboard reaches only this process, which ends its children
        )
        with self.lock:
            self.children.add(child)
            if self.stopped:
                child.kill()
        return child

    def _ask(self, child: subprocess.Popen, trial: Trial, wait: bool, log) -> None:
        order = {"trial": trial.to_dict(), "results_dir": str(self.results_dir.absolute())}
        order |= {"keep_model": self.keep_models, "wait": wait}
        try:
            child.stdin.write(json.dumps(order) + "\n")
            child.stdin.flush()
            for line in child.stdout:
                answer = json.loads(line)
                if "epoch" in answer:
                    self._report(trial, *answer["epoch"])
                else:
                    return self._close(trial, **({"finished": False} | answer))
        except BrokenPipeError:
            pass
        if not self.stopped:
            log.seek(0)
            last = ([line.strip() for line in log if line.strip()] or ["no message"])[-1]
            self._close(trial, False, f"its process ended with exit code {child.wait()} ({last})")
        return None
