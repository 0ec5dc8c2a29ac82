"""What makes GSB work: its parts changed one at a time, and the claims of that experiment."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from binvit.lab.analysis.batches import batch_dependence
from binvit.lab.analysis.claims import Claim, check_pair, check_value, confirm
from binvit.lab.analysis.statistics import summarize
from binvit.lab.analysis.tensor_losses import sample_images
from binvit.lab.analysis.verdicts import BEST, DISTILLATION_HELPS, GRADIENT_HELPS, SUPERPOSITION_HELPS
from binvit.lab.data.datasets import load_data
from binvit.lab.experiments.design.plan import BOTH_BIASES, Condition, Run, notebook_runs
from binvit.lab.experiments.methods import with_notes
from binvit.lab.figures.panels import dot_panels
from binvit.lab.training.recipe import Recipe
from binvit.lab.training.recipes import mlp_weights_stage
from binvit.lab.trials.measurements import add_measurements, read_measurements
from binvit.lab.trials.trained import load_trained
from binvit.lab.trials.tune import equal_terms

GSB = "GSB with its bias"
BATCHES_TABLE = "05_batches"  # of the archive
_REDUCTION = "reduction: "  # begins the names of the conditions whose models are measured
_FLOOR = -0.15  # of the figure: few levels lose more, and most change three points or less
_MEASURED = ["largest_change", "flipped", "images"]
ROUNDING = 1e-5  # of logits: what float sums in another order may change


def _all_epochs(recipe: Recipe) -> int:
    return recipe.epochs + sum(stage.epochs for stage in recipe.stages)


def _one_stage(recipe: Recipe) -> dict[str, Any]:
    return {"stages": (), "epochs": _all_epochs(recipe)}


def _two_stages(recipe: Recipe) -> dict[str, Any]:
    first = max(1, round(_all_epochs(recipe) * 2 / 3))  # as published: 600 of 900 epochs
    return {"stages": (mlp_weights_stage(first),), "epochs": max(1, _all_epochs(recipe) - first)}


def _gsb(name: str, **scheme_options: Any) -> Condition:
    return Condition(name, "gsb", scheme_options)


_HARD = "hard teacher"
_TAUGHT: tuple[tuple[str, Mapping[str, Any] | Callable[[Recipe], Mapping[str, Any]]], ...] = (
    ("soft teacher", {"distillation": "soft"}),
    (_HARD, {"distillation": "hard"}),
    ("hard, two stages", lambda recipe: {"distillation": "hard", **_two_stages(recipe)}),
)

# What is changed -> its levels. One level of each is what GSB does anyway: the same trial, trained once. The schemes
# stand on equal terms instead, as in every comparison: the bias as said, no limit.
FACTORS: dict[str, tuple[Condition, ...]] = {
    "groups": (
        Condition("1", "elastic"),
        _gsb("2, from 0.7", thresholds=(0.7,)),
        _gsb("3, from 0.7 and 0.9", thresholds=(0.7, 0.9)),
        _gsb("4, from 0.5, 0.7 and 0.9", thresholds=(0.5, 0.7, 0.9)),
    ),
    "superposition": (
        Condition("of neither", "elastic"),
        _gsb("of the map", value="elastic"),
        _gsb("of the value", attention="elastic"),
        _gsb("of both"),
    ),
    "reduction": (
        _gsb("over a row", reduce="row"),
        _gsb("over a head", reduce="head"),
        _gsb("over an image", reduce="sample"),
        _gsb("over the batch", reduce="batch"),
    ),
    "gradient": (_gsb("as released", gradient="official"), _gsb("masked", gradient="masked")),
    "scales": (_gsb("stacked", init="stacked"), _gsb("as released", init="official")),
    "bias": (
        _gsb("full", attention_bias="full"),
        _gsb("relative", attention_bias="relative"),
        _gsb("none", attention_bias="none"),
    ),
    "limit of activations": (_gsb("10", activation_limit=10.0), _gsb("none", activation_limit=None)),
    "distillation": tuple(
        Condition(kind, "gsb", recipe_options={"distillation": kind}) for kind in ("none", "soft", "hard")
    ),
    "training": (
        Condition("one stage", "gsb", recipe_options=_one_stage),
        Condition("two stages", "gsb", recipe_options=_two_stages),
    ),
    "scheme": tuple(
        Condition(f"{name}, {words} bias", name, equal_terms(bias))
        for name in BOTH_BIASES
        for words, bias in (("without", "none"), ("with", "full"))
    )
    + tuple(
        Condition(f"{name}, {words}", name, equal_terms("full"), options)
        for name in ("elastic", "gsb")
        for words, options in _TAUGHT
    ),
}


def conditions(factors: Sequence[str] = ("all",)) -> list[Condition]:
    """Return GSB as the catalogue has it, and with each factor at each of its levels while the others stay.

    Args:
        factors: keys of `FACTORS`; "all" stands for all of them.
    """
    levels = [(factor, level) for factor in (FACTORS if "all" in factors else factors) for level in FACTORS[factor]]
    named = [
        Condition(f"{factor}: {level.name}", level.scheme, level.scheme_options, level.recipe_options)
        for factor, level in levels
    ]
    return [Condition(GSB, "gsb"), *named]


def kept(chosen: Sequence[Condition]) -> set[str]:
    """Return the names of the conditions whose models `measure_batches` needs."""
    return {condition.name for condition in chosen if condition.name.startswith(_REDUCTION)}


def runs(p: Any) -> list[Run]:
    """Return what the notebook trains with these parameters."""
    chosen = conditions(p.factors)
    return notebook_runs(chosen, p, kept(chosen))


def with_levels(table: pd.DataFrame) -> pd.DataFrame:
    """Add the columns factor and level, and drop the rows of GSB itself, which is a level of every factor.

    Args:
        table: the result of `plan.train` or `statistics.differences` for conditions of `conditions`.
    """
    table = table[table["condition"] != GSB]
    names = table["condition"].str.split(": ", n=1, expand=True).reindex(columns=[0, 1])
    return table.assign(factor=names[0], level=names[1])


def changes(table: pd.DataFrame) -> pd.DataFrame:
    """Return what every change of GSB costs or gains, seed by seed, for a figure.

    Args:
        table: the result of `plan.train` for conditions of `conditions`.

    Returns:
        One row per data set, level and seed with the column difference. The level that is GSB itself has no row; the
        factor's name tells it instead.
    """
    base = table[table["condition"] == GSB].set_index(["data", "seed"])
    levels = with_levels(table)
    at = pd.MultiIndex.from_frame(levels[["data", "seed"]])
    levels = levels.assign(difference=levels["test_accuracy"].to_numpy() - base["test_accuracy"].reindex(at).to_numpy())
    same = levels["id"].to_numpy() == base["id"].reindex(at).to_numpy()
    own = levels[same].drop_duplicates(["data", "factor"]).set_index(["data", "factor"])["level"]
    keys = zip(levels["data"], levels["factor"], strict=True)
    names = [f"{factor} (GSB: {own[data, factor]})" if (data, factor) in own else factor for data, factor in keys]
    return levels.assign(factor=names)[~same].dropna(subset=["difference"])  # GSB itself may not be in an archive


def draw(differences: pd.DataFrame) -> Figure:
    """Draw what every change of GSB gains or costs, a row per level below its factor, and what does not train.

    Args:
        differences: the result of `changes`.
    """
    summary = summarize(differences, ["data", "factor", "level", "scheme"], "difference")
    summary = with_notes(summary, differences, ["data", "factor", "level"])
    layout: dict[str, Any] = {
        "floor": _FLOOR,
        "sort": False,
        "scheme": "scheme",
        "xlabel": "change of test accuracy (points)",
    }
    return dot_panels(summary, differences, "level", "factor", reference="0", value="difference", **layout)


def archived_batches(table: pd.DataFrame, archive: str | Path) -> pd.DataFrame:
    """Return what an archive knows of the models that `measure_batches` measures.

    Args:
        table: the result of `plan.train` for conditions of `conditions`.
        archive: folder of archived measurements.

    Returns:
        The table of `measure_batches`.
    """
    known = read_measurements(archive, BATCHES_TABLE).reindex(columns=["id", *_MEASURED])
    measured = table.loc[table["condition"].str.startswith(_REDUCTION), ["id", "condition", "data", "seed"]]
    return with_levels(measured.merge(known, on="id").drop(columns="id"))


def take_measurements(p: Any, results_dir: str | Path, archive: str | Path) -> int:
    """Measure the kept models of a notebook's trials as `measure_batches` does, and archive what was found.

    Args:
        p: the notebook's parameters.
        results_dir: where the models are; trials without one are left out.
        archive: folder of the archive.

    Returns:
        How many models were measured.
    """
    known, count = read_measurements(archive, BATCHES_TABLE), 0
    for run in runs(p):
        try:
            if not run.keep_model or (len(known) and run.trial.id in set(known["id"])):
                continue
            found = measure_batches([run], results_dir)
        except FileNotFoundError:  # its images or its model
            continue
        rows = found[_MEASURED].assign(id=run.trial.id)[["id", *_MEASURED]]
        add_measurements(archive, BATCHES_TABLE, rows, ["id"])
        count += 1
    return count


def measure_batches(
    runs: Sequence[Run], results_dir: str | Path, images: int = 256, batch_size: int = 32
) -> pd.DataFrame:
    """Measure how far the logits of trained models depend on which images share a batch.

    Args:
        runs: those of conditions that `kept` names are measured; their models must have been kept.
        results_dir: where the models are.
        images: how many test images are classified twice, in differently composed batches.
        batch_size: images of a batch; half of the test images if they do not fill two batches.

    Returns:
        One row per run: condition, data, seed, largest_change of a logit and the share of predictions flipped.
    """
    rows, seen = [], {}
    for run in runs:
        if not run.condition.startswith(_REDUCTION):
            continue
        trained = load_trained(run.trial, results_dir)
        if run.data not in seen:
            data = load_data(run.trial.dataset, root=run.trial.root, image_size=trained.image_size)
            seen[run.data] = sample_images(data, "test", images)
        together = min(batch_size, len(seen[run.data]) // 2)  # it takes two batches to change a batch's company
        found = batch_dependence(trained.model, seen[run.data], together, run.trial.seed)
        rows.append({"condition": run.condition, "data": run.data, "seed": run.trial.seed} | found)
    return with_levels(pd.DataFrame(rows, columns=["condition", "data", "seed", *_MEASURED]))


def claims(table: pd.DataFrame, batches: pd.DataFrame, margin: float = 0.02) -> list[Claim]:
    """Check what the GSB paper claims about its parts, and what this project changed in them.

    Args:
        table: the result of `plan.train` for one kind of images.
        batches: the result of `measure_batches`.
        margin: what "close" means, as a share of the test images.
    """
    levels = with_levels(table)
    points = f"{100 * margin:g} points"

    def better(sentence: str, factor: str, a: str, b: str, least: float = 0.0) -> Claim:
        return check_pair(sentence, levels[levels["factor"] == factor], a, b, least, on="level")

    change = batches[batches["data"].isin(table["data"])].groupby("level")["largest_change"].max()
    own = [change[name] for name in ("over a row", "over a head", "over an image") if name in change]
    three, four = "3, from 0.7 and 0.9", "4, from 0.5, 0.7 and 0.9"
    return [
        *confirm(
            SUPERPOSITION_HELPS,
            better("Three groups are more accurate than one.", "groups", three, "1"),
            better("Superposition of the attention map alone helps.", "superposition", "of the map", "of neither"),
            better("Superposition of the value alone helps.", "superposition", "of the value", "of neither"),
        ),
        *confirm(
            GRADIENT_HELPS,
            better("The released gradient is more accurate than the masked one.", "gradient", "as released", "masked"),
        ),
        *confirm(DISTILLATION_HELPS, better("Hard distillation helps.", "distillation", "hard", "none")),
        *confirm(
            BEST,
            better(
                "With its bias, GSB is more accurate than float.", "scheme", "gsb, with bias", "float, without bias"
            ),
        ),
        better(
            "With its bias, GSB is more accurate than float with the same bias.",
            "scheme",
            "gsb, with bias",
            "float, with bias",
        ),
        better(
            f"The bias of the map gains float more than {points}.",
            "scheme",
            "float, with bias",
            "float, without bias",
            margin,
        ),
        better(f"The bias of the map gains GSB more than {points}.", "bias", "full", "none", margin),
        better(f"A fourth group gains less than {points}.", "groups", three, four, -margin),
        better(
            f"Maxima over a row are within {points} of maxima over the batch, or better.",
            *("reduction", "over a row", "over the batch", -margin),
        ),
        check_value(
            "With maxima over the batch, as released, an image's logits depend on the other images.",
            change.get("over the batch"),
            at_least=ROUNDING,
        ),
        check_value(
            "With maxima within an image, its logits do not depend on the others.",
            max(own) if own else None,
            at_most=ROUNDING,
        ),
        better("Scales that stack up from the start are better than as released.", "scales", "stacked", "as released"),
        better("Two stages are better than one of as many epochs.", "training", "two stages", "one stage"),
        better("Soft distillation helps.", "distillation", "soft", "none"),
        better("Soft distillation is better than hard.", "distillation", "soft", "hard"),
        better("On equal terms, a hard teacher helps GSB.", "scheme", f"gsb, {_HARD}", "gsb, with bias"),
        better(
            "On equal terms, a hard teacher helps elastic binarization.",
            *("scheme", f"elastic, {_HARD}", "elastic, with bias"),
        ),
        better(
            "With a hard teacher each, GSB is more accurate than elastic binarization.",
            *("scheme", f"gsb, {_HARD}", f"elastic, {_HARD}"),
        ),
    ]
