"""The quickstart: predictions of trained models, and what packing does to files, answers and time."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from PIL import Image
from safetensors.torch import save as serialize

from binvit.lab.analysis.claims import Claim, check_mean, check_pair, check_value
from binvit.lab.benchmark.timing import interleave
from binvit.lab.experiments.design.plan import Condition, Run, notebook_runs, with_bias
from binvit.lab.figures.charts import learning_curves
from binvit.lab.training.evaluation import Classifier
from binvit.packed import load, pack, save


def conditions(schemes: Sequence[str], bias: str = "none") -> list[Condition]:
    """Return one condition per scheme, all with the same bias of the attention map.

    Args:
        schemes: names of `binvit.list_schemes`.
        bias: "none", "relative" or "full".
    """
    return [dataclasses.replace(with_bias(scheme, bias), name=scheme) for scheme in schemes]


def runs(p: Any) -> list[Run]:
    """Return what the notebook trains with these parameters."""
    return notebook_runs(conditions(p.schemes, p.bias), p, keep_models=p.schemes)


def claims(
    table: pd.DataFrame, expected: float, levels: Mapping[str, int], change: float | None, packed: pd.DataFrame
) -> list[Claim]:
    """Check what superposition is worth here, and that the models are what they are said to be.

    The trainings are a short first look, so that no sentence is confirmatory.

    Args:
        table: one row per trial.
        expected: test accuracy that the float model should exceed.
        levels: scheme -> different numbers in one block's attention weights.
        change: largest change of a logit if other images share the batch; None if that was not measured.
        packed: the result of `deploy`.
    """
    return [
        check_pair("Superposition is more accurate than one binary tensor.", table, "gsb", "elastic"),
        check_pair("Superposition is more accurate than float.", table, "gsb", "float"),
        check_pair("Superposition stays within 5 points of float.", table, "gsb", "float", -0.05),
        check_mean(f"The float model exceeds {expected:.0%}.", table, "float", expected),
        check_value("One binary tensor gives the attention at most two levels.", levels.get("elastic"), at_most=2),
        check_value("Superposition gives the attention more than two levels.", levels.get("gsb"), at_least=3),
        check_value("With row-wise maxima, logits do not depend on the batch.", change, at_most=0),
        check_value(
            "The packed models give the trained models' logits bit for bit.",
            bool(packed["equal_logits"].all()) if len(packed) else None,
        ),
    ]


def draw(history: pd.DataFrame) -> Figure:
    """Draw the training loss and the test accuracy of every scheme against the epoch.

    Args:
        history: the result of `trials.trained.histories`.
    """
    return learning_curves(history, ["train_loss", "test_accuracy"])


def deploy(
    models: Mapping[str, Classifier], pictures: Sequence[Image.Image], folder: Path, seconds: float = 0.3
) -> pd.DataFrame:
    """Pack trained models, save and load them, and compare them with what was trained.

    Args:
        models: trained models by name; those of the scheme "float" have nothing to pack and are left out.
        pictures: images to compare on.
        folder: where the packed files go, as NAME.packed.safetensors.
        seconds: time per measurement.

    Returns:
        One row per model: model, float32_kb and packed_kb (files), equal_logits (exact path, bit for bit), same_classes
        (share of images with the same class on the fast path), ms_trained and ms_packed (one image, median).
    """
    rows = []
    for name, trained in models.items():
        if not trained.model.scheme.components:
            continue
        images = trained.tensor(list(pictures))
        path = folder / f"{name}.packed.safetensors"
        save(pack(trained.model, classes=trained.classes, mean=trained.mean, std=trained.std), path)
        fast, exact = load(path), load(path, exact=True)
        with torch.inference_mode():
            expected = trained.model(images)
            contenders: dict[str, Callable[[], object]] = {
                "trained": functools.partial(_forward, trained.model, images[:1]),
                "packed": functools.partial(fast, images[:1]),
            }
            times = interleave(contenders, seconds)
        floats = {k: v.float().contiguous() for k, v in trained.model.state_dict().items() if v.is_floating_point()}
        rows.append(
            {
                "model": name,
                "float32_kb": len(serialize(floats)) / 1000,
                "packed_kb": path.stat().st_size / 1000,
                "equal_logits": torch.equal(exact(images), expected),
                "same_classes": float((fast(images).argmax(1) == expected.argmax(1)).float().mean()),
                "ms_trained": 1000 * float(np.median(times["trained"])),
                "ms_packed": 1000 * float(np.median(times["packed"])),
            }
        )
    columns = ["model", "float32_kb", "packed_kb", "equal_logits", "same_classes", "ms_trained", "ms_packed"]
    return pd.DataFrame(rows, columns=columns)


def _forward(model: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return model(images)


def predictions(models: Mapping[str, Classifier], picture: Image.Image) -> pd.DataFrame:
    """Classify one picture with several models.

    Args:
        models: name -> trained model.
        picture: an RGB picture of any size.

    Returns:
        One row per model: its name as ``model``, the likeliest class as ``class`` and its ``probability``.
    """
    rows = []
    for name, trained in models.items():
        probabilities = trained.probabilities([picture])[0]
        best = int(probabilities.argmax())
        rows.append((name, trained.classes[best], float(probabilities[best])))
    return pd.DataFrame(rows, columns=["model", "class", "probability"])


def one_per_class(labels: np.ndarray, count: int) -> list[int]:
    """Return the index of the first image of each of the first classes that occur.

    Args:
        labels: labels of a set of images, (N,).
        count: how many images to choose, at most one per class.

    Returns:
        Indices in the order of the classes.
    """
    _, first = np.unique(labels, return_index=True)
    return first[:count].tolist()
