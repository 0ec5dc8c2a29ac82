"""How every kernel is compiled: the one place that owns the options, the cache and the compile time.

numba optimizes every function by itself, and again inside each caller that it is inlined into: the forward pass, a nest
of kernels seven deep, would be compiled seven times. So a kernel has two forms. Python calls the entry, which is kept
on disk; in other kernels its name stands for the nested form, which is optimized and turned into machine code with the
entry around it.
"""

from __future__ import annotations

import functools
import gc
import hashlib
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import llvmlite.binding
import numba
import numpy as np
from llvmlite.binding import Linkage
from numba.core import event
from numba.core.caching import FunctionCache, IndexDataCacheFile, NullCache
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import Compiler, Flags
from numba.extending import intrinsic

config: Any = numba.config  # which numba fills at run time
JIT = not config.DISABLE_JIT
"""False under ``NUMBA_DISABLE_JIT=1``: kernels then run as plain Python, their vector code as numpy."""

# Features of the CPU that code is compiled for, which NUMBA_CPU_NAME=generic and NUMBA_CPU_FEATURES may narrow.
if config.CPU_FEATURES is None:
    _FEATURES = {name for name, present in llvmlite.binding.get_host_cpu_features().items() if present}
else:
    _FEATURES = {name[1:] for name in config.CPU_FEATURES.split(",") if name.startswith("+")}

WIDE_VECTORS = JIT and "avx512f" in _FEATURES
"""Whether 16 floats are one vector, of which there are 32, and one instruction looks up 16 floats in a table of 32."""

HALF_FLOATS = JIT and "f16c" in _FEATURES
"""Whether instructions turn float16 numbers into float32; elsewhere LLVM would call a library that is not there."""

ALIGNMENT = 64  # one 512-bit vector: an unaligned one crosses a cache line at every load, 15 % of a product's time

_REORDERED_SUMS = {"reassoc", "contract", "nsz"}  # lets LLVM keep one partial sum per lane

_SHARED = {Linkage.linkonce_any, Linkage.linkonce_odr, Linkage.weak_any, Linkage.weak_odr}

_HOMES = ("bits", "nn/fused", "packed/fast")  # the rooms whose kernels may be nested in others
_PATIENCE = 1.0  # seconds of compiling before a word is said
_COMPILING = "compiling", "binvit is compiling its kernels for this machine, which takes some seconds."


def kernel(
    function: Callable | None = None, *, parallel: bool = False, reorder: bool = False, allocates: bool = True
) -> Callable:
    """Compile a function with the options that all kernels share.

    Args:
        function: the kernel; numba compiles it at the first call and keeps the result on disk.
        parallel: whether its ``numba.prange`` loops run on several threads; such a kernel is called from Python only.
        reorder: whether floating-point sums may be reordered.
        allocates: whether the kernel makes arrays. If not, it counts no references to those that it is given and their
            views, one atomic step for each, on which threads that share an array would wait for each other.

    Returns:
        The compiled kernel, which other kernels may call; without JIT the function itself.
    """
    if function is None:
        return lambda f: kernel(f, parallel=parallel, reorder=reorder, allocates=allocates)
    if not JIT:
        return function
    fast = _REORDERED_SUMS if reorder else False
    return _Kernel(function, nogil=True, error_model="numpy", parallel=parallel, fastmath=fast, _nrt=allocates)


class _Kernel:
    def __init__(self, function: Callable, **options: Any) -> None:
        functools.update_wrapper(self, function)
        njit: Any = functools.partial(numba.njit, no_cfunc_wrapper=True, **options)
        self._entry = njit(pipeline_class=_EntryCompiler)(function)
        try:
            self._entry._cache = _Cache(function)
        except RuntimeError:  # numba found no folder: a read-only installation without a home
            self._entry._cache = _NoCache()
        self._nested = njit(no_cpython_wrapper=True, pipeline_class=_NestedCompiler)(function)
        for form in (self._entry, self._nested):
            form._compiler._customize_flags = _Flags

    def __call__(self, *arguments: Any) -> Any:
        return self._entry(*arguments)

    @property
    def _numba_type_(self) -> numba.types.Type:  # what the kernel's name means in compiled code
        return self._nested._numba_type_


class _Flags(Flags):
    # numba compares the flags at each function that it resolves, all options one by one; what is set decides as well.

    __slots__ = ()
    _HASH = hash(Flags())

    def __hash__(self) -> int:
        return self._HASH

    def __eq__(self, other: object) -> bool:
        return self._values == other._values if isinstance(other, _Flags) else super().__eq__(other)


class _EntryCompiler(Compiler):
    def define_pipelines(self) -> list:
        library = _EntryLibrary(self.state.targetctx.codegen(), self.state.func_id.func_qualname)
        library.enable_object_caching()
        self.state["library"] = library
        return super().define_pipelines()


class _EntryLibrary(JITCodeLibrary):
    # Code that calls its own copy of what is linked into it. numba shares copies of one name between all kernels of a
    # process and keeps the first that it sees: while compiling that of a parallel loop alone, when loading that of
    # the kernel around it, which was optimized once more and may sum in another order.

    def _optimize_final_module(self) -> None:
        super()._optimize_final_module()
        for function in self._final_module.functions:
            if function.linkage in _SHARED:
                function.linkage = Linkage.internal


class _NestedCompiler(Compiler):
    def define_pipelines(self) -> list:
        self.state["library"] = _NestedLibrary(self.state.targetctx.codegen(), self.state.func_id.func_qualname)
        return super().define_pipelines()


class _NestedLibrary(JITCodeLibrary):
    # Code that is linked into other libraries only: nothing of it is optimized or loaded by itself.

    codegen = SimpleNamespace(set_env=lambda name, environment: None)

    def _optimize_final_module(self) -> None:
        pass

    def _finalize_final_module(self) -> None:
        self._finalized = True

    def get_pointer_to_function(self, name: str) -> int:
        return 0


def _package_stamp() -> str:
    here = Path(__file__).parent
    sources = [here / "jit.py", *sorted(path for home in _HOMES for path in (here / home).rglob("*.py"))]
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()


_STAMP = _package_stamp()


class _NoCache(NullCache):
    def save_overload(self, signature: Any, data: Any) -> None:
        _say_uncached("there is no folder to write to")


class _Cache(FunctionCache):
    # A kernel's machine code on disk, which may fail at any time without failing a call.

    def __init__(self, function: Callable) -> None:
        super().__init__(function)
        # numba looks at the function's file only, so an edited kernel would live on inside those it is nested in.
        stamp = self._impl.locator.get_source_stamp(), _STAMP
        self._cache_file = _CacheFile(self.cache_path, f"{self._impl.filename_base}.sealed", stamp)

    def load_overload(self, signature: Any, context: Any) -> Any:
        try:
            return super().load_overload(signature, context)
        except Exception as error:  # damaged bytes may raise anything
            return _say_damaged(self.cache_path, error)

    def save_overload(self, signature: Any, data: Any) -> None:
        try:
            super().save_overload(signature, data)
        except OSError as error:
            _say_uncached(f"{self.cache_path} cannot be written ({error.strerror or error})")


class _CacheFile(IndexDataCacheFile):
    # Ends every file with a digest, which unpickling does not read: a flipped bit of machine code would be run. That of
    # code covers the stamp, too, since numba writes the index first: code of old sources may still lie behind it.

    @contextmanager
    def _open_for_write(self, path: str) -> Iterator[Any]:
        with super()._open_for_write(path) as file:
            yield file
            file.flush()
            file.write(self._seal(path, Path(file.name).read_bytes()))

    def _load_index(self) -> dict:
        try:
            self._check(self._index_path)
            return super()._load_index()
        except FileNotFoundError:
            return {}
        except Exception as error:
            _say_damaged(self._index_path, error)
            return {}

    def _load_data(self, name: str) -> Any:
        self._check(self._data_path(name))
        return super()._load_data(name)

    def _check(self, path: str) -> None:
        content = Path(path).read_bytes()
        if content[-32:] != self._seal(path, content[:-32]):
            raise ValueError("its digest does not fit")

    def _seal(self, path: str, content: bytes) -> bytes:
        stamp = "" if path == self._index_path else repr(self._source_stamp)
        return hashlib.sha256(content + stamp.encode()).digest()


class _Watch(event.Listener):
    # Says a word when the process has compiled for a second in all; numba compiles one kernel after the other. Garbage
    # is left meanwhile: walking through all objects of torch again and again takes a fifth of the time.

    def __init__(self) -> None:
        self._depth, self._spent, self._start, self._collects = 0, 0.0, 0.0, True

    def on_start(self, event: event.Event) -> None:
        self._depth += _is_ours(event)
        if self._depth == 1 and not self._start:
            self._start, self._collects = time.perf_counter(), gc.isenabled()
            gc.disable()
            self._timer = threading.Timer(max(0.0, _PATIENCE - self._spent), _say, _COMPILING)
            self._timer.daemon = True
            self._timer.start()

    def on_end(self, event: event.Event) -> None:
        self._depth -= _is_ours(event)
        if not self._depth and self._start:
            self._timer.cancel()
            if self._collects:
                gc.enable()
            self._spent, self._start = self._spent + time.perf_counter() - self._start, 0.0


def _is_ours(event: event.Event) -> bool:
    # Other programs compile, too, also functions of no module (made by exec) and by dispatchers of other targets.
    function = getattr(event.data["dispatcher"], "py_func", None)
    return str(getattr(function, "__module__", None)).startswith("binvit.")


if JIT:
    event.register("numba:compile", _Watch())

_SAID: set[str] = set()


def _say(topic: str, sentence: str) -> None:
    # Once a process; in a notebook it would become part of the document, and of what is compared.
    if topic in _SAID or os.environ.get("BINVIT_QUIET", "0") not in ("", "0") or "ipykernel" in sys.modules:
        return
    _SAID.add(topic)
    with suppress(AttributeError, OSError, ValueError):  # stderr is closed, or there is none
        sys.stderr.write(f"{sentence}\n")
        sys.stderr.flush()


def _say_uncached(reason: str) -> None:
    _say("uncached", f"binvit compiles its kernels anew in every process, since {reason}; set NUMBA_CACHE_DIR.")


def _say_damaged(path: str, error: Exception) -> None:
    _say("damaged", f"binvit compiles kernels anew, since it cannot read those in {path} ({error}).")


def vector_code(twin: Callable | None) -> Callable:
    """Make an intrinsic of LLVM vector code, with a plain Python twin that gives the same integers without JIT.

    Args:
        twin: a Python function with the arguments of the intrinsic, without the typing context. It does not warn of
            infinities and NaN, as instructions do not: lanes that nobody reads hold whatever memory held.

    Returns:
        A decorator for the intrinsic.
    """
    return lambda function: intrinsic(function) if JIT else twin and np.errstate(all="ignore")(twin)


def aligned_empty(shape: int | tuple[int, ...], dtype: np.typing.DTypeLike) -> np.ndarray:
    """Allocate an uninitialized array that starts at a multiple of 64 bytes.

    Args:
        shape: the array's shape.
        dtype: its element type.

    Returns:
        A C-contiguous array of that shape.
    """
    dtype = np.dtype(dtype)
    size = (math.prod(shape) if isinstance(shape, tuple) else shape) * dtype.itemsize
    buffer = np.empty(size + ALIGNMENT, np.uint8)
    start = -buffer.__array_interface__["data"][0] % ALIGNMENT  # faster than asking ctypes
    return buffer[start : start + size].view(dtype).reshape(shape)
