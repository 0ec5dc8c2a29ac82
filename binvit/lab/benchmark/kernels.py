"""Single products: bits against torch's float32, bfloat16 and int8."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable

import numpy as np
import pandas as pd
import torch

from binvit import bits
from binvit.bits.limit import run_in_registers
from binvit.jit import JIT
from binvit.lab.benchmark.timing import interleave, ratio_interval, use_threads

WIDTHS = {"DeiT-T": 192, "DeiT-S": 384, "DeiT-B": 768}
TOKENS = 197


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
        names: keys of `WIDTHS`.
        threads: threads of every contender.
        seconds: time per shape and contender.

    Returns:
        One row per shape and contender: model, layer, m, k, n, threads, contender, seconds (median), rate (billions of
        multiply-adds a second), times (how many times as fast the 1-bit product is), times_low
        and times_high (95 % interval over rounds), share_of_limit (of what population
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
            contenders: dict[str, Callable[[], object]] = {}
            for label, dtype, multiply in (
                ("torch float32", torch.float32, torch.mm),
                ("torch bfloat16", torch.bfloat16, torch.mm),
                ("torch int8", torch.int8, torch._int_mm),
            ):
                out = torch.empty(m, n, dtype=torch.int32 if dtype == torch.int8 else dtype)
                contenders[label] = functools.partial(multiply, x.to(dtype), y.to(dtype), out=out)
            sums = bits.aligned_empty((m, n), np.int32)
            contenders["binvit 1-bit"] = functools.partial(bits.binary_matmul, packed, weights, k, out=sums)
            if JIT:
                contenders["population count"] = run_in_registers
            times = interleave(contenders, seconds)
            medians = {label: float(np.median(t)) for label, t in times.items()}
            limit = run_in_registers() / medians.pop("population count") if JIT else np.nan
            for label, median in medians.items():
                low, high = ratio_interval(times[label], times["binvit 1-bit"])
                rate = m * k * n / median / 1e9
                rows.append(
                    {"model": name, "layer": layer, "m": m, "k": k, "n": n, "threads": threads, "contender": label}
                    | {"seconds": median, "rate": rate, "times": median / medians["binvit 1-bit"]}
                    | {"times_low": low, "times_high": high}
                    | {"share_of_limit": rate * 1e9 / limit if label == "binvit 1-bit" else np.nan}
                )
    return pd.DataFrame(rows)
