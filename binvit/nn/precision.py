"""Full precision inside mixed-precision training: sums of signs are exact in float32 only."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor


def full_precision(function: Callable) -> Callable:
    """Run a function outside autocast, with the 16-bit tensors among its arguments (or in lists of them) in float32.

    Args:
        function: takes tensors, lists of tensors and anything else by position.

    Returns:
        The function; without autocast it costs a microsecond and changes nothing.
    """

    @functools.wraps(function)
    def run(*arguments: Any, **options: Any) -> Any:
        kinds = [kind for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)]
        if not kinds:
            return function(*arguments, **options)
        wide = [_widen(argument) for argument in arguments]
        options = {name: _widen(option) for name, option in options.items()}
        with torch.autocast(kinds[0], enabled=False), torch.autocast(kinds[-1], enabled=False):
            return function(*wide, **options)

    return run


_PROCESS = os.getpid()


def forked() -> bool:
    """Tell whether this process was forked from the one that has imported the package."""
    return os.getpid() != _PROCESS


@contextmanager
def on_cpu() -> Iterator[None]:
    """Compute in float32 on the CPU and without gradients, whatever autocast and default device the caller has set.

    In a forked process torch keeps to one thread from then on: it would wait for OpenMP's other threads, which do not
    survive a fork.
    """
    if forked():
        torch.set_num_threads(1)
    with torch.no_grad(), ExitStack() as stack:
        if torch.is_autocast_enabled("cpu"):
            stack.enter_context(torch.autocast("cpu", enabled=False))
        # A device context leads every torch call through Python: it is entered only where the caller has another one.
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        yield


def _widen(argument: Any) -> Any:
    if isinstance(argument, Tensor) and argument.dtype in (torch.bfloat16, torch.float16):
        return argument.float()
    if type(argument) in (list, tuple):
        return type(argument)(map(_widen, argument))
    return argument
