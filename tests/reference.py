"""Slow, obvious oracles for the tests: nothing here is clever, and nothing here uses the package it judges."""

import numpy as np

# ---- bits -----------------------------------------------------------------------------------------------------------


def words_of(bits):
    """(..., K) zeros and ones -> uint64 (..., ceil(K / 64)), one bit at a time, the lowest first."""
    bits = np.asarray(bits)
    words = np.zeros((*bits.shape[:-1], -(-bits.shape[-1] // 64)), np.uint64)
    for k in range(bits.shape[-1]):
        words[..., k // 64] |= bits[..., k].astype(np.uint64) << np.uint64(k % 64)
    return words


def integer_product(a, w):
    """(M, K) and (N, K) integers -> (M, N), summed in int64."""
    return np.asarray(a, np.int64) @ np.asarray(w, np.int64).T
