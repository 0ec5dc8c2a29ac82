"""All published binarizers on the same model: families, published numbers, and the claims of that experiment."""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

import binvit
from binvit.lab.analysis.claims import Claim, all_of, check_pair
from binvit.lab.analysis.statistics import averaged
from binvit.lab.experiments.plan import Condition

FAMILIES: dict[str, tuple[str, ...]] = {
    "full precision": ("float",),
    "made for CNNs": ("bnn", "xnor", "xnor-k", "xnor++", "bireal", "irnet", "reactnet"),
    "made for transformers": ("bibert", "bit", "bivit", "bivit-head", "binaryvit", "bhvit-qd"),
    "group superposition": ("elastic", "gsb"),
}
CNN, TRANSFORMER = list(FAMILIES)[1:3]
PUBLISHED = ("notebook", "data", "model", "scheme", "what", "top1", "source", "grade")


def check_scheme(name: str) -> None:
    """Raise a ValueError unless `design` understands the name."""
    if name != "all":
        binvit.scheme(name)


def design(schemes: Sequence[str]) -> list[Condition]:
    """Return one condition per scheme, in the order of the families.

    Args:
        schemes: names of `binvit.list_schemes`; "all" stands for all of them.
    """
    schemes = binvit.list_schemes() if "all" in schemes else schemes
    return [Condition(name, name) for name in sorted(schemes, key=_place)]


def family(scheme: str) -> str:
    """Return what kind of networks a scheme was made for, a key of `FAMILIES`; schemes of one's own are "other"."""
    return next((name for name, members in FAMILIES.items() if scheme in members), "other")


def _place(scheme: str) -> int:
    known = [name for members in FAMILIES.values() for name in members]
    return known.index(scheme) if scheme in known else len(known)


def check_claims(table: pd.DataFrame, margin: float = 0.05) -> list[Claim]:
    """Check what the GSB paper claims about other binarizers, and one order that another paper has published.

    Args:
        table: the result of `experiments.train` for one kind of images, its column condition naming schemes.
        margin: what "far" and "close" mean, as a share of the test images.

    Returns:
        The claims; their sentences say so if not all schemes of the catalogue were run.
    """
    run = list(dict.fromkeys(table["condition"]))
    rivals = [name for name in run if name not in ("float", "gsb")]
    points = f"{100 * margin:g} points"
    one, several = ("", "") if set(binvit.list_schemes()) <= set(run) else (" that was run", " that were run")

    def pair(a: str, b: str, least: float = 0.0) -> Claim:
        return check_pair(f"{a} exceeds {b}", table, a, b, least, on="condition")

    families = averaged(table.assign(family=[family(name) for name in table["condition"]]), "family")
    transfer = [pair("float", name, margin) for name in rivals if family(name) == CNN]
    average = f"Schemes made for transformers{several} are more accurate than these, on average."
    return [
        all_of(f"GSB is more accurate than every other 1-bit scheme{one}.", [pair("gsb", name) for name in rivals]),
        check_pair(f"GSB stays within {points} of float.", table, "gsb", "float", -margin, on="condition"),
        all_of(f"Schemes made for convolutional networks{several} all lose more than {points}.", transfer),
        check_pair(average, families, TRANSFORMER, CNN, on="family"),
        all_of(
            "BiViT exceeds BiBERT and BiT, as He et al. found on Tiny-ImageNet.",
            [pair("bivit", other) for other in ("bibert", "bit")],
        ),
    ]


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
    """Add to a table of schemes what others have published about each, with data, model and grade.

    Args:
        summary: one row per scheme in the column condition.
        path: as for `published`.
        notebook: as for `published`.

    Returns:
        The table with a column of texts, empty where nothing is known.
    """
    rows = published(path, notebook)
    texts = rows["top1"] + " (" + rows["data"] + ", " + rows["model"] + "; " + rows["grade"] + ")"
    known = texts[rows["top1"] != ""].groupby(rows["scheme"]).agg("; ".join)
    return summary.assign(**{"published elsewhere": [known.get(name, "") for name in summary["condition"]]})
