"""Texts that say what an experiment is trained on and how: parameters that papermill can pass."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from binvit.config import read_yaml, show
from binvit.lab.data.sources import split_name
from binvit.lab.training.recipes import list_recipes
from binvit.lab.training.recipes import recipe as get_recipe

_PART = re.compile(r"(?P<samples>[1-9]\d{0,8}) per class|(?P<seeds>[1-9]\d{0,8}) seeds?|recipe (?P<recipe>\w+)")


@dataclass(frozen=True)
class Images:
    """What an experiment is trained on.

    Args:
        dataset: a name that `load_data` knows.
        samples_per_class: training images drawn per class; None takes all.
        recipe: a recipe for these images; None takes the experiment's.
        seeds: how many of the experiment's seeds are used, the first ones; None uses all.
    """

    dataset: str
    samples_per_class: int | None = None
    recipe: str | None = None
    seeds: int | None = None

    @classmethod
    def parse(cls, text: str) -> "Images":
        """Read one kind of images from a text such as "parquet:cifar100.parquet, 20 per class, recipe cifar, 3 seeds".

        Raises:
            ValueError: a part of the text is not understood, given twice, or names an unknown data set or recipe.
        """
        dataset, *parts = (part.strip() for part in text.split(","))
        found: dict[str, str] = {}
        for part in parts:
            match = _PART.fullmatch(part)
            given = {name: value for name, value in match.groupdict().items() if value} if match else {}
            if not given or given.keys() & found.keys():
                raise ValueError(
                    f"The images {show(text.strip())} are not understood at {show(part)}; a data set may be followed "
                    "by ', N per class', ', recipe NAME' and ', N seeds', once each."
                )
            found |= given
        if found.get("recipe", "smoke") not in list_recipes():
            raise ValueError(f"Unknown recipe {show(found['recipe'])}; valid recipes are {', '.join(list_recipes())}.")
        split_name(dataset)  # refuses unknown data sets
        samples, seeds = (int(found[name]) if name in found else None for name in ("samples", "seeds"))
        return cls(dataset, samples, found.get("recipe"), seeds)

    @property
    def title(self) -> str:
        """A short name for figures and tables."""
        kind, colon, path = self.dataset.partition(":")
        name = re.sub(r"_\d+px$", "", Path(path).stem) if colon else kind
        given = get_recipe(self.recipe) if self.recipe else None
        name += ", pretrained" if given and (given.pretrained or given.weights_hash) else ""
        return name + (f", {self.samples_per_class} per class" if self.samples_per_class else "")


def parse_images(text: str) -> list[Images]:
    """Read several kinds of images, separated by semicolons.

    Args:
        text: such as "digits; parquet:cifar100.parquet, 20 per class, recipe cifar".

    Raises:
        ValueError: a part is not understood, or two kinds of images would have the same name.
    """
    images = [Images.parse(part) for part in text.split(";")]
    refuse_twice([part.title for part in images], "kinds of images")
    return images


def parse_changes(text: str) -> dict[str, Any]:
    """Read fields of a recipe from a text such as "width 32, depth 2, global_pool avg"; an empty text changes none.

    Raises:
        ValueError: a part is no name with a value, or the recipe has no such field or value.
    """
    parts = [part.split() for part in text.split(",") if part.strip()]
    for part in parts:
        if len(part) != 2:
            raise ValueError(
                f"The changes of the recipe {show(text)} hold {show(' '.join(part))}, which is no name with a value."
            )
    found = {name: _value(name, value) for name, value in parts}
    get_recipe("smoke", **found)  # refuses unknown names and wrong values
    return found


def _value(name: str, text: str) -> Any:
    try:
        return float(text)  # YAML takes 1e-2 for a text
    except ValueError:
        pass
    return read_yaml(text, f"The value {show(text)}, which the changes of the recipe set {name} to,")


def refuse_twice(names: Sequence[str], what: str) -> None:
    """Raise a ValueError if a name occurs twice in an experiment."""
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise ValueError(f"Two {what} of the experiment are called {twice[0]!r}; each needs a name of its own.")
