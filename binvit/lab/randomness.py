"""Random numbers that decide an experiment and leave those of the caller alone."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def seed_all(*parts: int, device: str = "cpu") -> None:
    """Seed all generators from a trial's seed, stage and epoch, so that an epoch needs no memory of those before it.

    Args:
        *parts: what the seed is made of.
        device: where the trial is trained; the generators of other devices are left alone.
    """
    seed = int(np.random.SeedSequence(parts).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - timm's augmentations draw from the global state
    seed_torch(seed, device)


def seed_torch(seed: int, device: str) -> None:
    """Seed torch's generators of the CPU and of one device; `torch.manual_seed` seeds those of all devices."""
    torch.default_generator.manual_seed(seed)
    if device.startswith("cuda"):
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)
    elif device == "mps":
        torch.mps.manual_seed(seed)


@contextmanager
def own_random_state(device: str) -> Iterator[None]:
    """Leave the caller's random numbers as they were, on the CPU and on one device."""
    states = random.getstate(), np.random.get_state()  # noqa: NPY002
    mps = torch.mps.get_rng_state() if device == "mps" else None
    with torch.random.fork_rng([torch.device(device)] if device.startswith("cuda") else []):
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])  # noqa: NPY002
            if mps is not None:
                torch.mps.set_rng_state(mps)


@contextmanager
def fixed_randomness(*seed: int) -> Iterator[None]:
    """Seed Python's, numpy's and torch's CPU generators, and put them back into their earlier state afterwards.

    timm's augmentations draw from all three; the training loop (dropout, Mixup) must not notice.
    """
    states = random.getstate(), np.random.get_state(), torch.default_generator.get_state()  # noqa: NPY002
    first, second, third = (int(word) for word in np.random.SeedSequence(seed).generate_state(3))
    random.seed(first)
    np.random.seed(second)  # noqa: NPY002
    torch.default_generator.manual_seed(third)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        torch.default_generator.set_state(states[2])
