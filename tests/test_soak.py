"""The program of `make soak`, on runs that train nothing."""

import os
import random
import sys
import time

import pytest
import soak
import soak_kills
from click.testing import CliRunner

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="processes are killed by signals")


def shell(command: str) -> int:
    return os.posix_spawn("/bin/sh", ["sh", "-c", command], dict(os.environ))


@pytest.mark.parametrize("number", [1, 2, 3, 4, 8, 64])
def test_children_side_by_side_have_the_threads_of_the_undisturbed_run(monkeypatch, number):
    monkeypatch.setattr(soak_kills, "cores", lambda: number)
    jobs = soak_kills.several()
    assert jobs > 1
    assert max(1, number // jobs) == 1  # as run_trials shares the cores


@pytest.fixture
def asked(monkeypatch) -> list[int]:
    """Runs that finish six trials, one every 20 ms; the jobs they were asked for."""
    jobs = []

    def run(folder, count):
        jobs.append(count)
        folder.mkdir(parents=True, exist_ok=True)
        return shell(f"cd {folder}; for i in 1 2 3 4 5 6; do test -f $i.json || {{ sleep 0.02; : > $i.json; }}; done")

    monkeypatch.setattr(soak_kills, "run", run)
    monkeypatch.setattr(soak_kills, "trials", lambda: range(6))
    monkeypatch.setattr(soak_kills, "content", lambda folder: {path.name: "" for path in folder.glob("*.json")})
    monkeypatch.setattr(soak_kills, "cores", lambda: 8)
    monkeypatch.setattr(soak_kills, "LONGEST_OF_SEVERAL", 0.02)
    return jobs


def test_many_kills_fall_after_a_trial_has_finished(asked, tmp_path, capsys):
    assert soak_kills.soak_kills(20, tmp_path / "kills", random.Random(0), 60) == ([], True)
    assert set(asked) == {1, 8}
    told = capsys.readouterr().out.split()
    assert told[1] == "20"
    assert int(told[told.index("rounds,") + 1]) >= 8  # with finished trials at stake


def test_a_lost_trial_is_a_fault(asked, tmp_path, monkeypatch):
    found = iter([dict.fromkeys("abcdef", 0), {"a": 0}, {}])
    monkeypatch.setattr(soak_kills, "content", lambda folder: next(found))
    faults, complete = soak_kills.soak_kills(20, tmp_path / "kills", random.Random(0), 60)
    assert faults == ["a was finished and is lost"]
    assert not complete


def test_a_kill_waits_for_one_more_result_but_not_beyond_the_end_of_the_time(tmp_path):
    def moment(command, seconds, until=10.0):
        child = shell(f"cd {tmp_path}; {command}")
        code = soak_kills.has_ended(child, tmp_path, True, seconds, time.monotonic() + until)
        if code is None:
            os.kill(child, 9)
            os.waitpid(child, 0)
        return code

    (tmp_path / "0.json").touch()
    assert moment("sleep 0.05; : > 1.json; exec sleep 60", 0.0) is None
    assert (tmp_path / "1.json").exists()
    assert moment("exec sleep 60", 0.0, until=0.05) is None
    assert moment("exit 4", 60.0) == 4


def test_kills_and_cases_for_which_the_time_was_too_short_are_unfinished(asked, tmp_path, monkeypatch, capsys):
    assert soak_kills.soak_kills(5, tmp_path / "kills", random.Random(0), 0) == ([], False)
    monkeypatch.setattr(soak, "MOST_MEMORY", 2**40)
    path = tmp_path / "file"
    path.write_bytes(b"content")
    assert soak.soak_reader("any", (path, path.read_bytes), 5, random.Random(0), 0) == ([], False)
    assert "any: 0 cases" in capsys.readouterr().out
    assert soak.soak_reader("any", (path, path.read_bytes), 5, random.Random(0), 60) == ([], True)
    assert "any: 5 cases" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("codes", "sentence", "code"),
    [
        ({"kills": 0, "load": 0}, "no faults.\n", 0),
        ({"kills": 3, "load": 0}, "no faults. The time ran out before all was done of kills; --minutes gives", 3),
        ({"kills": 3, "load": 1}, "faults of load. The time ran out before all was done of kills;", 1),
        ({"kills": "signal", "load": 3}, "kills: its process died of the signal 9\n", 1),
    ],
)  # fmt: skip
def test_the_exit_code_says_whether_all_was_done_without_a_fault(monkeypatch, codes, sentence, code):
    def part(name, *_):
        return shell("kill -9 $$" if codes[name] == "signal" else f"exit {codes[name]}")

    monkeypatch.setattr(soak, "_apart", part)
    monkeypatch.setattr(soak.torch, "set_num_threads", lambda number: None)
    found = CliRunner().invoke(soak.main, [text for name in codes for text in ("--only", name)])
    assert sentence in found.output
    assert found.exit_code == code
