"""What is measured on trained models and on machines, kept beside the archived trials as tables."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import pandas as pd
from filelock import FileLock

from binvit.files import atomic_write

FOLDER = "measurements"


def read_measurements(archive: str | Path, name: str) -> pd.DataFrame:
    """Return a table of measurements; one without rows and columns if there is none.

    Args:
        archive: the folder with measurements/.
        name: the table's file name without ending, such as "03_losses".

    Raises:
        ValueError: the file cannot be read.
    """
    path = Path(archive) / FOLDER / f"{name}.csv"
    if not path.is_file():
        return pd.DataFrame()
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False)
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise ValueError(f"The measurements {path} cannot be read: {error}.") from None
    return table.apply(_numbers)


def _numbers(column: pd.Series) -> pd.Series:
    """Return texts as whole numbers, else as floats with every digit that was written, else as they are."""
    for kind in (int, float):
        with suppress(ValueError):
            return column.map(lambda text: kind(text or "nan"))  # noqa: B023
    return column


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
