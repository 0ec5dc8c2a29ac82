"""Benchmarks: kernels, whole models, growth, memory and training steps, each side by side with its peers in one run."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd
import timm
import torch
from timm.models.vision_transformer import VisionTransformer

from binvit.lab.benchmark.peers import PEERS, NotAvailable
from binvit.lab.benchmark.steps import training_step
from binvit.lab.benchmark.timing import interleave, ratio_interval, use_threads
from binvit.nn import binarize, calibrate, scheme
from binvit.nn.convert import VECTORS
from binvit.packed import pack

VARIANTS = {
    "binvit gsb": {"name": "gsb", "attention_bias": "relative"},
    "binvit gsb, full bias": {"name": "gsb", "attention_bias": "full"},
    "binvit gsb, no bias": {"name": "gsb", "attention_bias": "none"},
    "binvit elastic": {"name": "elastic", "attention_bias": "relative"},
}
"""What a packed model is measured as: a label and the scheme with its options."""


def random_model(width: int = 384, image_size: int = 224, depth: int = 12, classes: int = 1000) -> VisionTransformer:
    """Return a DeiT of random weights in evaluation mode, 64 channels per head and patches of 16 pixels."""
    torch.manual_seed(0)
    name = "deit_small_distilled_patch16_224"
    options = {"embed_dim": width, "num_heads": width // 64, "depth": depth, "img_size": image_size}
    return timm.create_model(name, num_classes=classes, **options).eval()


def calibrated_model(model: VisionTransformer, variant: str) -> VisionTransformer:
    """Binarize a float model by a key of `VARIANTS` and set its scales from one random batch.

    Its vectors are moved a little, too: the zeros they start from, unlike trained numbers, would be stored as float16.
    """
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(2, 3, *model.patch_embed.img_size, generator=generator)
    binary = calibrate(binarize(model, scheme(**VARIANTS[variant])), images)
    for name, parameter in binary.named_parameters():
        if any(name.endswith(ends) for ends in VECTORS):
            parameter.data.add_(torch.randn(parameter.shape, generator=generator), alpha=1e-4)
    return binary


def benchmark_models(
    batches: Sequence[int] = (1, 8),
    peers: Iterable[str] = PEERS,
    variants: Iterable[str] = VARIANTS,
    threads: int | None = None,
    seconds: float = 3.0,
    width: int = 384,
    image_size: int = 224,
    depth: int = 12,
    say: Callable[[str], None] = lambda sentence: None,
) -> pd.DataFrame:
    """Measure a whole binary DeiT against the same float model in the forms that people deploy.

    Args:
        batches: images per run.
        peers: keys of `binvit.lab.benchmark.peers.PEERS`; those that are not installed are left out with a word.
        variants: keys of `VARIANTS`.
        threads: threads of every contender.
        seconds: time per batch size and contender.
        width: width of the model; 384 is DeiT-S.
        image_size: pixels of an image's side, a multiple of 16.
        depth: blocks.
        say: takes sentences about peers that were left out.

    Returns:
        One row per batch size and contender: batch, width, tokens, threads, contender, seconds (median), low and high
        (quartiles), per_image, times (seconds over those of the first variant, gsb), times_low and times_high (95 %
        interval over rounds).
    """
    model = random_model(width, image_size, depth)
    rows = []
    with use_threads(threads) as threads:
        packed = {name: pack(calibrated_model(model, name)) for name in variants}
        for batch in batches:
            images = torch.randn(batch, 3, image_size, image_size, generator=torch.Generator().manual_seed(2))
            contenders = {}
            for name in peers:
                try:
                    contenders[name] = PEERS[name](model, images, threads)
                except NotAvailable as reason:
                    say(f"{name} is left out: {reason}.")
            contenders |= {name: functools.partial(run, images) for name, run in packed.items()}
            times = interleave(contenders, seconds)
            ours = next(iter(packed), None)
            reference = np.nan if ours is None else np.median(times[ours])
            for name, values in times.items():
                low, median, high = np.quantile(values, (0.25, 0.5, 0.75))
                shape = {"batch": batch, "width": width, "tokens": (image_size // 16) ** 2 + 2, "threads": threads}
                spread = {"seconds": median, "low": low, "high": high, "per_image": median / batch}
                ratio = (np.nan, np.nan) if ours is None else ratio_interval(values, times[ours])
                spread |= {"times": median / reference, "times_low": ratio[0], "times_high": ratio[1]}
                rows.append(shape | {"contender": name, "runs": len(values)} | spread)
    return pd.DataFrame(rows)


def benchmark_growth(
    sides: Sequence[int] = (128, 224, 320, 512),
    widths: Sequence[int] = (192, 384, 768),
    threads: int | None = None,
    seconds: float = 1.0,
    depth: int = 12,
) -> pd.DataFrame:
    """Measure how latency grows with the number of tokens (width 384) and with the width (224 pixels).

    Args:
        sides: pixels of an image's side, multiples of 16: 128 gives 64 patches, 512 gives 1,024.
        widths: widths, multiples of 64.
        threads: threads of every contender.
        seconds: time per size and contender.
        depth: blocks.

    Returns:
        The rows of `benchmark_models` for one image, with the column "grows" ("tokens" or "width").
    """
    options: dict[str, Any] = {
        "peers": ["timm float32"],
        "variants": ["binvit gsb"],
        "threads": threads,
        "seconds": seconds,
    }
    sizes = {}
    for side, width in [(side, 384) for side in sides] + [(224, width) for width in widths]:
        if (side, width) not in sizes:
            sizes[side, width] = benchmark_models((1,), image_size=side, width=width, **options)
    tables = [sizes[side, 384].assign(grows="tokens") for side in sides]
    tables += [sizes[224, width].assign(grows="width") for width in widths]
    return pd.concat(tables, ignore_index=True)


def benchmark_training(
    batch: int = 8,
    variants: Iterable[str] = VARIANTS,
    threads: int | None = None,
    rounds: int = 7,
    depth: int = 12,
    image_size: int = 224,
) -> pd.DataFrame:
    """Measure a training step (forward, backward, AdamW) of binarized DeiT-S against timm's float32 model.

    Args:
        batch: images per step.
        variants: keys of `VARIANTS`.
        threads: threads of every contender.
        rounds: rounds of one timed step, or of three if they are short.
        depth: blocks.
        image_size: pixels of an image's side, a multiple of 16.

    Returns:
        One row per contender: contender, batch, threads, seconds (median), times (over the float step), times_low and
        times_high (95 % interval over rounds).
    """
    model = random_model(image_size=image_size, depth=depth, classes=100).train()
    model.set_distilled_training(True)
    images, labels = torch.randn(batch, 3, image_size, image_size), torch.arange(batch) % 100
    with use_threads(threads) as threads:
        contenders = {"timm float32": training_step(model, images, labels)}
        for name in variants:
            binary = binarize(model, scheme(**VARIANTS[name]))
            contenders[name] = training_step(binary, images, labels)
        times = interleave(contenders, least=rounds, most=rounds)
    medians = {name: float(np.median(t)) for name, t in times.items()}
    rows = []
    for name, t in medians.items():
        low, high = ratio_interval(times[name], times["timm float32"])
        row = {"contender": name, "batch": batch, "threads": threads, "seconds": t}
        rows.append(row | {"times": t / medians["timm float32"], "times_low": low, "times_high": high})
    return pd.DataFrame(rows)
