"""Summaries laid out for reading, so that a long one fits a page."""

from __future__ import annotations

import pandas as pd

from binvit.lab.analysis.statistics import readable

NO_BREAK = "\N{NO-BREAK SPACE}"


def side_by_side(summary: pd.DataFrame, over: str, percent: bool = True) -> pd.DataFrame:
    """Lay out a summary with a column for each value of one of its groups.

    Args:
        summary: the result of `statistics.summarize` or `statistics.differences`.
        over: the group whose values head the columns.
        percent: show the numbers in percent, as for accuracies.

    Returns:
        One row per value of the other groups, which are the index, both in the order of the summary; every cell is the
        text "mean (interval; seeds)", whose lines break before the bracket alone, empty where the summary has no such
        row.

    Raises:
        ValueError: the summary has no such group, or no other.
    """
    groups = [name for name in summary.columns if name not in {"mean", "low", "high", "n"}]
    if over not in groups or len(groups) < 2:
        raise ValueError(
            f"The table has no group {over!r} beside another; its groups are {', '.join(groups) or 'none'}."
        )
    others = [name for name in groups if name != over]
    if summary.empty:
        return summary[others].set_index(others)
    shown = readable(summary, percent)
    mean = shown["mean (%)" if percent else "mean"]
    cells = mean + " (" + (shown["95 % interval"] + "; " + shown["seeds"].astype(str)).str.replace(" ", NO_BREAK) + ")"
    table = shown.assign(cell=cells).pivot_table("cell", others, over, aggfunc="first", sort=False)
    return table.reindex(columns=shown[over].unique()).fillna("")
