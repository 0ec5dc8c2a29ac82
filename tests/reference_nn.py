"""Slow, obvious oracles for `binvit.nn`: loops over numpy arrays, written from the formulas of the papers.

Every oracle of a rule takes (x, g, *parameters) as float64 arrays and returns an `Outcome`: the binarized array, the
gradient to x and one gradient per parameter (None where a parameter is not trained). sign(0) = +1.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

SMALLEST = 1e-5  # no learned scale goes below


class Outcome(NamedTuple):
    y: np.ndarray
    dx: np.ndarray
    dparameters: list[np.ndarray | None]


def sgn(x: float) -> float:
    return 1.0 if x >= 0 else -1.0


def signs(x: np.ndarray) -> np.ndarray:
    return np.array([sgn(value) for value in x.flat]).reshape(x.shape)


def sum_to(x: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Sum x over whatever `shape` (without its leading dimensions of 1 spelled out) was broadcast along."""
    total = np.zeros(shape)
    owner = np.broadcast_to(np.arange(total.size).reshape(shape), x.shape)
    for index in np.ndindex(x.shape):
        total.flat[owner[index]] += x[index]
    return total


def slope(x: float, window: str) -> float:
    """Derivative used for sign(x)."""
    if window == "through":
        return 1.0
    if abs(x) > 1 or (window == "open" and abs(x) == 1):
        return 0.0
    return 2 - 2 * abs(x) if window == "approx" else 1.0


def identity(x: np.ndarray, g: np.ndarray) -> Outcome:
    return Outcome(x, g, [])


def sign_rule(scale: str = "none", window: str = "closed", center: bool = False, factor: str = "constant") -> Callable:
    """y = s sign(c), s 1, the mean of |x| over the last axis ("row") or over the last two ("head").

    c is x, or x minus its mean over the last axis, through which the gradient passes. `factor` says how s enters the
    gradient; "exact" is the derivative of the mean of |c|, term by term.
    """

    def oracle(x: np.ndarray, g: np.ndarray) -> Outcome:
        y, dx = np.zeros_like(x), np.zeros_like(x)
        c = x - x.mean(-1, keepdims=True) if center else x
        averaged = c if factor == "exact" else x
        n = x.shape[-1]
        for i in np.ndindex(x.shape):
            s = {
                "none": lambda i=i: 1.0,
                "row": lambda i=i: np.abs(averaged[i[:-1]]).mean(),
                "head": lambda i=i: np.abs(averaged[i[:-2]]).mean(),
            }[scale]()
            y[i] = s * sgn(c[i])
            dx[i] = g[i] * slope(c[i], window) * (1.0 if factor == "bare" else s)
            if factor == "xnor":
                dx[i] = (dx[i] + g[i] / n) * (1 - 1 / n)
            if factor == "exact":
                dx[i] += sum(g[i[:-1]][j] * sgn(c[i[:-1]][j]) for j in range(n)) * sgn(c[i]) / n
        return Outcome(y, through_centring(dx) if center else dx, [])

    return oracle


def through_centring(h: np.ndarray) -> np.ndarray:
    """Chain rule of c_j = x_j - mean x along the last axis."""
    dx = np.zeros_like(h)
    n = h.shape[-1]
    for i in np.ndindex(h.shape):
        dx[i] = sum(h[i[:-1]][k] * ((k == i[-1]) - 1 / n) for k in range(n))
    return dx


def learned_row(w: np.ndarray, g: np.ndarray, a: np.ndarray) -> Outcome:
    """y = a sign(W - the row's mean) with a learned a per row, an open window and the gradient through the centring."""
    y, h, da = np.zeros_like(w), np.zeros_like(w), np.zeros_like(a)
    for r, c in np.ndindex(w.shape):
        centred = w[r, c] - w[r].mean()
        y[r, c] = a[r, 0] * sgn(centred)
        h[r, c] = g[r, c] * a[r, 0] * slope(centred, "open")
        da[r, 0] += g[r, c] * sgn(centred)
    return Outcome(y, through_centring(h), [da])


def bwn(scale: str = "tensor", center: str = "tensor") -> Callable:
    """y = mean|W| sign(W - mean W), dW = g; mean and factor over the "tensor", a "channel" (row) or "none"."""

    def oracle(w: np.ndarray, g: np.ndarray) -> Outcome:
        y = np.zeros_like(w)
        for r, c in np.ndindex(w.shape):
            mean = {"none": 0.0, "tensor": w.mean(), "channel": w[r].mean()}[center]
            factor = {"none": 1.0, "tensor": np.abs(w).mean(), "channel": np.abs(w[r]).mean()}[scale]
            y[r, c] = factor * sgn(w[r, c] - mean)
        return Outcome(y, g, [])

    return oracle


def elastic(lo: int = -1, hi: int = 1, gradient: str = "official") -> Callable:
    """y = a round(clip(x/a, lo, hi)), the sign for -1 and 1; da = sum((level - 1[inside] x/a) g) / sqrt(n hi)."""

    def oracle(x: np.ndarray, g: np.ndarray, a: np.ndarray) -> Outcome:
        y, dx, da = np.zeros_like(x), np.zeros_like(x), np.zeros_like(x)
        step = np.broadcast_to(a, x.shape)
        for i in np.ndindex(x.shape):
            ratio = x[i] / step[i]
            inside = 1.0 if lo <= ratio <= hi else 0.0
            level = sgn(x[i]) if (lo, hi) == (-1, 1) else float(round(min(max(ratio, lo), hi)))
            y[i] = step[i] * level
            dx[i] = g[i] * inside
            da[i] = (level - (0.0 if gradient == "bit" else ratio * inside)) * g[i]
        return Outcome(y, dx, [sum_to(da, a.shape) / (1.0 if gradient == "sum" else math.sqrt(x.size * hi))])

    return oracle


def learned_factor(x: np.ndarray, g: np.ndarray, c: np.ndarray) -> Outcome:
    """y = c sign(x) with a learned c."""
    factor = np.broadcast_to(c, x.shape)
    dx = np.array([g[i] * factor[i] * slope(x[i], "open") for i in np.ndindex(x.shape)]).reshape(x.shape)
    return Outcome(factor * signs(x), dx, [sum_to(g * signs(x), c.shape)])


def ede_slope(x: float, t: float) -> float:
    return max(1 / t, 1) * t * (1 - math.tanh(t * x) ** 2)


def ede(x: np.ndarray, g: np.ndarray, t: np.ndarray) -> Outcome:
    """IR-Net's activation: sign with dx = g k t (1 - tanh^2(t x))."""
    dx = np.array([g[i] * ede_slope(x[i], float(t)) for i in np.ndindex(x.shape)]).reshape(x.shape)
    return Outcome(signs(x), dx, [None])


def irnet_weight(w: np.ndarray, g: np.ndarray, t: np.ndarray) -> Outcome:
    """y = 2^round(log2 mean|What|) sign What, What = (W - mean)/std per row (unbiased); the chain rule in full."""
    y, dw = np.zeros_like(w), np.zeros_like(w)
    n = w.shape[1]
    for r, row in enumerate(w):
        mean = sum(row) / n
        std = math.sqrt(sum((value - mean) ** 2 for value in row) / (n - 1))
        if std < 1e-12:  # a row of equal weights stands still
            continue
        hat = [(value - mean) / std for value in row]
        s = 2.0 ** round(math.log2(sum(abs(h) for h in hat) / n))
        upstream = [g[r, j] * s * ede_slope(hat[j], float(t)) for j in range(n)]
        for j in range(n):
            y[r, j] = s * sgn(hat[j])
            for k in range(n):  # d hat_k / d w_j
                jacobian = ((k == j) - 1 / n) / std - hat[k] * hat[j] / ((n - 1) * std)
                dw[r, j] += upstream[k] * jacobian
    return Outcome(y, dw, [None])


def map_threshold(share: float = 0.5, mean_scale: bool = False, window: str = "through") -> Callable:
    """y = s 1[A >= share * max of the row], s 1 or the mean of the kept entries; dA = g s (window of the distance)."""

    def oracle(a: np.ndarray, g: np.ndarray) -> Outcome:
        y, da = np.zeros_like(a), np.zeros_like(a)
        for i in np.ndindex(a.shape):
            row = a[i[:-1]]
            threshold = share * max(row)
            kept = [value for value in row if value >= threshold]
            # A row whose maximum is negative keeps nothing: a share of it lies above it.
            s = (sum(kept) / len(kept) if kept else 0.0) if mean_scale else 1.0
            y[i] = s * (a[i] >= threshold)
            da[i] = g[i] * s * (1.0 if window == "through" else slope(a[i] - threshold, window))
        return Outcome(y, da, [])

    return oracle


def map_ede(a: np.ndarray, g: np.ndarray, t: np.ndarray) -> Outcome:
    """1[A >= half of the row's maximum] with IR-Net's gradient at the distance from the threshold."""
    da = np.array([g[i] * ede_slope(a[i] - 0.5 * max(a[i[:-1]]), float(t)) for i in np.ndindex(a.shape)])
    return Outcome(map_threshold()(a, g).y, da.reshape(a.shape), [None])


def map_learned(a: np.ndarray, g: np.ndarray, c: np.ndarray) -> Outcome:
    """c 1[A >= half of the row's maximum] with a learned c."""
    kept = map_threshold()(a, g).y
    return Outcome(c * kept, c * g, [np.asarray((g * kept).sum())])


def score_sign(s: np.ndarray, g: np.ndarray) -> Outcome:
    """1[S > 0], dS = g 1[|S| < 1]."""
    return Outcome((s > 0).astype(float), g * (np.abs(s) < 1), [])


def three_maps(a: np.ndarray, g: np.ndarray, scale: np.ndarray, offset: np.ndarray) -> Outcome:
    """y = a clip(round(3 A/a + z), 0, 3) per head; gradients inside 0 <= round <= 3, closed."""
    y, da, dscale, doffset = (np.zeros_like(a) for _ in range(4))
    heads = a.shape[1]
    share = heads / math.sqrt(3 * a.size)
    for i in np.ndindex(a.shape):
        step, z = scale[i[1], 0, 0], offset[i[1], 0, 0]
        level = round(3 * a[i] / step + z)
        inside = 1.0 if 0 <= level <= 3 else 0.0
        clipped = min(max(level, 0), 3)
        y[i] = step * clipped
        da[i] = 3 * g[i] * inside
        dscale[i] = share * g[i] * (clipped - inside * 3 * a[i] / step)
        doffset[i] = share * step * g[i] * inside
    return Outcome(y, da, [sum_to(dscale, scale.shape), sum_to(doffset, offset.shape)])


def head_sign(x: np.ndarray, g: np.ndarray, a: np.ndarray, z: np.ndarray) -> Outcome:
    """y = a (sign(x/a + r) - r), r = round(z), one a and z per head; sums per head over sqrt(n)."""
    y, dx = np.zeros_like(x), np.zeros_like(x)
    da, dz = np.zeros_like(x), np.zeros_like(x)
    for i in np.ndindex(x.shape):
        scale, offset = a[i[1], 0, 0], float(round(z[i[1], 0, 0]))
        moved = x[i] / scale + offset
        inside = 1.0 if -1 <= moved <= 1 else 0.0
        y[i] = scale * (sgn(moved) - offset)
        dx[i] = g[i] * inside
        dz[i] = g[i] * scale * (inside - 1)
        da[i] = g[i] * (sgn(moved) - offset - x[i] / scale * inside)
    return Outcome(y, dx, [sum_to(d, a.shape) / math.sqrt(x.size) for d in (da, dz)])


def _group(index: tuple[int, ...], reduce: str) -> tuple[int, ...]:
    return index[: {"batch": 0, "sample": 1, "head": 2, "row": 3}[reduce]]


def gsb_attention_masks(a: np.ndarray, thresholds: tuple[float, ...], reduce: str) -> list[np.ndarray]:
    """T_i = 1[A > t_i max A], the maximum over everything that shares the leading indices of the reduction."""
    return [
        np.array([a[i] > t * a[_group(i, reduce)].max() for i in np.ndindex(a.shape)]).reshape(a.shape)
        for t in thresholds
    ]


def gsb_value_masks(v: np.ndarray, thresholds: tuple[float, ...], reduce: str) -> list[np.ndarray]:
    """T_i = 1[v > t_i max v] + 1[v < t_i min v]; a value has no row of its own, so "row" means its head."""
    over = "head" if reduce == "row" else reduce
    masks = []
    for t in thresholds:
        mask = np.zeros(v.shape, dtype=bool)
        for i in np.ndindex(v.shape):
            group = v[_group(i, over)]
            mask[i] = v[i] > t * group.max() or v[i] < t * group.min()
        masks.append(mask)
    return masks


def gsb_attention(thresholds: tuple[float, ...], reduce: str, gradient: str = "official") -> Callable:
    """a1 round(clip(A/a1, 0, 1)) + a2 T1 + a3 T2 + ..., dA = g (1[0 <= A/a1 <= 1] + a2 T1 + a3 T2 + ...)."""

    def oracle(a: np.ndarray, g: np.ndarray, *scales: np.ndarray) -> Outcome:
        y, da, (da1,) = elastic(lo=0, hi=1)(a, g, scales[0])
        dscales = [da1]
        for mask, scale in zip(gsb_attention_masks(a, thresholds, reduce), scales[1:], strict=True):
            y = y + scale * mask
            da = da + g * scale * mask
            dscales.append(np.asarray(sum(g[mask]) / math.sqrt(max(mask.sum(), 1))))
        return Outcome(y, da, dscales)

    return oracle


def gsb_value(thresholds: tuple[float, ...], reduce: str, gradient: str = "official") -> Callable:
    """Sum over groups of a_i sign(x_i), x_1 = v, x_i = v T_{i-1}; what a mask leaves out contributes nothing.

    Window i is 1[|x_i/a_i| <= 1], so it is open wherever its mask leaves v out; "masked" closes it there.
    """

    def oracle(v: np.ndarray, g: np.ndarray, *scales: np.ndarray) -> Outcome:
        y, dv, dscales = np.zeros_like(v), np.zeros_like(v), []
        masks = [np.ones(v.shape, dtype=bool), *gsb_value_masks(v, thresholds, reduce)]
        for mask, scale in zip(masks, scales, strict=True):
            da = 0.0
            for i in np.ndindex(v.shape):
                x = v[i] if mask[i] else 0.0
                level = sgn(x) if mask[i] else 0.0
                inside = 1.0 if abs(x / scale) <= 1 else 0.0
                y[i] += scale * level
                dv[i] += g[i] * inside * (float(mask[i]) if gradient == "masked" else 1.0)
                da += (level - x / scale * inside) * g[i]
            dscales.append(np.asarray(da / math.sqrt(max(mask.sum(), 1))))
        return Outcome(y, dv, dscales)

    return oracle


def stacked(raw: list[float]) -> list[float]:
    """Level i less everything that the levels below it add up to."""
    steps: list[float] = []
    for level in raw:
        steps.append(level - sum(steps))
    return [max(step, SMALLEST) for step in steps]


def gsb_attention_levels(a: np.ndarray, thresholds: tuple[float, ...], reduce: str) -> list[float]:
    """Levels before they are stacked: 4 mean A, then 4 times the mean of A between one mask and the next."""
    masks = [*gsb_attention_masks(a, thresholds, reduce), np.zeros(a.shape, dtype=bool)]
    return [4 * a.mean()] + [4 * a[mask & ~above].mean() for mask, above in itertools.pairwise(masks)]


def gsb_value_levels(v: np.ndarray, thresholds: tuple[float, ...], reduce: str) -> list[float]:
    """Levels before they are stacked: twice the mean of |v| between one mask and the next."""
    masks = [np.ones(v.shape, dtype=bool), *gsb_value_masks(v, thresholds, reduce), np.zeros(v.shape, dtype=bool)]
    return [2 * np.abs(v[mask & ~above]).mean() for mask, above in itertools.pairwise(masks)]


WEIGHT: dict[str, Callable[..., Outcome]] = {
    "float": identity,
    "sign": sign_rule(),
    "sign_open": sign_rule(window="open"),
    "sign_through": sign_rule(window="through"),
    "sign_mean": sign_rule("row", "open", factor="xnor"),
    "sign_mean_constant": sign_rule("row", "open"),
    "sign_mean_exact": sign_rule("row", "open", center=True, factor="exact"),
    "sign_mean_bare": sign_rule("row", factor="bare"),
    "sign_mean_centred": sign_rule("row", center=True, factor="bare"),
    "sign_mean_centred_open": sign_rule("row", window="open", center=True),
    "sign_learned_centred": learned_row,
    "sign_learned_row": learned_factor,
    "sign_learned": learned_factor,
    "standardized": irnet_weight,
    "bwn": bwn(),
    "bwn_channel": bwn("channel"),
    "bwn_unscaled": bwn("none"),
    "int8": elastic(-128, 127),
    "int8_channel": elastic(-128, 127),
}
INPUT: dict[str, Callable[..., Outcome]] = {
    "float": identity,
    "sign": sign_rule(),
    "sign_open": sign_rule(window="open"),
    "elastic_bit": elastic(gradient="bit"),
    "sign_mean": sign_rule("row", "open"),
    "sign_approx": sign_rule(window="approx"),
    "sign_ede": ede,
    "elastic": elastic(),
    "elastic_unsigned": elastic(0, 1),
    "int8": elastic(-128, 127),
}
ATTENTION: dict[str, Callable[..., Outcome]] = {
    "float": identity,
    "half_max": map_threshold(),
    "half_max_mean": map_threshold(mean_scale=True),
    "half_max_approx": map_threshold(window="approx"),
    "half_max_ede": map_ede,
    "half_max_learned": map_learned,
    "quarter_max": map_threshold(share=0.25),
    "scores": score_sign,
    "three_maps": three_maps,
    "head_sign": head_sign,
    "elastic": elastic(0, 1),
    "elastic_small": elastic(0, 1, "sum"),
    "gsb": gsb_attention((0.7, 0.9), "row"),
}
QUERY = INPUT | {"head_sign": head_sign}
VALUE: dict[str, Callable[..., Outcome]] = {
    "float": identity,
    "sign": sign_rule(),
    "sign_open": sign_rule(window="open"),
    "elastic_bit": elastic(gradient="bit"),
    "sign_approx": sign_rule(window="approx"),
    "sign_ede": ede,
    "sign_mean": sign_rule("head", "open"),
    "sign_mean_token": sign_rule("row", "open"),
    "sign_learned": learned_factor,
    "head_sign": head_sign,
    "elastic": elastic(),
    "gsb": gsb_value((0.7, 0.9), "row"),
}
PLACES: dict[str, dict[str, Any]] = {
    "weight": WEIGHT,
    "mlp_weight": WEIGHT | {"as_weight": WEIGHT["bwn"]},
    "input": INPUT,
    "hidden": INPUT,
    "query": QUERY,
    "key": QUERY,
    "attention": ATTENTION,
    "value": VALUE,
    "patch_weight": WEIGHT,
    "patch_input": INPUT,
    "head_weight": WEIGHT,
    "head_input": INPUT,
}
