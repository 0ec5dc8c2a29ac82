"""Training steps of every scheme against the float step, at the sizes that recipes train at."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

import numpy as np
import pandas as pd
import torch
from timm.models.deit import VisionTransformerDistilled
from torch import Tensor, nn
from torch.nn import functional as F

from binvit.lab.benchmark.timing import interleave, ratio_interval, use_threads
from binvit.lab.training.model import build_model
from binvit.lab.training.recipes import recipe
from binvit.nn import binarize, list_schemes
from binvit.nn.schemes import check_name

SIZES = {"smoke": ("smoke", 8, 64), "cpu": ("cpu", 32, 64), "DeiT-S": ("paper", 224, 8)}
"""Sizes of a training step: recipe, pixels of an image's side, images."""


def benchmark_steps(
    sizes: Iterable[str] = tuple(SIZES),
    schemes: Iterable[str] | None = None,
    threads: int | None = None,
    rounds: int = 6,
    batch: int | None = None,
    seconds: float = 0.0,
) -> pd.DataFrame:
    """Measure the training step (forward, backward, AdamW) of binarized models, each beside the float model's.

    Args:
        sizes: keys of `SIZES`.
        schemes: names of the catalogue; None takes all of them.
        threads: threads of every contender.
        rounds: fewest rounds of a scheme, in each of which the float model runs, too.
        batch: images per step; None takes those of the size.
        seconds: time per contender, roughly, for more rounds than these.

    Returns:
        One row per size and scheme, "float" among them: size, scheme, batch, threads, first_ms (of the first step,
        which sets scales and may compile), ms (median), times (over the float step beside it), low and high (its 95 %
        interval over the rounds, NaN where they are too few).

    Raises:
        ValueError: if a size or a scheme is unknown.
    """
    names = dict.fromkeys(["float", *(list_schemes() if schemes is None else schemes)])
    rows = []
    for size in sizes:
        check_name("size", size, SIZES)
        name, pixels, count = SIZES[size]
        count = batch or count
        torch.manual_seed(0)
        model = build_model(recipe(name), 100, pixels).train()
        if isinstance(model, VisionTransformerDistilled):
            model.set_distilled_training(True)
        images, labels = torch.randn(count, 3, pixels, pixels), torch.arange(count) % 100
        rows += _measured(size, names, model, images, labels, threads, rounds, seconds)
    return pd.DataFrame(rows)


def _measured(
    size: str,
    names: Iterable[str],
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    threads: int | None,
    rounds: int,
    seconds: float,
) -> list[dict]:
    """Measure one scheme after the other beside the float step, so that memory holds two models and not all."""
    rows, of_float = [], []
    with use_threads(threads) as used:
        reference = training_step(model, images, labels)
        for scheme in names:
            step = reference if scheme == "float" else training_step(binarize(model, scheme), images, labels)
            start = time.perf_counter()
            step()
            first = time.perf_counter() - start
            times = interleave({"float": reference, scheme: step}, seconds, least=rounds)
            median, beside = np.median(times[scheme]), np.median(times["float"])
            of_float.append(beside)
            low, high = ratio_interval(times[scheme], times["float"])
            numbers = {"first_ms": 1e3 * first, "ms": 1e3 * median, "times": median / beside, "low": low, "high": high}
            rows.append({"size": size, "scheme": scheme, "batch": len(images), "threads": used} | numbers)
    rows[0]["ms"] = 1e3 * np.median(of_float)  # the float model, which ran beside every other
    return rows


def training_step(model: nn.Module, images: Tensor, labels: Tensor) -> Callable[[], None]:
    """Return a function that takes one training step; a distilled model's loss is the mean of its heads' losses."""
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, fused=True)

    def run() -> None:
        outputs = model(images)
        heads = outputs if isinstance(outputs, tuple) else (outputs,)
        loss = torch.stack([F.cross_entropy(logits, labels) for logits in heads]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return run
