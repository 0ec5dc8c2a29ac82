"""Wide with one bit or small with floats: accuracy against the bytes and the milliseconds of a whole model."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from safetensors.torch import save as serialize

import binvit
from binvit.lab.analysis.claims import Claim, check_difference
from binvit.lab.analysis.statistics import Difference, estimate, readable, summarize
from binvit.lab.benchmark.machine import LoadWatch, cpu_of, describe_cpu, kernels_version
from binvit.lab.benchmark.timing import interleave, use_threads
from binvit.lab.data.datasets import ImageData, load_data
from binvit.lab.experiments.design.plan import Condition, Run, archive_dir, loader, notebook_runs
from binvit.lab.figures.panels import subplot_grid
from binvit.lab.figures.style import axis_name, caption, colors_of, styled
from binvit.lab.training.model import build_model
from binvit.lab.trials.archive import find, is_present
from binvit.lab.trials.measurements import add_measurements, read_measurements
from binvit.lab.trials.tune import equal_terms
from binvit.packed.files import to_bytes

COSTS = ("bytes", "ms")
QUARTILES = {"low": "ms_low", "high": "ms_high"}  # columns of a measurement -> of a table of trials
UNMEASURED = "costs not measured"
TABLE = "09_sizes"
_KEYS = ("data", "scheme", "width")
_BELOW = 0.03  # how far below the lowest mean a seed is drawn at its place
_MEASURED = (*_KEYS, *COSTS, "low", "high", "others", "cpu", "kernels")


def conditions(float_widths: Sequence[int], binary_widths: Sequence[int], schemes: Sequence[str]) -> list[Condition]:
    """Return the float model and the 1-bit schemes on equal terms, at each of their widths.

    Args:
        float_widths: features per token of the float models.
        binary_widths: features per token of the 1-bit models.
        schemes: names of 1-bit schemes.
    """
    sizes = [("float", width) for width in float_widths]
    sizes += [(scheme, width) for scheme in schemes for width in binary_widths]
    return [
        Condition(f"{scheme}, width {width}", scheme, equal_terms(), functools.partial(_options, width=width))
        for scheme, width in sizes
    ]


def _options(recipe: Any, width: int) -> dict[str, Any]:
    heads = max(heads for heads in range(1, recipe.heads + 1) if width % heads == 0)
    return {"width": width, "heads": heads}


def runs(p: Any) -> list[Run]:
    """Return what the notebook trains with these parameters."""
    return notebook_runs(conditions(p.float_widths, p.binary_widths, p.schemes), p)


def with_widths(table: pd.DataFrame) -> pd.DataFrame:
    """Add the column width.

    Args:
        table: the result of `plan.train` for `conditions`.
    """
    return table.assign(width=[int(name.rpartition(" ")[2]) for name in table["condition"]])


def measure(runs: Sequence[Run], load: Any, seconds: float = 1.0) -> pd.DataFrame:
    """Measure the file and the latency of every model that is compared; neither depends on what it was trained to.

    Float models are written in float32 and run as timm builds them; 1-bit models are packed. Latencies are of one image
    on one thread, all models of the same images in turn.

    Args:
        runs: the result of `runs`.
        load: what loads images, as `plan.loader` gives it.
        seconds: time per model, roughly.

    Returns:
        One row per kind of images, scheme and width: bytes of the file, ms (median), low and high (quartiles), the
        share of the cores that others used meanwhile, the kind of CPU and the version of the kernels.
    """
    rows: list[dict[str, Any]] = []
    for data in dict.fromkeys(run.data for run in runs):
        own = {run.condition: run for run in reversed(runs) if run.data == data}
        contenders, sizes = {}, {}
        trial = next(iter(own.values())).trial
        images = load(trial.dataset, root=trial.root)
        for name, run in own.items():
            model, sizes[name] = _model(run, images)
            side = run.trial.get_recipe().image_size or images.image_size
            contenders[name] = functools.partial(_classify, model, torch.zeros(1, 3, side, side))
        watch = LoadWatch()
        with use_threads(1):
            times = interleave(contenders, seconds)
        others = watch.stop().others
        for name, run in own.items():
            low, median, high = 1000 * np.quantile(times[name], (0.25, 0.5, 0.75))
            row: dict[str, Any] = dict(zip(_KEYS, _key(run), strict=True))
            row |= {"bytes": sizes[name], "ms": median, "low": low, "high": high}
            rows.append(row | {"others": round(others, 3), "cpu": describe_cpu(), "kernels": kernels_version()})
    return pd.DataFrame(rows, columns=list(_MEASURED)).sort_values(list(_KEYS), ignore_index=True)


def _key(run: Run) -> tuple[str, str, int]:
    return run.data, run.trial.scheme, run.trial.get_recipe().width


def _model(run: Run, data: ImageData) -> tuple[Any, int]:
    recipe, side = run.trial.get_recipe(), run.trial.get_recipe().image_size or data.image_size
    torch.manual_seed(0)
    model = build_model(recipe, len(data.classes), side).eval()
    scheme = run.trial.get_scheme()
    if not scheme.components:
        return model, len(serialize(model.state_dict()))
    packed = binvit.pack(binvit.calibrate(binvit.binarize(model, scheme).eval(), torch.randn(8, 3, side, side)))
    return packed, len(to_bytes(packed))


@torch.inference_mode()
def _classify(model: Any, image: torch.Tensor) -> None:
    model(image)


def take_measurements(p: Any, results_dir: str | Path, archive: str | Path) -> int:
    """Measure the models of a notebook here, and archive bytes and milliseconds with this kind of CPU.

    Args:
        p: the notebook's parameters.
        results_dir: not looked at; what is measured does not depend on trained weights.
        archive: folder of the archive.

    Returns:
        How many kinds of images were measured: all models of those of which this kind of CPU lacks one with today's
        kernels. Those without an archived trial, and those whose files are absent, so that nobody knows their size, are
        left out.
    """
    known, asked, now = (
        read_measurements(archive, TABLE).reindex(columns=list(_MEASURED)),
        runs(p),
        (describe_cpu(), kernels_version()),
    )
    done = set(known[[*_KEYS, "cpu", "kernels"]].itertuples(index=False, name=None))
    lacking = {run.data for run in asked if (*_key(run), *now) not in done}
    new = [run for run in asked if run.data in lacking and is_present(run.trial.dataset, run.trial.root)]
    shown = {run.data for run in new if find(run.trial, archive) is not None}
    left = [run for run in asked if run.data in shown]
    if left:  # with the images themselves: blank ones that stand for absent files are not of their size
        add_measurements(archive, TABLE, measure(left, load_data), [*_KEYS, "cpu"])
    return len({run.data for run in left})


def sizes(runs: Sequence[Run], p: Any) -> pd.DataFrame:
    """Return bytes and milliseconds of the models: those that the archive has, without an archive measured here.

    Args:
        runs: the result of `runs`.
        p: the notebook's parameters.
    """
    archive = archive_dir(p)
    return measure(runs, loader(p)) if archive is None else read_measurements(archive, TABLE)


def with_costs(table: pd.DataFrame, sizes: pd.DataFrame) -> pd.DataFrame:
    """Add bytes, milliseconds and their quartiles of each trial's model, from the first kind of CPU that measured it.

    Args:
        table: the result of `with_widths`.
        sizes: the result of `measure`, or what an archive has of it.

    Returns:
        The table with the columns of `COSTS` and of `QUARTILES`, NaN where nothing was measured, cpu and kernels.
    """
    measured = sizes.reindex(columns=list(_MEASURED)).rename(columns=QUARTILES)
    first = measured[measured["cpu"] == measured.groupby("data")["cpu"].transform("first")]
    if first.empty:
        return table.assign(**dict.fromkeys([*COSTS, *QUARTILES.values()], np.nan), cpu="", kernels="")
    return table.merge(first[[*_KEYS, *COSTS, *QUARTILES.values(), "cpu", "kernels"]], on=list(_KEYS), how="left")


def accuracies(table: pd.DataFrame, runs: Sequence[Run]) -> pd.DataFrame:
    """Return each model's bytes and rate, the mean accuracy on test images and that on training images, for reading.

    Args:
        table: the result of `with_costs`.
        runs: the result of `runs`.
    """
    rates = {(run.data, run.condition): f"{run.trial.get_recipe().lr:g}" for run in runs}
    told = table.assign(
        bytes=table["bytes"].map("{:,.0f}".format).where(table["bytes"].notna(), UNMEASURED),
        rate=[rates[key] for key in zip(table["data"], table["condition"], strict=True)],
    )
    model = ["data", "scheme", "width", "bytes", "rate"]
    fitted = summarize(told, model, "train_accuracy")["mean"]
    return readable(summarize(told, model), name="test accuracy").assign(training=[f"{100 * x:.1f}" for x in fitted])


def unmeasured(table: pd.DataFrame) -> str:
    """Return which models have no known costs, as text: all of a kind of images, or some; empty if all have them.

    Args:
        table: the result of `with_costs`.
    """
    names = []
    for data, part in table.groupby("data", sort=False):
        lacking = part[list(COSTS)].isna().any(axis=1)
        if lacking.any():
            names.append(data if lacking.all() else f"{data} ({'; '.join(part.loc[lacking, 'condition'].unique())})")
    return f"{UNMEASURED}: {', '.join(names)}" if names else ""


def gains(table: pd.DataFrame, scheme: str, cost: str) -> pd.Series:
    """Return by how much a scheme is more accurate than float models of the same cost, seed by seed.

    Between two float models of neighbouring cost the accuracy is taken to run straight over the logarithm of the cost.
    1-bit models that are cheaper than the smallest float model, or dearer than the largest, are compared with none.

    Args:
        table: the result of `with_costs` for one kind of images.
        scheme: the 1-bit scheme.
        cost: an element of `COSTS`.

    Returns:
        The mean difference over the scheme's widths by seed, without seeds that have none.
    """
    found = {}
    for seed, part in table.dropna(subset=[cost]).groupby("seed"):
        floats = part[part["scheme"] == "float"].sort_values(cost)
        own = part[part["scheme"] == scheme]
        own = own[own[cost].between(floats[cost].min(), floats[cost].max())]
        if len(own) and len(floats) > 1:
            there = np.interp(np.log(own[cost]), np.log(floats[cost]), floats["test_accuracy"])
            found[seed] = float((own["test_accuracy"] - there).mean())
    return pd.Series(found, dtype=float)


def claims(table: pd.DataFrame) -> list[Claim]:
    """Check whether a 1-bit model is the better choice at equal bytes and at equal milliseconds.

    Bytes are exact, milliseconds are not: where their quartiles are known, a verdict holds only if it comes out alike
    with the medians and with the quartiles that favour either side (one side's lower, the other's upper ones).

    Args:
        table: the result of `with_costs` for one kind of images.

    Returns:
        The claims, all of them ours; undecided where no sizes overlap or costs were not measured.
    """
    words = {"bytes": "of as many bytes", "ms": "that take as long on this kind of CPU"}
    found = []
    for cost, text in words.items():
        for scheme in dict.fromkeys(table["scheme"]):
            if scheme == "float":
                continue
            sentence = f"{scheme} is more accurate than float models {text}."
            if any(table.loc[table["scheme"] == name, cost].isna().all() for name in ("float", scheme)):
                found.append(Claim(sentence, "undecided", UNMEASURED))
                continue
            claim, *others = (_compare(sentence, part, scheme, cost) for part in _readings(table, cost))
            if any(other.verdict != claim.verdict for other in others):
                evidence = f"{claim.evidence} with the medians, but not throughout the quartiles of the times"
                claim = Claim(sentence, "undecided", evidence)
            found.append(claim)
    return found


def _compare(sentence: str, table: pd.DataFrame, scheme: str, cost: str) -> Claim:
    if len(set(table.loc[table["scheme"] == "float", cost].dropna())) == 1:
        return Claim(sentence, "undecided", "one width of float was run, and it takes two to compare at equal cost")
    differences = gains(table, scheme, cost)
    if differences.empty:
        own, floats = (table.loc[table["scheme"] == name, cost] for name in (scheme, "float"))
        cheaper = f": each of {scheme} costs less than the smallest of float" if own.max() < floats.min() else ""
        return Claim(sentence, "undecided", f"no sizes overlap{cheaper}")
    found = estimate(differences)
    paired = Difference(found.mean, found.low, found.high, found.n, a=scheme, b="float", value="test_accuracy")
    claim = check_difference(sentence, paired)
    costs = table.loc[table["scheme"] == scheme].groupby("width")[cost].first()
    inside = costs.between(*table.loc[table["scheme"] == "float", cost].agg(["min", "max"]))
    return dataclasses.replace(claim, evidence=f"{claim.evidence}; {inside.sum()} of {len(costs)} widths overlap")


def _readings(table: pd.DataFrame, cost: str) -> list[pd.DataFrame]:
    """Return the table, and for times also as the quartiles favour float models, then the 1-bit ones."""
    if cost != "ms" or not set(QUARTILES.values()) <= set(table):
        return [table]
    low, high = (table[name].fillna(table["ms"]) for name in QUARTILES.values())
    floats = table["scheme"] == "float"
    return [table, table.assign(ms=low.where(floats, high)), table.assign(ms=high.where(floats, low))]


@styled
def draw(table: pd.DataFrame) -> Figure:
    """Draw test accuracy against bytes and against milliseconds, with the front of what no other model beats.

    Args:
        table: the result of `with_costs`; models that were not measured are not drawn, and the caption names them.
    """
    colors = colors_of(table["scheme"])

    def panel(part: pd.DataFrame, cost: str, ax: Axes) -> None:
        means = part.groupby(["scheme", "width", cost], sort=False)["test_accuracy"].mean().reset_index()
        floor = means["test_accuracy"].min() - _BELOW
        for scheme, line in means.groupby("scheme", sort=False):
            own = part[part["scheme"] == scheme]
            style: dict[str, Any] = {"color": colors[scheme], "alpha": 0.4, "ms": 2.6, "mew": 0}
            ax.plot(own[cost], 100 * own["test_accuracy"].where(own["test_accuracy"] >= floor), "o", **style)
            low = own.loc[own["test_accuracy"] < floor, cost]
            ax.plot(low, [100 * floor] * len(low), "v", **style | {"ms": 4})
            dots: dict[str, Any] = {"color": colors[scheme], "mec": "white", "mew": 0.8, "ms": 6}
            ax.plot(line[cost], 100 * line["test_accuracy"], "o", **dots, label=str(scheme))
        front = means.sort_values([cost, "test_accuracy"], ascending=[True, False])
        front = front[front["test_accuracy"] > front["test_accuracy"].cummax().shift(fill_value=-1.0)]
        ax.step(front[cost], 100 * front["test_accuracy"], where="post", color="0.6", lw=0.9, zorder=1)
        ax.set(xscale="log", xlabel="kB of the file" if cost == "bytes" else "ms for one image, one thread")
        ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.xaxis.set_major_formatter(lambda x, _: f"{x / 1000 if cost == 'bytes' else x:g}")
        ax.xaxis.set_minor_formatter(NullFormatter())
        ax.set_ylabel(axis_name("test_accuracy"))
        if cost == COSTS[0]:
            ax.legend(loc="lower right")

    fig = subplot_grid(table.dropna(subset=list(COSTS)), COSTS, panel, None)
    told = ["large: mean over the seeds, small: single seeds (triangles lie lower); line: the front"]
    if "cpu" in table:
        measured = table[table["ms"].notna()].groupby("data", sort=False)
        told += [f"milliseconds of {data}: {cpu_of(part)}" for data, part in measured]
    caption(fig, "\n".join(filter(None, [*told, unmeasured(table)])))
    return fig
