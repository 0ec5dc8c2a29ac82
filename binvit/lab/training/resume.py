"""What lets a killed training continue with the same bits: random numbers that need no memory, and the saved state."""

import contextlib
import dataclasses
import functools
import io
import platform
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from torch import nn

import binvit
from binvit.files import atomic_write


def versions() -> dict[str, str]:
    """Return the versions of what computed a result."""
    modules = {"torch": torch, "timm": timm, "numpy": np, "binvit": binvit}
    return {"python": platform.python_version()} | {name: str(item.__version__) for name, item in modules.items()}


@functools.cache
def cpu_kind() -> str:
    """Return the kind of this machine's CPU."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        for line in file:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


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
