"""Where a model is trained: on which device, by how many processes that share every batch, and in what memory."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import re
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from binvit.config import show

if TYPE_CHECKING:
    from accelerate import Accelerator

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of malloc.h


def choose_device(name: str | None = None) -> str:
    """Return a device that is there.

    Args:
        name: "cpu", "cuda", "mps" or one GPU, such as "cuda:1"; None takes a GPU if there is one.

    Raises:
        ValueError: there is no such device here.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name is None:
        return "cuda" if gpus else "cpu"
    if not re.fullmatch(r"cpu|mps|cuda(:\d{1,4})?", name):
        raise ValueError(f"A device is cpu, cuda, mps or one GPU such as cuda:1, got {show(name)}.")
    if name.startswith("cuda") and int(name[5:] or 0) >= gpus:
        raise ValueError(f"There is no device {show(name)}: torch sees {gpus or 'no'} GPU{'s' * (gpus > 1)} here.")
    if name == "mps" and not torch.backends.mps.is_available():
        raise ValueError("There is no device 'mps': torch sees no Apple GPU here.")
    return name


def spread(device: str | None, jobs: int) -> list[str]:
    """Return the device of each of several trainings that run side by side: several GPUs share them."""
    chosen = choose_device(device)
    count = torch.cuda.device_count() if chosen == "cuda" else 1
    return [f"cuda:{job % count}" for job in range(jobs)] if count > 1 else [chosen] * jobs


def keep_freed_memory() -> None:
    """Let this process keep what it frees, as every training step needs as much again; for processes of our own.

    glibc gives large blocks back to the system and gets them page by page: 7,000 faults in each step of gsb at the size
    `cpu`, a tenth of its time. No number changes. Nothing happens with another C library.

    Source: mallopt(3), M_TRIM_THRESHOLD and M_MMAP_THRESHOLD.
    """
    if platform.libc_ver()[0] == "glibc":
        with suppress(OSError, AttributeError):  # a platform without the function only trains a little slower
            for option, limit in ((_MMAP_THRESHOLD, 2**25), (_TRIM_THRESHOLD, 2**31 - 1)):
                ctypes.CDLL(None).mallopt(option, limit)


def give_back_memory() -> None:
    """Give what this process has kept back to the system, as between two trainings; for processes of our own.

    Source: malloc_trim(3). Nothing happens with another C library.
    """
    gc.collect()
    if platform.libc_ver()[0] == "glibc":
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)


class Team:
    """The processes that train one model together: those that torchrun has started, or this one alone.

    Every process makes the same batches and computes a slice of each; what they learn is averaged.

    Args:
        device: where this process trains, as `choose_device` takes it. Of several processes each takes the GPU of its
            local rank, unless this is "cpu".
    """

    def __init__(self, device: str | None = None):
        self.size = int(os.environ.get("WORLD_SIZE", "1"))
        self.rank = int(os.environ.get("RANK", "0"))
        if self.size > 1 and choose_device(device).startswith("cuda"):
            device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        self.device = choose_device(device)

    @property
    def leads(self) -> bool:
        """Whether this process writes the files."""
        return self.rank == 0

    @property
    def description(self) -> str:
        """Return what trains as results name it, such as "cpu" or "4 x cuda"."""
        kind = self.device.split(":")[0]
        return kind if self.size == 1 else f"{self.size} x {kind}"

    def slices(self, count: int, pieces: int = 1) -> list[slice]:
        """Return this process's share of the images of a batch, in pieces that follow one another.

        Args:
            count: images of the whole batch.
            pieces: parts of the share.

        Raises:
            ValueError: some part would be empty.
        """
        parts = self.size * pieces
        if count < parts:
            several = f"{self.size} processes with {pieces} accumulated parts each"
            raise ValueError(f"A batch of {count} images cannot be shared by {several}.")
        bounds = [count * part // parts for part in range(parts + 1)]
        own = range(self.rank * pieces, (self.rank + 1) * pieces)
        return [slice(bounds[part], bounds[part + 1]) for part in own]

    def wrap(self, model: nn.Module) -> nn.Module:
        """Return the model as it is called in training, so that all processes use the mean of their gradients."""
        return model if self.size == 1 else self._accelerator.prepare_model(model)

    def silent(self, wrapped: nn.Module) -> AbstractContextManager[Any]:
        """Return a context in which gradients are only added up, not exchanged."""
        return nullcontext() if self.size == 1 else self._accelerator.no_sync(wrapped)

    def total(self, values: Tensor) -> Tensor:
        """Return the sum over all processes."""
        return values if self.size == 1 else self._accelerator.reduce(values, "sum")

    def share(self, value: Any) -> Any:
        """Return the leading process's value, any object that pickles, in all processes."""
        if self.size == 1:
            return value
        self._accelerator.wait_for_everyone()  # connects the processes at the first time
        from accelerate.utils import broadcast_object_list

        return broadcast_object_list([value])[0]

    def collect(self, value: Any) -> list[Any]:
        """Return the values of all processes, in order of rank."""
        if self.size == 1:
            return [value]
        self._accelerator.wait_for_everyone()
        from accelerate.utils import gather_object

        return list(gather_object([value]))

    @cached_property
    def _accelerator(self) -> Accelerator:
        try:
            from accelerate import Accelerator
        except ModuleNotFoundError:
            missing = "Several processes that train one model need accelerate: pip install 'binvit[cluster]'."
            raise ModuleNotFoundError(missing) from None
        return Accelerator(cpu=self.device == "cpu")
