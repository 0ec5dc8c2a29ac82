"""How fast this CPU could multiply bits at most: xor, population count and add on registers, without any memory."""

from __future__ import annotations

import functools
import time

import numpy as np
from llvmlite import ir
from numba import types

from binvit.bits.emitter import Emitter
from binvit.bits.jit import JIT, kernel, vector_code

_LANES, _ACCUMULATORS = 16, 24
_BITS_PER_ROUND = _ACCUMULATORS * _LANES * 32


@vector_code(twin=None)
def _count_in_registers(typing_context, rounds, seed):
    """Runs rounds of 24 independent xor, popcount and add, as the register tile does, and returns something of them."""
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


def popcount_limit(repeats: int = 200) -> float:
    """Measures the most binary multiply-adds that one core can do in a second.

    Args:
        repeats: how many short measurements to take the best of.

    Returns:
        Multiply-adds a second of one core. A product may come out a few per cent above it, since the first step of its
        sums needs no addition.

    Raises:
        ValueError: without JIT, where there is nothing to measure.
    """
    if not JIT:
        raise ValueError(
            "The population-count limit can only be measured with numba's JIT, not under NUMBA_DISABLE_JIT."
        )
    rounds, best = 2000, np.inf
    _run(rounds, 1)
    for _ in range(repeats):
        start = time.perf_counter()
        _run(rounds, 1)
        best = min(best, time.perf_counter() - start)
    return (rounds - 1) * _BITS_PER_ROUND / best
