"""Learning rates that validation images have chosen, one per data set, recipe, scheme, bias of the map and width."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import Field

from binvit.config import Config, Number, Text, read_yaml, show
from binvit.files import atomic_write
from binvit.images import require_regular
from binvit.lab.data.sources import data_name
from binvit.lab.training.recipe import Count

RATES = Path(__file__).with_name("rates.yaml")
_HEAD = """\
# Learning rates chosen by the mean accuracy on validation images, over the seeds of the table beside each.
# Written by `binvit tune`; a recipe takes its rate from here unless a trial names one.
"""

Rate = Annotated[Number, Field(gt=0)]
Accuracy = Annotated[Number, Field(ge=0, le=1)]
Bias = Literal["none", "full", "relative"]
Key = tuple[str, str, str, str, int]
"""Data set, recipe, scheme, bias and width, 0 for the recipe's own."""


class ChosenRate(Config):
    """A learning rate and the measurements that chose it."""

    data: Text
    """Name of the data set, as `data_name` gives it."""
    recipe: Text
    """Name of the recipe."""
    scheme: Text
    """Name of the scheme."""
    bias: Bias
    """Learned bias of the attention map."""
    rate: Rate
    """The rate whose mean accuracy is highest."""
    table: tuple[tuple[Rate, tuple[Accuracy, ...]], ...]
    """Each rate that was tried, with the accuracy on validation images of every seed."""
    samples_per_class: Count | None = None
    """Training images of each class that it was chosen with; None means all."""

    width: Count | None = None
    """Features per token of the models that it was chosen with; None means the recipe's own."""

    @property
    def key(self) -> Key:
        """What the rate was chosen for."""
        return self.data, self.recipe, self.scheme, self.bias, self.width or 0


def read_rates(path: str | Path = RATES) -> dict[Key, ChosenRate]:
    """Return the chosen rates by data set, recipe, scheme, bias and width.

    Args:
        path: a file that `write_rates` has written; one that does not exist holds no rates.

    Raises:
        ValueError: the file holds something else.
    """
    if not Path(path).exists():
        return {}
    require_regular(Path(path), "file of rates")
    try:
        entries = read_yaml(Path(path).read_text(encoding="utf-8"), "it") or []
        if not isinstance(entries, list):
            raise ValueError(f"it must hold a list, got {show(entries)}.")
        return {rate.key: rate for rate in map(ChosenRate.from_dict, entries)}
    except UnicodeDecodeError as error:
        raise ValueError(f"The file of rates {path} is damaged: it is no text in UTF-8 ({error}).") from None
    except ValueError as error:
        raise ValueError(f"The file of rates {path} is damaged: {error}") from None


def write_rates(chosen: Iterable[ChosenRate], path: str | Path = RATES) -> Path:
    """Add rates to a file, sorted; those of the same data set, recipe, scheme, bias and width are replaced.

    Args:
        chosen: the new rates.
        path: the file.

    Returns:
        The path written.
    """
    rates = read_rates(path) | {rate.key: rate for rate in chosen}
    entries = [{k: v for k, v in rates[key].to_dict().items() if v is not None} for key in sorted(rates)]
    text = _HEAD + yaml.safe_dump(entries, sort_keys=False, default_flow_style=None, width=110)
    _shipped.cache_clear()
    return atomic_write(path, text)


@functools.cache
def _shipped() -> dict[Key, ChosenRate]:
    return read_rates()


def tuned_rate(dataset: str, recipe: str, scheme: str, bias: str, width: int | None = None) -> float | None:
    """Return the rate that validation images have chosen; None if nobody has asked them.

    A width that was not asked for has the rate of the recipe's own.

    Args:
        dataset: a name that `load_data` knows.
        recipe: a name of `list_recipes`.
        scheme: a name of `binvit.list_schemes`.
        bias: learned bias of the attention map: "none", "full" or "relative".
        width: features per token, if they are not the recipe's own.
    """
    known, asked = _shipped(), (data_name(dataset), recipe, scheme, bias)
    found = known.get((*asked, width or 0)) or known.get((*asked, 0))
    return None if found is None else found.rate
