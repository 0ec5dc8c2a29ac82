"""Every scheme gets the same search on validation images, and the grid grows where its best rate lies at an end."""

import dataclasses
import re

import pytest
from click.testing import CliRunner

from binvit.__main__ import cli
from binvit.lab.data import datasets
from binvit.lab.data.sources import data_name
from binvit.lab.training import rates
from binvit.lab.training.rates import ChosenRate, read_rates, tuned_rate, write_rates
from binvit.lab.trials import tune as module
from binvit.lab.trials.trial import Trial, teacher_trial
from binvit.lab.trials.tune import best_rate, tune, tuning_table

TINY = {"width": 16, "depth": 1, "heads": 2, "epochs": 1, "batch_size": 256}


def chosen(scheme="gsb", bias="none", rate=4e-3) -> ChosenRate:
    return ChosenRate("digits", "smoke", scheme, bias, rate, [(2e-3, [0.5, 0.6]), (4e-3, [0.7, 0.8])])


def test_rates_survive_the_file_and_replace_their_kind(tmp_path):
    path = write_rates([chosen(), chosen("float", rate=2e-3)], tmp_path / "rates.yaml")
    write_rates([chosen(rate=8e-3)], path)
    found = read_rates(path)
    assert [key[2] for key in found] == ["float", "gsb"]
    assert found["digits", "smoke", "gsb", "none", 0] == chosen(rate=8e-3)
    assert read_rates(tmp_path / "none.yaml") == {}


@pytest.mark.parametrize("text", ["3", "- 3", "- {rate: 1}", "[", "- {data: a, recipe: b, scheme: c, bias: d}"])
def test_other_files_are_refused(tmp_path, text):
    (tmp_path / "rates.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"^The file of rates .*rates\.yaml is damaged: .+\.$"):
        read_rates(tmp_path / "rates.yaml")


def test_a_file_that_cannot_hold_rates_is_told_before_the_search(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_accuracies", lambda *_: pytest.fail("it trains"))
    (tmp_path / "bytes").write_bytes(b"\xff- a")
    for place, why in ((tmp_path, "is a folder"), (tmp_path / "bytes", "is damaged: it is no text in UTF-8")):
        result = CliRunner().invoke(cli, ["tune", "--scheme", "gsb", "--rates", str(place)])
        assert isinstance(result.exception, ValueError)
        assert f"{place} {why}" in str(result.exception)


def test_a_rate_of_another_recipe_does_not_pass_for_the_recipes_own(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_accuracies", lambda *_: pytest.fail("it trains"))
    options = ["tune", "--scheme", "gsb", "--set", "width=32", "--set", "epochs=3", "--rates", str(tmp_path / "r.yaml")]
    error = CliRunner().invoke(cli, options).exception
    assert isinstance(error, ValueError)
    assert str(error).startswith("A rate is kept by recipe and width; a search with another epochs")
    assert list(tmp_path.iterdir()) == []


def test_a_trial_takes_the_chosen_rate_unless_it_names_one(monkeypatch):
    monkeypatch.setattr(rates, "_shipped", dict)
    plain = Trial("digits", "gsb", scheme_options={"attention_bias": "none"})
    default = plain.get_recipe().lr
    monkeypatch.setattr(rates, "_shipped", lambda: {rate.key: rate for rate in (chosen(), chosen("float", rate=3e-3))})
    assert default != 4e-3
    assert plain.get_recipe().lr == 4e-3
    assert Trial("digits", "gsb").get_recipe().lr == default  # with its own bias it was not tuned
    named = Trial("digits", "gsb", scheme_options={"attention_bias": "none"}, recipe_options={"lr": 1e-2})
    assert named.get_recipe().lr == 1e-2
    distilled = Trial("digits", "gsb", recipe_options={"lr": 1e-2, "distillation": "hard"})
    assert teacher_trial(distilled).get_recipe().lr == 3e-3  # the teacher is a float model with a rate of its own
    assert plain.id != Trial("digits", "gsb", scheme_options={"attention_bias": "none"}, seed=1).id


def test_a_width_has_a_rate_of_its_own_where_it_was_searched(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_accuracies", lambda trials, *_: [trial.get_recipe().width / 1e3 for trial in trials])
    own = Trial("digits", "gsb").get_recipe().width
    options = {"grid": (1e-3, 2e-3, 4e-3), "progress": False}
    found = [tune(["float"], recipe_options={"width": width}, **options)[0] for width in (24, own)]
    assert [rate.width for rate in found] == [24, None]
    path = write_rates([*found, dataclasses.replace(found[0], rate=8e-3)], tmp_path / "rates.yaml")
    assert {key[4]: rate.rate for key, rate in read_rates(path).items()} == {0: found[1].rate, 24: 8e-3}
    monkeypatch.setattr(rates, "_shipped", lambda: read_rates(path))
    widths = {width: Trial("digits", "float", recipe_options={"width": width}).get_recipe().lr for width in (24, 36)}
    assert widths == {24: 8e-3, 36: found[1].rate}
    assert Trial("digits", "float", recipe_options={"width": 24, "lr": 0.5}).get_recipe().lr == 0.5


def test_the_place_of_the_data_is_no_part_of_their_name_and_another_kind_of_data_has_another():
    assert data_name("parquet:some/where/flowers102_64px.parquet") == "flowers102_64px"
    assert data_name("digits") == "digits"
    assert data_name("cifar100:/data/torch") == "cifar100"
    assert tuned_rate("folder:nobody/asked", "smoke", "gsb", "none") is None
    assert tuned_rate("digits", "digits", "gsb", "none") is not None
    assert tuned_rate("folder:mine/digits", "digits", "gsb", "none") is None


def test_tuning_never_loads_test_images_and_goes_on_where_it_stopped(tmp_path, monkeypatch):
    asked = []
    load = datasets.read_source
    monkeypatch.setattr(datasets, "read_source", lambda *a, test=True: asked.append(test) or load(*a, test=test))
    options = {"grid": (0.02, 0.05), "seeds": (0,), "recipe_options": TINY, "results_dir": tmp_path, "progress": False}
    first = tune(["float"], **options)
    assert set(asked) == {False}
    asked.clear()
    assert tune(["float"], **options) == first
    assert asked == []
    assert {len(accuracies) for _, accuracies in first[0].table} == {1}


def test_the_grid_grows_at_the_end_where_the_best_rate_lies(monkeypatch):
    def accuracies(trials, *_):  # best at 0.016
        return [1 / (1 + abs(trial.get_recipe().lr - 0.016)) for trial in trials]

    monkeypatch.setattr(module, "_accuracies", accuracies)
    (up,) = tune(["gsb"], progress=False)
    assert up.rate == 0.016
    assert [rate for rate, _ in up.table] == [1e-3, 2e-3, 4e-3, 8e-3, 0.016, 0.032]
    (down,) = tune(["gsb"], grid=(0.1, 0.2), progress=False)
    assert down.rate == pytest.approx(0.0125)
    assert list(tuning_table([up]).columns) == ["rate", "0.001", "0.002", "0.004", "0.008", "0.016", "0.032"]


def test_the_command_takes_rates_and_seeds(tmp_path, monkeypatch):
    asked = []

    def accuracies(trials, *_):
        for trial in trials:
            asked.append((trial.recipe, trial.samples_per_class, trial.evaluate_on, trial.get_recipe().lr, trial.seed))
        return [1 / (1 + abs(trial.get_recipe().lr - 2e-4)) for trial in trials]

    monkeypatch.setattr(module, "_accuracies", accuracies)
    file, rates_ = tmp_path / "rates.yaml", ("1e-4", "2e-4", "4e-4")
    options = [part for rate in rates_ for part in ("--rate", rate)] + ["--seed", "3", "--rates", str(file)]
    options += ["--recipe", "pretrained", "--samples-per-class", "5", "--set", "width=42", "--set", "heads=3"]
    result = CliRunner().invoke(cli, ["tune", "--scheme", "gsb", *options])
    assert result.exit_code == 0, result.output
    assert asked == [("pretrained", 5, "val", float(rate), 3) for rate in rates_]
    (found,) = read_rates(file).values()
    assert (found.recipe, found.scheme, found.rate, found.samples_per_class) == ("pretrained", "gsb", 2e-4, 5)
    assert found.width == 42
    write_rates([dataclasses.replace(found, samples_per_class=None)], file)
    assert "samples_per_class" not in file.read_text()


def test_diverged_trainings_lose_and_other_failures_are_told(tmp_path):
    options = {"seeds": (0,), "recipe_options": TINY | {"clip_grad": 0.0, "schedule": "constant"}, "progress": False}
    (found,) = tune(["float"], grid=(0.02, 1e30), results_dir=tmp_path, **options)
    assert dict(found.table)[1e30] == (0.0,)
    with pytest.raises(ValueError, match="nowhere"):
        tune(["float"], f"folder:{tmp_path}/nowhere", results_dir=tmp_path, **options)
    with pytest.raises(ValueError, match="positive rates"):
        tune(["float"], grid=(), results_dir=tmp_path)


@pytest.mark.parametrize(
    ("what", "options"),
    [
        ("scheme once, got 'gsb'", ["--scheme", "gsb", "--scheme", "gsb"]),
        ("bias once, got 'full'", ["--bias", "full", "--bias", "none", "--bias", "full"]),
        ("rate once, got 0.001", ["--rate", "1e-3", "--rate", "0.001"]),
        ("seed once, got 1", ["--seed", "1", "--seed", "1"]),
    ],
)
def test_what_is_asked_for_twice_is_refused(tmp_path, monkeypatch, what, options):
    monkeypatch.setattr(module, "_accuracies", lambda *_: pytest.fail("it trains"))
    given = ["tune", "--rates", str(tmp_path / "rates.yaml"), *options]
    result = CliRunner().invoke(cli, given if "--scheme" in options else [*given, "--scheme", "bit"])
    assert isinstance(result.exception, ValueError)
    assert re.search(what, str(result.exception))


def test_the_search_trains_where_it_is_told(tmp_path):
    options = ["tune", "--scheme", "float", "--rate", "1e-3", "--seed", "0", "--out", str(tmp_path / "results")]
    result = CliRunner().invoke(cli, [*options, "--device", "tpu"])
    assert isinstance(result.exception, ValueError)
    assert "'tpu'" in str(result.exception)


def test_equal_rates_prefer_the_smaller_one():
    assert best_rate({0.1: [0.5, 0.7], 0.2: [0.6, 0.6], 0.05: [0.1, 0.2]}) == 0.1
