"""Costs counted by hand."""

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from binvit import lab
from binvit.lab.data.datasets import blank_data, load_data
from binvit.lab.training.model import build_model
from binvit.lab.trials.cost import cost
from binvit.lab.trials.store import write_result
from binvit.lab.trials.train_trial import train_trial
from binvit.lab.trials.trial import Trial

SHAPE = {"width": 12, "depth": 2, "heads": 3, "mlp_ratio": 2.0, "patch_size": 2, "batch_size": 16}


def forward() -> int:
    """Return two operations for each product of one 8 x 8 image."""
    tokens, width = 17, 12
    block = tokens * width * (3 * width + width + 2 * 2 * width) + 2 * tokens * tokens * width
    return 2 * (16 * 2 * 2 * 3 * width + 2 * block + width * 10)


def test_operations_are_those_of_training_teacher_and_evaluation():
    data = load_data("digits", samples_per_class=5)  # 50 images, of which an epoch uses three batches of 16
    options = SHAPE | {"epochs": 7, "eval_every": 3, "stages": [{"epochs": 2}]}
    evaluated = (3 + 1) * 719 + 50
    found = cost(Trial("digits", recipe_options=options, samples_per_class=5), data)
    assert (found.epochs, found.flop) == (9, forward() * (3 * 9 * 48 + evaluated))
    taught = Trial("digits", recipe_options=options | {"distillation": "soft"}, samples_per_class=5)
    assert cost(taught, data).flop == forward() * (4 * 9 * 48 + evaluated)


def test_bytes_are_near_those_of_the_files(tmp_path):
    trial = Trial("digits", "float", samples_per_class=5, recipe_options=SHAPE | {"epochs": 20})
    data = load_data("digits", samples_per_class=5)
    path = write_result(train_trial(trial), tmp_path)
    assert 0.5 < path.stat().st_size / cost(trial, data).bytes < 1.5
    parameters = sum(parameter.numel() for parameter in train_trial(trial).model.parameters())
    assert cost(trial, data, keep_model=True).bytes - cost(trial, data).bytes == 4 * parameters


def test_blank_images_have_the_official_numbers():
    data = blank_data("flowers102", image_size=64)
    assert (len(data.classes), len(data.train), len(data.test), data.image_size) == (102, 1020, 6149, 64)
    assert len(blank_data("cifar100", samples_per_class=20).train) == 2000


@pytest.mark.parametrize(
    "options",
    [
        {"epochs": 3, "lr": 1.0, "drop_path": 0.5, "batch_size": 7},
        {"model": "deit_tiny_patch16_224", "image_size": 32},
        {"patches": 2},
        {"distilled": True},
        {"global_pool": "avg"},
        {"heads": 3, "mlp_ratio": 0.5, "depth": 1, "width": 24, "patch_size": 1},
    ],
)
def test_operations_are_those_of_the_recipe_s_own_model(options):
    recipe = lab.recipe("smoke", **options)
    pixels = recipe.image_size or 8
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        build_model(recipe, 10, pixels).eval()(torch.empty(1, 3, pixels, pixels))
    data = dataclasses.replace(load_data("digits"), image_size=pixels)
    trained = recipe.epochs * (1078 - 1078 % recipe.batch_size)
    evaluated = -(-recipe.epochs // recipe.eval_every) * 719 + 1078
    assert cost(Trial("digits", recipe_options=options), data).flop == counter.get_total_flops() * (
        3 * trained + evaluated
    )
