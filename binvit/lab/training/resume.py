"""What lets a killed training continue with the same bits: random numbers that need no memory, and the saved state."""

import contextlib
import dataclasses
import functools
import hashlib
import io
import platform
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from llvmlite import binding
from torch import nn

import binvit
from binvit.files import atomic_write
from binvit.lab.training.devices import Team
from binvit.nn.fused.float_products import library


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


_VECTORS = {"avx2": "AVX2", "avx512vpopcntdq": "AVX-512 VPOPCNTDQ", "amx-int8": "AMX int8", "dotprod": "dot products"}


@functools.cache
def cpu_vectors() -> str:
    """Return this CPU's vector extensions that speed and last digits depend on; virtual machines may hide its model."""
    known = binding.get_host_cpu_features()
    found = [name for feature, name in _VECTORS.items() if known.get(feature)]
    return ", ".join(found) or f"none of {', '.join(_VECTORS.values())}"


def environment(team: Team) -> dict[str, str]:
    """Return what may change a result's last digits: versions, device, CPU, its vectors, what multiplies, threads."""
    cpu = {"cpu": cpu_kind(), "vectors": cpu_vectors(), "products": library()}
    return versions() | {"device": team.description} | cpu | {"threads": str(torch.get_num_threads())}


def changes(earlier: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Return what differs between two environments, such as "torch 2.9.0 (now 2.14.1)"; "" if nothing does."""
    return ", ".join(
        f"{name} {earlier[name]} (now {now[name]})"
        for name in now
        if earlier.get(name) != now[name] and name in earlier
    )


@dataclass
class Position:
    """How far a run has come; with model and optimizer this is all that its state needs.

    Args:
        stage: the stage that is being trained.
        epoch: whole epochs of this stage that are done.
        seconds: time spent so far.
        history: the records of all epochs done.
        versions: of what trained so far; "2.9.0, then 2.14.1" where they changed in between.
    """

    stage: int = 0
    epoch: int = 0
    seconds: float = 0.0
    history: list[dict[str, Any]] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=versions)


def write_state(
    path: Path, position: Position, model: nn.Module, optimizer: torch.optim.Optimizer, config: str, team: Team
) -> None:
    """Write the state of an unfinished run in one step.

    Args:
        path: the file.
        position: how far the run has come.
        model: the model as it is.
        optimizer: its optimizer.
        config: what the run must be trained with to be continued.
        team: what trains.
    """
    buffer = io.BytesIO()
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "environment": environment(team)}
    torch.save(state | {"position": dataclasses.asdict(position), "config": config}, buffer)
    content = buffer.getvalue()
    atomic_write(path, hashlib.sha256(content).digest() + content)


def read_state(path: Path | None, config: str, team: Team) -> dict[str, Any] | None:
    """Return the state of a killed run, None if there is none that fits; a warning says why one does not.

    A state of other versions is continued, since hours of training may hang on it: `Position.versions` keeps both.

    Args:
        path: the file; None if no state is kept.
        config: as given to `write_state`.
        team: what trains.

    Raises:
        OSError: the file cannot be read, which does not mean that it is damaged.
    """
    if path is None or not path.exists():
        return None
    content = path.read_bytes()
    if hashlib.sha256(content[32:]).digest() != content[:32]:
        _start_over(path, "is damaged")
        return None
    try:
        state: dict[str, Any] = torch.load(io.BytesIO(content[32:]), map_location=team.device, weights_only=True)
    except Exception as error:  # whatever torch raises for a file of another release of its own
        _start_over(path, f"cannot be read by torch {torch.__version__} ({type(error).__name__})")
        return None
    if state.get("config") != config:
        _start_over(path, "is of another recipe, scheme or data set")
        return None
    if changed := changes(state["environment"], environment(team)):
        warnings.warn(f"The training continues from {path}, which was written with {changed}.", stacklevel=2)
    position = state["position"]
    for name, version in versions().items():
        before = position["versions"].get(name, "unknown")
        if before.split(", then ")[-1] != version:
            position["versions"][name] = f"{before}, then {version}"
    return state


def _start_over(path: Path, reason: str) -> None:
    warnings.warn(f"The state {path} {reason}; the training starts over.", stacklevel=3)
