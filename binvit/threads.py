"""How many threads the parallel kernels use; torch's number is a different one."""

from __future__ import annotations

import functools
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numba
import numpy as np

from binvit.jit import JIT

_CHOSEN = threading.local()


def cores() -> int:
    """Return the number of cores that this process may use; CPU sets may give it fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def set_threads(threads: int | None = None) -> int:
    """Set how many threads the calling thread's parallel kernels use from now on.

    torch's thread count is a different one, and stays as it is.

    Args:
        threads: at least 1; more than numba started with (``NUMBA_NUM_THREADS``, by default every core) means all of
            them. None takes ``OMP_NUM_THREADS`` where that is set, else all.

    Returns:
        The number of threads now in use.

    Raises:
        ValueError: if `threads` is less than one or not a whole number.
    """
    limit = numba.config.NUMBA_NUM_THREADS
    if threads is None:
        given = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
        threads = int(given) if given.isdecimal() and int(given) > 0 else limit
    threads = min(check_threads(threads), limit)
    if JIT:
        start_threads()
        numba.set_num_threads(threads)
        _CHOSEN.threads = threads
    return threads


def check_threads(threads: int) -> int:
    """Check a number of threads.

    Args:
        threads: what should be a whole number of at least 1.

    Returns:
        The same number as int.

    Raises:
        ValueError: if it is anything else.
    """
    if isinstance(threads, bool) or not isinstance(threads, int | np.integer) or threads < 1:
        raise ValueError(f"The number of threads must be a whole number of at least 1, not {threads!r}.")
    return int(threads)


def get_threads() -> int:
    """Return how many threads the calling thread's parallel kernels use.

    Returns:
        The number set by `set_threads`, by default all that numba started with.
    """
    chosen = getattr(_CHOSEN, "threads", None)  # numba takes a microsecond to answer
    if JIT and not chosen:
        start_threads()
        return numba.get_num_threads()
    return chosen or 1


@functools.cache
def start_threads() -> None:
    """Let numba start its threads, which happens once; torch's number of threads stays as it is."""
    # numba starts them in torch's OpenMP runtime if that is loaded, and thereby sets the number that torch uses.
    torch: Any = sys.modules.get("torch")
    before = torch.get_num_threads() if hasattr(torch, "get_num_threads") else None
    numba.get_num_threads()
    if before is not None:
        torch.set_num_threads(before)


@contextmanager
def use_threads(threads: int | None) -> Iterator[int]:
    """Use a number of threads inside a ``with`` block and restore the previous one afterwards.

    Args:
        threads: as for `set_threads`, but None keeps the current number.

    Yields:
        The number of threads in use.
    """
    now, chosen = get_threads(), getattr(_CHOSEN, "threads", None)
    before = numba.get_num_threads() if JIT else 1
    try:
        yield now if threads is None else set_threads(threads)
    finally:
        _CHOSEN.threads = chosen
        if JIT:
            numba.set_num_threads(before)
