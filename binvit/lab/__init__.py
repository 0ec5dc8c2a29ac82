"""The laboratory: data, recipes, trials, statistics and figures of the experiments."""

from __future__ import annotations

import importlib
from typing import Any

# Public name -> module that defines it. Resolved on first use, so that a name costs only its own module.
_PUBLIC = {
    "Claim": "claims",
    "ImageData": "data",
    "Recipe": "recipes",
    "Stage": "recipes",
    "Trial": "trials",
    "TrialResult": "trials",
    "TrainingDiverged": "train",
    "TrialsFailed": "runner",
    "build_model": "models",
    "list_datasets": "data",
    "list_recipes": "recipes",
    "load_checkpoint": "checkpoint",
    "load_data": "data",
    "load_model": "runner",
    "mlp_weights_stage": "recipes",
    "paired_difference": "statistics",
    "read_result": "trials",
    "recipe": "recipes",
    "run_trials": "runner",
    "save_checkpoint": "checkpoint",
    "summarize": "statistics",
    "train_trial": "train",
}

__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        value = getattr(importlib.import_module(f"binvit.lab.{_PUBLIC[name]}"), name)
    else:
        try:
            return importlib.import_module(f"binvit.lab.{name}")
        except ModuleNotFoundError as error:
            if error.name != f"binvit.lab.{name}":
                raise
            raise AttributeError(f"module 'binvit.lab' has no attribute {name!r}") from None
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
