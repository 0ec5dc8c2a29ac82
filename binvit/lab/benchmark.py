"""Benchmarks: kernels, whole models, growth, memory and training steps, each side by side with its peers in one run."""

from __future__ import annotations

import contextlib
import functools
import re
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from binvit import bits
from binvit.bits.limit import run_in_registers
from binvit.jit import JIT
from binvit.lab.peers import PEERS, NotAvailable
from binvit.lab.timing import interleave, use_threads
from binvit.nn import binarize, calibrate, scheme
from binvit.nn.convert import VECTORS
from binvit.packed import load, pack, save

WIDTHS = {"DeiT-T": 192, "DeiT-S": 384, "DeiT-B": 768}
TOKENS = 197
VARIANTS = {
    "binvit gsb": {"name": "gsb", "attention_bias": "relative"},
    "binvit gsb, no bias": {"name": "gsb", "attention_bias": "none"},
    "binvit bit": {"name": "bit", "attention_bias": "relative"},
}
"""What a packed model is measured as: a label and the scheme with its options."""


def layer_shapes(names: Iterable[str] = WIDTHS) -> list[tuple[str, str, int, int, int]]:
    """Return the products of a transformer block as (model, layer, M, K, N) for one image of 197 tokens."""
    shapes = []
    for name in names:
        d = WIDTHS[name]
        layers = {"qkv": (d, 3 * d), "proj": (d, d), "fc1": (d, 4 * d), "fc2": (4 * d, d)}
        shapes += [(name, layer, TOKENS, k, n) for layer, (k, n) in layers.items()]
    return shapes


def benchmark_kernels(names: Iterable[str] = WIDTHS, threads: int | None = None, seconds: float = 0.5) -> pd.DataFrame:
    """Measure 1-bit products against torch's float32, bfloat16 and int8 products of the same shape.

    Operands are packed before and outputs allocated; packing is part of the whole model's time.

    Args:
        names: Keys of `WIDTHS`.
        threads: Threads of every contender.
        seconds: Time per shape and contender.

    Returns:
        One row per shape and contender: model, layer, m, k, n, threads, contender, seconds (median), rate (billions of
        multiply-adds a second), times (how many times as fast the 1-bit product is), share_of_limit (of what population
        counts on registers alone reached in the same rounds on as many threads at once; 1-bit products only).
    """
    rng = np.random.default_rng(0)
    rows = []
    bits.warm_up()
    with use_threads(threads) as threads, torch.inference_mode():
        for name, layer, m, k, n in layer_shapes(names):
            a, w = (np.where(rng.random(shape) < 0.5, -1.0, 1.0).astype(np.float32) for shape in ((m, k), (n, k)))
            packed, weights = bits.pack_signs(a), bits.prepare_weights(bits.pack_signs(w))
            x, y = torch.from_numpy(a), torch.from_numpy(w).t()
            contenders = {}
            for label, dtype, multiply in (
                ("torch float32", torch.float32, torch.mm),
                ("torch bfloat16", torch.bfloat16, torch.mm),
                ("torch int8", torch.int8, torch._int_mm),
            ):
                out = torch.empty(m, n, dtype=torch.int32 if dtype == torch.int8 else dtype)
                contenders[label] = functools.partial(multiply, x.to(dtype), y.to(dtype), out=out)
            out = bits.aligned_empty((m, n), np.int32)
            contenders["binvit 1-bit"] = functools.partial(bits.binary_matmul, packed, weights, k, out=out)
            if JIT:
                contenders["population count"] = run_in_registers
            medians = {label: float(np.median(t)) for label, t in interleave(contenders, seconds).items()}
            limit = run_in_registers() / medians.pop("population count") if JIT else np.nan
            for label, median in medians.items():
                rate = m * k * n / median / 1e9
                rows.append(
                    {"model": name, "layer": layer, "m": m, "k": k, "n": n, "threads": threads, "contender": label}
                    | {"seconds": median, "rate": rate, "times": median / medians["binvit 1-bit"]}
                    | {"share_of_limit": rate * 1e9 / limit if label == "binvit 1-bit" else np.nan}
                )
    return pd.DataFrame(rows)


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
        batches: Images per run.
        peers: Keys of `binvit.lab.peers.PEERS`; those that are not installed are left out with a word.
        variants: Keys of `VARIANTS`.
        threads: Threads of every contender.
        seconds: Time per batch size and contender.
        width: Width of the model; 384 is DeiT-S.
        image_size: Pixels of an image's side, a multiple of 16.
        depth: Blocks.
        say: Takes sentences about peers that were left out.

    Returns:
        One row per batch size and contender: batch, width, tokens, threads, contender, seconds (median), low and high
        (quartiles), per_image, times (seconds over those of the fastest binary variant).
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
            fastest = min(np.median(times[name]) for name in packed) if packed else np.nan
            for name, values in times.items():
                low, median, high = np.quantile(values, (0.25, 0.5, 0.75))
                shape = {"batch": batch, "width": width, "tokens": (image_size // 16) ** 2 + 2, "threads": threads}
                spread = {"seconds": median, "low": low, "high": high, "per_image": median / batch}
                rows.append(shape | {"contender": name, "runs": len(values)} | spread | {"times": median / fastest})
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
        sides: Pixels of an image's side, multiples of 16: 128 gives 64 patches, 512 gives 1,024.
        widths: Widths, multiples of 64.
        threads: Threads of every contender.
        seconds: Time per size and contender.
        depth: Blocks.

    Returns:
        The rows of `benchmark_models` for one image, with the column "grows" ("tokens" or "width").
    """
    options = {"peers": ["timm float32"], "variants": ["binvit gsb"], "threads": threads, "seconds": seconds}
    sizes = dict.fromkeys([(side, 384) for side in sides] + [(224, width) for width in widths])
    for side, width in sizes:
        sizes[side, width] = benchmark_models((1,), image_size=side, width=width, depth=depth, **options)
    tables = [sizes[side, 384].assign(grows="tokens") for side in sides]
    tables += [sizes[224, width].assign(grows="width") for width in widths]
    return pd.concat(tables, ignore_index=True)


def benchmark_training(
    batch: int = 8,
    variants: Iterable[str] = VARIANTS,
    threads: int | None = None,
    rounds: int = 3,
    depth: int = 12,
    image_size: int = 224,
) -> pd.DataFrame:
    """Measure a training step (forward, backward, AdamW) of binarized DeiT-S against timm's float32 model.

    Args:
        batch: Images per step.
        variants: Keys of `VARIANTS`.
        threads: Threads of every contender.
        rounds: Rounds of one timed step, or of three if they are short.
        depth: Blocks.
        image_size: Pixels of an image's side, a multiple of 16.

    Returns:
        One row per contender: contender, batch, threads, seconds (median), times (over the float step).
    """
    model = random_model(image_size=image_size, depth=depth, classes=100).train()
    model.set_distilled_training(True)
    images, labels = torch.randn(batch, 3, image_size, image_size), torch.arange(batch) % 100
    with use_threads(threads) as threads:
        contenders = {"timm float32": _training_step(model, images, labels)}
        for name in variants:
            binary = binarize(model, scheme(**VARIANTS[name]))
            contenders[name] = _training_step(binary, images, labels)
        times = interleave(contenders, least=rounds, most=rounds)
    medians = {name: float(np.median(t)) for name, t in times.items()}
    rows = [
        {"contender": name, "batch": batch, "threads": threads, "seconds": t, "times": t / medians["timm float32"]}
        for name, t in medians.items()
    ]
    return pd.DataFrame(rows)


def _training_step(model: nn.Module, images: Tensor, labels: Tensor) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, fused=True)

    def run() -> None:
        loss = sum(F.cross_entropy(logits, labels) for logits in model(images)) / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return run


def benchmark_memory(batch: int = 1, width: int = 384, depth: int = 12) -> pd.DataFrame:
    """Measure the memory that loading and running a model adds to a process, each model in a process of its own.

    Args:
        batch: Images per run.
        width: Width of the model.
        depth: Blocks.

    Returns:
        One row per model: contender, file_bytes, peak_bytes (highest memory of the process above that before loading).
    """
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        model = random_model(width, depth=depth)
        files = {"timm float32": Path(folder) / "float.pt", "binvit gsb": Path(folder) / "packed.safetensors"}
        torch.save(model.state_dict(), files["timm float32"])
        save(pack(calibrated_model(model, "binvit gsb")), files["binvit gsb"])
        processes = {}
        for name, path in files.items():
            code = (
                f"from binvit.lab.benchmark import peak_memory as p; print(p({str(path)!r}, {batch}, {width}, {depth}))"
            )
            processes[name] = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        for name, path in files.items():
            answer, _ = processes[name].communicate()
            if processes[name].returncode:
                raise RuntimeError(f"The process that measures the memory of {name} ended with an error.")
            peak = int(answer)
            rows.append({"contender": name, "batch": batch, "file_bytes": path.stat().st_size, "peak_bytes": peak})
    return pd.DataFrame(rows)


def peak_memory(path: str, batch: int, width: int, depth: int) -> int:
    """Load and run a model file in this process and return the bytes by which the process's highest memory grew."""
    bits.warm_up()
    images = torch.randn(batch, 3, 224, 224)
    with torch.inference_mode():
        F.conv2d(images, torch.randn(8, 3, 16, 16))  # libraries that both models need
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the highest from here on
    before = _highest_memory()
    if path.endswith(".pt"):
        options = {"embed_dim": width, "num_heads": width // 64, "depth": depth, "num_classes": 1000}
        with torch.device("meta"):
            model = timm.create_model("deit_small_distilled_patch16_224", **options)
        model.load_state_dict(torch.load(path, mmap=True, weights_only=True), assign=True)
        with torch.inference_mode():
            model.eval()(images)
    else:
        load(path)(images)
    return _highest_memory() - before


def _highest_memory() -> int:
    """Return the most bytes of memory that this process has had."""
    status = Path("/proc/self/status")
    if status.exists():  # Linux's ru_maxrss of a new program starts at its parent's
        return 1024 * int(re.search(r"VmHWM:\s*(\d+)", status.read_text())[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
