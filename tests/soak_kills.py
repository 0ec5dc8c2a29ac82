"""The part of soak.py that kills trainings at random moments."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

from binvit import lab
from binvit.lab.trials.store import model_path, read_result
from binvit.lab.trials.trial import Trial
from binvit.threads import cores

LONGEST_OF_SEVERAL = 20.0  # seconds until a kill: children of a pool start for seconds
TINY = {"width": 16, "depth": 1, "heads": 2, "patch_size": 4, "epochs": 6, "batch_size": 64, "checkpoint_minutes": 0.0}


def trials() -> list[Trial]:
    """Return the trials that are trained and killed: float and 1-bit, with a teacher, augmented."""
    made = [Trial("digits", name, seed=seed, samples_per_class=20, recipe_options=TINY)
            for name in ("float", "gsb") for seed in range(2)]  # fmt: skip
    options = {"distillation": "hard", "teacher_epochs": 3}, {"crop": 0.6, "mixup": 0.2, "drop_path": 0.1}
    return made + [Trial("digits", "elastic", samples_per_class=20, recipe_options=TINY | more) for more in options]


def content(folder: Path) -> dict[str, object]:
    """Return what the finished trials of a folder hold: results without their seconds, models byte by byte."""
    found: dict[str, object] = {}
    for trial in trials():
        with contextlib.suppress(FileNotFoundError):
            values = read_result(trial, folder).to_dict() | {"seconds": 0}
            found[trial.id] = json.dumps(values), model_path(trial, folder).read_bytes()
    return found


def run(folder: Path, jobs: int) -> int:
    """Start a process that runs the trials."""
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)
        code = 1
        try:
            with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
                lab.run_trials(trials(), folder, jobs=jobs, keep_models=True, progress=False)
            code = 0
        finally:
            os._exit(code)
    return child


def several() -> int:
    """Return a number of children that get one thread each, as the undisturbed run has: a result names its threads."""
    return max(2, cores())


def count_results(folder: Path) -> int:
    """Return how many results lie in a folder, those of teachers included."""
    return len(list(folder.glob("*.json")))


def has_ended(child: int, folder: Path, one_more: bool, seconds: float, until: float) -> int | None:
    """Wait for the moment of a kill, and return the exit code of a run that has ended before, None if it has not.

    Args:
        child: the run's process.
        folder: of its results.
        one_more: wait until one more trial has finished.
        seconds: the time to wait after that.
        until: the end of all waiting, by the monotonic clock.
    """
    before, moment = count_results(folder), None
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        now = time.monotonic()
        if moment is None and (not one_more or count_results(folder) > before):
            moment = now + seconds
        if now >= min(until, until if moment is None else moment):
            return None
        time.sleep(0.005)


def soak_kills(kills: int, folder: Path, draw: random.Random, seconds: float) -> tuple[list[str], bool]:
    """Kill runs at random moments until that has been done so often; every tenth is a run of several children.

    Half of the kills wait until one more trial has finished, so that finished trials are at stake.

    Returns:
        The faults, and whether all kills were done.
    """
    until = time.monotonic() + seconds
    start = time.monotonic()
    os.waitpid(run(folder / "whole", 1), 0)
    whole, faults = content(folder / "whole"), []
    if len(whole) != len(trials()):
        return ["the undisturbed run has not finished"], False
    length = (time.monotonic() - start) / count_results(folder / "whole")
    done = rounds = seen = risky = at_stake = 0
    while done < kills and time.monotonic() < until and not faults:
        rounds += 1
        place, finished = folder / f"round{rounds}", {}
        while len(finished) < len(whole) and done < kills and time.monotonic() < until and not faults:
            jobs = several() if done % 10 == 9 else 1
            child = run(place, jobs)
            longest = length if jobs == 1 else LONGEST_OF_SEVERAL
            code = has_ended(child, place, draw.random() < 0.5, draw.uniform(0, longest), until)
            if code is None:
                results = count_results(place)
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                done, risky, at_stake = done + 1, risky + bool(results), at_stake + results
            elif code:
                faults.append(f"a run ended with the exit code {code}")
            now = content(place)
            faults += [f"{name} was finished and is lost" for name in finished if now.get(name) != finished[name]]
            faults += [f"{name} differs from the undisturbed run" for name in now if now[name] != whole[name]]
            seen += len(now) - len(finished)
            finished = now
        shutil.rmtree(place, ignore_errors=True)
    print(
        f"kills: {done} SIGKILLs in {rounds} rounds, {risky} of them with {at_stake} finished trials at stake in all, "
        f"{seen} trials finished among them, {len(faults)} faults"
    )
    return faults, done >= kills
