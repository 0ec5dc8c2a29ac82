"""What `binvit bench` prints and writes: the tables of `binvit.lab.benchmark` and a roofline of the kernels."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from binvit import bits
from binvit.files import atomic_write
from binvit.jit import JIT
from binvit.lab import figures
from binvit.lab.benchmark import (
    benchmark_growth,
    benchmark_kernels,
    benchmark_memory,
    benchmark_models,
    benchmark_training,
)
from binvit.lab.style import scheme_color
from binvit.lab.timing import interleave


def memory_bandwidth() -> float:
    """Measure the bytes a second that this machine copies, read and written, by one large copy."""
    source = np.ones(64 * 2**20, np.uint8)
    target = np.empty_like(source)
    times = interleave({"copy": functools.partial(np.copyto, target, source)}, 0.3)["copy"]
    return 2 * source.nbytes / float(np.median(times))


_COLORS = {
    "torch float32": scheme_color("float"),
    "torch bfloat16": scheme_color("bit"),
    "torch int8": scheme_color("xnor"),
    "binvit 1-bit": scheme_color("gsb"),
}


def draw_roofline(kernels: pd.DataFrame, title: str | None = None) -> Figure:
    """Draw the kernels' rates below the limits of memory and of the population count.

    Args:
        kernels: What `benchmark_kernels` returned.
        title: What the figure says.

    Returns:
        The figure.
    """
    bytes_per_value = {"torch float32": 4, "torch bfloat16": 2, "torch int8": 1, "binvit 1-bit": 1 / 8}
    size = kernels["contender"].map(bytes_per_value)
    output = kernels["contender"].map({"torch bfloat16": 2}).fillna(4)
    m, k, n = (kernels[c] for c in "mkn")
    moved = size * (m * k + n * k) + output * m * n
    points = pd.DataFrame({"family": kernels["contender"], "intensity": m * k * n / moved, "rate": kernels["rate"]})
    points["name"] = ""
    threads = int(kernels["threads"].iloc[0])
    limits = {"population count": bits.popcount_limit(threads) / 1e9} if JIT else {}
    return figures.roofline(points, limits, memory_bandwidth() / 1e9, title=title, colors=_COLORS)


PARTS = ("kernels", "models", "growth", "memory", "training")


def run_benchmarks(
    parts: Iterable[str],
    out: Path,
    batches: Sequence[int] = (),
    threads: int | None = None,
    seconds: float = 2.0,
    say: Callable[[str], None] = print,
) -> dict[str, pd.DataFrame]:
    """Run parts of the benchmark, print their tables, and write them as CSV.

    Args:
        parts: Elements of `PARTS`.
        out: Folder of the tables and of the roofline figure; made if it is missing.
        batches: Images per run; by default 1, 8 and 32, and 8 for a training step.
        threads: Threads of every contender.
        seconds: Time per measurement, roughly.
        say: Takes every line of text.

    Returns:
        The tables by part.

    Raises:
        ValueError: If a part is unknown, `seconds` is no positive time, or `out` is a file.
    """
    parts = list(dict.fromkeys(parts))
    for part in parts:
        if part not in PARTS:
            raise ValueError(f"Unknown part {part!r} of the benchmark; valid are {', '.join(PARTS)}.")
    if not 0 < seconds < math.inf:  # nor NaN
        raise ValueError(f"The time per measurement must be a positive number of seconds, got {seconds!r}.")
    if out.exists() and not out.is_dir():
        raise ValueError(f"The folder of the tables, {out}, is a file.")
    say(f"The kernels took {bits.warm_up():.1f} s to compile or to load; no measurement includes it.")
    options = {"threads": threads, "seconds": seconds}
    runs: dict[str, Callable[[], pd.DataFrame]] = {
        "kernels": lambda: benchmark_kernels(**options),
        "models": lambda: benchmark_models(batches or (1, 8, 32), say=say, **options),
        "growth": lambda: benchmark_growth(**options),
        "memory": lambda: pd.concat([benchmark_memory(batch) for batch in batches or (1, 8)], ignore_index=True),
        "training": lambda: pd.concat([benchmark_training(b, threads=threads) for b in batches or (8,)]),
    }
    tables = {}
    for part in parts:
        tables[part] = runs[part]()
        say(f"\n{part}\n" + tables[part].to_string(index=False, float_format="{:.4g}".format))
        atomic_write(out / f"{part}.csv", tables[part].to_csv(index=False))
        if part == "kernels":
            figures.save_figure(draw_roofline(tables[part]), "roofline", out)
    say(f"\nThe tables are in {out}.")
    return tables
