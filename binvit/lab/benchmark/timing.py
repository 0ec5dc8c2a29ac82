"""Timing side by side: every contender runs in every round, so that all see the same machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch

from binvit import bits
from binvit.threads import check_threads

_PAUSE = 0.01  # seconds; OpenMP's threads were seen to spin for 4 ms after a product
_WARM_UP = 0.002, 0.03  # seconds; a thread that wakes on a busy core was seen to stay there for some milliseconds
_WARM_RUNS = 4
_COUNTED = 3  # runs per turn; one of those that last longer than the next number of seconds
_LONG = 0.1

Contenders = Mapping[str, Callable[[], object]]


@contextmanager
def use_threads(threads: int | None) -> Iterator[int]:
    """Give torch and the bit kernels the same number of threads inside a `with` block.

    Args:
        threads: at least 1; None keeps torch's present number for both.

    Yields:
        The number of threads.

    Raises:
        ValueError: if `threads` is below 1 or more than the bit kernels can have.
    """
    before = torch.get_num_threads()
    threads = before if threads is None else check_threads(threads)
    with bits.use_threads(threads) as available:
        if available != threads:
            raise ValueError(f"{threads} threads were asked for, but this machine gives the bit kernels {available}.")
        torch.set_num_threads(threads)
        try:
            yield threads
        finally:
            torch.set_num_threads(before)


def interleave(contenders: Contenders, seconds: float = 1.0, least: int = 6, most: int = 400) -> dict[str, np.ndarray]:
    """Run all contenders in turn, round by round, and return the seconds of each run.

    Before its turn every contender gets a pause, since the threads of the one before spin for some milliseconds after
    their last product, on the cores that the next one needs. Then it runs a few times to bring its own threads and
    data back, and its next three runs count, or its next run if that is a long one: each is measured as if it were
    alone and busy.

    Args:
        contenders: what to run, by name; the first call of each, which may compile, is not counted.
        seconds: time to spend per contender, roughly.
        least: fewest rounds; below six a ratio has no 95 % interval.
        most: most rounds.

    Returns:
        For each name, seconds per run, float64 (rounds or 3 rounds,).
    """
    once = {}
    for name, run in contenders.items():
        run()
        start = time.perf_counter()
        run()
        once[name] = time.perf_counter() - start
    counted = {name: _COUNTED if duration < _LONG else 1 for name, duration in once.items()}
    warm = {name: min(max(_WARM_UP[0], _WARM_RUNS * duration), _WARM_UP[1]) for name, duration in once.items()}
    spent = sum(_PAUSE + max(warm[name], duration) + counted[name] * duration for name, duration in once.items())
    rounds = int(np.clip(len(contenders) * seconds / max(spent, 1e-9), least, most))
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, run in contenders.items():
            time.sleep(_PAUSE)
            start = time.perf_counter()
            run()
            while time.perf_counter() - start < warm[name]:
                run()
            for _ in range(counted[name]):
                start = time.perf_counter()
                run()
                times[name].append(time.perf_counter() - start)
    return {name: np.array(values) for name, values in times.items()}


def ratio_interval(times: np.ndarray, reference: np.ndarray) -> tuple[float, float]:
    """Return the 95 % interval of a median ratio over the rounds of `interleave`; NaN where there are too few.

    Both see the same machine in a round, so that what slows all down does not widen the interval. It comes from order
    statistics and assumes no distribution.

    Args:
        times: seconds of one contender, float64 (rounds or 3 rounds,).
        reference: those of the other.
    """
    from scipy.stats import quantile_test  # takes longer to load than all that plans need

    rounds = min(len(times), len(reference))
    ratios = np.median(times.reshape(rounds, -1), 1) / np.median(reference.reshape(rounds, -1), 1)
    interval = quantile_test(ratios, q=1.0, p=0.5).confidence_interval(0.95)
    return float(interval.low), float(interval.high)
