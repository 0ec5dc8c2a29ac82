"""What a notebook needs in its second cell: checked parameters.

papermill only warns about an unknown parameter name and then injects it, so a typo would run the wrong experiment. The
second cell of every notebook therefore calls `check_parameters`, which reads names and types from the typed literals of
the first cell and refuses whatever does not fit before anything is trained.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import re
from collections.abc import Callable, Collection, Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Strict
from pydantic_core import PydanticCustomError

from binvit.config import Config, Number, Switch, Text, show


@dataclasses.dataclass(frozen=True)
class Between:
    """Numbers from `low` to `high`, as a set of valid values; `below=True` leaves `high` itself out."""

    low: float
    high: float
    below: bool = False

    def __contains__(self, value: float) -> bool:
        return self.low <= value < self.high if self.below else self.low <= value <= self.high

    def __str__(self) -> str:
        return f"numbers from {self.low:g} to {'below ' * self.below}{self.high:g}"


# ---------------------------------------------------------------------------------------------------------------- types

_YAML_HINT = " (YAML reads 1e-4 as a text: write 1.0e-4)"
_TEXT_HINT = " (papermill's -p passes texts: use -y or -f for lists, true and false)"


def _no_text(expected: str) -> BeforeValidator:
    def check(value: Any) -> Any:
        if isinstance(value, str):
            raise PydanticCustomError("no_text", expected)
        return value

    return BeforeValidator(check)


_KINDS: dict[str, Any] = {
    "int": Annotated[int, Strict(), _no_text("a whole number" + _TEXT_HINT)],
    "float": Annotated[Number, _no_text("a number" + _YAML_HINT)],
    "str": Text,
    "bool": Annotated[Switch, _no_text("true or false" + _TEXT_HINT)],
}
_LIST = _no_text("a list" + _TEXT_HINT)


def _kind(text: str, check_entry: Callable[[Any], Any], check_list: Callable[[list], list]) -> Any:
    """Return the type that a text such as `list[int]` stands for, with what its values must hold besides.

    What papermill cannot read is refused, since it would not be checked.
    """

    def build(node: ast.expr | None) -> Any:
        if isinstance(node, ast.Name) and node.id in _KINDS:
            return Annotated[_KINDS[node.id], AfterValidator(check_entry)]
        if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name):
            if node.value.id == "list":
                return Annotated[list[build(node.slice)], _LIST, AfterValidator(check_list)]  # type: ignore[misc]
            if node.value.id == "Optional":
                return build(node.slice) | None
        raise ValueError(
            f"The parameter type {text!r} is not understood; use int, float, str, bool, list[...] or Optional[...]."
        )

    try:
        return build(ast.parse(text.strip(), mode="eval").body)
    except SyntaxError:
        return build(None)


def convert(name: str, value: Any, annotation: str) -> Any:
    """Return a parameter's value if it has the declared type; an integer is taken where a number is asked for.

    Args:
        name: the parameter's name, for the message.
        value: what came.
        annotation: the declared type as text: int, float, str, bool, list[...] or Optional[...].

    Raises:
        ValueError: the value has another type.
    """
    kind = _kind(annotation, lambda entry: entry, lambda entries: entries)
    return getattr(_parameters({name: kind}, {name: value}), name)


def _parameters(kinds: Mapping[str, Any], values: Mapping[str, Any]) -> Any:
    """Return values as a frozen record with fields of these types."""
    fields = {"__annotations__": dict(kinds), "_owner": "The parameter "}
    model: Any = type("Parameters", (Config,), fields, written=False)
    return model(**values)


# ---------------------------------------------------------------------------------------------------------------- rules


def _check_scheme(name: str) -> None:
    import binvit

    if name not in binvit.list_schemes():
        raise ValueError(f"There is no scheme {show(name)}; the schemes are {', '.join(binvit.list_schemes())}.")


def _check_dataset(name: str) -> None:
    from binvit.lab.data.sources import split_name

    split_name(name)


def _check_recipe(name: str) -> None:
    from binvit.lab.training.recipes import recipe

    recipe(name)


Rule = Callable[[Any], None] | range | Between | Collection[Any]

# Parameters of these names mean the same in every notebook; a list of them carries the plural's "s".
_RULES: dict[str, Rule] = {
    "dataset": _check_dataset,
    "scheme": _check_scheme,
    "recipe": _check_recipe,
    "seed": range(2**31),
    "samples_per_class": range(1, 10**7),
    "label_noise": Between(0, 1, below=True),
    "epochs": range(1, 10**6),
    "image_size": range(1, 10**5),
    "jobs": range(1, 10**4),
    "repeats": range(1, 10**6),
}


def _rule(name: str, valid: Mapping[str, Rule]) -> Rule | None:
    if name in valid:
        return valid[name]
    return _RULES.get(name, _RULES.get(name.removesuffix("s")))


def _words(valid: range | Between | Collection[Any]) -> str:
    if isinstance(valid, range):
        return f"integers from {valid.start} to {valid.stop - 1}"
    return str(valid) if isinstance(valid, Between) else ", ".join(map(repr, valid))


def _check_entry(name: str, value: Any, rule: Rule | None) -> Any:
    if callable(rule):
        try:
            rule(value)
        except (ValueError, FileNotFoundError) as error:
            raise ValueError(f"The parameter {name} does not fit: {error}") from None
    elif rule is not None and value not in rule:
        raise ValueError(f"The parameter {name} holds {show(value)}; valid are {_words(rule)}.")
    return value


def _check_list(name: str, value: list) -> list:
    if not value:
        raise ValueError(f"The parameter {name} is an empty list; it needs at least one entry.")
    if any(value.count(entry) > 1 for entry in value):
        raise ValueError(f"The parameter {name} is {show(value)}, which holds an entry twice.")
    return value


# ---------------------------------------------------------------------------------------------------------------- cells


def declared_types(source: str) -> dict[str, str]:
    """Read names and types from a cell that consists of annotated literals only, and imports from typing.

    Returns:
        Name to type as text, in order; empty if the cell is of another kind.
    """
    try:
        body = ast.parse(source).body
    except SyntaxError:  # a cell with a magic
        return {}
    body = [line for line in body if not (isinstance(line, ast.ImportFrom) and line.module == "typing")]
    found = {}
    for line in body:
        if not (isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name) and line.value):
            return {}
        found[line.target.id] = ast.unparse(line.annotation)
    return found


def _annotated_types(namespace: Mapping[str, Any]) -> dict[str, str]:
    """Read names and types of all annotated names, for nbval and scripts, which keep no history of cells."""
    found = namespace.get("__annotations__")
    if found is None and "__annotate__" in namespace:  # Python 3.14 evaluates annotations when asked for their values
        found = namespace["__annotate__"](1)
    texts = {name: kind.__name__ if isinstance(kind, type) else str(kind) for name, kind in (found or {}).items()}
    return {name: re.sub(r"typing\.|^(.+) \| None$", _as_optional, text) for name, text in texts.items()}


def _as_optional(match: re.Match) -> str:
    return f"Optional[{match[1]}]" if match[1] else ""


def _injected_names(source: str) -> list[str]:
    if not source.startswith("# Parameters"):  # papermill's first line
        return []
    lines = [line for line in ast.parse(source).body if isinstance(line, ast.Assign)]
    return [target.id for line in lines for target in line.targets if isinstance(target, ast.Name)]


def check_parameters(namespace: Mapping[str, Any], **valid: Rule) -> Any:
    """Check all parameters of the running notebook and return them as a frozen dataclass.

    Names and types come from the notebook's parameters cell, the one that consists of annotated literals. Parameters
    called dataset, scheme, recipe, seed, samples_per_class, label_noise, epochs, image_size, jobs or repeats, or the
    plural of one of these, are checked against what the library knows.

    Args:
        namespace: the notebook's `globals()`.
        **valid: valid values of further parameters: a range, a tuple of choices, or `Between`. They hold for each entry
            of a list.

    Returns:
        An instance of a frozen dataclass with one field per parameter.

    Raises:
        ValueError: a name is unknown, or a value has the wrong type or is out of range; the sentence lists what is
            valid.
    """
    cells = list(namespace.get("In", []))
    found = [(number, types) for number, types in enumerate(map(declared_types, cells)) if types]
    number, types = found[-1] if found else (-1, _annotated_types(namespace))
    if not types:
        raise ValueError("No parameters cell has run: a notebook's first cell holds annotated literals.")
    injected = [name for source in cells[number + 1 :] for name in _injected_names(source)]
    for names, what in ((injected, "This notebook has"), (valid, "The parameters cell has")):
        unknown = [name for name in names if name not in types]
        if unknown:
            raise ValueError(f"{what} no parameter {unknown[0]}; its parameters are {', '.join(types)}.")
    kinds = {}
    for name, annotation in types.items():
        check_entry = functools.partial(_check_entry, name, rule=_rule(name, valid))
        kinds[name] = _kind(annotation, check_entry, functools.partial(_check_list, name))
    return _parameters(kinds, {name: namespace[name] for name in types})
