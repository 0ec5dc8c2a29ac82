"""Compiled CPU kernels of the attention core's training step: from the joint qkv tensor to the context and back.

They compute what `binvit.nn.rules` and the elastic rule define, for maxima taken per row of the map and per
head of the value. Each kernel works on one row or one head at a time, so that intermediate values stay in the
first-level cache, and sums do not depend on the number of threads.
"""

from __future__ import annotations

import numpy as np
from numba import prange

from binvit.nn.fused.elementwise import parallel_kernel

ZERO, HALF, ONE = np.float32(0), np.float32(0.5), np.float32(1)


@parallel_kernel(reorder=True)
def split_signs(qkv, shift_q, shift_k, signs_q, signs_k):
    """Write the signs of the shifted query and key: qkv (B, N, 3, H, d), shifts (H, d) -> (B, H, N, d) each."""
    batch, n, _, heads, width = qkv.shape
    for row in prange(batch * heads):
        b, h = row // heads, row % heads
        for i in range(n):
            for c in range(width):
                signs_q[b, h, i, c] = ONE if qkv[b, i, 0, h, c] + shift_q[h, c] >= 0 else -ONE
            for c in range(width):
                signs_k[b, h, i, c] = ONE if qkv[b, i, 1, h, c] + shift_k[h, c] >= 0 else -ONE


@parallel_kernel(reorder=True)
def superpose_value(qkv, shift, scales, thresholds, extremes, out):
    """Binarize the value per head: qkv (B, N, 3, H, d), shift (H, d) -> out (B, H, N, d), extremes (B, H, 2)."""
    batch, n, _, heads, width = qkv.shape
    for row in prange(batch * heads):
        b, h = row // heads, row % heads
        shifted = np.empty((n, width), np.float32)
        for i in range(n):
            for c in range(width):
                shifted[i, c] = qkv[b, i, 2, h, c] + shift[h, c]
        v, y = shifted.ravel(), out[b, h].reshape(n * width)  # loops over a whole head become vector code
        top, bottom = v[0], v[0]
        for e in range(v.size):
            top, bottom = max(top, v[e]), min(bottom, v[e])
        extremes[b, h, 0], extremes[b, h, 1] = top, bottom
        for e in range(v.size):
            y[e] = scales[0]
        for t in range(thresholds.shape[0]):
            high, low, scale = thresholds[t] * top, thresholds[t] * bottom, scales[t + 1]
            for e in range(v.size):
                y[e] += scale if (v[e] > high) | (v[e] < low) else ZERO
        for e in range(v.size):
            y[e] = y[e] if v[e] >= 0 else -y[e]


@parallel_kernel(reorder=True)
def superpose_map(product, bias, table, scales, thresholds, probability, out):
    """Apply softmax by table, bias, maximum and groups to integer products (B, H, N, N), one row at a time."""
    batch, heads, n, m = product.shape
    for row in prange(batch * heads * n):
        b, rest = row // (heads * n), row % (heads * n)
        h, i = rest // n, rest % n
        top = product[b, h, i, 0]
        for j in range(m):
            top = max(top, product[b, h, i, j])
        total = ZERO
        for j in range(m):
            probability[b, h, i, j] = table[np.int32((top - product[b, h, i, j]) * HALF)]
        for j in range(m):
            total += probability[b, h, i, j]
        inverse = ONE / total
        highest = np.float32(-np.inf)
        for j in range(m):
            p = probability[b, h, i, j] * inverse
            probability[b, h, i, j] = p
            if bias.shape[0] > 0:
                p += bias[h, i, j]
            out[b, h, i, j] = p
            highest = max(highest, p)
        first, half = scales[0], HALF * scales[0]
        if thresholds.shape[0] == 2:
            second, third = scales[1], scales[2]
            low, high = thresholds[0] * highest, thresholds[1] * highest
            for j in range(m):
                a = out[b, h, i, j]
                y = first if a > half else ZERO
                y += second if a > low else ZERO
                y += third if a > high else ZERO
                out[b, h, i, j] = y
        else:
            for j in range(m):
                a = out[b, h, i, j]
                y = first if a > half else ZERO
                for t in range(thresholds.shape[0]):
                    y += scales[t + 1] if a > thresholds[t] * highest else ZERO
                out[b, h, i, j] = y


@parallel_kernel(reorder=True)
def map_backward(probability, bias, g, scales, thresholds, factor, dbias, dscales, counts):
    """Turn g, the gradient of the binarized map, into the gradient of the scores, row by row and in place."""
    batch, heads, n, m = probability.shape
    groups = scales.shape[0]
    first = scales[0]
    for row in prange(heads * n):
        h, i = row // n, row % n
        a = np.empty(m, np.float32)
        d = np.empty(m, np.float32)
        for b in range(batch):
            highest = np.float32(-np.inf)
            for j in range(m):
                v = probability[b, h, i, j]
                if bias.shape[0] > 0:
                    v += bias[h, i, j]
                a[j] = v
                highest = max(highest, v)
            level = ZERO
            ramp = ZERO
            half = HALF * first
            for j in range(m):
                d[j] = g[b, h, i, j] if (a[j] >= 0) and (a[j] <= first) else ZERO
            for j in range(m):
                level += g[b, h, i, j] if a[j] > half else ZERO
                ramp += a[j] * d[j]
            dscales[row, 0] += level - ramp / first
            for t in range(groups - 1):
                limit = thresholds[t] * highest
                scale = scales[t + 1]
                total = ZERO
                count = ZERO
                for j in range(m):
                    d[j] += scale * (g[b, h, i, j] if a[j] > limit else ZERO)
                for j in range(m):
                    total += g[b, h, i, j] if a[j] > limit else ZERO
                    count += ONE if a[j] > limit else ZERO
                dscales[row, t + 1] += total
                counts[row, t] += count
            inner = ZERO
            for j in range(m):
                inner += probability[b, h, i, j] * d[j]
            for j in range(m):
                g[b, h, i, j] = probability[b, h, i, j] * (d[j] - inner) * factor
            if bias.shape[0] > 0:
                for j in range(m):
                    dbias[h, i, j] += d[j]


@parallel_kernel(reorder=True)
def merge_gradients(
    qkv,
    shift_q,
    shift_k,
    shift_v,
    up_q,
    up_k,
    up_v,
    gains,
    scale_q,
    scale_k,
    scales,
    thresholds,
    extremes,
    out,
    sums,
    counts,
    dshift,
):
    """Write the gradients of query, key and value through their binarizers into one tensor (B, N, 3, H, d).

    up_q, up_k, up_v (B, H, N, d) times `gains` are the gradients of the binarized tensors; sums (B * H, 2 + groups)
    collects the gradients of the scales before their normalization, counts (B * H, groups - 1) the sizes of the
    value's groups, dshift (B, 3, H, d) the gradients of the shifts per image.
    """
    batch, n, _, heads, width = qkv.shape
    groups = scales.shape[0]
    for row in prange(batch * heads):
        b, h = row // heads, row % heads
        for i in range(n):
            level, ramp = ZERO, ZERO
            for c in range(width):
                v, up = qkv[b, i, 0, h, c] + shift_q[h, c], up_q[b, h, i, c] * gains[0]
                d = up if abs(v) <= scale_q else ZERO
                out[b, i, 0, h, c] = d
                dshift[b, 0, h, c] += d
            for c in range(width):
                v, up = qkv[b, i, 0, h, c] + shift_q[h, c], up_q[b, h, i, c] * gains[0]
                level += up if v >= 0 else -up
                ramp += v * out[b, i, 0, h, c]
            sums[row, 0] += level - ramp / scale_q
            level, ramp = ZERO, ZERO
            for c in range(width):
                v, up = qkv[b, i, 1, h, c] + shift_k[h, c], up_k[b, h, i, c] * gains[1]
                d = up if abs(v) <= scale_k else ZERO
                out[b, i, 1, h, c] = d
                dshift[b, 1, h, c] += d
            for c in range(width):
                v, up = qkv[b, i, 1, h, c] + shift_k[h, c], up_k[b, h, i, c] * gains[1]
                level += up if v >= 0 else -up
                ramp += v * out[b, i, 1, h, c]
            sums[row, 1] += level - ramp / scale_k
            level, ramp = ZERO, ZERO
            for c in range(width):
                v, up = qkv[b, i, 2, h, c] + shift_v[h, c], up_v[b, h, i, c]
                out[b, i, 2, h, c] = up if abs(v) <= scales[0] else ZERO
            for c in range(width):
                v, up = qkv[b, i, 2, h, c] + shift_v[h, c], up_v[b, h, i, c]
                level += up if v >= 0 else -up
                ramp += v * out[b, i, 2, h, c]
            sums[row, 2] += level - ramp / scales[0]
            for t in range(groups - 1):
                top, bottom = thresholds[t] * extremes[b, h, 0], thresholds[t] * extremes[b, h, 1]
                scale = scales[t + 1]
                level, ramp, count = ZERO, ZERO, ZERO
                for c in range(width):
                    v, up = qkv[b, i, 2, h, c] + shift_v[h, c], up_v[b, h, i, c]
                    kept = (v > top) | (v < bottom)
                    out[b, i, 2, h, c] += up if abs(v) <= scale or not kept else ZERO
                for c in range(width):
                    v, up = qkv[b, i, 2, h, c] + shift_v[h, c], up_v[b, h, i, c]
                    kept = (v > top) | (v < bottom)
                    up_kept = up if kept else ZERO
                    level += up_kept if v >= 0 else -up_kept
                    ramp += v * up_kept if abs(v) <= scale else ZERO
                    count += ONE if kept else ZERO
                sums[row, 3 + t] += level - ramp / scale
                counts[row, t] += count
            for c in range(width):
                dshift[b, 2, h, c] += out[b, i, 2, h, c]
