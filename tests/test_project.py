"""The project's own files agree with each other."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.resources import files
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

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
    assert f"## [{PROJECT['version']}] - {citation['date-released']}" in (ROOT / "CHANGELOG.md").read_text()
    assert {entry["title"].split(":")[0].split(" of ")[0] for entry in citation["references"]} == {
        "GSB",
        "Binarization",
    }


def test_files_beside_the_modules_come_with_the_package():
    assert "font" in (files("binvit.lab.figures") / "binvit.mplstyle").read_text()
    assert "font" in (files("binvit.lab.notebooks") / "templates" / "report.css").read_text()


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


def rooms() -> dict[str, list[Path]]:
    """Return the modules of every folder of the package."""
    modules: dict[str, list[Path]] = {}
    for path in sorted((ROOT / "binvit").rglob("*.py")):
        if path.name != "__init__.py":
            modules.setdefault(path.parent.relative_to(ROOT).as_posix(), []).append(path)
    return modules


def test_rooms_are_small_and_so_are_files():
    for room, modules in rooms().items():
        assert len(modules) <= 12, f"{room} holds {len(modules)} modules"
        for path in modules:
            lines = len(path.read_text().splitlines())
            assert lines <= 350, f"{path} has {lines} lines"


def test_readme_draws_every_room_and_module_that_exists():
    readme = (ROOT / "README.md").read_text()
    picture = readme.split("\nbinvit/\n")[1].split("\n\n")[0]
    names = set(re.findall(r"\w+", picture))
    named_as_notebooks = {path.stem[3:] for path in (ROOT / "notebooks").glob("*.ipynb")}
    for room, modules in rooms().items():
        missing = ({path.stem for path in modules} | {*room.split("/")[1:]}) - names - named_as_notebooks
        assert not missing, f"{room}: {missing} in no line of the README's picture"


def test_every_notebook_has_its_experiment():
    experiments = {path.stem for path in rooms()["binvit/lab/experiments"]}
    assert {path.stem[3:] for path in (ROOT / "notebooks").glob("*.ipynb")} <= experiments


@pytest.mark.parametrize(
    ("imported", "by", "contract"),
    [
        ("binvit.lab.data.loader", "binvit.packed.files", "Arrows go down"),
        ("binvit.nn.rules", "binvit.bits.gemm", "Arrows go down"),
        ("binvit.packed", "binvit.jit", "Arrows go down"),
        ("binvit.lab.trials.trial", "binvit.lab.training.loop", "Inside lab"),
        ("binvit.lab.figures.style", "binvit.lab.analysis.claims", "Figures draw"),
        ("torch", "binvit.bits.packing", "bits counts bits"),
        ("binvit.bits.gemm", "binvit.bits.packing", "No circles"),
    ],
)
def test_linter_refuses_an_arrow_that_runs_up(imported, by, contract, tmp_path, monkeypatch):
    package = shutil.copytree(ROOT / "binvit", tmp_path / "binvit", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    importer = package.joinpath(*by.split(".")[1:]).with_suffix(".py")
    importer.write_text(f"{importer.read_text()}\nimport {imported}\n")
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as c; c()", "--no-cache"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=os.environ | {"COLUMNS": "200"})
    broken = [line for line in done.stdout.splitlines() if line.endswith("BROKEN")]
    assert done.returncode == 1, done.stderr
    assert any(line.startswith(contract) for line in broken), done.stdout


def test_types_come_with_the_package():
    assert (files("binvit") / "py.typed").is_file()


def test_every_test_that_reliability_names_exists():
    named = set(re.findall(r"`(test_\w+)`", (ROOT / "RELIABILITY.md").read_text()))
    defined = {
        name
        for path in (ROOT / "tests").glob("test_*.py")
        for name in re.findall(r"(?m)^def (test_\w+)", path.read_text())
    }
    assert len(named) > 30
    assert named <= defined


def test_profile_of_the_cluster_names_rules_that_exist():
    folder = ROOT / "notebooks"
    profile = yaml.safe_load((folder / "profiles" / "slurm" / "config.yaml").read_text())
    rules = set(re.findall(r"(?m)^rule (\w+):$", (folder / "Snakefile").read_text()))
    assert profile["executor"] == "slurm"
    assert "train" in rules
    for name in ("set-threads", "set-resources"):
        assert profile[name]
        assert profile[name].keys() <= rules


def test_constraints_fix_every_dependency_within_its_bounds():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    fixed = dict(line.split("==") for line in lines if not line.startswith("#"))
    listed = [
        *PROJECT["dependencies"],
        *(name for extra in PROJECT["optional-dependencies"].values() for name in extra if ">=" in name),
    ]
    for requirement in map(Requirement, listed):
        assert requirement.specifier.contains(fixed[canonicalize_name(requirement.name)]), requirement


def test_make_test_runs_every_check_and_takes_options_for_pip():
    makefile = (ROOT / "Makefile").read_text()
    for tool in ("ruff check", "ruff format --check", "mypy", "lint-imports", "pytest", "--nbval"):
        assert tool in makefile
    command = ["make", "--dry-run", "--always-make", "test", "PIP_OPTIONS=--pre", "CONSTRAINTS=constraints.txt"]
    steps = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    pip, binvit = [line for line in steps.replace("\\\n", "").splitlines() if "pip install" in line]
    assert " --pre " in pip
    assert " --pre " in binvit
    assert "--constraint=constraints.txt" in binvit


def test_continuous_integration_calls_make_test_with_the_oldest_python():
    jobs = yaml.safe_load((ROOT / ".github/workflows/test.yml").read_text())["jobs"]
    matrix = jobs["test"]["strategy"]["matrix"]["include"]
    assert {"run": "make test"} in jobs["test"]["steps"]
    assert PROJECT["requires-python"] == f">={min((job['python'] for job in matrix), key=Version)}"
    assert {job["versions"] for job in matrix} == {"lowest", "archived", "newest"}
