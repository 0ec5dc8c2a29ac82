"""What makes two trials the same: everything that decides their numbers, and nothing else."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from binvit.lab.training.recipe import Recipe, told
from binvit.nn.schemes import Scheme


def counted(trial: Any) -> list[str]:
    """Return the fields of a trial that count besides its resolved recipe and scheme and its data."""
    return ["seed", "samples_per_class", "label_noise", "evaluate_on", *(["noise"] if trial.label_noise else [])]


def identity(trial: Any, recipe: Recipe, scheme: Scheme, fingerprint: str, teacher: str = "") -> str:
    """Return the identity of a trial on its data, which names the files of its result and its model.

    It follows from the resolved scheme and recipe, the seed, samples and noise, what the model is evaluated on, the
    teacher, and the images; not from where they lie, nor from which options were written out.

    Args:
        trial: the configuration.
        recipe: its recipe with the options applied.
        scheme: its scheme, likewise.
        fingerprint: of its data set.
        teacher: identity of the trial that trains its teacher first; "" if there is none.

    Returns:
        The names of scheme and recipe, the seed and 16 hexadecimal digits.
    """
    values: dict[str, Any] = {
        "data": fingerprint,
        "scheme": told(scheme),
        "recipe": told(recipe),
        "trial": {name: value for name, value in told(trial).items() if name in counted(trial)},
    }
    if teacher:
        values["teacher"] = teacher
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]
    return f"{scheme.name}-{recipe.name}-{trial.seed}-{digest}"
