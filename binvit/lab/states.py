"""What lets a killed training continue with the same bits: random numbers that need no memory, and the saved state."""

import dataclasses
import io
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from binvit.files import atomic_write


def seed_all(*parts: int) -> None:
    """Seed all generators from a trial's seed, stage and epoch, so that an epoch needs no memory of those before it."""
    seed = int(np.random.SeedSequence(parts).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - timm's augmentations draw from the global state
    torch.manual_seed(seed)


@contextmanager
def own_random_state(device: str) -> Iterator[None]:
    """Leave the caller's random numbers as they were."""
    states = random.getstate(), np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng([] if device == "cpu" else [torch.cuda.current_device()]):
        yield
    random.setstate(states[0])
    np.random.set_state(states[1])  # noqa: NPY002


@dataclass
class Position:
    """How far a run has come; with model and optimizer this is all that its state needs.

    Args:
        stage: the stage that is being trained.
        epoch: whole epochs of this stage that are done.
        seconds: time spent so far.
        history: the records of all epochs done.
    """

    stage: int = 0
    epoch: int = 0
    seconds: float = 0.0
    history: list[dict[str, Any]] = field(default_factory=list)


def write_state(
    path: Path, position: Position, model: nn.Module, optimizer: torch.optim.Optimizer, config: str
) -> None:
    """Write the state of an unfinished run in one step.

    Args:
        path: the file.
        position: how far the run has come.
        model: the model as it is.
        optimizer: its optimizer.
        config: what the run must be trained with to be continued.
    """
    buffer = io.BytesIO()
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(state | {"position": dataclasses.asdict(position), "config": config}, buffer)
    atomic_write(path, buffer.getvalue())


def read_state(path: Path | None, config: str, device: str) -> dict[str, Any] | None:
    """Return the state of a killed run, None if there is none that fits.

    Args:
        path: the file; None if no state is kept.
        config: as given to `write_state`.
        device: where the tensors shall be.
    """
    if path is None or not path.is_file():
        return None
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except Exception:  # whatever a damaged file raises: a state only saves time
        return None
    return state if state.get("config") == config else None
