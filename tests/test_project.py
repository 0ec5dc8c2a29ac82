"""The project's own files agree with each other."""

import tomllib
from importlib.resources import files
from pathlib import Path

import yaml

import binvit

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_conda_installs_the_same_list():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    python, pip, from_pip = environment["dependencies"]
    assert python == "python" + PROJECT["requires-python"]
    assert pip == "pip"
    (editable,) = from_pip["pip"]
    assert editable == f"-e .[{','.join(PROJECT['optional-dependencies'])}]"


def test_every_bound_has_its_reason():
    lines = (ROOT / "pyproject.toml").read_text().splitlines()
    bounds = [line for line in lines if line.startswith('    "') and ">=" in line]
    listed = [
        *PROJECT["dependencies"],
        *(name for extra in PROJECT["optional-dependencies"].values() for name in extra),
    ]
    assert len(bounds) == sum(">=" in name for name in listed)
    assert [line for line in bounds if "# " not in line] == []


def test_one_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert PROJECT["version"] == citation["version"] == binvit.__version__
    assert f"## [{PROJECT['version']}]" in (ROOT / "CHANGELOG.md").read_text()
    assert {entry["title"].split(":")[0].split(" of ")[0] for entry in citation["references"]} == {
        "GSB",
        "Binarization",
    }


def test_style_file_comes_with_the_package():
    assert "font" in (files("binvit.lab.figures") / "binvit.mplstyle").read_text()


def test_readme_names_the_commands():
    readme = (ROOT / "README.md").read_text()
    for command in (
        "make reproduce",
        "make test",
        "binvit reproduce",
        "binvit train",
        "binvit predict",
        "binvit schemes",
    ):
        assert command in readme


def test_readme_lists_every_scheme():
    readme = (ROOT / "README.md").read_text()
    table = [line.split("`")[1] for line in readme.splitlines() if line.startswith("| `")]
    assert set(binvit.list_schemes()) <= set(table)


def test_first_example_of_the_readme_runs(capsys):
    example = (ROOT / "README.md").read_text().split("```python\n")[1].split("```")[0]
    assert len(example.strip().splitlines()) <= 10
    exec(example, {})
    assert capsys.readouterr().out == "gsb (0.7, 0.9) torch.Size([2, 10])\n"
