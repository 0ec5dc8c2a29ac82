"""Full precision inside mixed-precision training: sums of signs are exact in float32 only."""

from __future__ import annotations

import functools
from collections.abc import Callable
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
        arguments = [_widen(argument) for argument in arguments]
        options = {name: _widen(option) for name, option in options.items()}
        with torch.autocast(kinds[0], enabled=False), torch.autocast(kinds[-1], enabled=False):
            return function(*arguments, **options)

    return run


def _widen(argument: Any) -> Any:
    if isinstance(argument, Tensor) and argument.dtype in (torch.bfloat16, torch.float16):
        return argument.float()
    if type(argument) in (list, tuple):
        return type(argument)(map(_widen, argument))
    return argument
