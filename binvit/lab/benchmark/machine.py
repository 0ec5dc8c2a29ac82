"""What a measurement belongs to: the kind of CPU, the version of the kernels, and how much other programs used."""

from __future__ import annotations

import ast
import functools
import hashlib
import io
import os
import time
import tokenize
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import psutil

import binvit
from binvit.lab.training.resume import cpu_kind, cpu_vectors
from binvit.threads import cores

BUSY = 0.05
"""Share of the cores that other programs may use before a measurement is no longer trusted."""


OUTDATED = " (kernels of another version)"
"""Follows a kind of CPU whose measurements are of other code than this."""
_FAST = ("bits", "packed", "jit.py", "threads.py")  # of the package: what a packed model runs


def describe_cpu() -> str:
    """Return the kind of CPU, the features that speed depends on, and the number of cores."""
    return f"{cpu_kind()} with {cpu_vectors()}, {cores()} cores"


@functools.cache
def kernels_version(*more: str) -> str:
    """Return a fingerprint of the code that packed models run; comments, docstrings and line breaks are no part of it.

    Args:
        more: other folders or modules of the package that a measurement depends on, such as "nn" for a training step.
    """
    root, digest = Path(binvit.__file__).parent, hashlib.sha256()
    for name in (*_FAST, *more):
        files = [root / name] if name.endswith(".py") else sorted((root / name).rglob("*.py"))
        for file in files:
            digest.update(
                f"{file.relative_to(root).as_posix()}: {statements(file.read_text(encoding='utf-8'))}\n".encode()
            )
    return f"sha256:{digest.hexdigest()[:16]}"


def statements(source: str) -> str:
    """Return a program without its comments and docstrings, and with single spaces."""
    lines = source.splitlines(keepends=True)
    spans = [
        (token.start, token.end)
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    ]
    columns = [line.encode() for line in lines]  # ast counts bytes, tokenize characters
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and ast.get_docstring(
            node
        ):
            text = node.body[0]
            last = text.end_lineno or text.lineno
            first_column = len(columns[text.lineno - 1][: text.col_offset].decode())
            last_column = len(columns[last - 1][: text.end_col_offset].decode())
            spans.append(((text.lineno, first_column), (last, last_column)))
    for (first, start), (last, end) in sorted(spans, reverse=True):
        lines[first - 1 : last] = [lines[first - 1][:start] + lines[last - 1][end:]]
    return " ".join("".join(lines).split())


def cpu_of(table: pd.DataFrame) -> str:
    """Return the kind of CPU that a table of measurements comes from, and whether kernels have changed since.

    Args:
        table: its columns cpu and kernels say so; without cpu it was measured here, without kernels at another time.
    """
    if "cpu" not in table:
        return describe_cpu()
    told = table.reindex(columns=["cpu", "kernels"]).drop_duplicates()
    now = kernels_version()
    return "; ".join(cpu + (OUTDATED if code != now else "") for cpu, code in told.itertuples(index=False))


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
