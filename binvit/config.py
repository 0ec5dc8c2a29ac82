"""Configuration: frozen records whose fields are declared once, and one sentence for whatever does not fit them.

A record is a subclass of `Config`: every field has its type and range in the annotation and its meaning in the
docstring under it. pydantic checks; `sentence` says in words what came and what was expected.
"""

from __future__ import annotations

import dataclasses
import re
import reprlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any, ClassVar, Self, dataclass_transform

import pydantic_core
from pydantic import (
    AllowInfNan,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    PlainValidator,
    Strict,
    ValidationError,
)
from pydantic.dataclasses import dataclass

_DEEPEST = 32  # levels of lists and records; no configuration needs more than six


def _whole(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


Whole = Annotated[int, Strict(), BeforeValidator(_whole)]  # 3 and 3.0, never True or "3"
Number = Annotated[float, Strict(), AllowInfNan(False)]
Text = Annotated[str, Strict()]
Switch = Annotated[bool, Strict()]


def one_of(names: Iterable[str]) -> BeforeValidator:
    """Return the annotation of a text that is one of these names."""
    valid = tuple(names)

    def check(value: Any) -> Any:
        if isinstance(value, str) and value in valid:
            return value
        raise pydantic_core.PydanticCustomError("one_of", f"one of {', '.join(valid)}")

    return BeforeValidator(check)


class Options(Mapping[str, Any]):
    """A mapping that can be hashed: sorted by name, with tuples for lists and options for mappings inside."""

    def __init__(self, values: Mapping[str, Any] | Iterable[tuple[str, Any]] = ()):
        self._values = {name: freeze(value) for name, value in sorted(dict(values).items())}

    def __getitem__(self, name: str) -> Any:
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __hash__(self) -> int:
        return hash(tuple(self._values.items()))

    def __repr__(self) -> str:
        return repr(self._values)


def freeze(value: Any) -> Any:
    """Return lists as tuples and mappings as `Options`, so that the value can be hashed."""
    if isinstance(value, Mapping):
        return Options(value)
    if isinstance(value, list | tuple):
        return tuple(freeze(item) for item in value)
    return value


def thaw(value: Any) -> Any:
    """Return tuples as lists and mappings as dicts, as JSON has them."""
    if isinstance(value, Mapping):
        return {name: thaw(item) for name, item in value.items()}
    return [thaw(item) for item in value] if isinstance(value, tuple) else value


def _options(value: Any) -> Options:
    try:
        given = list(value.items() if isinstance(value, Mapping) else value)
        pairs = dict(given)
    except (TypeError, ValueError):
        given, pairs = [value], {None: value}
    if len(pairs) < len(given):
        raise pydantic_core.PydanticCustomError("options", "a mapping of names to values, each name once")
    if not all(isinstance(name, str) for name in pairs):
        raise pydantic_core.PydanticCustomError("options", "a mapping of names to values")
    return Options(pairs)


# A field of options: any mapping or pairs of name and value come in, `Options` are kept, JSON gets an object.
OptionsField = Annotated[Mapping[str, Any], PlainValidator(_options), PlainSerializer(thaw)]


@dataclass_transform(frozen_default=True, field_specifiers=(dataclasses.field, Field))
class Config:
    """A frozen, hashable record that is checked when it is made; its subclasses are pydantic dataclasses."""

    _owner: ClassVar[str] = ""  # begins the sentences about fields; by default "The recipe's " for a Recipe

    def __init_subclass__(cls, written: bool = True, **options: Any) -> None:
        """Make a dataclass of a subclass; one that is not written in a file has no docstrings to be looked for."""
        super().__init_subclass__(**options)
        settings = ConfigDict(
            extra="forbid", use_attribute_docstrings=written, allow_inf_nan=False, arbitrary_types_allowed=True
        )
        dataclass(cls, frozen=True, config=settings)
        build = cls.__init__

        def __init__(self: Any, *values: Any, **fields: Any) -> None:
            names, owner = cls.field_names(), cls._owner or f"The {_what(cls)}'s "
            for name, value in [*zip(names, values, strict=False), *fields.items()]:
                if _is_deep(value):
                    raise ValueError(f"{owner}{name} is nested deeper than {_DEEPEST} levels.")
            try:
                build(self, *map(plain, values), **{name: plain(value) for name, value in fields.items()})
            except ValidationError as error:
                raise ValueError(sentence(error, _what(cls), names, owner)) from None

        cls.__init__ = __init__  # type: ignore[method-assign]

    @classmethod
    def field_names(cls) -> list[str]:
        """Return the names of all fields, in order."""
        return [item.name for item in dataclasses.fields(cls)]  # type: ignore[arg-type]

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as JSON types."""
        return type(self).__pydantic_serializer__.to_python(self, mode="json")  # type: ignore[attr-defined]

    @classmethod
    def from_dict(cls, values: Any) -> Self:
        """Make a record of what `to_dict` returned; fields that are missing take their defaults.

        Raises:
            ValueError: it is no mapping, a field is unknown or missing, or a value does not fit.
        """
        if not isinstance(values, Mapping) or not all(isinstance(name, str) for name in values):
            raise ValueError(f"A {_what(cls)} must be a mapping of field names to values, got {show(values)}.")
        return cls(**values)


def _what(cls: type) -> str:
    return re.sub(r"(?<=[a-z])(?=[A-Z])", " ", cls.__name__).lower()


_FLAT = frozenset((bool, int, float, str, bytes, type(None)))  # most values by far, and nothing is inside
_PLAIN = frozenset((dict, list, tuple))


def _is_deep(value: Any, levels: int = _DEEPEST) -> bool:
    kind = type(value)
    if kind in _FLAT or not (kind in _PLAIN or isinstance(value, Mapping | list | tuple)):
        return False
    items = value.values() if kind is dict or isinstance(value, Mapping) else value
    return levels == 0 or any(type(item) not in _FLAT and _is_deep(item, levels - 1) for item in items)


def plain(value: Any) -> Any:
    """Return a value with numpy's and torch's numbers and arrays as Python's numbers and lists, at any depth."""
    kind = type(value)
    if kind in _FLAT:
        return value
    if kind in (list, tuple):
        return kind([item if type(item) in _FLAT else plain(item) for item in value])
    if kind is not dict and kind.__module__ in ("numpy", "torch") and hasattr(value, "tolist"):
        return value.tolist()
    if kind is dict or isinstance(value, Mapping):
        return {
            name if type(name) is str else plain(name): item if type(item) in _FLAT else plain(item)
            for name, item in value.items()
        }
    return value


# ------------------------------------------------------------------------------------------------------------ sentences


class _Show(reprlib.Repr):
    """Short texts of values of any size and depth."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxlist, self.maxtuple, self.maxdict = 4, 8, 8, 8
        self.maxstring = self.maxother = 100

    def repr_int(self, value: int, level: int) -> str:
        if value.bit_length() > 128:  # Python refuses to write out more than 4,300 digits
            return f"a whole number of about {round(value.bit_length() * 0.30103)} digits"
        return repr(value)


show = _Show().repr

_EXPECTED = {
    "int_type": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "a text",
    "tuple_type": "a list",
    "list_type": "a list",
    "dict_type": "a mapping of names to values",
    "mapping_type": "a mapping of names to values",
    "dataclass_type": "a mapping of field names to values",
    "greater_than_equal": "at least {ge}",
    "greater_than": "above {gt}",
    "less_than_equal": "at most {le}",
    "less_than": "below {lt}",
    "literal_error": "one of {expected}",
    "too_short": "a list of at least {min_length} entries",
    "too_long": "a list of at most {max_length} entries",
    "string_too_short": "a text of at least {min_length} characters",
    "string_pattern_mismatch": "a text of the form {pattern}",
    "none_required": "None",
}


def sentence(error: ValidationError, what: str, fields: Iterable[str] = (), owner: str = "") -> str:
    """Return the first fault of a validation as one full sentence.

    Args:
        error: what pydantic raised.
        what: what the fields belong to, such as "recipe".
        fields: the valid names, in order.
        owner: what stands before a field's name, such as "The recipe's ".
    """
    names = list(fields)
    fault = error.errors(include_url=False)[0]
    kind, place, value, context = fault["type"], list(fault["loc"]), fault["input"], fault.get("ctx", {})
    if place and isinstance(place[0], int) and place[0] < len(names):
        place[0] = names[place[0]]  # an argument given by position
    if kind == "value_error":
        return str(context["error"])
    if kind == "unexpected_positional_argument":
        return f"A {what} has {len(names)} fields, got a value more: {show(value)}."
    if kind == "missing" and place and isinstance(last := place[-1], int):  # an entry of a list of fixed length
        kind, place, context = "too_short", place[:-1], {"min_length": last + 1}
    where = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place).removeprefix(".")
    if kind in ("unexpected_keyword_argument", "extra_forbidden"):
        return f"Unknown {what} field {show(where)}; valid fields are {', '.join(names)}."
    if kind == "missing":
        return f"A {what} needs the field {where}."
    context = {name: f"{item:g}" if isinstance(item, float) else item for name, item in context.items()}
    expected = _EXPECTED[kind].format(**context) if kind in _EXPECTED else fault["msg"].removeprefix("Input should be ")
    return f"{owner}{where} must be {expected}, got {show(value)}."


def check_type(what: str, value: Any, kind: Any, expected: str) -> None:
    """Raise a ValueError that names an argument and what it must be, unless its value is of that kind."""
    if not isinstance(value, kind):
        raise ValueError(f"{what} must be {expected}, got {type(value).__name__}.")


# ----------------------------------------------------------------------------------------------------------------- text


def read_json(text: str | bytes, what: str) -> Any:
    """Return what a JSON text holds.

    Args:
        text: the text; NaN and infinity are no JSON.
        what: where it comes from, for the sentence.

    Raises:
        ValueError: it is no JSON, nested deeper than 200 levels, or holds a number of more than 4,300 digits.
    """
    try:
        return pydantic_core.from_json(
            text if isinstance(text, bytes) else text.encode(errors="surrogatepass"), allow_inf_nan=False
        )
    except ValueError as error:
        raise ValueError(f"{what} is no readable JSON ({error}).") from None


def read_yaml(text: str, what: str) -> Any:
    """Return what a YAML text holds; dates stay texts, since no field is one.

    Args:
        text: the text.
        what: where it comes from, for the sentence.

    Raises:
        ValueError: it is no YAML, nested too deeply, or holds a number that Python does not read.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        yaml_implicit_resolvers = {  # noqa: RUF012
            first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
            for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
        }

        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):  # a few lines of them stand for billions of values
                raise yaml.YAMLError(f"the alias *{self.peek_event().anchor} is not taken; write the value out")
            return super().compose_node(parent, index)

    try:
        return yaml.load(text, Loader)
    except RecursionError:
        raise ValueError(f"{what} is nested too deeply to be read.") from None
    except (yaml.YAMLError, ValueError) as error:
        if not isinstance(error, yaml.YAMLError) and "digits" in str(error):  # Python's words name a function to call
            raise ValueError(f"{what} holds a whole number of more than 4,300 digits.") from None
        raise ValueError(f"{what} is no readable YAML ({' '.join(str(error).split())}).") from None
