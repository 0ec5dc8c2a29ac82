"""The batch runner: papermill executes planned notebooks, and a failure stops no other."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from itertools import chain
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated

from pydantic import Field

from binvit.config import Config, Number, Text
from binvit.lab.notebooks import clean
from binvit.lab.notebooks.plan import Job
from binvit.lab.project import project_dir
from binvit.threads import cores

_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")


class Outcome(Config):
    """What became of a job."""

    name: Text
    """The notebook's name without its suffix."""
    executed: Path
    """The executed copy."""
    seconds: Annotated[Number, Field(ge=0, le=1e9)]
    """The time it took."""
    error: Text | None = None
    """One line about what went wrong, None if nothing did."""
    size: Text = "archive"
    """Which parameters it ran with."""


@contextlib.contextmanager
def _environment(processes: int) -> Iterator[None]:
    """Use kernels of this environment and share the cores; both are inherited by the kernels' processes."""
    extra = {"JUPYTER_PREFER_ENV_PATH": "1", "PYDEVD_DISABLE_FILE_VALIDATION": "1"}
    if processes > 1:
        share = str(max(1, cores() // processes))
        extra |= {name: share for name in _THREADS if name not in os.environ}
    before = {name: os.environ.get(name) for name in extra}
    os.environ.update(extra)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def run_job(job: Job, out: Path, progress: bool = False) -> Outcome:
    """Execute one notebook into `out`; an error in a cell or of the disk ends it and is reported, not raised."""
    import papermill

    logging.getLogger("papermill").setLevel(logging.ERROR)  # its progress is shown by the caller
    executed, unfinished = out / job.notebook.name, out / f".{job.notebook.name}"
    error = None
    start = time.perf_counter()
    try:
        out.mkdir(parents=True, exist_ok=True)
        executed.unlink(missing_ok=True)  # a copy of an earlier run must not pass for this one's
        with _environment(processes=1):
            papermill.execute_notebook(
                str(job.notebook),
                str(unfinished),
                dict(job.values),
                kernel_name="python3",
                progress_bar={"desc": job.notebook.stem, "leave": False} if progress else False,
                extra_arguments=["--log-level=50"],  # the kernel's own messages would break the progress bars
            )
    except papermill.PapermillExecutionError as failed:
        error = f"{failed.ename}: {failed.evalue}"
    except Exception as failed:  # the kernel died or did not start; the other notebooks still run
        error = f"{type(failed).__name__}: {failed}"
    seconds = time.perf_counter() - start
    try:
        if unfinished.exists():
            clean.write(clean.clean(json.loads(unfinished.read_text(encoding="utf-8")), project_dir()), executed)
    except Exception as failed:  # a full disk has cut it off
        error = error or f"Its executed copy could not be written ({failed})."
    with contextlib.suppress(OSError):
        unfinished.unlink(missing_ok=True)
    if error:
        error = re.sub(r"\s+", " ", error).strip()
    return Outcome(job.notebook.stem, executed, seconds, error, job.size)


def run(jobs: Sequence[Job], out: Path, processes: int = 1) -> list[Outcome]:
    """Execute all jobs and go on after one fails.

    Args:
        jobs: what `plan` returned.
        out: where the executed copies go.
        processes: how many notebooks run side by side; they share the cores. One that measures time runs alone.

    Returns:
        One outcome per job, in the order of the jobs.
    """
    from tqdm.auto import tqdm

    outcomes: dict[str, Outcome] = {}
    with tqdm(total=len(jobs), desc="notebooks", unit="notebook", disable=None) as bar:  # None: only on a terminal
        alone = [job for job in jobs if processes == 1 or job.measures_time()]
        beside = [job for job in jobs if job not in alone]
        for outcome in chain(_outcomes(beside, out, min(processes, len(beside))), _outcomes(alone, out, 1)):
            outcomes[outcome.name] = outcome
            bar.update()
            bar.write(f"{outcome.name} {'failed' if outcome.error else 'finished'} after {outcome.seconds:.0f} s")
    return [outcomes[job.notebook.stem] for job in jobs]


def _outcomes(jobs: Sequence[Job], out: Path, processes: int) -> Iterator[Outcome]:
    if processes <= 1:
        yield from (run_job(job, out, progress=sys.stderr.isatty()) for job in jobs)
        return
    # Spawned, since papermill's event loop and the numerical libraries' threads do not survive a fork.
    with _environment(processes), ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        futures = {pool.submit(run_job, job, out): job for job in jobs}
        for future in as_completed(futures):
            try:
                yield future.result()
            except BrokenProcessPool:
                job = futures[future]
                yield Outcome(job.notebook.stem, out / job.notebook.name, 0.0, "A process of the batch died.", job.size)
