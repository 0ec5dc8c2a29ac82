"""Running trials: finished ones are read, the others trained, here or in several processes."""

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from filelock import FileLock, Timeout
from safetensors import safe_open
from tqdm.auto import tqdm

from binvit.files import set_aside
from binvit.lab.checkpoint import CheckpointInfo, is_checkpoint, load_checkpoint, save_checkpoint
from binvit.lab.train import TrainingDiverged, train_trial
from binvit.lab.trials import OutdatedResult, Trial, TrialResult, read_result, result_path, teacher_trial, write_result

Report = Callable[[int, int, dict[str, Any]], None]


class TrialsFailed(ValueError):
    """Some trials failed while the others finished.

    Args:
        message: which trials failed and why.
        wrong_input: whether every failure is one of the input (a wrong value or a missing file) and none of the work.
    """

    def __init__(self, message: str, wrong_input: bool = False):
        super().__init__(message)
        self.wrong_input = wrong_input


# Other errors of the operating system, such as a full disk, are no fault of the input.
_WRONG_INPUT = (ValueError, FileNotFoundError, FileExistsError, NotADirectoryError, PermissionError)
_SECONDS_PER_REPORT = 2.0


def is_wrong_input(error: Exception) -> bool:
    """Say whether an error of a trial comes from its input, not from its work."""
    return isinstance(error, _WRONG_INPUT) and not isinstance(error, TrainingDiverged)


def run_trials(
    trials: Iterable[Trial],
    results_dir: str | Path = "results",
    jobs: int = 1,
    keep_models: bool = False,
    progress: bool = True,
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
    results = {trial: _finished(trial, results_dir, keep_models) for trial in trials}
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
            )
        results = {trial: result or read_result(trial, results_dir) for trial, result in results.items()}
    return pd.DataFrame([results[trial].to_row() | {"root": trial.root} for trial in trials])


def load_model(trial: Trial, results_dir: str | Path = "results") -> torch.nn.Module:
    """Return the model that a trial has trained.

    Args:
        trial: a trial that was run with `keep_models`, or as a teacher.
        results_dir: the folder `run_trials` wrote to.

    Returns:
        The binarized timm model in evaluation mode, on the CPU.

    Raises:
        FileNotFoundError: no model of this trial is kept there.
        ValueError: the checkpoint is damaged.
    """
    return load_kept(trial, results_dir)[0]


def load_kept(trial: Trial, results_dir: str | Path) -> tuple[torch.nn.Module, CheckpointInfo]:
    """Return the model that a trial has trained, as `load_model` does, and its description."""
    path = model_path(trial, results_dir)
    if path.is_file():
        model, info = load_checkpoint(path)
        if _is_record(info.trial, trial):
            return model, info
    raise FileNotFoundError(
        f"There is no model of the trial {trial.describe()} ({path}); run it by run_trials with keep_models=True."
    )


def model_path(trial: Trial, results_dir: str | Path = "results") -> Path:
    """Return the checkpoint that keeps a trial's model."""
    return result_path(trial, results_dir).with_suffix(".safetensors")


def run_trial(
    trial: Trial, results_dir: str | Path, keep_model: bool = False, report: Report | None = None, wait: bool = True
) -> bool:
    """Run one trial, unless its result exists, and write its files.

    Args:
        trial: the configuration.
        results_dir: folder of the results.
        keep_model: also write the checkpoint.
        report: called after every epoch, as in `train_trial`.
        wait: wait for another process that runs this trial.

    Returns:
        Whether the result exists now; False if another process runs the trial and `wait` is False.
    """
    results_dir = Path(results_dir)
    running = results_dir / ".running"  # locks, and states from which killed trials continue
    running.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(running / f"{trial.id}.lock", blocking=wait):
            if _finished(trial, results_dir, keep_model) is not None:
                return True
            teacher = None
            recipe = trial.get_recipe()
            if recipe.has_teacher and not recipe.teacher:
                taught = teacher_trial(trial)
                run_trial(taught, results_dir, keep_model=True, report=report)
                teacher = load_model(taught, results_dir)
            result = train_trial(trial, teacher=teacher, progress=report, resume=running / f"{trial.id}.state")
            if keep_model:
                save_checkpoint(model_path(trial, results_dir), result.model, result.info)
            write_result(result, results_dir)  # last, since it says that the trial is finished
            return True
    except Timeout:
        return False


def compile_kernels() -> float:
    """Compile the kernels of training and of packed models, or load them from disk, by a training of one epoch.

    Returns:
        The seconds it took: half a minute at the first time on a machine, then about two.
    """
    start = time.perf_counter()
    train_trial(Trial("digits", "gsb", "smoke", samples_per_class=7, recipe_options={"epochs": 1}), device="cpu")
    return time.perf_counter() - start


def _length(trial: Trial) -> int:
    """How long a training takes, roughly: epochs of all stages, twice as many for 1-bit models."""
    recipe = trial.get_recipe()
    epochs = recipe.epochs + sum(stage.epochs for stage in recipe.stages)
    return epochs if trial.scheme == "float" else 2 * epochs


def _finished(trial: Trial, results_dir: str | Path, keep_model: bool) -> TrialResult | None:
    """Return a finished trial's result; a file that cannot be used is set aside, and None returned."""
    try:
        result = read_result(trial, results_dir)
    except FileNotFoundError:
        return None
    except ValueError as error:
        label = "outdated" if isinstance(error, OutdatedResult) else "corrupt"
        try:
            kept = set_aside(result_path(trial, results_dir), label)
        except FileNotFoundError:  # another process was faster
            return None
        model_path(trial, results_dir).unlink(missing_ok=True)
        warnings.warn(f"{error} It is kept as {kept.name}, and the trial is run again.", stacklevel=3)
        return None
    return result if not keep_model or _keeps_model(trial, results_dir) else None


def _keeps_model(trial: Trial, results_dir: str | Path) -> bool:
    """Say whether the trial's checkpoint is there and its own, without reading its tensors."""
    path = model_path(trial, results_dir)
    if not is_checkpoint(path):
        return False
    try:
        with safe_open(path, framework="pt") as file:
            return _is_record(json.loads(file.metadata().get("trial", "null")), trial)
    except ValueError:
        return False


def _is_record(record: Any, trial: Trial) -> bool:
    """Say whether a file's record is of this trial; the root may differ from machine to machine."""
    return isinstance(record, dict) and record | {"root": None} == trial.to_dict() | {"root": None}


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
            [sys.executable, "-m", "binvit.lab.worker"],
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
