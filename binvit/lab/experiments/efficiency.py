"""What notebook 08 shows: latencies, bytes and growth of a binary vision transformer as figures, and its claims."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, NullLocator

import binvit
from binvit.lab.analysis.claims import Claim, check_value, not_run
from binvit.lab.benchmark.archived import read_bench
from binvit.lab.benchmark.machine import BUSY, cpu_of
from binvit.lab.benchmark.models import calibrated_model, random_model
from binvit.lab.figures.style import GREY, INK, caption, label_ends, require_columns, save_figure, scheme_color, styled
from binvit.packed import pack
from binvit.packed.audit import Audit, audit

REFERENCES = {1: ":", 2: "--"}  # powers of growth -> line style
OURS, THEIRS = scheme_color("gsb"), scheme_color("float")


@styled
def draw(models: pd.DataFrame, title: str | None = None) -> Figure:
    """Draw milliseconds per image as bars, one panel per batch size, the fastest on top, the kind of CPU in the title.

    Args:
        models: what `binvit.lab.benchmark.models.benchmark_models` returned.
        title: what the figure says besides.

    Returns:
        The figure.
    """
    require_columns(models, ["batch", "contender", "per_image", "low", "high"])
    batches = sorted(models["batch"].unique())
    rows = models["contender"].nunique()
    fig, axes = plt.subplots(1, len(batches), figsize=(3.9 * len(batches), 0.9 + 0.23 * rows), squeeze=False)
    for ax, batch in zip(axes[0], batches, strict=True):
        part = models[models["batch"] == batch].sort_values("per_image")
        colors = [OURS if name.startswith("binvit") else THEIRS for name in part["contender"]]
        ms = 1000 * part["per_image"].to_numpy()
        ax.barh(range(len(part)), ms, color=colors, height=0.62)
        spread = 1000 * part[["low", "high"]].to_numpy() / batch
        ax.hlines(range(len(part)), spread[:, 0], spread[:, 1], color=INK, lw=0.8)
        ends = np.maximum(ms, spread[:, 1])
        for y, (value, end) in enumerate(zip(ms, ends, strict=True)):
            ax.annotate(f"{value:.1f}", (end, y), (5, 0), textcoords="offset points", va="center", fontsize=7.5)
        ax.set_yticks(range(len(part)), part["contender"])
        ax.set_ylim(len(part) - 0.4, -0.6)
        ax.set_xlim(0, 1.15 * ends.max())
        ax.tick_params(axis="y", length=0)
        ax.grid(axis="y", visible=False)
        ax.set(xlabel="ms per image", title=f"batch of {batch}")
    caption(fig, "median; the line spans the quartiles")
    _head(fig, "\n".join(filter(None, [title, cpu_of(models)])))
    return fig


def _head(fig: Figure, title: str) -> None:
    fig.suptitle(title, x=0.01, ha="left", fontsize=9, fontweight="bold")


@styled
def draw_bytes(audit: Audit, title: str | None = None) -> Figure:
    """Draw a model's bytes by part and in total, in float32 and packed.

    Args:
        audit: what `binvit.packed.audit.audit` returned.
        title: what the figure says.

    Returns:
        The figure.
    """
    table = audit.table[["float32_bytes", "bytes"]]
    table = table[table.sum(axis=1) > 0].sort_values("bytes")
    table.loc["total"] = table.sum()
    fig, ax = plt.subplots(figsize=(6.4, 0.8 + 0.26 * len(table)))
    for y, (part, row) in enumerate(table.iterrows()):
        if row["float32_bytes"] > 0:  # scales exist in packed models alone
            ax.plot([row["bytes"], row["float32_bytes"]], [y, y], color=GREY, lw=1, zorder=1)
            ax.plot(row["float32_bytes"], y, "o", color=THEIRS, ms=6)
        ax.plot(row["bytes"], y, "o", color=OURS, ms=6)
        del part
    top = len(table) - 1
    last = table.iloc[-1]
    for value, color, text, side in (
        (last["bytes"], OURS, "packed", "right"),
        (last["float32_bytes"], THEIRS, "float32", "left"),
    ):
        shift = -6 if side == "right" else 6
        ax.annotate(
            text, (value, top), (shift, 0), textcoords="offset points", ha=side, va="center", color=color, fontsize=8
        )
    ax.set_yticks(range(len(table)), table.index)
    ax.set_xscale("log")
    ax.tick_params(axis="y", length=0)
    ax.set(xlabel="bytes", title=title)
    return fig


@styled
def draw_growth(growth: pd.DataFrame) -> Figure:
    """Draw how the latency of one image grows with tokens and with width, with lines of reference.

    The lines start at each contender's first point and show what growth in proportion and with the square would be. The
    title is the kind of CPU.

    Args:
        growth: what `binvit.lab.benchmark.models.benchmark_growth` returned.

    Returns:
        The figure.
    """
    kinds = list(growth["grows"].unique())
    fig, axes = plt.subplots(1, len(kinds), figsize=(3.6 * len(kinds), 2.9), squeeze=False, sharey=True)
    for ax, kind in zip(axes[0], kinds, strict=True):
        part = growth[growth["grows"] == kind]
        ends, colors = {}, {}
        for name, line in part.groupby("contender", sort=False):
            line = line.sort_values(kind)
            colors[name] = OURS if name.startswith("binvit") else THEIRS
            ax.plot(line[kind], 1000 * line["seconds"], color=colors[name], marker="o", mec="white", mew=0.8, ms=6)
            ends[name] = (line[kind].iloc[-1], 1000 * line["seconds"].iloc[-1])
            for power, style in REFERENCES.items():
                times = line["seconds"].iloc[0] * (line[kind] / line[kind].iloc[0]) ** power
                ax.plot(line[kind], 1000 * times, color=GREY, lw=0.7, ls=style, zorder=1)
        ax.set(xscale="log", yscale="log", xlabel=kind)
        ticks = sorted(part[kind].unique())
        ax.set_xticks(ticks, [f"{t:,}" for t in ticks])
        ax.xaxis.set_minor_locator(NullLocator())
        ax.yaxis.set_minor_formatter(NullFormatter())
        label_ends(ax, ends, colors, {name: name for name in ends})
    axes[0, 0].set_ylabel("ms for one image")
    caption(fig, "median; grey: growth in proportion (dotted) and with the square (dashed) from the first point")
    _head(fig, cpu_of(growth))
    return fig


def claims(
    kernels: pd.DataFrame, models: pd.DataFrame, training: pd.DataFrame | None = None, others: float = 0.0
) -> list[Claim]:
    """Check how many times as fast as their peers the products and the whole model are, at the worst shape and batch.

    A ratio is judged by its interval over rounds, and not at all if other programs used the machine meanwhile.

    Args:
        kernels: what `binvit.lab.benchmark.kernels.benchmark_kernels` returned.
        models: what `binvit.lab.benchmark.models.benchmark_models` returned.
        training: what `binvit.lab.benchmark.models.benchmark_training` returned, if it was measured.
        others: share of the cores that other programs used, as `binvit.lab.benchmark.machine` measures it.

    Returns:
        Claims whose verdicts depend on the machine.
    """
    found = [
        _speed(
            f"Each 1-bit product is at least {bound} times as fast as {peer}.",
            kernels[kernels["contender"] == peer],
            others,
            at_least=bound,
        )
        for peer, bound in (("torch float32", 10), ("torch bfloat16", 2), ("torch int8", 2))
    ]
    share = kernels["share_of_limit"].min()
    sentence = "The products reach 85 % of what the population count allows."
    found.append(_unless_busy(check_value(sentence, share, at_least=0.85), others))
    peers = models[~models["contender"].str.startswith("binvit")]
    floats = peers[peers["contender"] == "timm float32"]
    found.append(
        _speed("The whole model with GSB is at least 6 times as fast as timm in float32.", floats, others, at_least=6)
    )
    sentence = "The whole model with GSB is at least 1.2 times as fast as its fastest peer here."
    found.append(_speed(sentence, peers, others, at_least=1.2))
    if training is not None:
        steps = training[training["contender"] != "timm float32"]
        found.append(_speed("A training step takes at most 1.5 times the float step.", steps, others, at_most=1.5))
    return found


def _speed(
    sentence: str, rows: pd.DataFrame, others: float, at_least: float | None = None, at_most: float | None = None
) -> Claim:
    """Judge the worst ratio by its interval over rounds."""
    if rows.empty:
        return not_run(sentence)
    worst = rows.loc[rows["times"].idxmin() if at_most is None else rows["times"].idxmax()]
    low, high, bound = worst["times_low"], worst["times_high"], at_least if at_most is None else at_most
    above, below = low >= bound, high < bound
    yes, no = (above, below) if at_most is None else (high <= bound, low > bound)
    demanded = f"at {'least' if at_most is None else 'most'} {bound:g} demanded"
    evidence = f"{worst['times']:.2f} (95 % interval over rounds {low:.2f} to {high:.2f}; {demanded})"
    return _unless_busy(Claim(sentence, "yes" if yes else "no" if no else "undecided", evidence), others)


def _unless_busy(claim: Claim, others: float) -> Claim:
    if others <= BUSY:
        return claim
    return Claim(claim.sentence, "undecided", f"{claim.evidence}; other programs used {others:.0%} of the cores")


def redraw(archive: str | Path, out: str | Path) -> None:
    """Draw the archived measurements of the first kind of CPU, and the bytes of a DeiT-S.

    Args:
        archive: folder of archived measurements.
        out: folder of the figures.
    """
    models, growth = (read_bench(archive, part) for part in ("models", "growth"))
    if len(models):
        save_figure(draw(models[models["cpu"] == models["cpu"].iloc[0]], "DeiT-S, 224 x 224"), "08_latency", out)
    if len(growth):
        save_figure(draw_growth(growth[growth["cpu"] == growth["cpu"].iloc[0]]), "08_growth", out)
    trained = calibrated_model(random_model(classes=1000), "binvit gsb")
    counted = audit(pack(binvit.round_vectors(trained)))
    save_figure(draw_bytes(counted, "Bytes of DeiT-S by part"), "08_bytes", out)


def size_claims(rounded: Audit, differences: np.ndarray, unrounded: Audit) -> list[Claim]:
    """Check size and exactness of a model with float16 vectors, which are the same on every machine.

    Args:
        rounded: the audit of the packed model whose vectors `binvit.round_vectors` rounded.
        differences: logits of its exact path minus those of the rounded model before packing.
        unrounded: the audit of the packed model with float32 vectors, for the evidence.

    Returns:
        The claims.
    """
    whole = rounded.totals
    shares = f"{100 * rounded.share:.1f} % (at most 5 % demanded; {100 * unrounded.share:.1f} % with float32 vectors)"
    return [
        check_value(
            "With float16 vectors, the packed file is at most 5 % of the float32 file.",
            rounded.share,
            at_most=0.05,
            evidence=shares,
        ),
        check_value("The exact path gives the rounded model's logits bit for bit.", not differences.any()),
        check_value(
            "Most of the operations that are left are binary.",
            float(whole["binary_ops"] / 64 / whole["ops"]),
            at_least=0.5,
        ),
    ]
