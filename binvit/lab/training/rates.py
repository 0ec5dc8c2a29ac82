"""Learning rates that validation images have chosen, one per data set, recipe, scheme and bias of the map."""

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
from binvit.lab.training.recipe import Count

RATES = Path(__file__).with_name("rates.yaml")
_HEAD = """\
# Learning rates chosen by the mean accuracy on validation images, over the seeds of the table beside each.
# Written by `binvit tune`; a recipe takes its rate from here unless a trial names one.
"""

Rate = Annotated[Number, Field(gt=0)]
Accuracy = Annotated[Number, Field(ge=0, le=1)]
Bias = Literal["none", "full", "relative"]


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

    @property
    def key(self) -> tuple[str, str, str, str]:
        """What the rate was chosen for."""
        return self.data, self.recipe, self.scheme, self.bias


def data_name(dataset: str) -> str:
    """Return the name of a data set without its place: "parquet:data/flowers102_64px.parquet" is flowers102_64px."""
    kind, colon, path = dataset.partition(":")
    return Path(path).stem if colon else kind


def read_rates(path: str | Path = RATES) -> dict[tuple[str, str, str, str], ChosenRate]:
    """Return the chosen rates by data set, recipe, scheme and bias.

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
    """Add rates to a file, sorted; those of the same data set, recipe, scheme and bias are replaced.

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
def _shipped() -> dict[tuple[str, str, str, str], ChosenRate]:
    return read_rates()


def tuned_rate(dataset: str, recipe: str, scheme: str, bias: str) -> float | None:
    """Return the rate that validation images have chosen; None if nobody has asked them.

    Args:
        dataset: a name that `load_data` knows.
        recipe: a name of `list_recipes`.
        scheme: a name of `binvit.list_schemes`.
        bias: learned bias of the attention map: "none", "full" or "relative".
    """
    found = _shipped().get((data_name(dataset), recipe, scheme, bias))
    return None if found is None else found.rate
