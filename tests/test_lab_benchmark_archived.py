"""Measurements of an archive: what makes room for what, and what stands beside what."""

import pandas as pd
import pytest

from binvit.lab.benchmark import archived, machine
from binvit.lab.experiments import efficiency
from binvit.lab.trials.measurements import add_measurements, read_measurements


def test_what_another_cpu_took_stands_beside_what_this_one_takes(tmp_path):
    here = pd.DataFrame({"batch": [1], "contender": "binvit elastic", "per_image": 0.006})
    kernels = pd.DataFrame({"contender": ["torch int8"], "times": 5.0})
    add_measurements(tmp_path, "08_models", here.assign(per_image=0.009, cpu="old"), ["cpu"])
    table = archived.beside(tmp_path, here, kernels)
    assert list(table.columns) == ["old" + machine.OUTDATED, "here"]
    assert table.loc[("ms per image, batch 1", "binvit elastic")].tolist() == ["9.0", "6.0"]
    with pytest.raises(FileNotFoundError, match=r"There is no archive .*paper_figurs"):
        archived.beside(tmp_path / "paper_figurs", here, kernels)


def test_archived_steps_and_memory_stand_beside_those_of_this_machine(tmp_path):
    keys = ["size", "scheme", "batch", "threads", "cpu"]
    rows = [
        ("cpu", "gsb", 64, 1, "one", machine.kernels_version("nn"), 0.824),
        ("cpu", "gsb", 64, 2, "one", float("nan"), 0.77),
        ("smoke", "gsb", 64, 1, "one", machine.kernels_version(), 1.5),  # of packed models, which is not what trains
        ("cpu", "bnn", 64, 1, "two", machine.kernels_version("nn"), 1.2),
    ]
    steps = pd.DataFrame(rows, columns=[*keys, "kernels", "times"])
    add_measurements(tmp_path, "08_steps", steps, keys)
    table = archived.archived_steps(tmp_path)
    assert table.columns.tolist() == [
        ("one", "cpu", 64, 1), ("one", "cpu", 64, 2), ("one", "smoke", 64, 1), ("two", "cpu", 64, 1)
    ]  # fmt: skip
    assert table.loc["gsb"].tolist() == ["0.82", "0.77 (earlier)", "1.50 (earlier)", ""]
    assert table.loc["bnn"].tolist() == ["", "", "", "1.20"]
    memory = pd.DataFrame({"contender": ["binvit gsb"], "batch": 1, "file_bytes": 5e6, "peak_bytes": 5e7})
    add_measurements(tmp_path, "08_memory", memory.assign(cpu="one", peak_bytes=6e7), ["cpu"])
    shown = archived.memory_beside(tmp_path, memory)
    assert shown.columns.tolist() == ["one" + machine.OUTDATED, "here"]
    assert shown.loc[("binvit gsb", 1)].tolist() == ["5.0, 60.0", "5.0, 50.0"]
    assert archived.memory_beside(tmp_path, None).columns.tolist() == ["one" + machine.OUTDATED]
    assert archived.archived_steps(tmp_path / "none").empty
    assert archived.memory_beside(tmp_path / "none", None).empty
    assert archived.memory_beside(tmp_path / "none", memory).columns.tolist() == ["here"]


def test_measured_steps_are_archived_by_cpu_size_threads_and_scheme(tmp_path):
    runs = [("gsb", "cpu", 1, 1.1), ("gsb", "cpu", 2, 1.2), ("gsb", "smoke", 1, 1.4), ("bit", "cpu", 1, 1.0)]
    for scheme, size, threads, times in [*runs, ("gsb", "cpu", 1, 1.3)]:
        steps = {"scheme": scheme, "cpu": "a", "size": size, "threads": threads, "times": times}
        pd.DataFrame([steps]).to_csv(tmp_path / "training.csv", index=False)
        assert archived.archive_bench(tmp_path, tmp_path / "archive") == ["training"]
    table = read_measurements(tmp_path / "archive", "08_steps")
    found = sorted(table[["scheme", "size", "threads", "times"]].itertuples(index=False, name=None))
    assert found == [("bit", "cpu", 1, 1.0), ("gsb", "cpu", 1, 1.3), ("gsb", "cpu", 2, 1.2), ("gsb", "smoke", 1, 1.4)]


def test_measured_models_make_room_for_the_same_batches_only(tmp_path):
    for batches, times in (([1, 8], 2.0), ([1], 3.0)):
        rows = [{"cpu": "a", "width": 384, "threads": 2, "batch": batch, "contender": c, "times": times}
                for batch in batches for c in ("ours", "theirs")]  # fmt: skip
        pd.DataFrame(rows).to_csv(tmp_path / "models.csv", index=False)
        assert archived.archive_bench(tmp_path, tmp_path / "archive") == ["models"]
    table = read_measurements(tmp_path / "archive", "08_models")
    assert table.groupby("batch")["times"].agg(list).to_dict() == {1: [3.0, 3.0], 8: [2.0, 2.0]}


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("a,b\n1,2\n", r"lack the column cpu; they have \['a', 'b'\]"),
        ("", "cannot be read: No columns to parse from file"),
        ("cpu\n\xff\n", "cannot be read: 'utf-8' codec can't decode .*"),
        ("cpu,times\na,1\nb,2,3\n", "cannot be read: Error tokenizing data.*"),
        (f"cpu,times\na,{5000 * '9'}\n", "hold a number in the column times that is not finite"),
    ],
)
def test_damaged_tables_of_a_bench_are_named_in_a_sentence(content, sentence, tmp_path):
    (tmp_path / "memory.csv").write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=rf"^The measurements .*memory\.csv {sentence}\.$"):
        archived.archive_bench(tmp_path, tmp_path / "archive")
    assert not (tmp_path / "archive").exists()


def test_archived_times_without_a_contender_are_refused_before_anything_is_drawn(tmp_path):
    (tmp_path / "measurements").mkdir()
    (tmp_path / "measurements" / "08_models.csv").write_text("cpu,times\na,1\n")
    with pytest.raises(ValueError, match="needs a column 'contender'"):
        efficiency.redraw(tmp_path, tmp_path)
