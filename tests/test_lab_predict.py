"""Kept models at work: what the card of a packed one says."""

import pytest

from binvit.lab.predict import open_packed
from binvit.lab.trials.pool import run_trials
from binvit.lab.trials.store import model_path
from binvit.lab.trials.trial import Trial


@pytest.mark.parametrize("images", ["test", "val"])
def test_a_card_tells_an_accuracy_of_test_images_only(tmp_path, images):
    short = {"width": 16, "depth": 1, "heads": 2, "epochs": 1}
    trial = Trial("digits", "elastic", samples_per_class=5, recipe_options=short, evaluate_on=images)
    (measured,) = run_trials([trial], tmp_path, keep_models=True, progress=False)["test_accuracy"]
    card = open_packed(model_path(trial, tmp_path)).blueprint.card
    assert card.accuracy == {"test": measured, "val": None}[images]
    assert (card.data, card.seeds) == ("digits", (0,))
