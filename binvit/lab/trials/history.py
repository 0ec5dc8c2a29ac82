"""The history of a training: one record per epoch, and columns of few bytes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, NotRequired

from pydantic import Field
from typing_extensions import TypedDict

from binvit.config import Number, Whole, show
from binvit.lab.training.recipe import Share

_MOST_EPOCHS = 10**5  # of a history that is read; more are damage, and take memory
_MOST_UNEVALUATED = 250  # epochs of a history that an archive keeps


class Epoch(TypedDict):
    """One record of a training's history."""

    stage: Annotated[Whole, Field(ge=0)]
    epoch: Annotated[Whole, Field(ge=1)]
    train_loss: Number
    train_accuracy: Share
    test_accuracy: Share | None
    lr: NotRequired[Number]


def in_columns(history: Mapping[str, Any]) -> dict[str, Any]:
    """Return a history's columns without what the rest tells: the learning rate, for one, follows from the recipe.

    A column is a list, one value for all epochs, or a mapping of those epochs that have a value; `epochs` counts them.
    """
    columns = {name: column for name, column in history.items() if name not in ("epochs", "lr")}
    count = history.get("epochs") or max(len(column) for column in columns.values())
    if columns.get("epoch") == list(range(1, count + 1)):
        del columns["epoch"]
    for name, column in columns.items():
        if isinstance(column, list) and len(set(column)) == 1:
            columns[name] = column[0]
        elif isinstance(column, list) and column.count(None) > count // 2:
            columns[name] = {str(i): value for i, value in enumerate(column, 1) if value is not None}
    return {"epochs": count, **columns}


def in_records(history: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return one record per epoch from columns, those of `in_columns` or one list each.

    Raises:
        ValueError: the columns have different lengths.
    """
    columns = {name: column for name, column in history.items() if name != "epochs"}
    count = history.get("epochs", max((len(c) for c in columns.values() if isinstance(c, list)), default=0))
    if not isinstance(count, int) or not 0 < count <= _MOST_EPOCHS:
        raise ValueError(f"it has {show(count)} epochs.")
    columns.setdefault("epoch", list(range(1, count + 1)))
    for name, column in columns.items():
        if isinstance(column, Mapping):
            columns[name] = [column.get(str(i)) for i in range(1, count + 1)]
        elif not isinstance(column, list):
            columns[name] = [column] * count
        if len(columns[name]) != count:
            raise ValueError("its history must have columns of one length.")
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def thinned(history: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a history's columns with every n-th of the epochs that were not evaluated, every sixth of 1,500."""
    records = in_records(history)
    unevaluated = [i for i, record in enumerate(records) if record.get("test_accuracy") is None]
    step = -(-len(unevaluated) // _MOST_UNEVALUATED)
    if step < 2:
        return history
    left = set(range(len(records))) - set(unevaluated) | set(unevaluated[step - 1 :: step])
    return {name: [records[i][name] for i in sorted(left)] for name in records[0]}
