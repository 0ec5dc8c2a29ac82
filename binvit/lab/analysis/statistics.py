"""Means and differences over seeds with 95 % intervals from Student's t distribution."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import special  # stats, whose t distribution is made of these, takes a second to load

CONFIDENCE = 0.95
MEASURED = ("test_accuracy", "train_accuracy", "seconds")  # what differs between trials without being a setting
SHARES = ("test_accuracy", "train_accuracy", "clean_train_accuracy", "memorized", "flipped")  # from 0 to 1


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % interval; the interval of a single number is unknown (NaN)."""

    mean: float
    low: float
    high: float
    n: int

    def interval(self, confidence: float) -> tuple[float, float]:
        """Return the t interval at another confidence; NaN for a single number.

        Args:
            confidence: between 0 and 1, such as 0.99.
        """
        if math.isnan(self.low):
            return math.nan, math.nan
        half = self._standard_error * float(special.stdtrit(self.n - 1, (1 + confidence) / 2))
        return self.mean - half, self.mean + half

    def p_values(self, margin: float) -> tuple[float, float] | None:
        """Return the one-sided p-values of the t test of "not above the margin" and of "above the margin".

        Args:
            margin: in the units of the mean.

        Returns:
            Two numbers that add up to 1; None for a single number. Equal numbers leave no doubt, (0, 1) above the
            margin and (1, 0) below it; at the margin itself they say nothing.
        """
        if math.isnan(self.low):
            return None
        if self._standard_error == 0:
            return (0.5, 0.5) if self.mean == margin else (0.0, 1.0) if self.mean > margin else (1.0, 0.0)
        t = (self.mean - margin) / self._standard_error
        return float(special.stdtr(self.n - 1, -t)), float(special.stdtr(self.n - 1, t))

    @property
    def _standard_error(self) -> float:
        return (self.high - self.low) / 2 / float(special.stdtrit(self.n - 1, (1 + CONFIDENCE) / 2))

    def text(self, percent: bool = False) -> str:
        """Return the estimate as text that always tells the number of seeds, such as ``97.3 ± 0.6 (n = 3)``.

        Args:
            percent: multiply by 100 and show one digit, as for accuracies.

        Returns:
            The mean, half the interval's width (absent for a single number), and n.
        """
        factor = 100 if percent else 1
        spec = ".1f" if percent else ".3g"
        half = factor * (self.high - self.low) / 2
        spread = "" if math.isnan(half) else f" ± {half:{spec}}"
        return f"{factor * self.mean:{spec}}{spread} (n = {self.n})"


@dataclass(frozen=True)
class Difference(Estimate):
    """The mean of ``a - b`` over pairs with its 95 % interval."""

    a: str
    b: str
    value: str


def estimate(values: Iterable[float]) -> Estimate:
    """Return the mean and 95 % t interval of independent numbers.

    Args:
        values: one number per seed.

    Returns:
        The estimate; low and high are NaN for a single number, from which no spread can be told.

    Raises:
        ValueError: if there is no number, or one that is not finite.

    References:
        Student. The probable error of a mean. Biometrika 6, 1908.
    """
    x = np.asarray(list(values), dtype=np.float64)
    if x.size == 0:
        raise ValueError("An interval needs at least one number, and none came.")
    if not np.isfinite(x).all():
        raise ValueError(f"An interval needs finite numbers, and {(~np.isfinite(x)).sum()} of {x.size} are not.")
    mean = float(x.mean())
    if x.size == 1:
        return Estimate(mean, math.nan, math.nan, 1)
    half = float(special.stdtrit(x.size - 1, (1 + CONFIDENCE) / 2) * x.std(ddof=1) / math.sqrt(x.size))
    return Estimate(mean, mean - half, mean + half, int(x.size))


def summarize(
    df: pd.DataFrame, by: str | Sequence[str] = "scheme", value: str = "test_accuracy", seed: str = "seed"
) -> pd.DataFrame:
    """Return the mean, 95 % interval and number of seeds of each group of trials.

    Args:
        df: one row per trial.
        by: the columns that name a group; groups keep the order of their first trial.
        value: the column to average.
        seed: the column that tells the trials of one group apart.

    Returns:
        The columns of ``by``, then ``mean``, ``low``, ``high`` (NaN for one seed) and ``n``. Intervals of accuracies
        and other shares end at 0 and 1.

    Raises:
        ValueError: if a column is missing, a value is not finite, or a seed occurs twice within a group, which would
            count differently configured trials as repetitions of one.
    """
    by = [by] if isinstance(by, str) else list(by)
    _require(df, [*by, value, seed])
    rows = []
    for key, group in df.groupby(by, sort=False, dropna=False):
        _refuse_duplicates(group, seed, ", ".join(f"{c} = {k!r}" for c, k in zip(by, key, strict=True)), by)
        e = estimate(group[value])
        rows.append((*key, e.mean, e.low, e.high, e.n))
    found = pd.DataFrame(rows, columns=[*by, "mean", "low", "high", "n"])
    if value in SHARES:
        found[["low", "high"]] = found[["low", "high"]].astype(float).clip(0, 1)
    return found


def paired_difference(
    df: pd.DataFrame,
    a: str,
    b: str,
    on: str = "scheme",
    pair: str | Sequence[str] = "seed",
    value: str = "test_accuracy",
) -> Difference:
    """Return the mean and 95 % interval of ``a - b``, trials of ``a`` paired with those of ``b`` of the same seed.

    Args:
        df: one row per trial.
        a: the value of column ``on`` to subtract from.
        b: the value of column ``on`` to subtract.
        on: the column that tells the two sides apart.
        pair: the column, or columns, whose values make a pair.
        value: the column to compare.

    Returns:
        The difference; its interval is NaN for a single pair.

    Raises:
        ValueError: if a column or a side is missing, a pair is ambiguous, or a trial has no partner.
    """
    pair = [pair] if isinstance(pair, str) else list(pair)
    _require(df, [on, value, *pair])
    sides = []
    for name in (a, b):
        _require_side(df, on, name)
        side = df[df[on] == name]
        _refuse_duplicates(side, pair, f"{on} = {name!r}", [on])
        sides.append(side.set_index(pair)[value])
    lone = sides[0].index.symmetric_difference(sides[1].index)
    if len(lone):
        first = lone[0]
        has, lacks = (a, b) if first in sides[0].index else (b, a)
        raise ValueError(
            f"Trials of {a!r} and {b!r} cannot be paired by {', '.join(pair)}: {first} has {has!r} but not {lacks!r}."
        )
    e = estimate(sides[0] - sides[1].reindex(sides[0].index))
    return Difference(e.mean, e.low, e.high, e.n, str(a), str(b), value)


def shared(df: pd.DataFrame, a: str, b: str, on: str = "scheme", pair: str | Sequence[str] = "seed") -> pd.DataFrame:
    """Return the trials of two sides that have a partner on the other one; arguments as of `paired_difference`."""
    pair = [pair] if isinstance(pair, str) else list(pair)
    _require(df, [on, *pair])
    keys = pd.MultiIndex.from_frame(df[pair])
    partners = [keys[(df[on] == side).to_numpy()] for side in (a, b)]
    return df[df[on].isin([a, b]) & keys.isin(partners[0]) & keys.isin(partners[1])]


def compare(
    df: pd.DataFrame,
    reference: str,
    on: str = "scheme",
    pair: str | Sequence[str] = "seed",
    value: str = "test_accuracy",
) -> pd.DataFrame:
    """Return the difference of every other side to one reference, paired by seed.

    Args:
        df: one row per trial.
        reference: the value of column ``on`` that all others are compared with.
        on: the column that tells the sides apart.
        pair: the column, or columns, whose values make a pair.
        value: what is compared.

    Returns:
        ``on``, ``mean``, ``low``, ``high`` and ``n`` of every other side that has partners, which alone count.

    Raises:
        ValueError: as `paired_difference` does, or if the reference is absent.
    """
    _require_side(df, on, reference)
    rows = []
    for name in [x for x in df[on].unique() if x != reference]:
        if len(both := shared(df, name, reference, on, pair)):
            d = paired_difference(both, name, reference, on, pair, value)
            rows.append((name, d.mean, d.low, d.high, d.n))
    return pd.DataFrame(rows, columns=[on, "mean", "low", "high", "n"])


def readable(summary: pd.DataFrame, percent: bool = True, name: str = "mean") -> pd.DataFrame:
    """Return a summary for reading: mean and interval as text in one column, the number of seeds beside it.

    Args:
        summary: the result of `summarize` or `compare`.
        percent: show the numbers in percent, as for accuracies.
        name: the heading of the column.

    Returns:
        The group columns, ``name``, ``95 % interval`` and ``seeds``.
    """
    factor, digits = (100, 1) if percent else (1, 3)

    def interval(low: float, high: float) -> str:
        return "unknown" if math.isnan(low) else f"{factor * low:.{digits}f} to {factor * high:.{digits}f}"

    out = summary.drop(columns=["mean", "low", "high", "n"])
    out[f"{name} (%)" if percent else name] = [f"{factor * m:.{digits}f}" for m in summary["mean"]]
    out["95 % interval"] = [interval(lo, hi) for lo, hi in zip(summary["low"], summary["high"], strict=True)]
    return out.assign(seeds=summary["n"].to_numpy())


def _require(df: pd.DataFrame, columns: Sequence[str]) -> None:
    missing = [c for c in columns if c not in df.columns]
    if missing:
        raise ValueError(f"The table has no column {missing[0]!r}; its columns are {_listed(df.columns)}.")


def _require_side(df: pd.DataFrame, on: str, name: str) -> None:
    _require(df, [on])
    if name not in set(df[on]):
        raise ValueError(f"No trial has {on} = {name!r}; there are {_listed(df[on].unique())}.")


def _refuse_duplicates(group: pd.DataFrame, key: str | Sequence[str], name: str, known: Sequence[str]) -> None:
    key = [key] if isinstance(key, str) else list(key)
    if (twice := group[group.duplicated(key, keep=False)]).empty:
        return
    same = twice[(twice[key] == twice[key].iloc[0]).all(axis=1)]
    varies = [c for c in same.columns if c not in {*key, *known, *MEASURED} and len({repr(x) for x in same[c]}) > 1]
    hint = f"; they differ in {_listed(varies)}, so group or select by it" if varies else ""
    at = ", ".join(f"{k} = {same[k].iloc[0]}" for k in key)
    raise ValueError(f"{len(same)} trials have {name} and {at}, but one was expected{hint}.")


def _listed(names: Iterable[object]) -> str:
    return ", ".join(repr(x) if isinstance(x, str) else str(x) for x in names) or "none"


def change(
    df: pd.DataFrame,
    column: str,
    start: float,
    end: float,
    value: str = "test_accuracy",
    name: str = "change",
    by: str = "scheme",
) -> pd.DataFrame:
    """Return how a measured value changes between two settings, trial by trial of the same kind and seed.

    Args:
        df: the table of one data set, one row per trial.
        column: the setting, such as "label_noise".
        start: its first value.
        end: its second value.
        value: what is measured.
        name: the new column.
        by: the column that names the kinds of trials, such as the scheme.

    Returns:
        The column ``by``, seed and the new column: the value at `end` minus the value at `start`; beside it chance, if
        the table has it, and the lower test accuracy of both.

    Raises:
        ValueError: a setting has no trials, or several of one kind and seed.
    """
    sides = []
    for at in (start, end):
        side = df[df[column] == at]
        if side.empty:
            raise ValueError(f"No trial has {column} = {at:g}; there are {sorted(df[column].unique())}.")
        if side.duplicated([by, "seed"]).any():
            raise ValueError(f"Several trials of one {by} and seed have {column} = {at:g}; select one data set.")
        sides.append(side.set_index([by, "seed"]))
    changes = (sides[1][value] - sides[0][value]).dropna().rename(name).to_frame()
    if "chance" in df:
        lower = np.minimum(*(side["test_accuracy"] for side in sides))
        changes = changes.assign(chance=sides[0]["chance"], test_accuracy=lower)
    return changes.reset_index()


def differences(table: pd.DataFrame, column: str, reference: str = "float", by: str = "scheme") -> pd.DataFrame:
    """Return how much more accurate each scheme is than a reference, setting by setting, paired by seed.

    Args:
        table: the result of `run`.
        column: the setting, such as "samples_per_class".
        reference: a value of the column ``by``.
        by: the column that tells the sides apart.

    Returns:
        data, the setting, the column ``by``, mean, low, high and n; no rows if the reference was not run.
    """
    columns = ["data", column, by, "mean", "low", "high", "n"]
    parts = [
        compare(part, reference, by).assign(data=data, **{column: at})
        for (data, at), part in table.groupby(["data", column], sort=False)
        if reference in set(part[by])
    ]
    return pd.concat(parts, ignore_index=True)[columns] if parts else pd.DataFrame(columns=columns)


def averaged(table: pd.DataFrame, keep: str | Sequence[str], value: str = "test_accuracy") -> pd.DataFrame:
    """Average a table over everything but some columns, within each data set and seed: intervals count seeds alone.

    Args:
        table: the result of `train`.
        keep: the columns to compare by.
        value: the column to average.

    Returns:
        The columns kept, data, seed and value.
    """
    kept = [keep] if isinstance(keep, str) else keep
    return table.groupby([*kept, "data", "seed"], sort=False, as_index=False, dropna=False)[value].mean()
