"""A team of threads that runs one kernel together, and the counters by which they share its work.

The kernels release the GIL, so plain Python threads run them side by side. One hand-over per forward pass replaces a
parallel region per layer, threads wait for each other inside the kernel for a fraction of a microsecond, and no second
OpenMP runtime spins next to torch's, which is kept to one thread meanwhile.
"""

from __future__ import annotations

import os
import queue
import threading
from collections import deque
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

import numpy as np
import torch
from llvmlite import ir
from numba import types

from binvit.bits.emitter import Emitter, check_arrays
from binvit.jit import JIT, kernel, vector_code

T = TypeVar("T")
_LINE = 8  # counters of a cache line, which threads on different cores should not write at the same time
STEP = 4 * _LINE
"""Counters of a step whose parts threads share: taken, done, taken from the front, taken from the back."""
_PATIENCE = 2000  # looks at a counter before the processor is offered to others


class Team:
    """Worker threads that wait for a task; there is one team in a process, made when it is first needed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inboxes: list[queue.SimpleQueue] = []

    def run(self, task: Callable[[int, int], None], threads: int) -> None:
        """Call task(number, threads) for every number below `threads`, side by side, and wait for all.

        Args:
            task: may wait for its siblings, so all of them run at the same time. It is called once, task(0, 1), if one
                thread is enough or the team is busy with another caller's task.
            threads: how many.
        """
        if threads <= 1 or not JIT or not self._lock.acquire(blocking=False):
            task(0, 1)
            return
        try:
            while len(self._inboxes) < threads - 1:
                self._inboxes.append(queue.SimpleQueue())
                threading.Thread(target=_work, args=(self._inboxes[-1],), name="binvit", daemon=True).start()
            done: queue.SimpleQueue = queue.SimpleQueue()
            for number, inbox in zip(range(1, threads), self._inboxes, strict=False):
                inbox.put((task, number, threads, done))
            _report(task, 0, threads, done)
            errors = [error for error in (done.get() for _ in range(threads)) if error is not None]
            if errors:
                raise errors[0]
        finally:
            self._lock.release()


def _work(inbox: queue.SimpleQueue) -> None:
    while True:
        _report(*inbox.get())


def _report(task: Callable[[int, int], None], number: int, threads: int, done: queue.SimpleQueue) -> None:
    try:
        task(number, threads)
        done.put(None)
    except BaseException as error:
        done.put(error)


TEAM = Team()
if hasattr(os, "register_at_fork"):  # threads do not survive a fork: the child starts without workers
    os.register_at_fork(after_in_child=lambda: Team.__init__(TEAM))


class _OneTorchThread:
    """Context in which torch computes with one thread; Python threads may be inside at the same time.

    After a parallel region OpenMP's threads spin for milliseconds, on the cores that the next image's kernels need.
    """

    def __init__(self) -> None:
        self._lock, self._inside, self._threads = threading.Lock(), 0, 1

    def __enter__(self) -> None:
        with self._lock:
            threads = torch.get_num_threads()  # also by those who come later: who has not asked cannot set it for good
            self._threads = self._threads if self._inside else threads
            self._inside += 1
            torch.set_num_threads(1)

    def __exit__(self, *error: object) -> None:
        # Everyone who leaves restores: besides the process-wide number, every Python thread has one of its own.
        with self._lock:
            self._inside -= 1
            torch.set_num_threads(self._threads)

    def threads(self) -> int:
        """Return the number of threads of torch outside of the context, for a Python thread that is not inside."""
        with self._lock:
            if self._inside:  # a Python thread takes its number over when it first asks
                torch.set_num_threads(self._threads)
            return torch.get_num_threads()


ONE_TORCH_THREAD = _OneTorchThread()
if hasattr(os, "register_at_fork"):  # the lock may be held by a thread that stays behind
    os.register_at_fork(after_in_child=lambda: _OneTorchThread.__init__(ONE_TORCH_THREAD))


def torch_threads() -> int:
    """Return how many threads torch uses, whatever other Python threads' forward passes are doing."""
    return ONE_TORCH_THREAD.threads()


class Pool(Generic[T]):
    """Things to be lent to one caller at a time, kept for the next one with the same key.

    Every step is one atomic operation of a deque: there is no lock that a fork could leave locked in the child.

    Args:
        size: how many are kept while nobody uses them; what was used last stays.
    """

    def __init__(self, size: int) -> None:
        self._free: deque[tuple[Hashable, T]] = deque(maxlen=size)

    @contextmanager
    def borrow(self, key: Hashable, make: Callable[[], T]) -> Iterator[T]:
        """Lend a thing that nobody else holds; what an exception interrupted is not lent again.

        Args:
            key: what the thing is for.
            make: makes one if none of that key is free.

        Yields:
            The thing.
        """
        thing = self._take(key)
        thing = make() if thing is None else thing
        yield thing
        self._free.append((key, thing))

    def _take(self, key: Hashable) -> T | None:
        for _ in range(len(self._free)):
            try:
                found, thing = self._free.popleft()
            except IndexError:  # another thread was faster
                return None
            if found == key:
                return thing
            self._free.append((found, thing))
        return None


def _next_twin(counters, index):
    counters[index] += 1
    return counters[index] - 1


@vector_code(twin=_next_twin)
def take_next(typing_context, counters, index):
    """Add one to a counter that threads share and return what it was."""
    check_arrays("take_next", {"counters": (counters, types.int64, 1)})
    signature = types.int64(counters, types.intp)

    def codegen(context, builder, signature, arguments):
        address = Emitter(context, builder, signature, arguments).address(0, arguments[1])
        address = builder.bitcast(address, ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", address, ir.Constant(ir.IntType(64), 1), "acq_rel")

    return signature, codegen


@vector_code(twin=lambda counters, index: counters[index])
def look_at(typing_context, counters, index):
    """Return a counter that threads share."""
    check_arrays("look_at", {"counters": (counters, types.int64, 1)})
    signature = types.int64(counters, types.intp)

    def codegen(context, builder, signature, arguments):
        address = Emitter(context, builder, signature, arguments).address(0, arguments[1])
        return builder.load_atomic(builder.bitcast(address, ir.IntType(64).as_pointer()), "acquire", 8)

    return signature, codegen


@vector_code(twin=lambda: None)
def _offer_processor(typing_context):
    """Let other threads run if more of them are ready than there are cores."""
    signature = types.void()

    def codegen(context, builder, signature, arguments):
        if os.name == "posix":
            Emitter(context, builder, signature, arguments).call("sched_yield", ir.IntType(32))
        return context.get_dummy_value()

    return signature, codegen


@kernel(allocates=False)
def wait_for_parts(counters, step, parts):
    """Wait until all parts of a step are done.

    Args:
        counters: int64, as for `take_part`.
        step: the step's first counter.
        parts: how many there are.
    """
    looks = 0
    while look_at(counters, step + _LINE) < parts:
        looks += 1
        if looks > _PATIENCE:
            _offer_processor()


@kernel(allocates=False)
def take_part(counters, step, parts, task):
    """Return a part of a step that nobody has taken, less than 0 if all are.

    Threads of even number take parts from the front, the others from the back, so that most rows stay with the thread
    whose cache holds them.

    Args:
        counters: int64, `STEP` of them for each step, zeros at first.
        step: the step's first counter.
        parts: how many there are.
        task: this thread's number.
    """
    if take_next(counters, step) >= parts:
        return np.int64(-1)
    side = task % 2
    place = take_next(counters, step + (2 + side) * _LINE)
    return parts - 1 - place if side else place


@kernel(allocates=False)
def finish_part(counters, step, parts, task):
    """Tell that a part is done, and take another one as `take_part` does.

    Args:
        counters: as for `take_part`.
        step: as for `take_part`.
        parts: as for `take_part`.
        task: as for `take_part`.
    """
    take_next(counters, step + _LINE)
    return take_part(counters, step, parts, task)
