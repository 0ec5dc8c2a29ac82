import copy
import dataclasses
import json
import pickle
import re
from typing import Annotated, Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from binvit.config import Config, Number, Options, OptionsField, Switch, Text, Whole, read_json, read_yaml


class Course(Config):
    rounds: Annotated[Whole, Field(ge=1, le=1000)]
    """How often."""
    options: OptionsField = Options()


class Plan(Config):
    name: Text
    """What it is called."""
    rate: Annotated[Number, Field(gt=0)] = 1.0
    size: Annotated[Whole, Field(ge=1, le=64)] | None = None
    kind: Literal["soft", "hard", "none"] = "none"
    flip: Switch = False
    rates: tuple[Number, ...] = ()
    courses: tuple[Course, ...] = ()
    mark: Annotated[Text, Field(pattern="^[a-z]*$")] = ""
    place: Text | None = dataclasses.field(default=None, compare=False)

    def __post_init__(self) -> None:
        if self.name == "bad":
            raise ValueError("A plan must not be called bad.")


def nested(levels: int) -> list:
    value: Any = []
    for _ in range(levels):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"rate": True}, "The plan's rate must be a number, got True."),
        ({"rate": "1"}, "The plan's rate must be a number, got '1'."),
        ({"rate": float("nan")}, "The plan's rate must be a finite number, got nan."),
        ({"rate": float("inf")}, "The plan's rate must be a finite number, got inf."),
        ({"rate": 0}, "The plan's rate must be above 0, got 0."),
        ({"rate": 10**400}, "The plan's rate must be a number, got a whole number of about 400 digits."),
        ({"size": True}, "The plan's size must be a whole number, got True."),
        ({"size": 2.5}, "The plan's size must be a whole number, got 2.5."),
        ({"size": 65}, "The plan's size must be at most 64, got 65."),
        ({"size": 10**30}, "The plan's size must be at most 64, got 1000000000000000000000000000000."),
        ({"size": 10**5000}, "The plan's size must be at most 64, got a whole number of about 5000 digits."),
        ({"flip": 1}, "The plan's flip must be true or false, got 1."),
        ({"kind": "mild"}, "The plan's kind must be one of 'soft', 'hard' or 'none', got 'mild'."),
        ({"kind": ["soft"]}, "The plan's kind must be one of 'soft', 'hard' or 'none', got ['soft']."),
        ({"rates": "123"}, "The plan's rates must be a list, got '123'."),
        ({"rates": [1, "a"]}, "The plan's rates[1] must be a number, got 'a'."),
        ({"courses": {"rounds": 3}}, "The plan's courses must be a list, got {'rounds': 3}."),
        ({"courses": [3]}, "The plan's courses[0] must be a mapping of field names to values, got 3."),
        ({"courses": [{"rounds": 0}]}, "The plan's courses[0].rounds must be at least 1, got 0."),
        ({"courses": [{}]}, "A plan needs the field courses[0].rounds."),
        (
            {"courses": [{"rounds": 1, "options": 3}]},
            "The plan's courses[0].options must be a mapping of names to values, got 3.",
        ),
        (
            {"courses": [{"rounds": 1, "options": {1: 2}}]},
            "The plan's courses[0].options must be a mapping of names to values, got {1: 2}.",
        ),
        (
            {"colour": 1},
            "Unknown plan field 'colour'; valid fields are name, rate, size, kind, flip, rates, courses, mark, place.",
        ),
        ({"mark": "A1"}, "The plan's mark must be a text of the form ^[a-z]*$, got 'A1'."),
        ({"name": "bad"}, "A plan must not be called bad."),
        ({"rates": nested(1000)}, "The plan's rates is nested deeper than 32 levels."),
        ({"name": nested(20)}, "The plan's name must be a text, got [[[[[...]]]]]."),
    ],
)
def test_what_does_not_fit_is_refused_by_one_sentence_with_field_value_and_expectation(fields, text):
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        Plan(**({"name": "a"} | fields))


def test_positions_and_missing_fields_are_named_too():
    with pytest.raises(ValueError, match=r"^A plan needs the field name\.$"):
        Plan()  # type: ignore[call-arg]
    with pytest.raises(ValueError, match=r"^The plan's rate must be a number, got 'b'\.$"):
        Plan("a", "b")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^A plan has 9 fields, got a value more: 9\.$"):
        Plan("a", 1, 2, "soft", True, (), (), "", None, 9)  # type: ignore[call-arg]
    for values in (3, [("name", "a")], {1: "a"}, None):
        with pytest.raises(ValueError, match=r"^A plan must be a mapping of field names to values, got "):
            Plan.from_dict(values)


def test_numbers_of_numpy_and_torch_are_taken_as_python_s():
    expected = Plan("a", 0.5, 3, flip=True, rates=(1.0, 2.0), courses=(Course(2, {"lr": 0.25}),))
    assert expected == Plan(
        np.str_("a"),
        np.float32(0.5),
        np.int64(3),
        flip=np.bool_(True),
        rates=np.array([1, 2]),
        courses=[{"rounds": torch.tensor(2), "options": {"lr": np.float16(0.25)}}],
    )
    with pytest.raises(ValueError, match="must be a whole number, got True"):
        Plan("a", size=np.bool_(True))


@given(
    st.builds(
        Plan,
        st.text().filter(lambda name: name != "bad"),
        rate=st.floats(min_value=1e-9, max_value=1e300),
        size=st.none() | st.integers(1, 64),
        courses=st.lists(
            st.builds(
                Course,
                st.integers(1, 9),
                st.dictionaries(st.text(), st.integers() | st.lists(st.text(), max_size=2), max_size=3),
            ),
            max_size=2,
        ),
    )
)
def test_a_record_survives_json_pickle_and_copies_and_can_be_hashed(plan):
    for again in (
        Plan.from_dict(json.loads(json.dumps(plan.to_dict(), allow_nan=False))),
        pickle.loads(pickle.dumps(plan)),  # noqa: S301 - its own bytes
        copy.deepcopy(plan),
        dataclasses.replace(plan),
        dataclasses.replace(plan, place="elsewhere"),
    ):
        assert again == plan
        assert hash(again) == hash(plan)
        assert repr(again.courses) == repr(plan.courses)


def test_a_record_cannot_be_changed_and_a_changed_copy_is_checked():
    plan = Plan("a")
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.rate = 2.0  # type: ignore[misc]
    with pytest.raises(ValueError, match="must be at least 1"):
        dataclasses.replace(plan, size=0)
    with pytest.raises(TypeError):
        plan.courses[0] = 1  # type: ignore[index]


def test_options_are_a_sorted_mapping_whatever_they_were_given_as():
    assert Course(1, {"b": [1, {"y": 2, "x": 1}], "a": 0}) == Course(1, (("a", 0), ("b", (1, {"x": 1, "y": 2}))))
    options = Course(1, {"b": [1, {"y": 2}], "a": 0}).options
    assert options == {"a": 0, "b": (1, {"y": 2})}
    assert list(options) == ["a", "b"]
    assert dict(**options)["b"][1]["y"] == 2
    assert len({options, Options(dict(options))}) == 1


def test_fields_are_documented_by_the_docstrings_under_them():
    assert Plan.__pydantic_fields__["name"].description == "What it is called."  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "text", ["[" * 1000 + "]" * 1000, "7" * 5000, "NaN", "[Infinity]", "[1", "", "\ud800", b"\xff"]
)
def test_text_that_is_no_json_is_refused_by_one_sentence(text):
    with pytest.raises(ValueError, match=r"^The file x\.json is no readable JSON \(.+\)\.$"):
        read_json(text, "The file x.json")


@pytest.mark.parametrize(
    "text", ["[" * 1000 + "]" * 1000, "7" * 5000, "{a: [", "\x00", "[&a 1, *a]", "!!python/none 1"]
)
def test_text_that_is_no_yaml_is_refused_by_one_sentence(text):
    sentences = r"is no readable YAML \(.+\)|is nested too deeply.*|holds a whole number of more than 4,300 digits"
    with pytest.raises(ValueError, match=rf"^The file x\.yaml ({sentences})\.$") as refused:
        read_yaml(text, "The file x.yaml")
    assert "sys.set_int_max_str_digits" not in str(refused.value)


class Place(Config, written=False):
    corner: tuple[Number, Number]


def test_a_list_of_fixed_length_that_is_too_short_is_told_by_its_length():
    with pytest.raises(ValueError, match=r"^The place's corner must be a list of at least 2 entries, got \[1\]\.$"):
        Place(corner=[1])


def test_dates_in_yaml_stay_texts_that_a_field_can_name():
    assert read_yaml("[2024-99-99, 2024-01-01, 3]", "x") == ["2024-99-99", "2024-01-01", 3]
    with pytest.raises(ValueError, match=r"^The plan's rates\[0\] must be a number, got '2024-99-99'\.$"):
        Plan("a", rates=read_yaml("[2024-99-99]", "x"))
