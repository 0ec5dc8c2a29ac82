"""What a trial costs: floating-point operations, epochs and bytes, counted before anything is trained."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from binvit.lab.data.datasets import ImageData
from binvit.lab.training.model import build_model
from binvit.lab.training.recipe import Recipe
from binvit.lab.trials.trial import Trial

# Of a result's file: what every file says, and its record of an epoch.
_RESULT_BYTES, _EPOCH_BYTES = 4000, 200
# The fields of a recipe that its model's products and parameters depend on.
_SHAPE = "model", "width", "depth", "heads", "mlp_ratio", "patch_size", "patches", "distilled", "global_pool"


@dataclass(frozen=True)
class Cost:
    """What one training takes.

    Args:
        epochs: passes over the training images, of all stages.
        flop: floating-point operations of training and evaluation, products alone.
        bytes: what stays on disk, the result and the model if it is kept.
    """

    epochs: int
    flop: int
    bytes: int


def cost(trial: Trial, data: ImageData, keep_model: bool = False) -> Cost:
    """Count what a trial costs.

    The products of a 1-bit model are counted as the float model's, though training counts some of the forward ones in
    bits. A training image costs three forward passes, one for the output and two for the gradients, and one more of a
    teacher.

    Args:
        trial: the configuration. A teacher that is trained first is a trial of its own.
        data: its images, of which only numbers and sizes count.
        keep_model: whether the trained model stays on disk.
    """
    recipe = trial.get_recipe()
    shape = Recipe(name="shape", **{field: getattr(recipe, field) for field in _SHAPE})
    forward, parameters = _model_cost(shape, len(data.classes), data.image_size)
    count, stages = len(data.train), [*(stage.epochs for stage in recipe.stages), recipe.epochs]
    batch = min(recipe.batch_size, count)
    trained = sum(stages) * (count - count % batch)  # a last batch that is not full is left out
    evaluated = sum(-(-epochs // recipe.eval_every) for epochs in stages) * len(data.evaluated) + count
    flop = forward * (trained * (4 if recipe.has_teacher else 3) + evaluated)
    kept = 4 * parameters if keep_model else 0
    return Cost(sum(stages), flop, kept + _RESULT_BYTES + _EPOCH_BYTES * sum(stages))


@functools.lru_cache(maxsize=256)
def _model_cost(recipe: Recipe, classes: int, image_size: int) -> tuple[int, int]:
    """Return the operations of one image's forward pass and the number of parameters of a recipe's model."""
    with torch.device("meta"):  # shapes without numbers
        model = build_model(recipe, classes, image_size).eval()
        with FlopCounterMode(display=False) as counter:
            model(torch.empty(1, 3, image_size, image_size))
    return counter.get_total_flops(), sum(parameter.numel() for parameter in model.parameters())
