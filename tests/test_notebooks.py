"""The committed notebooks as files; nbval executes them."""

from pathlib import Path

import pytest
import yaml

from binvit.lab.notebooks import check, plan

FOLDER = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


def test_structure():
    problems = [problem for notebook in NOTEBOOKS for problem in check.problems(notebook)]
    assert not problems, "\n".join(problems)


def test_names_carry_one_number_each():
    numbers = [path.name[:3] for path in NOTEBOOKS]
    assert len(set(numbers)) == len(numbers)
    assert set(numbers) <= {f"{number:02d}_" for number in range(1, 100)}


def test_papermill_sees_every_parameter_of_every_size():
    for size in plan.SIZES:
        jobs = plan.plan(FOLDER, size) if NOTEBOOKS else []
        assert [job.notebook for job in jobs] == NOTEBOOKS


@pytest.mark.parametrize("size", plan.SIZES)
def test_second_cells_accept_the_values_of_every_size(size):
    plan.check(plan.plan(FOLDER, size), files=False)


def test_no_parameter_file_without_notebook():
    known = {f"{notebook.name[:2]}.{size}.yaml" for notebook in NOTEBOOKS for size in plan.SIZES if size != "archive"}
    assert {path.name for path in (FOLDER / "params").glob("*")} <= known


def test_every_rule_that_nbval_shall_ignore_is_a_pair():
    lines = [line for line in (FOLDER / "nbval.cfg").read_text().splitlines() if line and not line.startswith("[")]
    assert [line.split(":")[0] for line in lines] == ["regex", "replace"] * (len(lines) // 2)


def test_parameter_files_keep_their_numbers_as_numbers():
    for path in (FOLDER / "params").glob("*.yaml"):
        assert yaml.safe_load(path.read_text()), f"{path.name} sets nothing"
