"""All published binarizers on the same model: families, published numbers, and the claims of that experiment."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

import binvit
from binvit.lab.analysis.claims import LEAST, UNTRAINED, Claim, all_of, check_pair, confirm
from binvit.lab.analysis.statistics import averaged, summarize
from binvit.lab.analysis.verdicts import BEST, CNN_DO_NOT_TRANSFER, SUPERPOSITION_HELPS
from binvit.lab.experiments.design.baselines import measurements_of
from binvit.lab.experiments.design.plan import BOTH_BIASES, WITH_BIAS, Condition, Run, notebook_runs, with_bias
from binvit.lab.figures.charts import mark
from binvit.lab.figures.panels import dot_panels

FAMILIES: dict[str, tuple[str, ...]] = {
    "full precision": ("float",),
    "made for CNNs": ("bnn", "xnor", "xnor-k", "xnor++", "bireal", "irnet", "reactnet"),
    "made for transformers": ("bibert", "bit", "bivit", "bivit-head", "binaryvit", "bhvit-qd"),
    "group superposition": ("elastic", "gsb"),
}
CNN, TRANSFORMER = list(FAMILIES)[1:3]
PUBLISHED = ("notebook", "data", "model", "scheme", "what", "top1", "source", "grade")


def check_scheme(name: str) -> None:
    """Raise a ValueError unless `conditions` understands the name."""
    if name != "all":
        binvit.scheme(name)


def conditions(schemes: Sequence[str], biased: bool = True) -> list[Condition]:
    """Return one condition per scheme without the bias of the map, in the order of the families, then some with it.

    Args:
        schemes: names of `binvit.list_schemes`; "all" stands for all of them.
        biased: also show those of `plan.BOTH_BIASES` with the bias.
    """
    schemes = sorted(binvit.list_schemes() if "all" in schemes else schemes, key=_place)
    levels = [("none", "full") if biased and name in BOTH_BIASES else ("none",) for name in schemes]
    return [with_bias(name, bias) for name, biases in zip(schemes, levels, strict=True) for bias in biases]


def runs(p: Any) -> list[Run]:
    """Return what the notebook trains with these parameters."""
    return notebook_runs(conditions(p.schemes, p.biased), p)


def family(scheme: str) -> str:
    """Return what kind of networks a scheme was made for, a key of `FAMILIES`; schemes of one's own are "other"."""
    return next((name for name, members in FAMILIES.items() if scheme in members), "other")


def _place(scheme: str) -> int:
    known = [name for members in FAMILIES.values() for name in members]
    return known.index(scheme) if scheme in known else len(known)


def with_families(table: pd.DataFrame, guessing: Mapping[str, float]) -> pd.DataFrame:
    """Add the columns family and trains, which is false where the mean is below three times chance.

    Args:
        table: the result of `plan.train` for `conditions`.
        guessing: the result of `plan.chance`.
    """
    mean = table.groupby(["data", "condition"])["test_accuracy"].transform("mean")
    trains = mean.astype(float) >= LEAST * table["data"].map(guessing).astype(float)
    families = [family(scheme) if good else UNTRAINED for scheme, good in zip(table["scheme"], trains, strict=True)]
    return table.assign(family=families, trains=trains)


def claims(table: pd.DataFrame, margin: float = 0.05) -> list[Claim]:
    """Check what the GSB paper claims about other binarizers, and one order that another paper has published.

    Schemes that do not train are compared with nothing. Unless a sentence says so, no scheme has a bias of the map.

    Args:
        table: the result of `with_families` for one kind of images.
        margin: what "far" and "close" mean, as a share of the test images.

    Returns:
        The claims; their sentences say so if not all schemes of the catalogue that they are about were run.
    """
    run = set(table["condition"])
    table = table[table["trains"]]
    plain = [name for name in dict.fromkeys(table["condition"]) if not name.endswith(WITH_BIAS)]
    rivals = [name for name in plain if name not in ("float", "gsb")]
    points = f"{100 * margin:g} points"
    absent = [name for name in binvit.list_schemes() if name not in run]
    one, several = (" that was run", " that were run") if absent else ("", "")
    of_networks = " that were run" if any(family(name) == CNN for name in absent) else ""

    def pair(a: str, b: str, least: float = 0.0, sentence: str = "") -> Claim:
        return check_pair(sentence or f"{a} exceeds {b}", table, a, b, least, on="condition")

    whole = table[table["condition"].isin(plain)]
    complete = whole.groupby("seed")["condition"].transform("nunique") == len(plain)
    families = averaged(whole[complete], "family")  # a seed of fewer schemes would have another mean
    transfer = [pair("float", name, margin) for name in rivals if family(name) == CNN]
    average = f"Schemes made for transformers{several} are more accurate than these, on average."
    order = [pair("bivit", other) for other in ("bibert", "bit")]
    # Against its baseline alone it would be the sentence about three groups once more.
    better = [pair("gsb", name) for name in rivals] if rivals != ["elastic"] else []
    return [
        *confirm(
            CNN_DO_NOT_TRANSFER,
            all_of(f"Schemes made for convolutional networks{of_networks} all lose more than {points}.", transfer),
        ),
        *confirm(
            BEST,
            all_of(f"GSB is more accurate than every other 1-bit scheme{one}.", better),
        ),
        *confirm(SUPERPOSITION_HELPS, pair("gsb", "elastic", sentence="Three groups are more accurate than one.")),
        pair(
            "gsb" + WITH_BIAS,
            "elastic" + WITH_BIAS,
            sentence="With the bias of the map, three groups are more accurate than one.",
        ),
        pair("gsb", "float", -margin, f"GSB stays within {points} of float."),
        pair(
            "gsb" + WITH_BIAS,
            "float" + WITH_BIAS,
            -margin,
            f"With the bias of the map in both, GSB stays within {points} of float.",
        ),
        pair("float" + WITH_BIAS, "float", sentence="The bias of the map helps the float model."),
        check_pair(average, families, TRANSFORMER, CNN, on="family"),
        all_of("BiViT exceeds BiBERT and BiT, as He et al. found on Tiny-ImageNet.", order),
    ]


take_measurements = measurements_of(runs)


def with_references(shown: pd.DataFrame, pixels: pd.DataFrame, guessing: Mapping[str, float]) -> pd.DataFrame:
    """Add what models have to exceed, guessing and methods that know nothing but pixels, to a table for reading.

    Args:
        shown: one row per kind of images and condition: data, condition, test accuracy (%) and training accuracy (%).
        pixels: the result of `baselines`.
        guessing: the result of `plan.chance`.

    Returns:
        The table with more rows, images by images; what a row has not is an empty text.
    """
    rows = [(data, "chance", f"{100 * guessing[data]:.1f}", "") for data in shown["data"].unique()]
    pixels = pixels[pixels["data"].isin(shown["data"])]
    means = pixels.groupby(["data", "condition"], sort=False)[["test_accuracy", "train_accuracy"]].mean()
    rows += [
        (data, name, f"{100 * test:.1f}", f"{100 * train:.1f}")
        for (data, name), (test, train) in zip(means.index, means.to_numpy(), strict=True)
    ]
    added = pd.DataFrame(rows, columns=["data", "condition", "test accuracy (%)", "training accuracy (%)"])
    return pd.concat([shown.astype(object), added]).fillna("").sort_values("data", kind="stable", ignore_index=True)


def with_notes(summary: pd.DataFrame, trials: pd.DataFrame, keys: Sequence[str]) -> pd.DataFrame:
    """Add the column note of `charts.dots`, which counts the trainings below three times chance where there are any.

    Args:
        summary: one row per condition, with the columns of `keys` and n.
        trials: single trials with the columns of `keys`, test_accuracy and, where it is known, chance.
        keys: columns that tell conditions apart.
    """
    lost = trials["test_accuracy"] < LEAST * trials.get("chance", pd.Series(0.0, trials.index))
    counts = lost.groupby([trials[key] for key in keys]).sum()
    known = [int(counts.get(key, 0)) for key in zip(*(summary[key] for key in keys), strict=True)]
    notes = [f", {count} of {n} do not train" if count else "" for count, n in zip(known, summary["n"], strict=True)]
    return summary.assign(note=notes)


def draw(table: pd.DataFrame, guessing: Mapping[str, float]) -> Figure:
    """Draw the test accuracy of every scheme within its family, with chance as a line and the float model as another.

    Where a mean is well above chance but some of its trainings are not, their number follows it.

    Args:
        table: the result of `with_families`.
        guessing: the result of `plan.chance`.
    """
    table = table.sort_values("trains", ascending=False, kind="stable")  # what does not train stands last
    summary = summarize(table, ["data", "family", "condition", "scheme"])
    known = table.assign(chance=table["data"].map(guessing).astype(float))
    summary = with_notes(summary, known[known["trains"]], ["data", "condition"])
    figure = dot_panels(summary, table, "condition", "family", reference="float", scheme="scheme")
    for ax, data in zip(figure.axes, summary["data"].unique(), strict=False):  # one says that nothing was run
        mark(ax, 100 * guessing[data], "chance")
    return figure


def published(path: str | Path, notebook: str) -> pd.DataFrame:
    """Read the published numbers that belong beside a notebook's own, never mixed with them.

    Args:
        path: the CSV file; its columns are `PUBLISHED`. Rows without a number say why there is none.
        notebook: number of the notebook, such as "04".

    Returns:
        The rows of this notebook, without the column notebook; missing numbers and names are empty texts.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it has other columns.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no table of published numbers {path}.")
    table = pd.read_csv(path, dtype=str, keep_default_na=False)
    if tuple(table.columns) != PUBLISHED:
        raise ValueError(f"The table {path} has the columns {', '.join(table.columns)}, not {', '.join(PUBLISHED)}.")
    return table[table["notebook"] == notebook].drop(columns="notebook").reset_index(drop=True)


def beside(summary: pd.DataFrame, path: str | Path, notebook: str) -> pd.DataFrame:
    """Add to a table of schemes what others have published about each, with data, model, what was 1-bit, and grade.

    Args:
        summary: one row per scheme in the column condition.
        path: as for `published`.
        notebook: as for `published`.

    Returns:
        The table with a column of texts, empty where nothing is known.
    """
    rows = published(path, notebook)
    texts = rows["top1"] + " (" + rows[["data", "model", "what"]].agg(", ".join, axis=1) + "; " + rows["grade"] + ")"
    known = texts[rows["top1"] != ""].groupby(rows["scheme"]).agg("; ".join)
    return summary.assign(**{"published elsewhere": [known.get(name, "") for name in summary["condition"]]})
