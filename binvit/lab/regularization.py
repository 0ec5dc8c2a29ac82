"""Does binarization regularize? What the tables of `robustness` say about few images and about wrong labels."""

from __future__ import annotations

import pandas as pd

from binvit.lab.claims import Claim, check_pair
from binvit.lab.statistics import compare


def change(
    df: pd.DataFrame, column: str, start: float, end: float, value: str = "test_accuracy", name: str = "change"
) -> pd.DataFrame:
    """Return how a measured value changes between two settings, trial by trial of the same scheme and seed.

    Args:
        df: the table of one data set, one row per trial.
        column: the setting, such as "label_noise".
        start: its first value.
        end: its second value.
        value: what is measured.
        name: the new column.

    Returns:
        scheme, seed and the new column: the value at `end` minus the value at `start`.

    Raises:
        ValueError: a setting has no trials, or several of one scheme and seed.
    """
    sides = []
    for at in (start, end):
        side = df[df[column] == at]
        if side.empty:
            raise ValueError(f"No trial has {column} = {at:g}; there are {sorted(df[column].unique())}.")
        if side.duplicated(["scheme", "seed"]).any():
            raise ValueError(f"Several trials of one scheme and seed have {column} = {at:g}; select one data set.")
        sides.append(side.set_index(["scheme", "seed"])[value])
    return (sides[1] - sides[0]).dropna().rename(name).reset_index()


def differences(table: pd.DataFrame, column: str, reference: str = "float") -> pd.DataFrame:
    """Return how much more accurate each scheme is than a reference, setting by setting, paired by seed.

    Args:
        table: the result of `run`.
        column: the setting, such as "samples_per_class".
        reference: a scheme.

    Returns:
        data, the setting, scheme, mean, low, high and n; no rows if the reference was not run.
    """
    columns = ["data", column, "scheme", "mean", "low", "high", "n"]
    parts = [
        compare(part, reference).assign(data=data, **{column: at})
        for (data, at), part in table.groupby(["data", column], sort=False)
        if reference in set(part["scheme"])
    ]
    return pd.concat(parts, ignore_index=True)[columns] if parts else pd.DataFrame(columns=columns)


def sample_claims(table: pd.DataFrame, binary: str = "gsb", single: str = "bit", full: str = "float") -> list[Claim]:
    """Check whether binarization regularizes, on the trials of one data set.

    Args:
        table: the result of `run` with the trials of `sample_runs`.
        binary: the scheme that is said to regularize.
        single: the scheme with one group.
        full: the float scheme.

    Returns:
        the claims; undecided where a scheme was not run.
    """
    few, many = table["samples_per_class"].min(), table["samples_per_class"].max()
    part = table[table["samples_per_class"] == few]
    found = [
        check_pair(f"With {few} images per class, {binary} is more accurate than {full}.", part, binary, full),
        check_pair(f"With {few} images per class, {binary} is more accurate than {single}.", part, binary, single),
        check_pair(
            f"With {few} images per class, the gap between training and test is smaller for {binary} than for {full}.",
            part,
            full,
            binary,
            value="gap",
        ),
    ]
    if few < many:
        gained = change(table, "samples_per_class", few, many)
        sentence = (
            f"From {few} to {many} images per class, {full} gains more than {binary}: few images favour {binary}."
        )
        found.append(check_pair(sentence, gained, full, binary, value="change"))
    return found


def noise_claims(table: pd.DataFrame, binary: str = "gsb", single: str = "bit", full: str = "float") -> list[Claim]:
    """Check whether binarization resists wrong labels, on the trials of one data set.

    Args:
        table: the result of `run` with the trials of `noise_runs`.
        binary: the scheme that is said to resist.
        single: the scheme with one group.
        full: the float scheme.

    Returns:
        the claims; undecided where a scheme was not run.
    """
    found = []
    for kind in ("symmetric", "class-conditional"):
        part = table[(table["labels"] == kind) & (table["label_noise"] > 0)]
        if part.empty:
            continue
        part = part[part["label_noise"] == part["label_noise"].max()]
        where = f"With {part['label_noise'].iloc[0]:.0%} {kind} noise"
        found += [
            check_pair(f"{where}, {binary} is more accurate than {full}.", part, binary, full),
            check_pair(f"{where}, {binary} is more accurate than {single}.", part, binary, single),
            check_pair(
                f"{where}, {binary} memorizes a smaller share of the wrong labels than {full}.",
                part,
                full,
                binary,
                value="memorized",
            ),
        ]
    symmetric = table[table["labels"] == "symmetric"]
    most = symmetric["label_noise"].max() if len(symmetric) else 0
    if most > 0 and (symmetric["label_noise"] == 0).any():
        lost = change(symmetric, "label_noise", 0, most)
        sentence = f"From right labels to {most:.0%} symmetric noise, {binary} loses less accuracy than {full}."
        found.append(check_pair(sentence, lost, binary, full, value="change"))
    return found
