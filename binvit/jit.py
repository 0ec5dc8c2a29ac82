"""How every kernel is compiled: the one place that owns the options, the threads and the compile time."""

from __future__ import annotations

import functools
import hashlib
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import llvmlite.binding
import numba
import numpy as np
from numba import config
from numba.extending import intrinsic

JIT = not config.DISABLE_JIT
"""False under ``NUMBA_DISABLE_JIT=1``: kernels then run as plain Python, their vector code as numpy."""

# Features of the CPU that code is compiled for, which NUMBA_CPU_NAME=generic and NUMBA_CPU_FEATURES may narrow.
if config.CPU_FEATURES is None:
    _FEATURES = {name for name, present in llvmlite.binding.get_host_cpu_features().items() if present}
else:
    _FEATURES = {name[1:] for name in config.CPU_FEATURES.split(",") if name.startswith("+")}

FLOAT_PERMUTE = JIT and "avx512f" in _FEATURES
"""Whether one instruction looks up 16 floats in a table of 32."""

_CHOSEN = threading.local()

ALIGNMENT = 64  # one 512-bit vector: an unaligned one crosses a cache line at every load, 15 % of a product's time

# Lets LLVM keep one partial sum per lane.
_REORDERED_SUMS = {"reassoc", "contract", "nsz", "arcp"}


def kernel(
    function: Callable | None = None,
    *,
    parallel: bool = False,
    reorder: bool = False,
) -> Callable:
    """Compiles a function with the options that all kernels share.

    Args:
        function: the kernel; numba compiles it at the first call and keeps the result on disk.
        parallel: whether its ``numba.prange`` loops run on several threads.
        reorder: whether floating-point sums may be reordered.

    Returns:
        The compiled kernel, which other compiled functions may call; without JIT the function itself.
    """
    if function is None:
        return lambda f: kernel(f, parallel=parallel, reorder=reorder)
    if not JIT:
        return function
    options = {
        "nogil": True,
        "error_model": "numpy",
        "parallel": parallel,
        "fastmath": _REORDERED_SUMS if reorder else False,
    }
    try:
        compiled = numba.njit(cache=True, **options)(function)
    except RuntimeError:  # nowhere to write a cache: a read-only installation without a home directory
        return numba.njit(**options)(function)
    _follow_package(compiled)
    return compiled


def vector_code(twin: Callable) -> Callable:
    """Makes an intrinsic of LLVM vector code, with a plain Python twin that gives the same integers without JIT.

    Args:
        twin: a Python function with the arguments of the intrinsic, without the typing context.

    Returns:
        A decorator for the intrinsic.
    """
    return lambda function: intrinsic(function) if JIT else twin


def _package_stamp() -> str:
    digest = hashlib.sha256()
    here = Path(__file__).parent
    for path in sorted([here / "jit.py", *(here / "bits").rglob("*.py")]):
        digest.update(path.read_bytes())
    return digest.hexdigest()


_STAMP = _package_stamp()


def _follow_package(compiled: Callable) -> None:
    # numba looks at the caller's file only, so an edited kernel would live on inside the callers it was inlined into.
    file = getattr(getattr(compiled, "_cache", None), "_cache_file", None)
    if hasattr(file, "_source_stamp"):
        file._source_stamp = (file._source_stamp, _STAMP)


def aligned_empty(shape: int | tuple[int, ...], dtype: np.typing.DTypeLike) -> np.ndarray:
    """Allocates an uninitialized array that starts at a multiple of 64 bytes.

    Args:
        shape: the array's shape.
        dtype: its element type.

    Returns:
        A C-contiguous array of that shape.
    """
    dtype = np.dtype(dtype)
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    buffer = np.empty(size + ALIGNMENT, np.uint8)
    start = -buffer.ctypes.data % ALIGNMENT
    return buffer[start : start + size].view(dtype).reshape(shape)


def set_threads(threads: int | None = None) -> int:
    """Sets how many threads the calling thread's parallel kernels use from now on.

    torch's thread count is a different one, and stays as it is.

    Args:
        threads: at least 1; more than numba started with (``NUMBA_NUM_THREADS``, by default every core) means all of
            them. None takes ``OMP_NUM_THREADS`` where that is set, else all.

    Returns:
        The number of threads now in use.

    Raises:
        ValueError: if `threads` is less than one or not a whole number.
    """
    limit = config.NUMBA_NUM_THREADS
    if threads is None:
        given = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
        threads = int(given) if given.isdecimal() and int(given) > 0 else limit
    threads = min(check_threads(threads), limit)
    if JIT:
        _start_threads()
        numba.set_num_threads(threads)
        _CHOSEN.threads = threads
    return threads


def check_threads(threads: int) -> int:
    """Checks a number of threads.

    Args:
        threads: what should be a whole number of at least 1.

    Returns:
        The same number as int.

    Raises:
        ValueError: if it is anything else.
    """
    if isinstance(threads, bool) or not isinstance(threads, int | np.integer) or threads < 1:
        raise ValueError(f"The number of threads must be a whole number of at least 1, not {threads!r}.")
    return int(threads)


def get_threads() -> int:
    """Returns how many threads the calling thread's parallel kernels use.

    Returns:
        The number set by `set_threads`, by default all that numba started with.
    """
    chosen = getattr(_CHOSEN, "threads", None)  # numba takes a microsecond to answer
    if JIT and not chosen:
        _start_threads()
        return numba.get_num_threads()
    return chosen or 1


@functools.cache
def _start_threads() -> None:
    # numba starts its threads in torch's OpenMP runtime if that is loaded, and thereby sets the number that torch uses.
    torch = sys.modules.get("torch")
    before = torch.get_num_threads() if hasattr(torch, "get_num_threads") else None
    numba.get_num_threads()
    if before is not None:
        torch.set_num_threads(before)


@contextmanager
def use_threads(threads: int | None) -> Iterator[int]:
    """Uses a number of threads inside a ``with`` block and restores the previous one afterwards.

    Args:
        threads: as for `set_threads`, but None keeps the current number.

    Yields:
        The number of threads in use.
    """
    before = get_threads()
    try:
        yield before if threads is None else set_threads(threads)
    finally:
        set_threads(before)
