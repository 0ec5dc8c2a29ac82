"""Measurements of an archive: `binvit bench` added to it, and other machines beside what is measured here."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from binvit.lab.benchmark.machine import cpu_of, kernels_version
from binvit.lab.benchmark.run import PARTS
from binvit.lab.figures.style import require_columns
from binvit.lab.trials.measurements import add_measurements, read_measurements, read_table

_TOGETHER = {
    "models": ("width", "threads", "batch"),
    "training": ("size", "threads", "scheme"),
}  # what one run measures


def archive_bench(folder: str | Path, archive: str | Path) -> list[str]:
    """Add the tables of `binvit bench` to an archive; what was measured there on the same kind of CPU makes room.

    Models in batches of another size, and steps of other schemes, sizes or numbers of threads stay. Training steps are
    called 08_steps.

    Args:
        folder: what `binvit bench --out` has written.
        archive: folder of the archive.

    Returns:
        The parts that were there.

    Raises:
        FileNotFoundError: there is none.
        ValueError: one of them is damaged.
    """
    found = [part for part in PARTS if (Path(folder) / f"{part}.csv").is_file()]
    if not found:
        raise FileNotFoundError(f"There are no tables of binvit bench in {folder}.")
    for part in found:
        name = "08_steps" if part == "training" else f"08_{part}"  # 08_training has the notebook's one scheme
        keys = ["cpu", *_TOGETHER.get(part, ())]
        add_measurements(archive, name, read_table(Path(folder) / f"{part}.csv", keys), keys)
    return found


def beside(archive: str | Path, models: pd.DataFrame, kernels: pd.DataFrame) -> pd.DataFrame:
    """Put what was measured here beside what an archive knows of other machines.

    Args:
        archive: folder of archived measurements.
        models: what `binvit.lab.benchmark.models.benchmark_models` returned here.
        kernels: what `binvit.lab.benchmark.kernels.benchmark_kernels` returned here.

    Returns:
        A column per kind of CPU and "here": milliseconds per image of each batch and contender, then how many times as
        fast the 1-bit product is as each peer's, the smallest and the largest of all shapes.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    if not Path(archive).is_dir():
        raise FileNotFoundError(f"There is no archive {archive}.")
    both = {
        name: pd.concat([_told_apart(read_bench(archive, name)), here.assign(cpu="here")], ignore_index=True)
        for name, here in (("models", models), ("kernels", kernels))
    }
    rows = [
        (f"ms per image, batch {batch}", contender, cpu, f"{1000 * part['per_image'].median():.1f}")
        for (batch, contender, cpu), part in both["models"]
        .sort_values("batch", kind="stable")
        .groupby(["batch", "contender", "cpu"], sort=False)
    ]
    rows += [
        ("times a 1-bit product", contender, cpu, f"{part['times'].min():.1f} to {part['times'].max():.1f}")
        for (contender, cpu), part in both["kernels"].groupby(["contender", "cpu"], sort=False)
        if contender != "binvit 1-bit"
    ]
    table = pd.DataFrame(rows, columns=["what", "contender", "CPU", "value"])
    kinds = [*(cpu for cpu in table["CPU"].unique() if cpu != "here"), "here"]
    wide = table.pivot_table(index=["what", "contender"], columns="CPU", values="value", aggfunc="first", sort=False)
    return wide[kinds].fillna("")


def memory_beside(archive: str | Path, here: pd.DataFrame | None) -> pd.DataFrame:
    """Put the memory that was measured here beside what an archive knows of other machines.

    Args:
        archive: folder of archived measurements.
        here: what `binvit.lab.benchmark.memory.benchmark_memory` returned here; None if it was not measured.

    Returns:
        A column per kind of CPU and "here": million bytes of the file, then by how many million bytes the highest
        memory of a process rises, by contender and number of images; empty if nothing was measured anywhere.
    """
    both = _told_apart(read_bench(archive, "memory"))
    if here is not None:
        both = pd.concat([both, here.assign(cpu="here")], ignore_index=True)
    if both.empty:
        return both
    require_columns(both, ["contender", "batch", "file_bytes", "peak_bytes"])
    both["value"] = [
        f"{file / 1e6:.1f}, {peak / 1e6:.1f}" for file, peak in zip(both["file_bytes"], both["peak_bytes"], strict=True)
    ]
    wide = both.pivot_table("value", ["contender", "batch"], "cpu", aggfunc="first", sort=False)
    return wide.rename_axis(columns="MB of the file, and of memory").fillna("")


def archived_steps(archive: str | Path) -> pd.DataFrame:
    """Return what an archive knows of training steps: how many times as long as the float step, by scheme.

    Args:
        archive: folder of archived measurements.

    Returns:
        A column per kind of CPU, size, images and threads; "earlier" stands where the code that trains is another.
    """
    table = read_measurements(archive, "08_steps")
    if table.empty:
        return table
    keys = ["cpu", "size", "batch", "threads"]
    require_columns(table, [*keys, "scheme", "times"])
    earlier = table.reindex(columns=["kernels"])["kernels"] != kernels_version("nn")
    text = [f"{times:.2f}{' (earlier)' if old else ''}" for times, old in zip(table["times"], earlier, strict=True)]
    wide = table.assign(text=text).pivot_table("text", "scheme", keys, aggfunc="first")
    return wide.fillna("")


def read_bench(archive: str | Path, part: str) -> pd.DataFrame:
    """Return a table of `PARTS` from an archive.

    Args:
        archive: folder of archived measurements.
        part: its name.

    Returns:
        The table; empty if the archive has none.
    """
    table = read_measurements(archive, f"08_{part}")
    if not table.empty:
        require_columns(table, ["contender", "cpu"])
    return table


def _told_apart(table: pd.DataFrame) -> pd.DataFrame:
    """Name kinds of CPU as `cpu_of` does: with a word where other kernels than these were measured."""
    return table.assign(cpu=[cpu_of(table.loc[[row]]) for row in table.index]) if len(table) else table
