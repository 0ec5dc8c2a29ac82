"""The optimizer and the learning rate of a training stage."""

from collections.abc import Container
from typing import Any

from timm.models.vision_transformer import VisionTransformer
from timm.optim import create_optimizer_v2, param_groups_weight_decay
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch.optim import Optimizer

from binvit.lab.training.recipe import Recipe


def new_optimizer(model: VisionTransformer, recipe: Recipe, latent: Container[str]) -> Optimizer:
    """Return the optimizer of a stage, at the highest learning rate.

    Args:
        model: a timm vision transformer, binarized or not.
        recipe: how it is trained.
        latent: names of the float model's tensors; all others are scales and shifts, on which no weight decays.

    Raises:
        ValueError: the optimizer needs a GPU or a package that this machine has not.
    """
    peak = recipe.lr * (recipe.batch_size / recipe.lr_batch if recipe.lr_batch else 1.0)
    fused: dict[str, Any] = {"fused": True} if recipe.optimizer in ("adam", "adamw") else {}
    added = [name for name, _ in model.named_parameters() if name not in latent]
    undecayed = [*model.no_weight_decay(), *added]
    groups = param_groups_weight_decay(model, recipe.weight_decay, no_weight_decay_list=undecayed)
    try:
        return create_optimizer_v2(groups, opt=recipe.optimizer, lr=peak, **fused)
    except (AssertionError, ImportError) as error:  # timm asserts that there are a GPU and the package of a few
        raise ValueError(f"The optimizer {recipe.optimizer!r} cannot be used on this machine ({error}).") from None


def new_schedule(optimizer: Optimizer, recipe: Recipe, steps: int) -> Scheduler:
    """Return the schedule of a stage's learning rate, counted in steps; the decay starts where the warm-up ends.

    Args:
        optimizer: the result of `new_optimizer`.
        recipe: how the model is trained.
        steps: optimizer steps of the stage.
    """
    rising = min(round(recipe.warmup * steps), steps - 1)
    schedule, _ = create_scheduler_v2(
        optimizer,
        recipe.schedule,
        num_epochs=steps - rising,
        decay_epochs=0.2,
        decay_rate=1.0,
        min_lr=recipe.min_lr,
        warmup_lr=optimizer.param_groups[0]["lr"] / 100,
        warmup_epochs=rising,
        warmup_prefix=True,
        step_on_epochs=False,
        updates_per_epoch=1,
    )
    return schedule
