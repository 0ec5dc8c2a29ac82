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

from binvit.lab.benchmark.timing import interleave, use_threads
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
    rounds: int = 5,
    batch: int | None = None,
) -> pd.DataFrame:
    """Measure the training step (forward, backward, AdamW) of binarized models against the float model's.

    Args:
        sizes: keys of `SIZES`.
        schemes: names of the catalogue; None takes all of them.
        threads: threads of every contender.
        rounds: rounds, in each of which every scheme runs.
        batch: images per step; None takes those of the size.

    Returns:
        One row per size and scheme, "float" among them: size, scheme, batch, threads, first_ms (of the first step,
        which sets scales and may compile), ms (median), times (over the float step).

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
        with use_threads(threads) as used:
            steps, first = {}, {}
            for scheme in names:
                binary = model if scheme == "float" else binarize(model, scheme)
                steps[scheme] = training_step(binary, images, labels)
                start = time.perf_counter()
                steps[scheme]()
                first[scheme] = time.perf_counter() - start
            times = interleave(steps, least=rounds, most=rounds)
        medians = {scheme: float(np.median(t)) for scheme, t in times.items()}
        rows += [
            (size, scheme, count, used, 1e3 * first[scheme], 1e3 * median, median / medians["float"])
            for scheme, median in medians.items()
        ]
    return pd.DataFrame(rows, columns=["size", "scheme", "batch", "threads", "first_ms", "ms", "times"])


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
