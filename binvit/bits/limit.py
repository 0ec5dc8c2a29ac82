"""How fast this CPU could multiply bits at most: xor, population count and add on registers, without any memory."""

from __future__ import annotations

import functools
import time

import numba
import numpy as np
from llvmlite import ir
from numba import types

from binvit.bits.emitter import Emitter
from binvit.jit import JIT, kernel, vector_code
from binvit.threads import get_threads, use_threads

_LANES, _ACCUMULATORS = 16, 24
_BITS_PER_ROUND = _ACCUMULATORS * _LANES * 32
_ROUNDS = 10_000  # a hundred microseconds, beside which starting and joining threads are small


@vector_code(twin=None)
def _count_in_registers(typing_context, rounds, seed):
    """Run rounds of 24 independent xor, popcount and add, as the register tile does, and return something of them."""
    signature = types.int32(types.intp, types.int32)

    def codegen(context, builder, signature, arguments):
        emit = Emitter(context, builder, signature, arguments)
        lane = ir.IntType(32)
        vector = ir.VectorType(lane, _LANES)
        start = emit.splat(arguments[1], _LANES)

        def step(k, counts):
            if counts is None:
                return [builder.add(start, ir.Constant(vector, [i] * _LANES)) for i in range(_ACCUMULATORS)]
            # A neighbour's count is the operand: nothing is constant, so that nothing can be left out.
            return [
                builder.add(count, emit.popcount(builder.xor(start, counts[i - 7]))) for i, count in enumerate(counts)
            ]

        mixed = functools.reduce(builder.xor, emit.accumulate(arguments[0], step))
        return builder.extract_element(mixed, ir.Constant(lane, 0))

    return signature, codegen


@kernel
def _run(rounds, seed):
    return _count_in_registers(rounds, seed)


@kernel(parallel=True)
def _run_together(threads, rounds, seed):
    mixed = 0
    for thread in numba.prange(threads):
        mixed += _run(rounds, seed + thread)
    return mixed


def run_in_registers() -> int:
    """Run population counts for some hundred microseconds, as fast as this thread's number of threads can together.

    All of them run at once, as they do in a product, since cores may share power, a clock or a physical core. The
    number of threads is what `set_threads` said.

    Returns:
        The binary multiply-adds that they stand for.

    Raises:
        ValueError: without JIT, where there is nothing to measure.
    """
    if not JIT:
        raise ValueError(
            "The population-count limit can only be measured with numba's JIT, not under NUMBA_DISABLE_JIT."
        )
    threads = get_threads()
    if threads == 1:
        _run(_ROUNDS, 1)
    else:
        _run_together(threads, _ROUNDS, 1)
    return threads * (_ROUNDS - 1) * _BITS_PER_ROUND


def popcount_limit(threads: int | None = 1, repeats: int = 200) -> float:
    """Measure the most binary multiply-adds that some threads can do in a second, all of them at once.

    Args:
        threads: how many; None takes what `set_threads` said.
        repeats: how many short measurements to take the best of.

    Returns:
        Multiply-adds a second of all threads. A product may come out a few per cent above it, since the first step of
        its sums needs no addition.

    Raises:
        ValueError: without JIT, where there is nothing to measure, or if `threads` is less than 1.
    """
    with use_threads(threads):
        done, best = run_in_registers(), np.inf
        for _ in range(repeats):
            start = time.perf_counter()
            run_in_registers()
            best = min(best, time.perf_counter() - start)
    return done / best
