"""Sentences about results, each with a checked verdict and the evidence for it."""

import dataclasses
import html
import math
import textwrap
from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd

from binvit.lab.analysis.statistics import SHARES, Difference, Estimate, estimate, paired_difference, shared, summarize
from binvit.lab.analysis.verdicts import Claim, Verdict, all_of, confirm, correct, not_run

__all__ = [
    "LEAST",
    "UNTRAINED",
    "Claim",
    "all_of",
    "check_difference",
    "check_mean",
    "check_pair",
    "check_value",
    "confirm",
    "correct",
    "for_each_data",
    "not_run",
    "show",
    "table",
    "verdicts",
]

LEAST = 3
"""Below so many times chance a model has learned nothing worth comparing."""
UNTRAINED = "does not train"
"""What tables and figures say of such a model."""


def check_difference(sentence: str, difference: Estimate, margin: float = 0.0, percent: bool = True) -> Claim:
    """Check the claim that a difference, or a mean, is larger than a margin.

    Yes if the whole 95 % interval lies above the margin, no if none of it does, and undecided if the interval crosses
    the margin, is unknown because there is a single seed, or is the margin itself, all seeds being equal. "Not worse
    than by 2 points" is the margin -0.02.

    Args:
        sentence: what is claimed.
        difference: the paired difference (`statistics.paired_difference`) or the mean (`statistics.estimate`).
        margin: what it must exceed, in the units of the difference.
        percent: tell the evidence in percent (a mean) and percentage points (a difference).

    Returns:
        The claim with its verdict.

    Raises:
        ValueError: if the margin is not finite, since such a claim could not fail (or not hold).
    """
    _require_finite("margin", margin)
    if math.isnan(difference.low) or math.isnan(difference.high) or difference.low == difference.high == margin:
        verdict: Verdict = "undecided"
    elif difference.low > margin:
        verdict = "yes"
    elif difference.high <= margin:
        verdict = "no"
    else:
        verdict = "undecided"
    evidence = _interval_evidence(difference, margin, percent)
    # Sides that are the same training test nothing, so that no correction counts them.
    p = None if difference.n > 1 and difference.low == difference.high == margin else difference.p_values(margin)
    return Claim(sentence, verdict, evidence, p=p, estimate=difference, percent=percent)


def check_pair(
    sentence: str,
    df: pd.DataFrame,
    a: str,
    b: str,
    margin: float = 0.0,
    on: str = "scheme",
    pair: str | Sequence[str] = "seed",
    value: str = "test_accuracy",
    percent: bool = True,
) -> Claim:
    """Check the claim that ``a`` exceeds ``b`` by more than a margin, on trials paired by seed.

    Args:
        sentence: what is claimed.
        df: one row per trial; if it has the column chance, sides that have learned nothing (`LEAST`) are not compared.
        a: the value of column ``on`` that is claimed to be larger.
        b: the value of column ``on`` that it is compared with.
        margin: what the difference must exceed; negative for "not worse than by".
        on: the column that tells the two sides apart.
        pair: the column, or columns, whose values make a pair.
        value: the column to compare.
        percent: tell the evidence in percentage points.

    Returns:
        The claim; undecided if one side was not run, as when a notebook is given fewer schemes. Trials without a
        partner are left out; the evidence tells how many pairs there are.

    Raises:
        ValueError: as `statistics.paired_difference` and `check_difference` do.
    """
    _require_finite("margin", margin)
    absent = [name for name in (a, b) if name not in set(df[on])]
    if absent:
        return not_run(sentence, f"no trial of {absent[0]!r} was run")
    df = shared(df, a, b, on, pair)
    if df.empty:
        return not_run(sentence, f"no pair of {a!r} and {b!r} was run")
    claim = check_difference(sentence, paired_difference(df, a, b, on, pair, value), margin, percent)
    for name in (a, b) if "chance" in df else ():
        mean, chance = df.loc[df[on] == name, ["test_accuracy", "chance"]].mean()
        if mean < LEAST * chance:
            text = f"{100 * mean:.1f} % of test images, {100 * chance:.1f} % by chance; {claim.evidence}"
            return Claim(sentence, "undecided", f"{name} below {LEAST} times chance: {text}")
    lost = "".join(_lost(df[df[on] == name], name) for name in (a, b))
    return dataclasses.replace(claim, evidence=claim.evidence + lost)


def _lost(part: pd.DataFrame, name: str) -> str:
    """Say how many trainings have learned nothing, though their mean has."""
    count = int((part["test_accuracy"] < LEAST * part["chance"]).sum()) if "chance" in part else 0
    return f"; {count} of {len(part)} {name} below {LEAST} times chance" if count else ""


def check_mean(
    sentence: str,
    df: pd.DataFrame,
    a: str,
    margin: float,
    on: str = "scheme",
    value: str = "test_accuracy",
    percent: bool = True,
) -> Claim:
    """Check the claim that the mean of ``a`` is larger than a margin.

    Args:
        sentence: what is claimed.
        df: one row per trial.
        a: the value of column ``on`` that the claim is about.
        margin: what the mean must exceed.
        on: the column that names the trials.
        value: the column to average.
        percent: tell the evidence in percent.

    Returns:
        The claim; undecided if no trial of ``a`` was run.

    Raises:
        ValueError: as `statistics.summarize` and `check_difference` do.
    """
    _require_finite("margin", margin)
    chosen = df[df[on] == a]
    if chosen.empty:
        return not_run(sentence, f"no trial of {a!r} was run")
    summarize(chosen, on, value)  # refuses seeds that occur twice
    mean = estimate(chosen[value])
    claim = dataclasses.replace(check_difference(sentence, mean, margin, percent), is_share=value in SHARES)
    low, high = _shown(claim, (mean.low, mean.high))
    shown = dataclasses.replace(mean, low=low, high=high)
    return dataclasses.replace(claim, evidence=_interval_evidence(shown, margin, percent))


def check_value(
    sentence: str,
    value: bool | float | None,
    at_least: float | None = None,
    at_most: float | None = None,
    evidence: str | None = None,
) -> Claim:
    """Check a claim about one exact thing: a condition, or a number against a bound.

    Args:
        sentence: what is claimed.
        value: a bool, which takes no bound, or a number, which takes one or two. NaN is undecided, and so is None,
            which stands for what was not run.
        at_least: the smallest number for which the claim holds.
        at_most: the largest number for which the claim holds.
        evidence: what to show as evidence instead of the value and its bounds.

    Returns:
        The claim with its verdict.

    Raises:
        ValueError: if a number comes without a finite bound or a bool with one.
    """
    bounds = {k: v for k, v in {"at least": at_least, "at most": at_most}.items() if v is not None}
    if value is None:
        return not_run(sentence)
    if isinstance(value, (bool, np.bool_)):
        if bounds:
            raise ValueError(f"The claim {sentence!r} is checked by a condition, which takes no bound.")
        return Claim(sentence, "yes" if value else "no", evidence or ("holds" if value else "does not hold"))
    if not bounds:
        raise ValueError(f"The claim {sentence!r} is checked by a number, which needs at_least or at_most.")
    for name, bound in bounds.items():
        _require_finite(name, bound)
    value = float(value)
    if math.isnan(value):
        verdict: Verdict = "undecided"
    else:
        holds = (at_least is None or value >= at_least) and (at_most is None or value <= at_most)
        verdict = "yes" if holds else "no"
    demanded = " and ".join(f"{name} {_number(bound)}" for name, bound in bounds.items())
    return Claim(sentence, verdict, evidence or f"{_number(value)} ({demanded} demanded)")


def table(claims: Sequence[Claim], evidence: bool = False) -> pd.DataFrame:
    """Return the claims as a table.

    Args:
        claims: what was checked, in the order to show.
        evidence: add the evidence, whose numbers differ from machine to machine.

    Returns:
        One row per claim, counted from 1, with the columns ``claim``, ``kind``, ``verdict`` and, if asked for,
        ``uncorrected`` (the verdict before Holm's correction), ``evidence``, ``low`` and ``high`` (the 95 % interval),
        ``corrected_low`` and ``corrected_high`` (the interval at the level of Holm's procedure), ``p`` (two-sided) and
        ``source``.
    """
    rows = []
    for c in claims:
        unknown = (math.nan, math.nan)
        interval = _shown(c, (c.estimate.low, c.estimate.high)) if c.estimate else unknown
        p = 2 * min(c.p) if c.p else math.nan
        verdict = (c.sentence, c.kind, c.verdict, c.plain or c.verdict, c.evidence)
        rows.append((*verdict, *interval, *_shown(c, c.corrected or unknown), p, c.source))
    columns = ["claim", "kind", "verdict", "uncorrected", "evidence", "low", "high"]
    columns += ["corrected_low", "corrected_high", "p", "source"]
    df = pd.DataFrame(rows, columns=columns, index=range(1, len(rows) + 1))
    return df if evidence else df[["claim", "kind", "verdict"]]


def verdicts(claims: Sequence[Claim], width: int = 110) -> str:
    """Return the claims as plain text that is the same on every machine which reaches the same verdicts.

    Args:
        claims: what was checked, in the order to show.
        width: the length at which lines are broken.

    Returns:
        One paragraph per claim, such as ``yes        Superposition beats a single group.``
    """
    indent = " " * 11
    return "\n".join(
        textwrap.fill(c.sentence, width, initial_indent=f"{c.verdict:<11}", subsequent_indent=indent) for c in claims
    )


def show(claims: Sequence[Claim]) -> None:
    """Display the claims with their evidence in a notebook.

    Args:
        claims: what was checked, in the order to show.
    """
    from IPython.display import display

    colors = {"yes": "#0a7d55", "no": "#b3402a", "undecided": "#667"}
    style = ' style="text-align:left; white-space:normal"'
    rows = []
    for c in claims:
        note = "" if c.plain is None else f"<br>({c.plain} before correction)"
        said = html.escape(c.sentence) + (f"<br><i>{html.escape(c.source)}</i>" if c.source else "")
        word = f'<td style="color:{colors[c.verdict]}"><b>{c.verdict}</b>{note}</td>'
        why = f"<td{style}>{html.escape(c.evidence + _corrected(c))}</td>"
        rows.append(f"<tr><td{style}>{said}</td>{word}{why}<td{style}>{c.kind}</td></tr>")
    head = "".join(f"<th{style}>{name}</th>" for name in ("claim", "verdict", "evidence", "kind"))
    page = "\n".join([f"<table><thead><tr>{head}</tr></thead><tbody>", *rows, "</tbody></table>"])
    plain = "\n".join(f"{c.verdict:<11}{c.sentence} {c.evidence}{_corrected(c)}" for c in claims)
    display({"text/html": page, "text/plain": plain}, raw=True)


def _interval_evidence(e: Estimate, margin: float, percent: bool) -> str:
    sign, name, unit = ("+", f"{e.a} - {e.b}: ", " points") if isinstance(e, Difference) else ("", "", " %")
    factor, unit = (100, unit) if percent else (1, "")
    spec = f"{sign}.1f" if percent else f"{sign}.3g"
    seeds = f"{e.n} seed{'' if e.n == 1 else 's'}"
    if math.isnan(e.low):
        spread = "interval unknown"
    else:
        spread = f"95 % interval {factor * e.low:{spec}} to {factor * e.high:{spec}}"
    if e.n > 1 and e.mean == e.low == e.high == 0:
        spread = "both sides are equal in every seed"
    return f"{name}{factor * e.mean:{spec}}{unit} ({spread}, {seeds}; more than {factor * margin:{spec}} demanded)"


def _corrected(claim: Claim) -> str:
    if claim.corrected is None or math.isnan(claim.corrected[0]):
        return ""
    factor, spec = (100, ".1f") if claim.percent else (1, ".3g")
    sign = "+" if isinstance(claim.estimate, Difference) else ""
    low, high = (f"{factor * end:{sign}{spec}}" for end in _shown(claim, claim.corrected))
    return f"; corrected interval {low} to {high}"


def _shown(claim: Claim, interval: tuple[float, float]) -> tuple[float, float]:
    """Return an interval as it is told; that of a mean of shares ends at 0 and 1."""
    if not claim.is_share or math.isnan(interval[0]):
        return interval
    return max(interval[0], 0.0), min(interval[1], 1.0)


def _number(x: float) -> str:
    return f"{x:,.0f}" if float(x).is_integer() and abs(x) < 1e15 else f"{x:.3g}"


def _require_finite(name: str, x: float) -> None:
    if not math.isfinite(x):
        raise ValueError(f"The {name} of a claim must be a finite number, since {x} lets it come out one way only.")


def for_each_data(table: pd.DataFrame, check: Callable[[pd.DataFrame], Sequence[Claim]]) -> list[Claim]:
    """Check the same claims on all images one after the other; with several, each sentence names its own.

    Args:
        table: the result of `train`.
        check: rows of one kind of images -> claims.

    Returns:
        All claims, those of the first images first. Images whose trials, shared with other experiments, compare nothing
        here have none, unless there are no others.
    """
    found = {data: list(check(part)) for data, part in table.groupby("data", sort=False)}
    if len(found) == 1:
        return next(iter(found.values()))
    compared = {
        data: claims for data, claims in found.items() if not all(claim.is_not_run for claim in claims)
    } or found
    named = lambda claim, data: dataclasses.replace(claim, sentence=f"On {data}: {claim.sentence}")  # noqa: E731
    return [named(claim, data) for data, claims in compared.items() for claim in claims]
