"""The experiment on lost information: one tensor at a time in several trained models, and the claims about it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from torch import Tensor

from binvit.lab.analysis import SUPERPOSED, TENSORS, one_tensor_at_a_time, single_tensor_options
from binvit.lab.claims import Claim, check_pair
from binvit.lab.data import ImageData, load_data
from binvit.lab.experiments import Condition, Run, all_of
from binvit.lab.inspection import load_trained
from binvit.lab.trials import Trial

CASES = [(tensor, "1-bit") for tensor in TENSORS] + [(tensor, "GSB") for tensor in SUPERPOSED]
_PRODUCTS = {
    "a 1-bit query or key": ("query", "key"),
    "1-bit linear weights or inputs": ("linear weights", "linear inputs"),
}


def conditions(train_each: bool, thresholds: Sequence[float] = (0.7, 0.9), reduce: str = "row") -> list[Condition]:
    """Return what is trained: the float model, and if asked for each model with a single kind of binary tensor.

    Args:
        train_each: also train with every tensor binarized alone, from scratch.
        thresholds: of GSB's groups.
        reduce: the set over which GSB's maxima run.

    Returns:
        conditions for `experiments.plan`; binary ones are called "value, GSB" and so on.
    """
    groups = {"thresholds": tuple(thresholds), "reduce": reduce}
    single = [
        Condition(f"{tensor}, {binarizer}", "gsb", single_tensor_options(tensor, binarizer == "GSB", **groups))
        for tensor, binarizer in CASES
    ]
    return [Condition("float", "float"), *(single if train_each else [])]


def trial_data(trial: Trial) -> ImageData:
    """Load the images that a trial was trained on."""
    size = trial.get_recipe().image_size
    return load_data(trial.dataset, trial.samples_per_class, seed=trial.seed, root=trial.root, image_size=size)


def measure(
    runs: Sequence[Run],
    trained: pd.DataFrame,
    results_dir: str | Path,
    images: int = 256,
    thresholds: Sequence[float] = (0.7, 0.9),
    reduce: str = "row",
    least_squares: bool = True,
) -> pd.DataFrame:
    """Measure what each tensor loses in the float model of every seed.

    Args:
        runs: the plan of `conditions`.
        trained: the table of `experiments.train`, which kept the float models.
        results_dir: where they are kept.
        images: how many set the scales and how many errors are measured on.
        thresholds: of GSB's groups.
        reduce: the set over which GSB's maxima run.
        least_squares: as in `analysis.binarize_tensor`.

    Returns:
        one row per data, seed, tensor and binarizer: the columns of `analysis.one_tensor_at_a_time`, and trained_drop,
        what a model loses that was trained with this one binary tensor, if such models were trained.
    """
    options = {"thresholds": thresholds, "reduce": reduce, "least_squares": least_squares}
    parts = []
    for run in runs:
        if run.condition == "float":
            model = load_trained(run.trial, results_dir).model
            table = one_tensor_at_a_time(model, trial_data(run.trial), images, **options)
            parts.append(table.assign(data=run.data, seed=run.trial.seed))
    losses = pd.concat(parts, ignore_index=True)
    reached = trained.set_index(["data", "seed", "condition"])["test_accuracy"]
    if set(reached.index.get_level_values("condition")) != {"float"}:
        keys = zip(losses["data"], losses["seed"], losses["tensor"], losses["binarizer"], strict=True)
        losses["trained_drop"] = [
            reached[data, seed, "float"] - reached[data, seed, f"{tensor}, {binarizer}"]
            for data, seed, tensor, binarizer in keys
        ]
    return losses


def claims(losses: pd.DataFrame, groups: int = 3) -> list[Claim]:
    """Check what the paper says about lost information, on the measurements of one data set.

    Args:
        losses: the result of `measure`, rows of one data set.
        groups: how many groups GSB superposed, one more than its thresholds.

    Returns:
        the claims; a tensor that costs more than several others is compared with each of them, and claims about
        trained models are undecided if none were trained.
    """
    single = losses[losses["binarizer"] == "1-bit"]
    several = f"{groups} groups"
    named = losses.assign(groups=losses["binarizer"].map({"1-bit": "1 group", "GSB": several}))

    def costs_more(sentence: str, value: str, tensor: str, others: Iterable[str]) -> Claim:
        pairs = [check_pair(f"{tensor} exceeds {o}", single, tensor, o, on="tensor", value=value) for o in others]
        return all_of(sentence, pairs)

    checked = []
    for tensor in SUPERPOSED:
        for words, others in _PRODUCTS.items():
            sentence = f"Without further training, a 1-bit {tensor} costs more accuracy than {words}."
            checked.append(costs_more(sentence, "accuracy_drop", tensor, others))
    for tensor in SUPERPOSED:
        sentence = f"After training with it, a 1-bit {tensor} costs more accuracy than any other 1-bit tensor."
        if "trained_drop" in losses:
            others = [other for other in TENSORS if other != tensor]
            checked.append(costs_more(sentence, "trained_drop", tensor, others))
        else:
            checked.append(Claim(sentence, "undecided", "not run"))
    for tensor in SUPERPOSED:
        part = named[named["tensor"] == tensor]
        less = f"With {several}, the {tensor} loses less accuracy than with one."
        closer = f"With {several}, the {tensor} is closer to the float one: the cosine grows by more than 0.02."
        richer = f"With {several}, an element of the {tensor} carries more than 0.2 bits more."
        checked += [
            check_pair(less, part, "1 group", several, on="groups", value="accuracy_drop"),
            check_pair(closer, part, several, "1 group", 0.02, on="groups", value="cosine", percent=False),
            check_pair(richer, part, several, "1 group", 0.2, on="groups", value="entropy", percent=False),
        ]
    return checked


def query_rows(maps: Tensor, grid: tuple[int, int]) -> np.ndarray:
    """Return one query's row of each attention map as a picture over the patches.

    It is the class token's row, or the middle patch's where there is no class token; a mean over rows would show more
    levels than a binary map has.

    Args:
        maps: (B, N, N), N tokens are the patches with any number of other tokens before them.
        grid: rows and columns of patches, (h, w).

    Returns:
        (B, h, w).
    """
    rows, columns = grid
    extra = maps.shape[-1] - rows * columns
    query = 0 if extra else (rows // 2) * columns + columns // 2
    return maps[:, query, extra:].reshape(-1, rows, columns).numpy()
