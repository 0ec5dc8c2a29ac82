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


def signs_of_layer_norm(x, gamma, beta, shift, epsilon):
    """LayerNorm(x) + shift in double precision: (T, D); its signs are what the packed layer sees."""
    x = np.asarray(x, np.float64)
    y = (x - x.mean(axis=1, keepdims=True)) / np.sqrt(x.var(axis=1, keepdims=True) + epsilon)
    return y * gamma + beta + shift


def softmax_map(queries, keys, scale, bias):
    """Signs (T, d) twice, a scale, a bias (T, T) or 0 -> the attention map (T, T) in double precision."""
    scores = np.asarray(queries, np.float64) @ np.asarray(keys, np.float64).T * scale
    exponentials = np.exp(scores - scores.max(axis=1, keepdims=True))
    return exponentials / exponentials.sum(axis=1, keepdims=True) + bias


def relative_bias(table, grid, prefix):
    """(heads, entries) -> (heads, T, T), pair of tokens by pair of tokens."""
    (h, w), tokens = grid, prefix + grid[0] * grid[1]
    positions = (2 * h - 1) * (2 * w - 1)
    bias = np.zeros((len(table), tokens, tokens), np.float32)
    for query in range(tokens):
        for key in range(tokens):
            if query >= prefix and key >= prefix:
                (y, x), (key_y, key_x) = divmod(query - prefix, w), divmod(key - prefix, w)
                entry = (y - key_y + h - 1) * (2 * w - 1) + x - key_x + w - 1
            elif query < prefix:
                entry = positions + query * tokens + key
            else:
                entry = positions + prefix * tokens + key
            bias[:, query, key] = table[:, entry]
    return bias


def superposed_product(groups, values, lower, upper, coefficients):
    """Bits (G_a, T, T) and values (T, d) -> sum over i, then j, of a_i c_j times the exact integers, in float32."""
    out = np.zeros(values.shape, np.float32)
    for i, group in enumerate(groups):
        for j in range(len(lower)):
            inside = (values < lower[j]) | (values > upper[j])
            signs = np.where(inside, np.where(values >= 0, 1, -1), 0)
            out = out + integer_product(group, signs.T).astype(np.float32) * coefficients[i, j]
    return out
