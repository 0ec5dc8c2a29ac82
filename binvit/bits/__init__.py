"""Bits instead of floats: packing, exact products by population count, and the fused steps of a binary transformer.

This package knows numpy and numba only. Bit 1 means +1 (or 1), the lowest bit of a uint64 word comes first, and padding
bits are zero.
"""

from binvit.bits.gemm import PreparedWeights, binary_matmul, prepare_weights, warm_up
from binvit.bits.limit import popcount_limit
from binvit.bits.packing import pack_levels, pack_planes, pack_signs, unpack_levels, unpack_signs, word_count
from binvit.jit import aligned_empty
from binvit.threads import get_threads, set_threads, use_threads

__all__ = [
    "PreparedWeights",
    "aligned_empty",
    "binary_matmul",
    "get_threads",
    "pack_levels",
    "pack_planes",
    "pack_signs",
    "popcount_limit",
    "prepare_weights",
    "set_threads",
    "unpack_levels",
    "unpack_signs",
    "use_threads",
    "warm_up",
    "word_count",
]
