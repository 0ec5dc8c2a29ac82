"""The machine of a measurement: its kind of CPU, and how much of it other programs used meanwhile."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

import pandas as pd
import psutil

from binvit.lab.training.resume import cpu_kind, cpu_vectors
from binvit.threads import cores

BUSY = 0.05
"""Share of the cores that other programs may use before a measurement is no longer trusted."""


def describe_cpu() -> str:
    """Return the kind of CPU, the features that speed depends on, and the number of cores."""
    return f"{cpu_kind()} with {cpu_vectors()}, {cores()} cores"


def cpu_of(table: pd.DataFrame) -> str:
    """Return the kind of CPU that a table of measurements comes from: its column cpu, without one this machine's."""
    return "; ".join(table["cpu"].unique()) if "cpu" in table else describe_cpu()


@dataclass(frozen=True)
class Load:
    """How much of the machine other programs used while something was measured."""

    others: float
    """Their share of all cores' time, 0 to 1; what a host takes away from a virtual machine counts as theirs."""

    @property
    def busy(self) -> bool:
        """Whether a measurement made meanwhile should not be trusted."""
        return self.others > BUSY

    def sentence(self) -> str:
        """Say it in words."""
        text = f"Meanwhile other programs used {self.others:.0%} of the cores"
        return text + (": the machine was busy, and the numbers should not be trusted." if self.busy else ".")


class LoadWatch:
    """Measures, from when it is made, how busy the machine is with anything but this process and its ended children."""

    def __init__(self) -> None:
        self._start, self._ours, self._all = time.perf_counter(), _own_seconds(), _busy_seconds()

    def stop(self) -> Load:
        """Return the load since then; the watch goes on."""
        seconds = (time.perf_counter() - self._start) * (psutil.cpu_count() or 1)
        others = (_busy_seconds() - self._all) - (_own_seconds() - self._ours)
        return Load(min(1.0, max(0.0, others / max(seconds, 1e-9))))


def _busy_seconds() -> float:
    times = psutil.cpu_times()
    return sum(getattr(times, name, 0.0) for name in ("user", "nice", "system", "irq", "softirq", "steal"))


def _own_seconds() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system
