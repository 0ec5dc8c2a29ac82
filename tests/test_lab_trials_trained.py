"""Curves are read as trials wrote them."""

import math

import pytest

from binvit.lab.trials.store import TrialResult, write_result
from binvit.lab.trials.trained import histories
from binvit.lab.trials.trial import Trial


def test_histories_are_one_table(tmp_path):
    record = {"stage": 0, "train_loss": 1.0, "train_accuracy": 0.5, "lr": 0.1}
    trials = [Trial("digits", "elastic", seed=seed, recipe_options={"epochs": 2}) for seed in (0, 1)]
    for trial in trials:
        history = [record | {"epoch": 1, "test_accuracy": None}, record | {"epoch": 2, "test_accuracy": 0.5}]
        numbers = {"test_accuracy": 0.5, "train_accuracy": 0.5, "clean_train_accuracy": None, "memorized": None}
        made = {"recipe": trial.get_recipe().to_dict(), "scheme": trial.get_scheme().to_dict()}
        rest = {"seconds": 1.0, "parameters": 1, "versions": {}, "threads": 1, "device": "cpu"}
        rest |= {"fingerprint": trial.fingerprint, "cpu": "any", "id": trial.id}
        write_result(TrialResult(trial=trial, history=history, **numbers, **made, **rest), tmp_path)
    table = histories(trials, tmp_path)
    assert list(table["seed"]) == [0, 0, 1, 1]
    assert math.isnan(table["test_accuracy"][0])
    assert set(table["recipe_options"]) == {"epochs=2"}
    with pytest.raises(FileNotFoundError):
        histories([Trial("digits", "gsb")], tmp_path)
