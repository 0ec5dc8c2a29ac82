import ast
import errno
import json
import os
import sys
from pathlib import Path

import notebook_maker
import papermill
import pytest

from binvit.lab.notebooks import run
from binvit.lab.notebooks.check import problems
from binvit.lab.notebooks.plan import Job, check, parse, plan, read_values
from binvit.threads import cores


@pytest.fixture
def folder(tmp_path) -> Path:
    notebook_maker.write(tmp_path / "01_count.ipynb")
    notebook_maker.write(tmp_path / "02_count.ipynb")
    (tmp_path / "params").mkdir()
    (tmp_path / "params" / "01.cpu.yaml").write_text("count: 30\nrate: 1\n")
    (tmp_path / "params" / "02.cpu.yaml").write_text("names: [b]\n")
    return tmp_path


def test_the_archive_runs_the_defaults(folder):
    assert plan(folder) == [Job(folder / "01_count.ipynb"), Job(folder / "02_count.ipynb")]


def test_size_reads_the_parameter_files_and_given_values_win(folder):
    jobs = plan(folder, "cpu", values={"count": 4}, texts={"rate": "1e-4"})
    assert [job.values for job in jobs] == [
        {"count": 4, "rate": 1e-4},
        {"names": ["b"], "count": 4, "rate": 1e-4},
    ]


@pytest.mark.parametrize("number", ["02", "2"])
def test_only(folder, number):
    assert [job.notebook.name for job in plan(folder, only=[number])] == ["02_count.ipynb"]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"size": "huge"}, "no size 'huge'; the sizes are archive, smoke, cpu, paper"),
        ({"only": ["09"]}, "no notebook '09'; there are 01, 02"),
        ({"values": {"coutn": 1}}, "01_count.ipynb has no parameter 'coutn'; its parameters are count, names, rate"),
        ({"texts": {"coutn": "1"}}, "no parameter 'coutn'"),
        ({"values": {"count": "many"}}, "count must be a whole number .*, got 'many'"),
        ({"texts": {"count": "2.5"}}, "count must be a whole number, got 2.5"),
        ({"texts": {"names": "a"}}, "names must be a list .*, got 'a'"),
        ({"texts": {"names": "[a"}}, "names must be a list"),
    ],
)
def test_wrong_plans_are_refused(folder, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        plan(folder, **options)


def write_checked(path: Path, check: str) -> list[Job]:
    """Write a notebook with images whose second cell is `check`, and plan it."""
    made = notebook_maker.notebook()
    made["cells"][1]["source"] = 'dataset: str = "digits"\ndata_dir: str = ""\nshare: float = 0.1\nseed: int = 0'
    made["cells"][2]["source"] = check
    notebook_maker.clean.write(made, path)
    return plan(path.parent)


CHECK = (
    "from binvit.lab.experiments.design.parse import parse_images\nfrom binvit.lab.notebooks import parameters\n\n"
    "limit = parameters.Between(0, 1)\n"
    "p = parameters.check_parameters(globals(), share=limit, dataset=parse_images)\nraise RuntimeError('not reached')"
)


@pytest.mark.parametrize(
    ("values", "error", "sentence"),
    [
        ({"share": 2.0}, ValueError, r"01_a\.ipynb: The parameter share holds 2.0; valid are numbers from 0 to 1"),
        ({"seed": -1}, ValueError, "seed holds -1"),
        ({"dataset": "digit"}, ValueError, "'digit'.*digits, cifar10"),
        ({"dataset": "digits; parquet:no.parquet, 2 per class"}, FileNotFoundError, "01_a.ipynb: no.parquet .*exist"),
        ({"dataset": "folder:no", "data_dir": "some/where"}, FileNotFoundError, "some/where/no .*does not exist"),
        ({"dataset": "chaoyang"}, ValueError, "chaoyang needs root=FOLDER"),
    ],
)
def test_values_are_refused_by_the_second_cell_before_anything_runs(tmp_path, values, error, sentence):
    (job,) = write_checked(tmp_path / "01_a.ipynb", CHECK)
    check([job])
    with pytest.raises(error, match=sentence):
        check([Job(job.notebook, values)])
    if error is FileNotFoundError:
        check([Job(job.notebook, values)], files=False)


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("count: int = two", "NameError: name 'two' is not defined"),
        ("count: int = 2x", "SyntaxError: .*"),
        ("count: int = 1 / 0", "ZeroDivisionError: division by zero"),
    ],
)
def test_a_slip_in_the_first_cell_is_told_in_a_sentence(tmp_path, line, why):
    made = notebook_maker.notebook()
    made["cells"][1]["source"] = line
    notebook_maker.clean.write(made, tmp_path / "01_count.ipynb")
    job = Job(tmp_path / "01_count.ipynb")
    with pytest.raises(ValueError, match=rf"^01_count\.ipynb: The first two cells cannot be run \({why}\)\.$"):
        check([job])


def test_files_that_are_there_and_notebooks_without_checks_pass(tmp_path):
    (tmp_path / "some.parquet").write_bytes(b"")
    jobs = write_checked(tmp_path / "01_a.ipynb", CHECK)
    check([Job(jobs[0].notebook, {"dataset": "parquet:some.parquet", "data_dir": str(tmp_path)})])
    check(write_checked(tmp_path / "01_a.ipynb", "share = share / 0"))


def test_missing_files_are_named(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"There is no parameter file .*01\.paper\.yaml"):
        plan(folder, "paper")
    with pytest.raises(FileNotFoundError, match="There are no notebooks in"):
        plan(tmp_path / "params")


def test_wrong_values_in_a_parameter_file_are_refused(folder):
    (folder / "params" / "01.cpu.yaml").write_text("rate: 1e-4")
    with pytest.raises(ValueError, match=r"write 1\.0e-4"):
        plan(folder, "cpu")


@pytest.mark.parametrize("text", ["{}", "[]", '{"cells": 3}', '{"cells": [{}]}', "[" * 100_000, ""])
def test_what_is_no_notebook_is_refused(folder, text):
    (folder / "01_count.ipynb").write_text(text)
    with pytest.raises(ValueError, match=r"01_count\.ipynb cannot be read as a notebook \(\w+: "):
        plan(folder)


@pytest.mark.parametrize("line", ["", "count = 3", "count: int"])
def test_parameters_have_values_and_types(folder, line):
    path = folder / "01_count.ipynb"
    cell = {"cell_type": "code", "metadata": {"tags": ["parameters"]}, "source": [line]}
    path.write_text(json.dumps({"cells": [cell]}))
    with pytest.raises(ValueError, match=r"01_count\.ipynb has no parameters cell of lines such as"):
        plan(folder)


def test_a_plan_needs_no_papermill(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "papermill", None)  # loading it takes longer than the plan
    assert plan(folder, values={})[0].notebook.name == "01_count.ipynb"


def test_empty_parameter_file_changes_nothing(tmp_path):
    (tmp_path / "empty.yaml").write_text("# nothing yet\n")
    assert read_values(tmp_path / "empty.yaml") == {}


@pytest.mark.parametrize(
    ("text", "annotation", "value"),
    [
        ("1e-4", "float", 1e-4),
        ("3", "float", 3.0),
        ("3", "int", 3),
        ("3", "str", "3"),
        ("true", "bool", True),
        ("[0, 1]", "list[int]", [0, 1]),
        ("[a, b]", "list[str]", ["a", "b"]),
        ("null", "Optional[int]", None),
        ("1e-4", "Optional[float]", 1e-4),
    ],
)
def test_texts_are_read_as_the_declared_type(text, annotation, value):
    assert parse("x", text, annotation) == value


def test_run_goes_on_after_a_failure_and_shares_the_cores(folder, tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    threads = "import os\nprint(os.environ['OMP_NUM_THREADS'])"
    notebook_maker.write(folder / "01_count.ipynb", claims="raise RuntimeError('no\\nluck')")
    notebook_maker.write(folder / "02_count.ipynb", claims=threads)
    monkeypatch.setattr(os, "cpu_count", lambda: 96)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(6)), raising=False)
    outcomes = run.run(plan(folder), tmp_path / "out", processes=2)
    assert [(outcome.name, outcome.error) for outcome in outcomes] == [
        ("01_count", "RuntimeError: no luck"),
        ("02_count", None),
    ]
    assert all(outcome.seconds > 0 for outcome in outcomes)
    assert '"3\\n"' in outcomes[1].executed.read_text()
    failed = json.loads(outcomes[0].executed.read_text())
    assert failed["cells"][-1]["outputs"][0]["ename"] == "RuntimeError"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["01_count.ipynb", "02_count.ipynb"]


def test_a_notebook_that_measures_time_runs_alone(folder, tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    told = "import os\nimport time\nprint([os.environ.get('OMP_NUM_THREADS'), time.time()])"
    for number in (1, 2, 3):
        notebook_maker.write(folder / f"0{number}_count.ipynb", claims=told)
    path = folder / "01_count.ipynb"
    measuring = json.loads(path.read_text())
    measuring["cells"][2]["metadata"]["tags"] = ["measures-time"]
    path.write_text(json.dumps(measuring))
    assert problems(path) == []
    outcomes = run.run(plan(folder), tmp_path / "out", processes=2)
    assert [(outcome.name, outcome.error) for outcome in outcomes] == [(f"0{n}_count", None) for n in (1, 2, 3)]
    cells = [json.loads(outcome.executed.read_text())["cells"][-1] for outcome in outcomes]
    printed = [ast.literal_eval("".join(cell["outputs"][0]["text"])) for cell in cells]
    assert printed[0][0] is None  # all cores are its own
    assert {threads for threads, _ in printed[1:]} == {str(max(1, cores() // 2))}
    assert printed[0][1] - outcomes[0].seconds > max(ended for _, ended in printed[1:])  # it begins when all have ended


@pytest.mark.parametrize(
    "path", sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb")), ids=lambda p: p.stem
)
def test_notebooks_that_measure_time_say_so(path):
    measures = "benchmark.timing" in (Path(run.__file__).parents[1] / "experiments" / f"{path.stem[3:]}.py").read_text()
    measures |= "benchmark.benchmark_" in path.read_text()
    assert Job(path, {"archive": ""}).measures_time() == measures
    assert Job(path).measures_time() == (measures and path.name[:2] != "09")  # which reads what was measured


def test_copy_of_an_earlier_run_does_not_pass_for_this_one(folder, tmp_path, monkeypatch):
    stale = notebook_maker.write(tmp_path / "out" / "01_count.ipynb")
    monkeypatch.setattr("papermill.execute_notebook", lambda *args, **options: 1 / 0)
    outcome = run.run_job(Job(folder / "01_count.ipynb"), tmp_path / "out")
    assert outcome.error == "ZeroDivisionError: division by zero"
    assert not stale.exists()


@pytest.mark.parametrize("cut", [0, 300])
def test_a_full_disk_fails_its_notebook_and_lets_the_others_run(folder, tmp_path, monkeypatch, cut):
    execute = papermill.execute_notebook

    def full(path, unfinished, *arguments, **options):
        execute(path, unfinished, *arguments, **options)
        if "01_count" in path:
            os.truncate(unfinished, cut)
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(papermill, "execute_notebook", full)
    first, second = run.run(plan(folder), tmp_path / "out")
    assert first.error == "OSError: [Errno 28] No space left on device"
    assert second.error is None
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["02_count.ipynb"]


def test_a_copy_that_cannot_be_kept_is_an_error(folder, tmp_path, monkeypatch):
    def full(notebook, path):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(run.clean, "write", full)
    outcome = run.run_job(Job(folder / "01_count.ipynb"), tmp_path / "out")
    assert outcome.error == "Its executed copy could not be written ([Errno 28] No space left on device)."
    assert not list((tmp_path / "out").iterdir())


def test_executed_copy_holds_the_given_values_and_no_papermill(folder, tmp_path):
    (outcome,) = run.run(plan(folder, only=["01"], values={"count": 41}), tmp_path / "out")
    text = outcome.executed.read_text()
    assert "count is 41." in text
    assert "papermill" not in text
    assert '"injected-parameters"' in text
    assert str(tmp_path) not in text


def test_misspelt_name_that_reaches_the_notebook_is_refused_by_its_second_cell(folder, tmp_path):
    outcome = run.run_job(Job(folder / "01_count.ipynb", {"coutn": 1}), tmp_path / "out")
    assert outcome.error == "ValueError: This notebook has no parameter coutn; its parameters are count, names, rate."


def test_an_archive_that_is_not_there_is_told_before_anything_runs(tmp_path):
    jobs = plan(Path(__file__).parents[1] / "notebooks", "archive", ["04"], {"archive": str(tmp_path / "nope")})
    for files in (True, False):
        with pytest.raises(FileNotFoundError, match=r"^04_methods\.ipynb: There is no archive .*nope: .*\.$"):
            check(jobs, files=files)
