import dataclasses
import errno
import json
import os
import re
from pathlib import Path

import notebook_maker
import pandas as pd
import pytest
from click.testing import CliRunner

from binvit import files
from binvit.__main__ import cli
from binvit.lab.notebooks import report
from binvit.lab.notebooks.run import Outcome


def table(html: str) -> dict:
    return {"output_type": "execute_result", "execution_count": 4, "metadata": {}, "data": {"text/html": html}}


@pytest.fixture
def outcomes(tmp_path) -> list[Outcome]:
    """Two executed notebooks, the second stopped by an error, and one of which no copy exists."""
    made = notebook_maker.notebook()
    made["cells"][3]["outputs"] = [
        {"output_type": "display_data", "metadata": {}, "data": {"image/png": "QUJD\n", "text/plain": "<Figure>"}}
    ]
    made["cells"][4]["outputs"] = [table("<table><tr><td>GSB helps</td><td>yes</td></tr></table>")]
    failed = notebook_maker.notebook()
    failed["cells"][0]["source"] = ["# Second <b>one</b>\n", "\n", "Why?"]
    error = {"output_type": "error", "ename": "E", "evalue": "v", "traceback": ["\x1b[31mE: <v>\x1b[0m"]}
    failed["cells"][2]["outputs"] = [error]
    paths = []
    for name, notebook in (("01_made", made), ("02_failed", failed)):
        path = tmp_path / "notebooks" / f"{name}.ipynb"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(notebook))
        paths.append(path)
    return [
        Outcome("01_made", paths[0], 75.0, size="cpu"),
        Outcome("02_failed", paths[1], 2.0, "E: <v>"),
        Outcome("03_gone", tmp_path / "notebooks" / "03_gone.ipynb", 1.0, "RuntimeError: Kernel died"),
    ]


def test_index_shows_question_figure_claims_time_and_failures(outcomes, tmp_path):
    index = report.write_report(outcomes, tmp_path).read_text()
    assert '<a href="01_made.html">What is counted?</a>' in index
    assert re.search(r"<p>Does <span class=.formula.><math.*</math></span> hold\?</p>", index)
    assert 'src="data:image/png;base64,QUJD"' in index
    assert "<td>GSB helps</td><td>yes</td>" in index
    assert "1 min 15 s" in index
    assert "2 failed" in index
    assert "Failed: E: &lt;v&gt;" in index
    assert "Second &lt;b&gt;one&lt;/b&gt;" in index
    assert "03_gone" in index
    assert "03_gone.html" not in index
    assert "size cpu" in index


def test_index_counts_verdicts_and_opens_claims_on_demand(tmp_path):
    made = notebook_maker.notebook()
    cell = next(cell for cell in made["cells"] if "claims" in cell["metadata"].get("tags", []))
    rows = "".join(f"<tr><td><b>{verdict}</b></td></tr>" for verdict in ("no", "undecided", "no"))
    cell["outputs"] = [{"output_type": "display_data", "metadata": {}, "data": {"text/html": f"<table>{rows}</table>"}}]
    path = tmp_path / "01_made.ipynb"
    path.write_text(json.dumps(made))
    index = report.write_report([Outcome("01_made", path, 1.0)], tmp_path).read_text()
    assert '<details class="claims"><summary>Claims: 2 no, 1 undecided</summary>' in index


def test_pages_hold_all_outputs_and_need_no_network(outcomes, tmp_path):
    report.write_report(outcomes, tmp_path)
    page = (tmp_path / "01_made.html").read_text()
    assert "<h1" in page
    assert "GSB helps" in page
    assert "base64,QUJD" in page
    assert "check_parameters" in page
    assert "&lt;v&gt;" in (tmp_path / "02_failed.html").read_text()
    assert not (tmp_path / "03_gone.html").exists()
    for file in tmp_path.glob("*.html"):
        text = file.read_text()
        assert "<script" not in text
        assert not re.search(r"(src|href)=\"(https?:)?//", text)
        assert len(text) < 60_000


def test_report_is_the_same_for_the_same_outcomes(outcomes, tmp_path):
    index = report.write_report(outcomes, tmp_path)
    before = {file: file.read_bytes() for file in tmp_path.glob("*.html")}
    assert report.write_report(outcomes, tmp_path) == index
    assert {file: file.read_bytes() for file in tmp_path.glob("*.html")} == before


def test_index_keeps_the_notebooks_of_earlier_batches(outcomes, tmp_path):
    report.write_report(outcomes, tmp_path)
    repeated = Outcome("02_failed", outcomes[1].executed, 33.0)
    index = report.write_report([repeated], tmp_path).read_text()
    assert index.index("01_made.html") < index.index("02_failed.html")
    assert "03_gone" not in index
    assert "2 notebooks, all finished, 1 min 48 s in all" in index
    assert "size cpu" in index
    (tmp_path / "outcomes.json").write_text("[1")
    assert "1 notebook, all finished" in report.write_report([repeated], tmp_path).read_text()


def test_what_killed_writers_have_left_is_removed(outcomes, tmp_path):
    name = f"{files._machine()}.{2**22 + 1}.0123abcd.tmp"  # no process has such a number
    left = [tmp_path / f".index.html.{name}", tmp_path / "notebooks" / f".01_made.ipynb.{name}"]
    kept = [tmp_path / f".index.html.{files._machine()}.{os.getpid()}.0123abcd.tmp", tmp_path / ".own.tmp"]
    for path in left + kept:
        path.touch()
    report.write_report(outcomes, tmp_path)
    assert [path for path in left + kept if path.exists()] == kept


def test_names_and_messages_are_text_whatever_they_hold(outcomes, tmp_path):
    hostile = Outcome("<i>", tmp_path / "<i>.ipynb", 1.0, "<script>alert(1)</script>", size="<b>")
    index = report.write_report([*outcomes, hostile], tmp_path).read_text()
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in index
    assert not {"<script", "<i>", "<b>"} & set(re.findall(r"<\w+>?", index))


def test_summary_of_a_notebook_without_opening_or_results():
    summary = report.summarize({"cells": [notebook_maker.cell("code", "1", 1)]})
    assert summary == report.Summary(title="Untitled", question="", figure=None, claims=None)


def test_printed_claims_are_shown_as_text():
    made = notebook_maker.notebook()
    made["cells"][4]["outputs"] = [{"output_type": "stream", "name": "stdout", "text": "yes <1>\n"}]
    assert report.summarize(made).claims == "<pre>yes &lt;1&gt;\n</pre>"


def test_hidden_input_stays_hidden(tmp_path):
    made = notebook_maker.notebook()
    made["cells"][2]["metadata"] = {"tags": ["hide-input"]}
    path = tmp_path / "01_made.ipynb"
    path.write_text(json.dumps(made))
    report.write_report([Outcome("01_made", path, 1.0)], tmp_path)
    assert "check_parameters" not in (tmp_path / "01_made.html").read_text()


@pytest.mark.parametrize(
    "damage", ["", "{", "[]", "{}", '{"cells": 3}', '{"cells": [{}]}', "[" * 100_000, '{"cells": [{"cell_type": 1}]}']
)
def test_a_damaged_copy_breaks_no_report(outcomes, tmp_path, damage):
    report.write_report(outcomes, tmp_path)
    outcomes[0].executed.write_text(damage)
    index = report.write_report(outcomes[1:], tmp_path).read_text()  # the first is one of an earlier batch now
    assert "Failed: Its executed copy cannot be read" in index
    assert "Second &lt;b&gt;one&lt;/b&gt;" in index
    assert "02_failed.html" in index
    index = report.write_report(outcomes, tmp_path).read_text()
    assert "Failed: Its executed copy cannot be read" in index
    assert not (tmp_path / "01_made.html").exists()


@pytest.mark.parametrize(
    "damage",
    [
        "",
        "[{",
        "{}",
        "[3]",
        '[["name"]]',
        "[" * 100_000,
        '[{"name": 1, "executed": "01_made.ipynb", "seconds": 1}]',
        '[{"name": "01_made", "executed": "01_made.ipynb", "seconds": NaN}]',
        '[{"name": "01_made", "executed": "01_made.ipynb", "seconds": "long"}]',
        '[{"name": "01_made", "executed": null, "seconds": 1.0}]',
    ],
)
def test_damaged_records_of_earlier_batches_start_afresh(outcomes, tmp_path, damage):
    report.write_report(outcomes[:1], tmp_path)
    (tmp_path / "outcomes.json").write_text(damage)
    index = report.write_report(outcomes[1:], tmp_path).read_text()
    assert "Second &lt;b&gt;one&lt;/b&gt;" in index
    assert "01_made.html" not in index


@pytest.mark.parametrize("number", [errno.EMFILE, errno.EACCES, errno.EIO])
def test_records_that_cannot_be_read_are_never_overwritten(outcomes, tmp_path, monkeypatch, number):
    report.write_report(outcomes[:1], tmp_path)
    before = {path.name: path.read_bytes() for path in (tmp_path / "outcomes.json", tmp_path / "index.html")}
    read = Path.read_bytes

    def refused(path):
        if path.name == "outcomes.json":
            raise OSError(number, "Refused", str(path))
        return read(path)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", refused)
        with pytest.raises(OSError, match="Refused"):
            report.write_report(outcomes[1:], tmp_path)
    assert {name: (tmp_path / name).read_bytes() for name in before} == before
    assert "01_made.html" in report.write_report(outcomes[1:], tmp_path).read_text()


def test_a_table_of_retrained_trials_that_cannot_be_read_is_no_missing_one(outcomes, tmp_path, monkeypatch):
    def refused(path, **options):
        raise OSError(errno.EMFILE, "Too many open files", str(path))

    monkeypatch.setattr(report.pd, "read_csv", refused)
    with pytest.raises(OSError, match="Too many open files"):
        report.write_report(outcomes, tmp_path)


def test_a_smoke_sized_report_says_that_its_verdicts_mean_nothing(outcomes, tmp_path):
    words = "The verdicts mean nothing"
    assert words not in report.write_report(outcomes, tmp_path).read_text()
    assert words not in (tmp_path / "01_made.html").read_text()
    small = dataclasses.replace(outcomes[0], size="smoke")
    assert words in report.write_report([small], tmp_path).read_text()
    assert words in (tmp_path / "01_made.html").read_text()


def test_the_index_shows_the_trials_that_were_trained_again(outcomes, tmp_path):
    assert "trained again" not in report.write_report(outcomes, tmp_path).read_text()
    (tmp_path / report.RETRAINED).write_text(
        "notebook,trial,archived (%),here (%),verdict\n04,a<b,91.234567,91.3,identical\n"
    )
    index = report.write_report(outcomes, tmp_path).read_text()
    assert "trained again" in index
    assert "<td>a&lt;b</td>" in index
    assert "<td>91.23</td>" in index
    assert "<td>04</td>" in index


@pytest.fixture
def folders(outcomes, tmp_path) -> list[Path]:
    """The reports of one notebook each that `join_reports` takes."""
    made = []
    for outcome in outcomes:
        folder = tmp_path / "jobs" / outcome.name[:2]
        copy = folder / "notebooks" / outcome.executed.name
        copy.parent.mkdir(parents=True)
        if outcome.executed.is_file():
            copy.write_bytes(outcome.executed.read_bytes())
        report.write_report([dataclasses.replace(outcome, executed=copy)], folder)
        made.append(folder)
    return made


def test_joined_reports_show_every_notebook_also_one_that_left_no_copy(folders, tmp_path):
    index = report.join_reports(folders, tmp_path / "joined").read_text()
    assert "3 notebooks" in index
    assert "2 failed" in index
    assert "Failed: E: &lt;v&gt;" in index
    assert "Failed: RuntimeError: Kernel died" in index
    assert "What is counted?" in (tmp_path / "joined" / "01_made.html").read_text()
    (folders[0] / "notebooks" / "01_made.ipynb").unlink()
    index = report.join_reports(folders, tmp_path / "joined").read_text()
    assert "3 failed" in index
    assert "Failed: Its executed copy is gone." in index
    assert not (tmp_path / "joined" / "notebooks" / "01_made.ipynb").exists()


@pytest.mark.parametrize(("damage", "state"), [("[1", "damaged"), ("", "damaged"), ("[3]", "damaged"), (None, "gone")])
def test_joined_reports_count_a_notebook_without_sound_records_as_failed(folders, tmp_path, damage, state):
    for folder in folders:
        (folder / "outcomes.json").unlink() if damage is None else (folder / "outcomes.json").write_text(damage)
    index = report.join_reports(folders[:1], tmp_path / "one").read_text()
    assert "1 notebook" in index
    assert "1 failed" in index
    assert f"Failed: The records in 01 are {state}, so that it may not have finished." in index
    assert 'href="01_made.html"' in index  # what is there is shown
    assert "size unknown" in index
    index = report.join_reports(folders, tmp_path / "all").read_text()
    assert "3 failed" in index
    assert 'id="03"' in index  # nothing tells its name


def test_records_that_cannot_be_read_stop_the_joining(folders, tmp_path, monkeypatch):
    def refused(path):
        raise OSError(errno.EMFILE, "Too many open files", str(path))

    monkeypatch.setattr(Path, "read_bytes", refused)
    with pytest.raises(OSError, match="Too many open files"):
        report.join_reports(folders, tmp_path / "joined")


@pytest.fixture
def full(monkeypatch):
    """Return a function that makes the disk full for files of these names."""
    write = report.atomic_write

    def fill(*names):
        def refused(path, content):
            if path.name in names:
                raise OSError(errno.ENOSPC, "No space left on device", str(path))
            return write(path, content)

        monkeypatch.setattr("binvit.lab.notebooks.report.atomic_write", refused)
        monkeypatch.setattr("binvit.lab.notebooks.published.atomic_write", refused)

    return fill


def test_a_page_that_cannot_be_written_is_a_failure_and_stops_no_other(outcomes, tmp_path, full):
    good = [outcomes[0], dataclasses.replace(outcomes[1], error=None)]
    (tmp_path / "01_made.html").mkdir()
    with pytest.raises(OSError, match=r"01_made\.html"):
        report.write_report(good, tmp_path)
    index = (tmp_path / "index.html").read_text()
    assert "1 failed" in index
    assert "Failed: Its page could not be written (" in index
    assert "01_made.html" not in index
    assert "What is counted?" in index
    assert (tmp_path / "02_failed.html").is_file()
    assert "2 notebooks, all finished" in report.write_report(good[1:], tmp_path).read_text()  # so had the first
    (tmp_path / "01_made.html").rmdir()
    full("02_failed.html")
    with pytest.raises(OSError, match=r"02_failed\.html"):
        report.write_report(good, tmp_path)
    index = (tmp_path / "index.html").read_text()
    assert "Failed: Its page could not be written (No space left on device)." in index
    assert 'href="01_made.html"' in index
    assert len(json.loads((tmp_path / "outcomes.json").read_text())) == 2


@pytest.mark.parametrize("name", ["outcomes.json", "index.html"])
def test_what_cannot_be_written_is_told_after_all_else_is_there(outcomes, tmp_path, full, name):
    full(name)
    with pytest.raises(OSError, match=name):
        report.write_report(outcomes, tmp_path)
    (other,) = {"outcomes.json", "index.html"} - {name}
    assert (tmp_path / "01_made.html").is_file()
    assert (tmp_path / other).is_file()


@pytest.fixture
def reproduce(outcomes, tmp_path, monkeypatch):
    """Return a function that calls `binvit reproduce` where notebooks are executed already."""
    notebook_maker.write(tmp_path / "own" / "01_made.ipynb")
    good = [outcomes[0], dataclasses.replace(outcomes[1], error=None)]
    monkeypatch.setattr("binvit.lab.notebooks.run.run", lambda jobs, out, processes: good)
    monkeypatch.setattr("binvit.lab.trials.train_trial.compile_kernels", lambda: 0.0)
    command = ["reproduce", "--notebooks", str(tmp_path / "own"), "--out", str(tmp_path)]
    return lambda: CliRunner().invoke(cli, command)


def test_a_page_on_a_full_disk_ends_with_a_sentence_and_exit_code_1(reproduce, tmp_path, full):
    assert reproduce().exit_code == 0
    full("01_made.html")
    found = reproduce()
    assert found.exit_code == 1
    page = tmp_path / "01_made.html"
    assert f"could not be written in full: No space left on device: {page}." in found.output.replace("\n", " ")
    assert 'href="02_failed.html"' in (tmp_path / "index.html").read_text()


def test_a_sample_on_a_full_disk_lets_the_report_be_written(reproduce, tmp_path, full, monkeypatch):
    (tmp_path / "retrained.csv").write_text("notebook,verdict\n04,of an earlier batch\n")
    rows = [("04", "identical", 90.0, 90.0, 0.0, 0.0, "a trial", "")]
    columns = ["notebook", "verdict", "archived (%)", "here (%)", "difference", "allowed", "trial", "made with"]
    monkeypatch.setattr("binvit.lab.notebooks.published.retrain", lambda *_: pd.DataFrame(rows, columns=columns))
    full("retrained.csv")
    found = reproduce()
    assert found.exit_code == 1
    assert "kept: No space left on device: " in found.output
    index = (tmp_path / "index.html").read_text()
    assert "2 notebooks, all finished" in index
    assert "of an earlier batch" not in index
    full()
    assert reproduce().exit_code == 0
    assert "a trial" in (tmp_path / "index.html").read_text()


@pytest.mark.parametrize(
    "error", [OSError(errno.EIO, "Input/output error"), ValueError("It is damaged."), MemoryError()]
)
def test_a_report_is_there_whatever_the_sample_raises(reproduce, tmp_path, monkeypatch, error):
    def fail(*arguments):
        raise error

    monkeypatch.setattr("binvit.lab.notebooks.published.check_sample", fail)
    assert reproduce().exit_code == 1
    assert "2 notebooks, all finished" in (tmp_path / "index.html").read_text()
