"""Models that come with the package: what their cards say is what they do."""

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

import binvit
from binvit.__main__ import cli, main
from binvit.lab.data.datasets import load_data
from binvit.packed.shipped import MODELS, find_model

DIGITS = load_data("digits")
TRIALS = Path(__file__).parents[1] / "paper_figures" / "trials"


def test_all_together_are_small():
    assert {"gsb-digits", "elastic-digits", "gsb-flowers102"} <= set(binvit.list_models())
    assert sum(path.stat().st_size for path in MODELS.iterdir()) < 2e6


@pytest.mark.parametrize("name", ["gsb-digits", "elastic-digits"])
def test_accuracy_is_that_of_the_card(name):
    """The archive measures the trained model, the file holds its bits: one image of 700 may differ at a threshold."""
    model = binvit.load(name)
    card = model.blueprint.card
    pictures = [DIGITS.test.open(number) for number in range(len(DIGITS.test))]
    logits = model(model.preprocess(pictures))
    accuracy = (logits.argmax(1).numpy() == DIGITS.test.labels).mean()
    assert accuracy == pytest.approx(card.accuracy, abs=1.5 / len(pictures))
    assert card.data == "digits"
    assert card.licence
    assert model.classes == tuple("0123456789")


@pytest.mark.parametrize("name", binvit.list_models())
def test_the_card_tells_of_an_archived_trial(name):
    plan = binvit.load(name).blueprint
    lines = [json.loads(line) for path in TRIALS.glob("*.jsonl") for line in path.read_text().splitlines()]
    own = plan.card.data, plan.scheme.name, plan.card.seeds[0], plan.card.accuracy
    trials = [line["trial"] | line for line in lines]
    assert own in {(t["dataset"], t["trial"]["scheme"], t["seed"], t["test_accuracy"]) for t in trials}


def test_the_flowers_have_their_names():
    model = binvit.load("gsb-flowers102")
    rng = np.random.default_rng(0)
    (found,) = model.predict(rng.integers(0, 256, (64, 64, 3), np.uint8), top=102)
    assert len({name for name, _ in found}) == len(model.classes) == 102
    assert sum(probability for _, probability in found) == pytest.approx(1, abs=1e-5)


def test_a_file_of_the_same_name_goes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own = binvit.load("gsb-digits")
    binvit.save(own, "elastic-digits")
    assert binvit.load("elastic-digits").blueprint.scheme == own.blueprint.scheme
    assert find_model("gsb-digits").parent == MODELS


def test_unknown_names_are_refused_with_those_there_are():
    with pytest.raises(FileNotFoundError, match=r"There is no model gbs-digits; the package brings .*gsb-digits"):
        binvit.load("gbs-digits")
    with pytest.raises(SystemExit) as ended:
        main(["predict", "gbs-digits", __file__])
    assert ended.value.code == 2


def test_the_command_line_knows_them(tmp_path):
    listed = CliRunner().invoke(cli, ["models"]).output
    assert "gsb-digits" in listed
    number = int(np.flatnonzero(DIGITS.test.labels == 7)[0])
    DIGITS.test.open(number).save(tmp_path / "seven.png")
    out = CliRunner().invoke(cli, ["predict", "gsb-digits", str(tmp_path / "seven.png")])
    assert out.exit_code == 0, out.output
    assert "7" in out.output
