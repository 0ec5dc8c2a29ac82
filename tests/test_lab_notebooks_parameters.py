import dataclasses
from typing import Optional

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import binvit
from binvit.lab import project
from binvit.lab.notebooks import parameters
from binvit.lab.notebooks.parameters import Between, check_parameters, convert


def running(cell: str, injected: str = "") -> dict:
    """Return the globals of a notebook whose first cells have run."""
    namespace = {"In": ["", "import os", cell], "Optional": Optional}
    exec(cell, namespace)
    if injected:
        namespace["In"].append(f"# Parameters\n{injected}\n")
        exec(injected, namespace)
    namespace["In"].append("p = check_parameters(globals())")
    return namespace


def test_parameters_come_back_as_frozen_dataclass():
    p = check_parameters(running("dataset: str = 'digits'\nseeds: list[int] = [0, 1]\nrate: float = 1"))
    assert dataclasses.asdict(p) == {"dataset": "digits", "seeds": [0, 1], "rate": 1.0}
    assert isinstance(p.rate, float)
    with pytest.raises(dataclasses.FrozenInstanceError):
        p.rate = 2.0


def test_cell_may_import_from_typing():
    cell = "from typing import Optional\n\nlimit: Optional[int] = None  # at most"
    assert check_parameters(running(cell)).limit is None
    assert parameters.declared_types(cell) == {"limit": "Optional[int]"}
    assert parameters.declared_types("import os\nlimit: int = 1") == {}


def test_injected_values_replace_defaults():
    assert check_parameters(running("count: int = 1", "count = 5")).count == 5


def test_misspelt_injected_name_is_refused_with_the_valid_names():
    with pytest.raises(ValueError, match=r"no parameter coutn; its parameters are count, rate\."):
        check_parameters(running("count: int = 1\nrate: float = 0.5", "coutn = 5"))


def test_variables_of_later_cells_are_no_parameters():
    namespace = running("count: int = 1")
    namespace |= {"i": 3, "table": [1, 2]}
    assert dataclasses.asdict(check_parameters(namespace)) == {"count": 1}


def test_a_cell_run_again_counts_as_it_is_now():
    namespace = running("count: int = 1", "count = 5")
    namespace["In"].append("count: int = 7\nnew: str = 'x'")
    exec(namespace["In"][-1], namespace)
    assert dataclasses.asdict(check_parameters(namespace)) == {"count": 7, "new": "x"}


@pytest.mark.parametrize(
    ("cell", "sentence"),
    [
        ("scheme: str = 'gbs'", "There is no scheme 'gbs'; the schemes are .*gsb"),
        ("schemes: list[str] = ['gsb', 'gbs']", "There is no scheme 'gbs'"),
        ("dataset: str = 'digit'", "digits"),
        ("recipe: str = 'huge'", "smoke"),
        ("seeds: list[int] = []", "empty list"),
        ("seeds: list[int] = [1, 1]", "twice"),
        ("seed: int = -1", "valid are integers from 0"),
        ("label_noise: float = 1.0", "valid are numbers from 0 to below 1"),
        ("samples_per_class: Optional[int] = 0", "integers from 1"),
        ("epochs: int = 0", "integers from 1"),
        ("count: int = 2.0", r"The parameter count must be a whole number, got 2\.0\."),
        ("flag: bool = 'true'", "The parameter flag must be true or false .*-y or -f.*, got 'true'"),
        ("rate: float = '1e-4'", r"The parameter rate must be a number .*write 1\.0e-4\), got '1e-4'"),
        ("rate: float = float('nan')", "The parameter rate must be a finite number, got nan"),
        ("seeds: list[int] = '[1]'", r"The parameter seeds must be a list .*-y or -f.*, got '\[1\]'"),
        ("levels: list[float] = [1, 'a']", r"The parameter levels\[1\] must be a number .*, got 'a'"),
        ("seed: int = 10**5000", "seed holds a whole number of about 5000 digits; valid are integers from 0"),
        ("rate: float = 10**400", "rate must be a number, got a whole number of about 400 digits"),
        ("count: int = True", "The parameter count must be a whole number, got True"),
        ("levels: list[float] = 0.5", "The parameter levels must be a list, got 0.5"),
        ("width: int | None = None", "'int | None' is not understood; use int, float"),
    ],
)
def test_wrong_value_is_refused_with_a_sentence(cell, sentence):
    with pytest.raises(ValueError, match=sentence.replace("|", r"\|")):
        check_parameters(running(cell))


@pytest.mark.parametrize(
    ("valid", "sentence"),
    [
        (range(1, 5), "levels holds 7; valid are integers from 1 to 4"),
        ((1, 2), "levels holds 7; valid are 1, 2"),
        (Between(0, 3), "levels holds 7; valid are numbers from 0 to 3"),
    ],
)
def test_own_rules_hold_for_each_entry(valid, sentence):
    with pytest.raises(ValueError, match=sentence):
        check_parameters(running("levels: list[int] = [1, 7]"), levels=valid)
    assert check_parameters(running("levels: list[int] = [1, 2]"), levels=valid).levels == [1, 2]


def test_rule_for_a_parameter_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="no parameter levles"):
        check_parameters(running("levels: list[int] = [1]"), levles=range(3))


def test_without_history_of_cells_as_under_nbval():
    cell = "count: int = 2\nnames: list[str] = ['a']\nlimit: Optional[float] = None"
    namespace = running(cell) | {"In": [""]}
    assert dataclasses.asdict(check_parameters(namespace)) == {"count": 2, "names": ["a"], "limit": None}
    with pytest.raises(ValueError, match=r"The parameter limit must be a number .*, got 'x'"):
        check_parameters(namespace | {"limit": "x"})


def test_a_value_nested_a_thousand_times_is_refused_with_a_sentence():
    deep: list = []
    for _ in range(1000):
        deep = [deep]
    with pytest.raises(ValueError, match=r"^The parameter levels is nested deeper than 32 levels\.$"):
        check_parameters(running("levels: list[float] = [1]") | {"levels": deep})


def test_without_parameters_cell():
    with pytest.raises(ValueError, match="No parameters cell has run"):
        check_parameters({"In": ["", "x = 1"]})


def test_all_schemes_and_recipes_pass():
    names = binvit.list_schemes()
    assert check_parameters(running(f"schemes: list[str] = {names!r}")).schemes == names
    assert check_parameters(running("recipes: list[str] = ['smoke', 'cpu', 'paper']")).recipes[1] == "cpu"


@settings(max_examples=30)  # each makes ten records, which takes a tenth of a second
@given(st.one_of(st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.text(), st.booleans(), st.none()))
def test_convert_keeps_values_of_the_right_type_and_refuses_others(value):
    fits = {"int": int, "str": str, "bool": bool}
    for annotation, kind in fits.items():
        if type(value) is kind:
            assert convert("x", value, annotation) == value
            assert convert("x", [value], f"list[{annotation}]") == [value]
        else:
            with pytest.raises(ValueError, match="The parameter x"):
                convert("x", value, annotation)
        assert convert("x", None, f"Optional[{annotation}]") is None


def test_folders_are_found_from_anywhere(tmp_path, monkeypatch):
    (tmp_path / "clone" / "notebooks").mkdir(parents=True)
    (tmp_path / "clone" / "binvit" / "lab").mkdir(parents=True)
    for place in ("clone", "clone/notebooks"):
        monkeypatch.chdir(tmp_path / place)
        assert project.folder("results") == tmp_path / "clone" / "results"
    monkeypatch.chdir(tmp_path)
    assert (project.folder("notebooks") / "nbval.cfg").is_file()  # this clone
    assert project.folder(tmp_path / "elsewhere") == tmp_path / "elsewhere"
