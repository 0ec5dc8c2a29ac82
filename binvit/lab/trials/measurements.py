"""What is measured on trained models and on machines, kept beside the archived trials as tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from filelock import FileLock

from binvit.config import show
from binvit.files import atomic_write

FOLDER = "measurements"


def read_measurements(archive: str | Path, name: str) -> pd.DataFrame:
    """Return a table of measurements; one without rows and columns if there is none.

    Args:
        archive: the folder with measurements/.
        name: the table's file name without ending, such as "03_losses".

    Raises:
        ValueError: as `read_table` does.
    """
    path = Path(archive) / FOLDER / f"{name}.csv"
    return read_table(path) if path.is_file() else pd.DataFrame()


def read_table(path: Path, columns: Sequence[str] = ()) -> pd.DataFrame:
    """Return a table of measurements.

    Args:
        path: its file.
        columns: what it must have.

    Raises:
        ValueError: the file cannot be read, lacks a column, or holds a number that is not finite.
    """
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False).apply(_numbers)
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise ValueError(f"The measurements {path} cannot be read: {str(error).strip().rstrip('.')}.") from None
    for name in columns:
        if name not in table:
            raise ValueError(f"The measurements {path} lack the column {name}; they have {show(list(table.columns))}.")
    for name in table.select_dtypes(float):
        if np.isinf(table[name]).any():
            raise ValueError(f"The measurements {path} hold a number in the column {name} that is not finite.")
    return table


def _numbers(column: pd.Series) -> pd.Series:
    """Return texts as whole numbers, else as floats with every digit that was written, else as they are."""
    for kind in (int, float):
        with suppress(ValueError):
            return column.map(lambda text: kind(text or "nan"))  # noqa: B023
    return column


def measured_with(table: pd.DataFrame, options: Mapping[str, Any]) -> pd.DataFrame:
    """Return the rows of a table of measurements that were made with these options.

    Args:
        table: the result of `read_measurements`.
        options: column -> value; a table that lacks a column does not say, and has no such row.
    """
    for name, value in options.items():
        if name not in table:
            return table.head(0)
        table = table[table[name].map(lambda cell: "" if pd.isna(cell) else str(cell)) == str(value)]
    return table


def add_measurements(archive: str | Path, name: str, rows: pd.DataFrame, keys: Sequence[str]) -> None:
    """Write measurements to an archive; rows that are there already and have the same keys make room for them.

    Several processes may write to one archive: one waits until another has written.

    Args:
        archive: the folder with measurements/.
        name: the table's file name without ending.
        rows: what was measured.
        keys: columns that say what the rows belong to, such as the identity of a trial or the kind of CPU; the table is
            sorted by the first of them, and otherwise keeps the order in which things were measured.
    """
    if rows.empty:
        return
    folder = Path(archive) / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):
        before = read_measurements(archive, name)
        if len(before):
            new = pd.MultiIndex.from_frame(rows[list(keys)].astype(str))
            before = before[~pd.MultiIndex.from_frame(before[list(keys)].astype(str)).isin(new)]
        table = pd.concat([before, rows], ignore_index=True) if len(before) else rows
        table = table.sort_values(keys[0], kind="stable", key=lambda column: column.astype(str))
        atomic_write(folder / f"{name}.csv", table.to_csv(index=False, lineterminator="\n"))
