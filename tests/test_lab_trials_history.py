import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from binvit.lab.trials.history import in_columns, in_records, thinned

number = st.one_of(st.integers(0, 3), st.floats(0, 1, allow_nan=False))


@given(st.lists(st.tuples(number, st.none() | number, st.integers(0, 1), st.integers(1, 50)), min_size=1, max_size=30))
def test_a_history_comes_back_from_its_columns(rows):
    names = ("train_loss", "test_accuracy", "stage", "epoch")
    history = [dict(zip(names, row, strict=True)) for row in rows]
    columns = {name: [record[name] for record in history] for name in names}
    short = json.loads(json.dumps(in_columns(columns | {"lr": [0.1] * len(rows)})))
    assert in_records(short) == history
    assert in_columns(short) == short  # written again, a line stays
    assert in_records(columns) == history  # as older archives have it


@pytest.mark.parametrize("history", [{"epochs": 100_001}, {"epochs": "3"}, {"a": [1], "b": [1, 2]}, {}, {"epochs": 0}])
def test_histories_of_no_length_are_refused(history):
    with pytest.raises(ValueError, match=r"epochs|columns of one length"):
        in_records(history)


@given(st.integers(1, 1200), st.integers(1, 400))
def test_a_thinned_history_has_all_that_was_evaluated_and_some_of_the_rest(epochs, every):
    evaluated = {epochs, *range(every, epochs + 1, every)}
    history = in_columns(
        {
            "train_loss": [i / 7 for i in range(1, epochs + 1)],
            "test_accuracy": [0.5 if i in evaluated else None for i in range(1, epochs + 1)],
        }
    )
    found = in_columns(thinned(history))
    kept = in_records(found)
    assert all(record["train_loss"] == record["epoch"] / 7 for record in kept)
    assert {record["epoch"] for record in kept if record["test_accuracy"] is not None} == evaluated
    others = [record["epoch"] for record in kept if record["test_accuracy"] is None]
    assert len(others) == epochs - len(evaluated) or 125 <= len(others) <= 250
    assert others == sorted(set(others))
    assert in_columns(thinned(found)) == found
