"""Summaries laid out for reading keep every number, where it belongs, and in the order of the summary."""

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from binvit.lab.analysis import statistics, tables


def summary_of(rows: dict[tuple[str, str, int], list[float]], names=("data", "scheme", "images")) -> pd.DataFrame:
    trials = [
        dict(zip(names, key, strict=True)) | {"seed": seed, "test_accuracy": value}
        for key, values in rows.items()
        for seed, value in enumerate(values)
    ]
    return statistics.summarize(pd.DataFrame(trials), list(names))


def test_cells_hold_mean_interval_and_seeds_and_what_was_not_run_is_empty():
    found = tables.side_by_side(
        summary_of({("b", "x", 5): [0.5], ("a", "y", 2): [0.2, 0.2], ("b", "y", 2): [0.3]}), "data"
    )
    assert list(found.columns) == ["b", "a"]
    assert found.index.names == ["scheme", "images"]
    assert found.map(lambda cell: cell.replace(tables.NO_BREAK, " ")).to_dict("list") == {
        "b": ["50.0 (unknown; 1)", "30.0 (unknown; 1)"],
        "a": ["", "20.0 (20.0 to 20.0; 2)"],
    }
    assert list(found.index) == [("x", 5), ("y", 2)]
    share = tables.side_by_side(summary_of({("a", "x", 5): [0.5, 0.5, 0.5]}), "data", percent=False)
    assert share.loc[("x", 5), "a"].split(" ") == ["0.500", "(0.500 to 0.500; 3)".replace(" ", tables.NO_BREAK)]


@given(st.sets(st.tuples(*(st.sampled_from("abcd") for _ in range(2)), st.integers(0, 3)), min_size=1))
def test_no_number_is_lost_or_moved(keys):
    rows = {key: [index / 1000] for index, key in enumerate(sorted(keys, key=hash))}
    summary = summary_of(rows)
    for over, place in (("data", 0), ("images", 2)):
        found = tables.side_by_side(summary, over)
        for key, (value,) in rows.items():
            rest = tuple(part for at, part in enumerate(key) if at != place)
            assert found.loc[rest, key[place]].startswith(f"{100 * value:.1f} (")
        assert (found != "").sum().sum() == len(rows)
        assert list(found.columns) == list(dict.fromkeys(summary[over]))


def test_one_other_group_is_a_plain_index():
    found = tables.side_by_side(summary_of({("a", "x"): [0.5], ("b", "x"): [0.6]}, ("data", "scheme")), "data")
    assert found.index.name == "scheme"
    assert [cell.split()[0] for cell in found.loc["x"]] == ["50.0", "60.0"]


def test_nothing_run_is_an_empty_table():
    empty = summary_of({("a", "x", 5): [0.5]}).iloc[:0]
    assert tables.side_by_side(empty, "data").empty


@pytest.mark.parametrize(("names", "over"), [(("data", "scheme"), "seed"), (("data",), "data")])
def test_a_group_that_is_not_there_is_refused(names, over):
    summary = summary_of({tuple("a" * len(names)): [0.5]}, names)
    with pytest.raises(ValueError, match=f"no group '{over}' beside another; its groups are data"):
        tables.side_by_side(summary, over)
