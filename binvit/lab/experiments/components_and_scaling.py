"""Which components may be 1-bit, and do scaling factors help: the design and the claims of that experiment."""

from collections.abc import Sequence
from typing import Any

import pandas as pd

from binvit.lab.analysis.claims import Claim, all_of, check_pair
from binvit.lab.analysis.statistics import averaged
from binvit.lab.experiments.plan import Condition

COMPONENTS: dict[str, tuple[str, ...]] = {"MLP": ("mlp",), "MHSA": ("mhsa",), "both": ("mlp", "mhsa")}
NOTHING, PATCHES = "nothing", "patch embedding"
# Kind of factor -> the published scheme that has it, and the rules of weights and patches in the patch embedding.
FACTORS: dict[str, tuple[str, str, str]] = {
    "no factor": ("bnn", "sign", "sign"),
    "weights": ("xnor", "sign_mean", "sign"),
    "weights and inputs": ("xnor-k", "sign_mean", "sign_mean"),
    "learned": ("xnor++", "sign_learned", "sign"),
}


def design(components: Sequence[str] = tuple(COMPONENTS), factors: Sequence[str] = tuple(FACTORS)) -> list[Condition]:
    """Return the conditions: float, each component with each factor, and the patch embedding alone with each factor.

    Args:
        components: keys of `COMPONENTS`.
        factors: keys of `FACTORS`.
    """
    found = [Condition(NOTHING, "float")]
    for component in components:
        options: dict[str, Any] = {"components": COMPONENTS[component]}
        found += [Condition(f"{component}, {factor}", FACTORS[factor][0], options) for factor in factors]
    for factor in factors:
        scheme, weight, patches = FACTORS[factor]
        options = {"components": ("patch_embed",), "patch_weight": weight, "patch_input": patches}
        found.append(Condition(f"{PATCHES}, {factor}", scheme, options))
    return found


def with_factors(table: pd.DataFrame) -> pd.DataFrame:
    """Add the columns component and factor; where nothing is 1-bit the same trial stands for every factor.

    Args:
        table: the result of `experiments.train` for conditions of `design`.

    Returns:
        The table with the two columns, nothing first.
    """
    names = table["condition"].str.split(", ", n=1, expand=True).reindex(columns=[0, 1])
    table = table.assign(component=names[0], factor=names[1])
    plain, binary = table[table["component"] == NOTHING], table[table["component"] != NOTHING]
    repeated = [plain.assign(factor=factor) for factor in binary["factor"].unique()]
    return pd.concat([*repeated, binary], ignore_index=True)


def patch_embedding(table: pd.DataFrame) -> pd.DataFrame:
    """Return the trials whose patch embedding alone is 1-bit, and the float ones with the factor "nothing".

    Args:
        table: the result of `with_factors`.
    """
    plain = table[table["component"] == NOTHING].assign(factor=NOTHING).drop_duplicates(["data", "seed"])
    return pd.concat([plain, table[table["component"] == PATCHES]], ignore_index=True)


def check_claims(table: pd.DataFrame, margin: float = 0.05) -> list[Claim]:
    """Check what Sato et al. claim, and what it costs to have a binary patch embedding.

    Means over factors or components are taken within each seed, so that intervals count seeds alone.

    Args:
        table: the result of `with_factors` for one kind of images.
        margin: what "much" and "close" mean, as a share of the test images.
    """
    blocks = table[table["component"].isin(COMPONENTS)]
    by_component, by_factor = averaged(blocks, "component"), averaged(blocks, "factor")
    embedding = patch_embedding(table)
    none, weights, both, learned = FACTORS
    points = f"{100 * margin:g} points"

    def better(sentence: str, a: str, b: str, least: float = 0.0, among: pd.DataFrame = by_factor) -> Claim:
        on = "factor" if "factor" in among else "component"
        return check_pair(sentence, among, a, b, least, on=on)

    alone = [better(f"{name} alone.", name, "both", margin, by_component) for name in ("MLP", "MHSA")]
    return [
        all_of(
            f"With one 1-bit component, MLP or MHSA, a model is more than {points} more accurate than with both.", alone
        ),
        better("A factor of the weights helps.", weights, none),
        better("A factor of the inputs beside it helps further.", both, weights),
        better("Learned factors are better than computed ones.", learned, both),
        better("The same factors help the 1-bit patch embedding.", both, none, among=embedding),
        better(f"With them it stays within {points} of the float embedding.", both, NOTHING, -margin, embedding),
    ]
