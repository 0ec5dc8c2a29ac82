"""Which components may be 1-bit, and do scaling factors help: the design and the claims of that experiment."""

from collections.abc import Sequence
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from binvit.lab.analysis.claims import Claim, check_pair, confirm
from binvit.lab.analysis.statistics import summarize
from binvit.lab.analysis.verdicts import FACTORS_HELP, ONE_COMPONENT
from binvit.lab.experiments.design.plan import Condition, Run, notebook_runs
from binvit.lab.figures.charts import heat
from binvit.lab.figures.panels import panels
from binvit.lab.figures.style import caption, interval_caption

COMPONENTS: dict[str, tuple[str, ...]] = {"MLP": ("mlp",), "MHSA": ("mhsa",), "both": ("mlp", "mhsa")}
NOTHING, PATCHES = "nothing", "patch embedding"
BASE = "xnor"  # whose block, norms included, all conditions share
_PLAIN = dict.fromkeys(("input", "hidden", "query", "key", "value", "patch_input"), "sign_open")
_MEANS = dict.fromkeys(("input", "hidden", "query", "key", "value", "patch_input"), "sign_mean")


def _weights(rule: str) -> dict[str, Any]:
    return {"weight": rule, "patch_weight": rule, "attention": "half_max"} | _PLAIN


# Kind of factor -> the rules of the base scheme that it changes: windows of the gradients are the same in all.
FACTORS: dict[str, dict[str, Any]] = {
    "no factor": _weights("sign_open"),
    "weights": _weights("sign_mean_constant"),
    "weights and inputs": _weights("sign_mean_constant") | _MEANS | {"attention": "half_max_mean"},
    "learned": _weights("sign_learned_row"),
}


def conditions(
    components: Sequence[str] = tuple(COMPONENTS), factors: Sequence[str] = tuple(FACTORS)
) -> list[Condition]:
    """Return the conditions: float, each component with each factor, and the patch embedding alone with each factor.

    Args:
        components: keys of `COMPONENTS`.
        factors: keys of `FACTORS`.
    """
    places = {name: COMPONENTS[name] for name in components} | {PATCHES: ("patch_embed",)}
    return [
        Condition(NOTHING, "float"),
        *(
            Condition(f"{name}, {factor}", BASE, FACTORS[factor] | {"components": place})
            for name, place in places.items()
            for factor in factors
        ),
    ]


def runs(p: Any) -> list[Run]:
    """Return what the notebook trains with these parameters."""
    return notebook_runs(conditions(p.components, p.factors), p)


def with_factors(table: pd.DataFrame) -> pd.DataFrame:
    """Add the columns component and factor, both "nothing" for the float model.

    Args:
        table: the result of `plan.train` for `conditions`.
    """
    names = table["condition"].str.split(", ", n=1, expand=True).reindex(columns=[0, 1])
    return table.assign(component=names[0], factor=names[1].fillna(NOTHING))


def patch_embedding(table: pd.DataFrame) -> pd.DataFrame:
    """Return the trials whose patch embedding alone is 1-bit, and the float ones on the same images.

    Args:
        table: the result of `with_factors`.
    """
    run = table.loc[table["component"] == PATCHES, "data"]
    return table[table["component"].isin([NOTHING, PATCHES]) & table["data"].isin(run)]


def draw(table: pd.DataFrame) -> Figure:
    """Draw the test accuracy of each 1-bit component with each factor as a heat map, the float model in its title.

    Args:
        table: the result of `with_factors`.
    """
    summary = summarize(table, ["data", "component", "factor"])
    blocks = summary[summary["component"].isin(COMPONENTS)]
    whole = summary[summary["component"] == NOTHING].set_index("data")["mean"]

    def panel(part: pd.DataFrame, ax: Axes) -> None:
        heat(part, "factor", "component", xlabel="factor", ylabel="1-bit component", ax=ax)
        data = part["data"].iloc[0]
        ax.set_title(f"{data}: float {100 * whole[data]:.1f} %, nothing 1-bit" if data in whole else data)

    size = 1.4 + 1.1 * blocks["factor"].nunique(), 0.9 + 0.5 * blocks["component"].nunique()
    fig = panels(blocks, panel, *size)
    if len(blocks):
        caption(fig, f"test accuracy (%): {interval_caption(blocks['n'], points=False)}")  # of all panels
    return fig


def claims(table: pd.DataFrame, margin: float = 0.05) -> list[Claim]:
    """Check what Sato et al. claim, component by component, and what it costs to have a binary patch embedding.

    Args:
        table: the result of `with_factors` for one kind of images.
        margin: what "much" and "close" mean, as a share of the test images.
    """
    embedding = patch_embedding(table)
    none, weights, both, learned = FACTORS
    points = f"{100 * margin:g} points"

    def factor(sentence: str, component: str, a: str, b: str, least: float = 0.0) -> Claim:
        among = embedding if component == PATCHES else table[table["component"] == component]
        return check_pair(sentence, among, a, b, least, on="factor")

    def alone(component: str) -> Claim:
        sentence = f"With factors of weights and inputs, a 1-bit {component} alone is more than {points} above both."
        return check_pair(sentence, table[table["factor"] == both], component, "both", margin, on="component")

    places = {"MLP": "a 1-bit MLP", "MHSA": "a 1-bit MHSA", "both": "both 1-bit"}
    helps = [factor(f"Factors of weights and inputs help {words}.", name, both, none) for name, words in places.items()]
    found = confirm(ONE_COMPONENT, *[alone(component) for component in ("MLP", "MHSA")])
    found += confirm(
        FACTORS_HELP,
        *helps,
        factor("Factors of weights and inputs help the 1-bit patch embedding.", PATCHES, both, none),
    )
    for name, words in places.items():
        found += [
            factor(f"With {words}, a factor of the inputs helps beside that of the weights.", name, both, weights),
            factor(f"With {words}, a learned factor is better than the same one computed.", name, learned, weights),
        ]
    close = f"With factors, the 1-bit patch embedding stays within {points} of the float one."
    return [*found, factor(close, PATCHES, both, NOTHING, -margin)]
