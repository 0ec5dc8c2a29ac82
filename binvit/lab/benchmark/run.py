"""What `binvit bench` prints and writes: the tables of `binvit.lab.benchmark` and a roofline of the kernels."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from binvit import bits
from binvit.config import show
from binvit.files import atomic_write
from binvit.lab.benchmark.kernels import benchmark_kernels
from binvit.lab.benchmark.machine import LoadWatch, describe_cpu, kernels_version
from binvit.lab.benchmark.memory import benchmark_memory
from binvit.lab.benchmark.models import benchmark_growth, benchmark_models
from binvit.lab.benchmark.roofline import draw_roofline
from binvit.lab.benchmark.steps import SIZES, benchmark_steps
from binvit.lab.figures.style import save_figure
from binvit.nn import list_schemes
from binvit.nn.schemes import check_name

PARTS = ("kernels", "models", "growth", "memory", "training")


def run_benchmarks(
    parts: Iterable[str],
    out: Path,
    batches: Sequence[int] = (),
    threads: int | None = None,
    seconds: float = 2.0,
    sizes: Sequence[str] = (),
    schemes: Sequence[str] = (),
    say: Callable[[str], None] = print,
) -> dict[str, pd.DataFrame]:
    """Run parts of the benchmark, print their tables, and write them as CSV.

    Each row also tells the kind of CPU, the load of others meanwhile, and the version of the kernels.

    Args:
        parts: elements of `PARTS`.
        out: folder of the tables and of the roofline figure; made if it is missing.
        batches: images per run; by default 1, 8 and 32, and those of each size for a training step.
        threads: threads of every contender.
        seconds: time per measurement, roughly.
        sizes: of training steps; by default all of `binvit.lab.benchmark.steps.SIZES`.
        schemes: whose training steps are measured; by default all of the catalogue.
        say: takes every line of text.

    Returns:
        The tables by part.

    Raises:
        ValueError: if a part, a size or a scheme is unknown, `seconds` is no positive time, or `out` is a file.
    """
    parts = list(dict.fromkeys(parts))
    for part in parts:
        if part not in PARTS:
            raise ValueError(f"Unknown part {show(part)} of the benchmark; valid are {', '.join(PARTS)}.")
    for kind, names, valid in (("size", sizes, SIZES), ("scheme", schemes, ("float", *list_schemes()))):
        for name in names:
            check_name(kind, name, valid)
    if not 0 < seconds < math.inf:  # nor NaN
        raise ValueError(f"The time per measurement must be a positive number of seconds, got {show(seconds)}.")
    if out.exists() and not out.is_dir():
        raise ValueError(f"The folder of the tables, {out}, is a file.")
    out.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=out).close()  # minutes of measurements should not end at a folder that takes no file
    say(f"CPU: {describe_cpu()}.")
    say(f"The kernels took {bits.warm_up():.1f} s to compile or to load; no measurement includes it.")
    options: dict[str, Any] = {"threads": threads, "seconds": seconds}
    runs: dict[str, Callable[[], pd.DataFrame]] = {
        "kernels": lambda: benchmark_kernels(**options),
        "models": lambda: benchmark_models(batches or (1, 8, 32), say=say, **options),
        "growth": lambda: benchmark_growth(**options),
        "memory": lambda: pd.concat([benchmark_memory(batch) for batch in batches or (1, 8)], ignore_index=True),
        "training": lambda: pd.concat(
            [benchmark_steps(sizes or SIZES, schemes or None, batch=b, **options) for b in batches or (None,)]
        ),
    }
    tables = {}
    for part in parts:
        watch = LoadWatch()
        table = runs[part]()
        load = watch.stop()
        say(f"\n{part}\n" + table.to_string(index=False, float_format="{:.4g}".format))
        say(load.sentence())
        code = kernels_version("nn") if part == "training" else kernels_version()
        tables[part] = table.assign(cpu=describe_cpu(), others=round(load.others, 3), kernels=code)
        atomic_write(out / f"{part}.csv", tables[part].to_csv(index=False))
        if part == "kernels":
            save_figure(draw_roofline(tables[part]), "roofline", out)
    say(f"\nThe tables are in {out}.")
    return tables
