"""What follows from an archive: figures and tables the same each time, nothing trained, what is not there named."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import archive_maker
import matplotlib
import matplotlib.image as mpimg
import numpy as np
import pandas as pd
import pytest
from image_files import parquet_file

from binvit.lab.analysis import verdicts
from binvit.lab.analysis.statistics import Difference
from binvit.lab.analysis.verdicts import Claim, correct
from binvit.lab.experiments import limited_samples, methods
from binvit.lab.experiments.design import baselines, plan
from binvit.lab.notebooks import first_page, grid, published
from binvit.lab.notebooks.plan import checked_values
from binvit.lab.notebooks.plan import plan as plan_notebooks
from binvit.lab.training.rates import tuned_rate
from binvit.lab.trials.archive import add
from binvit.lab.trials.measurements import add_measurements, read_measurements
from binvit.lab.trials.trial import Trial

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def no_training(monkeypatch):
    def train(*args, **options):
        raise AssertionError("Something was trained.")

    for module in ("pool", "train_trial"):
        monkeypatch.setattr(f"binvit.lab.trials.{module}.run_trial", train)


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """Three seeds of everything on digits, but no trial of bnn and two of gsb with wrong labels."""
    folder = tmp_path_factory.mktemp("archive")

    def keep(run):
        return run.condition != "bnn" and not (run.trial.label_noise and (run.condition, run.trial.seed) == ("gsb", 2))

    archive_maker.fill(folder, archive_maker.jobs(folder, archive_maker.NUMBERS), keep)
    (job,) = archive_maker.jobs(folder, ["03"])
    floats = [run.trial.id for run in grid.notebook_runs(job) if run.condition == "float"]
    archive_maker.losses(folder, floats)
    return folder


def redraw_all(archive, out, numbers=archive_maker.NUMBERS):
    readme = out.parent / "README.md"
    readme.write_text(f"before\n{first_page.BEGIN}\nold\n{first_page.END}\nafter\n")
    names = published.redraw_all(archive_maker.jobs(archive, numbers), archive, out, readme)
    return {path.name: path.read_bytes() for path in (*out.iterdir(), readme)}, names


@pytest.fixture(scope="module")
def drawn(archive, tmp_path_factory):
    """The files, what the notebooks' cells have left, and the trials that each of them has looked for."""
    asked: dict[str, set[Trial]] = {}

    def redraw(job, out):
        asked[job.notebook.name[:2]] = set()
        return given_redraw(job, out)

    def read_trials(trials, folder):
        asked[max(asked)].update(trials)
        return given_read(trials, folder)

    given_redraw, given_read = published.redraw, plan.read_trials
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(published, "redraw", redraw)
        patch.setattr(plan, "read_trials", read_trials)
        return *redraw_all(archive, tmp_path_factory.mktemp("drawn") / "out"), asked


@pytest.mark.parametrize("number", archive_maker.NUMBERS)
def test_a_notebook_looks_for_the_trials_that_a_plan_of_the_published_size_trains(drawn, number):
    values = {"dataset": "digits", "seeds": [0, 1, 2]}
    planned = grid.grid(plan_notebooks(archive_maker.NOTEBOOKS, "cpu", [number], values))
    teachers = {teacher for item in planned for teacher in item.needs}
    asked = {trial.id for trial in drawn[2][number]}
    assert len(asked) >= 9
    assert {item.id for item in planned} == asked | teachers


def test_figures_and_tables_of_an_archive_are_the_same_byte_for_byte(archive, drawn, tmp_path):
    first = drawn[0]
    again, _ = redraw_all(archive, tmp_path / "out", ["04"])
    del again["README.md"]
    assert again == {name: first[name] for name in again}
    assert {name[-3:] for name in again} == {"csv", "pdf", "png"}
    for number in archive_maker.NUMBERS:
        assert f"{number}_claims.csv" in first
        assert any(name.startswith(number) and name.endswith(".png") for name in first)
    table = pd.read_csv(tmp_path / "out" / "04_methods_table.csv")
    assert "bnn" not in set(table["condition"])
    assert set(table["n"]) == {3}
    page = first["README.md"].decode()
    assert page.startswith("before\n")
    assert page.endswith("after\n")
    assert "old" not in page
    rows = page.split("|---|\n")[1].split(first_page.END)[0].splitlines()
    assert len(rows) == len(first_page.ROWS)
    assert not any("| not run | not run | not run | not run |" in row for row in rows)  # digits have all of them
    assert all(row.endswith("| not run | not run | not run |") for row in rows)


def test_an_empty_archive_says_so_everywhere(tmp_path):
    add([], tmp_path)
    shutil.copy(ROOT / "paper_figures" / "reference.csv", tmp_path)
    found, _ = redraw_all(tmp_path, tmp_path / "out")
    rows = found["README.md"].decode().split("|---|\n")[1].split(first_page.END)[0].splitlines()
    assert all(row.count("not run") == len(first_page.COLUMNS) for row in rows)


def test_what_an_archive_lacks_is_named(archive):
    (job,) = archive_maker.jobs(archive, ["07"])
    runs = grid.notebook_runs(job)
    found = plan.read_archive(runs, archive)
    assert len(found) == len(runs) - 5  # one seed at five shares and kinds of wrong labels
    assert plan.not_run(runs, found) == "Not run on digits: 5 of 18 trials of gsb."
    (job,) = archive_maker.jobs(archive, ["04"])
    runs = grid.notebook_runs(job)
    found = plan.read_archive(runs, archive)
    assert plan.not_run(runs, found, "digits; cifar10") == (
        "Not run on digits: bnn.\nNot run on cifar10: all conditions."
    )
    runs = [run for run in runs if run.condition != "bnn"]
    assert plan.not_run(runs, found) == f"All {len(runs)} trials are there."


def test_names_with_commas_stay_apart():
    runs = [
        plan.Run(condition, "digits", Trial("digits", "gsb", seed=seed))
        for seed, condition in enumerate(["float", "map, GSB", "map, 1-bit", "map, 1-bit"])
    ]
    found = pd.DataFrame({"data": "digits", "condition": ["float", "map, 1-bit"]})
    assert plan.not_run(runs, found) == 'Not run on digits: "map, GSB"; 1 of 2 trials of "map, 1-bit".'


def test_archived_trials_are_shown_where_their_images_are_absent(tmp_path):
    photos = parquet_file(tmp_path / "photos.parquet")
    values = {"dataset": "parquet:photos.parquet, recipe cpu", "data_dir": str(tmp_path), "updates": 4}
    few = values | {"samples_per_class": [2, 4]}
    noisy = values | {"samples_per_class": 4, "label_noises": [0.0, 0.5], "confused_noises": [0.5]}
    jobs = archive_maker.jobs(tmp_path, ["06"], **few) + archive_maker.jobs(tmp_path, ["07"], **noisy)
    archive_maker.fill(tmp_path, jobs)
    before = [archive_maker.training_runs(job) for job in jobs]
    assert len(published.archived_trials(jobs)) == sum(map(len, before))
    photos.unlink()
    runs = [module_runs(job) for job in jobs]
    assert [[run.trial for run in part] for part in runs] == [[run.trial for run in part] for part in before]
    assert [len(plan.read_archive(part, tmp_path)) for part in runs] == [len(part) for part in before]
    assert published.archived_trials(jobs) == []  # nothing that could be trained again


def module_runs(job):
    """Return the runs as the notebook's cell makes them, with its own loader."""
    names = {"06": "limited_samples", "07": "label_noise"}
    module = __import__(f"binvit.lab.experiments.{names[job.notebook.name[:2]]}", fromlist=["runs"])
    return module.runs(checked_values(job))


def test_baselines_are_archived_by_their_images(tmp_path):
    (job,) = archive_maker.jobs(tmp_path, ["06"], samples_per_class=[2, 5], seeds=[0, 1])
    p = checked_values(job)
    add([], tmp_path)
    assert limited_samples.take_measurements(p, tmp_path, tmp_path) == 0  # there is nothing that it would stand beside
    archive_maker.fill(tmp_path, [job], lambda run: run.condition == "float")
    assert limited_samples.take_measurements(p, tmp_path, tmp_path) == 4
    assert limited_samples.take_measurements(p, tmp_path, tmp_path) == 0
    runs = grid.notebook_runs(job)
    made, read = baselines.baselines(runs), baselines.baselines(runs, tmp_path)
    keys = ["samples_per_class", "seed", "condition"]
    pd.testing.assert_frame_equal(*(table.sort_values(keys, ignore_index=True) for table in (made, read)))


def test_baselines_of_all_images_are_taken_once_for_all_seeds(tmp_path):
    (job,) = archive_maker.jobs(tmp_path, ["04"], schemes=["float"], biased=False, seeds=[3, 4])
    archive_maker.fill(tmp_path, [job], lambda run: True)
    p = checked_values(job)
    assert methods.take_measurements(p, tmp_path, tmp_path) == 1
    assert methods.take_measurements(p, tmp_path, tmp_path) == 0
    read = baselines.baselines(grid.notebook_runs(job), tmp_path)
    assert read[["condition", "data", "samples_per_class", "seed"]].to_numpy().tolist() == [
        [name, "digits", 0, 0] for name in baselines.BASELINES
    ]
    ours = pd.DataFrame({"data": ["digits"], "condition": ["float"], "seeds": [2]})
    table = methods.with_references(ours, read, {"digits": 0.1, "other": 0.5})
    assert table["condition"].tolist() == ["float", "chance", *baselines.BASELINES]
    assert table["test accuracy (%)"].tolist() == ["", "10.0", *(f"{100 * x:.1f}" for x in read["test_accuracy"])]


def test_measurements_replace_those_of_the_same_key(tmp_path):
    assert read_measurements(tmp_path, "x").empty
    add_measurements(tmp_path, "x", pd.DataFrame({"id": ["b", "a"], "value": [0.1, 1 / 3]}), ["id"])
    add_measurements(tmp_path, "x", pd.DataFrame({"id": ["b"], "value": [0.2]}), ["id"])
    assert read_measurements(tmp_path, "x").to_dict("list") == {"id": ["a", "b"], "value": [1 / 3, 0.2]}
    (tmp_path / "measurements" / "x.csv").write_bytes(b"")
    with pytest.raises(ValueError, match=r"x\.csv cannot be read"):
        read_measurements(tmp_path, "x")


def test_every_sentence_of_the_papers_has_a_row_and_every_row_one_claim(drawn):
    sources = set()
    for label, number, beginning in first_page.ROWS:
        found = first_page.by_images(drawn[1][number])["digits"]
        (claim,) = [claim for claim in found if first_page.says(claim, beginning)]
        assert claim.kind == ("exploratory" if label.endswith("(exploratory)") else "confirmatory")
        sources |= {claim.source} - {""}
    named = {value for value in vars(verdicts).values() if isinstance(value, str) and "abstract: " in value}
    assert sources == {source for source in named if not source.endswith("abstract: ")}


def test_cells_tell_verdict_difference_interval_and_seeds():
    from binvit.lab.analysis.claims import all_of, check_difference, not_run
    from binvit.lab.analysis.statistics import Difference

    claim = check_difference("a beats b", Difference(0.05, 0.04, 0.06, 5, "a", "b", "test_accuracy"))
    assert first_page.cell(claim) == "**yes**: +5.0 (+4.0 to +6.0); 5 seeds"
    worse = check_difference("a beats c", Difference(-0.05, -0.06, -0.04, 5, "a", "c", "test_accuracy"))
    assert first_page.cell(all_of("a beats all", [claim, worse])) == "**no**: 1 of 2 fails; 5 seeds"
    assert first_page.cell(not_run("a beats d", "no trial of 'd' was run")) == "not run"
    assert first_page.cell(None) == "not run"
    lone = check_difference("a beats e", Difference(0.05, float("nan"), float("nan"), 1, "a", "e", "test_accuracy"))
    assert first_page.cell(lone) == "**undecided**: +5.0; 1 seed"
    assert first_page.cell(all_of("a beats all", [lone])) == "**undecided**: 1 of 1 undecided; 1 seed"
    absent = not_run("a beats d", "no trial of 'd' was run")
    assert first_page.cell(all_of("a beats all", [absent])) == "not run"
    assert first_page.cell(all_of("a beats all", [absent, claim])) == "**undecided**: 1 of 2 undecided"
    barely = check_difference("a beats f", Difference(-0.05, -0.099, -0.001, 5, "a", "f", "test_accuracy"))
    told = "**undecided**: 1 of 3 fails before correction, 1 undecided; 5 seeds"
    assert first_page.cell(all_of("a beats all", [barely, claim, lone])) == told
    few = dataclasses.replace(claim, sentence="From 5 to 100 images per class, a gains more than b.", plain="yes")
    assert first_page.cell(few) == "**yes**: +5.0 (+4.0 to +6.0); 5 to 100 of a class; 5 seeds"
    changed = dataclasses.replace(claim, verdict="undecided", plain="yes")
    assert first_page.cell(changed) == "**undecided**: +5.0 (+4.0 to +6.0); 5 seeds; yes before correction"
    (corrected, _) = correct(
        [dataclasses.replace(claim, kind="confirmatory"), dataclasses.replace(worse, kind="confirmatory")]
    )
    assert "(+4.0 to +6.0)" not in first_page.cell(corrected)


def test_a_file_without_markers_is_refused(tmp_path):
    (tmp_path / "README.md").write_text("nothing")
    with pytest.raises(ValueError, match="has no lines '<!-- results"):
        first_page.write_results(tmp_path / "README.md", "table")


def test_what_is_committed_follows_from_the_committed_archive(tmp_path):
    folder = ROOT / "paper_figures"
    readme = tmp_path / "README.md"
    shutil.copy(ROOT / "README.md", readme)
    published.redraw_all(plan_notebooks(archive_maker.NOTEBOOKS, "archive"), folder, tmp_path / "out", readme)
    assert readme.read_text() == (ROOT / "README.md").read_text(), "make figures writes another table of results"
    drawn = {path.name: path for path in (tmp_path / "out").iterdir()}
    committed = {path.name for path in folder.glob("[!.]*") if path.is_file()} - {
        "README.md",
        "data.csv",
        "reference.csv",
    }
    assert committed == set(drawn)
    for name, path in drawn.items():
        if name.endswith(".csv"):
            assert path.read_bytes() == (folder / name).read_bytes(), f"make figures writes another {name}"
        elif name.endswith(".png") and matplotlib.__version__ == drawn_with():
            np.testing.assert_array_equal(mpimg.imread(path), mpimg.imread(folder / name), name)


def test_published_trials_train_at_rates_that_validation_images_chose():
    lines = [
        json.loads(line)
        for path in (ROOT / "paper_figures" / "trials").iterdir()
        for line in path.read_text().splitlines()
    ]
    trials = [Trial.from_dict(line["trial"]) for line in lines]
    taken = [trial for trial in trials if trial.evaluate_on == "test" and "lr" not in trial.recipe_options]
    assert taken
    for trial in taken:
        asked = trial.scheme, trial.get_scheme().attention_bias, trial.recipe_options.get("width")
        assert tuned_rate(trial.dataset, trial.recipe, *asked) == trial.get_recipe().lr, trial.describe()


def drawn_with() -> str:
    """Return the version of matplotlib that the committed figures were drawn with."""
    return re.search(r"^matplotlib==(\S+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)[1]


@pytest.mark.parametrize(
    ("claim", "told"),
    [
        (
            Claim("A.", "undecided", "3 of 14 fail: x (5 seeds)", plain="no"),
            "3 of 14 fail; no before correction; 5 seeds",
        ),
        (Claim("A.", "no", "1 of 4 fails: x (1 seed)", plain="no"), "1 of 4 fails; 1 seed"),
        (
            Claim("A.", "undecided", "b below 3 times chance: 28.7 % of test images; a - b: +9.0 points (10 seeds)"),
            "b below 3 times chance: 28.7 %; 10 seeds",
        ),
        (
            Claim("Those that were run.", "undecided", "2 of 3 are undecided: x (2 seeds)", plain="undecided"),
            "2 of 3 undecided; not all schemes run; 2 seeds",
        ),
        (
            Claim("A.", "undecided", "x", estimate=Difference(0.0, 0.0, 0.0, 5, "a", "b", "test_accuracy")),
            "both sides train alike; 5 seeds",
        ),
        (
            Claim(
                "A.",
                "yes",
                "x; 1 of 7 b below 3 times chance",
                estimate=Difference(0.2, 0.1, 0.3, 7, "a", "b", "test_accuracy"),
                percent=True,
            ),
            "+20.0 (+10.0 to +30.0); 7 seeds; 1 of 7 b below 3 times chance",
        ),
    ],
)
def test_a_cell_hides_nothing_that_its_evidence_tells(claim, told):
    assert first_page.cell(claim) == f"**{claim.verdict}**: {told}"
