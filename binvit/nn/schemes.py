"""Scheme: which rule binarizes which place of a vision transformer, and with which options."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import field
from typing import Annotated, Any, Literal, get_args

from pydantic import Field

from binvit.config import Config, Number, Switch, Text, one_of, show
from binvit.nn.block_parts import BRANCHES, LAYER_ACTIVATIONS
from binvit.nn.rules import (
    REDUCTIONS,
    Bwn,
    Ede,
    Elastic,
    Float,
    GsbAttention,
    GsbValue,
    HeadSign,
    LearnedOutput,
    LearnedRow,
    MapEde,
    MapLearned,
    MapThreshold,
    Rule,
    ScoreSign,
    Sign,
    ThreeMaps,
    check_thresholds,
)

Component = Literal["patch_embed", "mlp", "mhsa", "head"]
COMPONENTS: tuple[Component, ...] = get_args(Component)

# Rule names, by the kind of place they fit. Each entry makes the rule from the scheme, which carries the rules'
# options.
_FLOAT: dict[str, Callable[[Scheme], Rule]] = {"float": lambda s: Float()}
WEIGHT_RULES = _FLOAT | {
    "sign": lambda s: Sign(),
    "sign_open": lambda s: Sign(window="open"),
    "sign_through": lambda s: Sign(window="through"),
    "sign_mean": lambda s: Sign(scale="row", window="open", factor="xnor"),
    "sign_mean_constant": lambda s: Sign(scale="row", window="open"),
    "sign_mean_exact": lambda s: Sign(scale="row", window="open", center=True, factor="exact"),
    "sign_mean_bare": lambda s: Sign(scale="row", factor="bare"),
    "sign_mean_centred": lambda s: Sign(scale="row", center=True, factor="bare"),
    "sign_mean_centred_open": lambda s: Sign(scale="row", center=True, window="open"),
    "sign_learned_centred": lambda s: LearnedRow(),
    "sign_learned_row": lambda s: LearnedRow(center=False),
    "sign_learned": lambda s: LearnedOutput(),
    "standardized": lambda s: Ede(standardize=True),
    "bwn": lambda s: Bwn(),
    "bwn_channel": lambda s: Bwn(scale="channel"),
    "bwn_unscaled": lambda s: Bwn(scale="none"),
    "int8": lambda s: Elastic(lo=-128, hi=127),
    "int8_channel": lambda s: Elastic(per="channel", lo=-128, hi=127),
}
INPUT_RULES = _FLOAT | {
    "sign": lambda s: Sign(),
    "sign_open": lambda s: Sign(window="open"),
    "sign_mean": lambda s: Sign(scale="row", window="open"),
    "sign_approx": lambda s: Sign(window="approx"),
    "sign_ede": lambda s: Ede(),
    "elastic": lambda s: Elastic(),
    "elastic_bit": lambda s: Elastic(gradient="bit"),
    "elastic_unsigned": lambda s: Elastic(lo=0),
    "int8": lambda s: Elastic(lo=-128, hi=127),
}
QUERY_RULES = INPUT_RULES | {"head_sign": lambda s: HeadSign()}
ATTENTION_RULES = _FLOAT | {
    "half_max": lambda s: MapThreshold(),
    "half_max_mean": lambda s: MapThreshold(mean_scale=True),
    "half_max_approx": lambda s: MapThreshold(window="approx"),
    "half_max_ede": lambda s: MapEde(),
    "quarter_max": lambda s: MapThreshold(share=0.25),
    "half_max_learned": lambda s: MapLearned(),
    "scores": lambda s: ScoreSign(),
    "three_maps": lambda s: ThreeMaps(),
    "head_sign": lambda s: HeadSign(),
    "elastic": lambda s: Elastic(lo=0),
    "elastic_small": lambda s: Elastic(lo=0, start=0.005, gradient="sum"),
    "gsb": lambda s: GsbAttention(**s.gsb_options()),
}
_PLAIN = ("float", "sign", "sign_open", "sign_approx", "sign_ede", "elastic", "elastic_bit")
VALUE_RULES = {name: INPUT_RULES[name] for name in _PLAIN} | {
    "sign_mean": lambda s: Sign(scale="head", window="open"),
    "sign_mean_token": lambda s: Sign(scale="row", window="open"),
    "sign_learned": lambda s: LearnedOutput(per="tensor"),
    "head_sign": lambda s: HeadSign(),
    "gsb": lambda s: GsbValue(**s.gsb_options()),
}
PLACES: dict[str, dict[str, Callable[[Scheme], Rule]]] = {
    "weight": WEIGHT_RULES,
    "mlp_weight": WEIGHT_RULES | {"as_weight": lambda s: s.rule("weight")},
    "input": INPUT_RULES,
    "hidden": INPUT_RULES,
    "query": QUERY_RULES,
    "key": QUERY_RULES,
    "attention": ATTENTION_RULES,
    "value": VALUE_RULES,
    "patch_weight": WEIGHT_RULES,
    "patch_input": INPUT_RULES,
    "head_weight": WEIGHT_RULES,
    "head_input": INPUT_RULES,
}


class Scheme(Config):
    """One way to binarize a vision transformer; fields are overridden by `binvit.scheme(name, field=value)`."""

    name: Text
    """Name in the catalogue."""
    description: Text = field(default="", compare=False)
    """One line for tables."""
    reference: Text = field(default="", compare=False)
    """The paper, and what this project had to decide itself."""
    components: tuple[Component, ...] = COMPONENTS
    """What is binarized, a subset of "patch_embed", "mlp", "mhsa" (qkv, proj and the attention products) and
    "head"; everything else stays float."""
    weight: Annotated[str, one_of(PLACES["weight"])] = "float"
    """Rule of the weights of qkv, proj, fc1 and fc2, a key of `WEIGHT_RULES`."""
    mlp_weight: Annotated[str, one_of(PLACES["mlp_weight"])] = "as_weight"
    """Rule of the weights of fc1 and fc2 where it is another one, a key of `WEIGHT_RULES` or "as_weight"."""
    input: Annotated[str, one_of(PLACES["input"])] = "float"
    """Rule of the inputs of qkv, proj and fc1, a key of `INPUT_RULES`."""
    hidden: Annotated[str, one_of(PLACES["hidden"])] = "float"
    """Rule of the input of fc2, a key of `INPUT_RULES`."""
    query: Annotated[str, one_of(PLACES["query"])] = "float"
    """Rule of the query, a key of `QUERY_RULES`."""
    key: Annotated[str, one_of(PLACES["key"])] = "float"
    """Rule of the key, a key of `QUERY_RULES`."""
    attention: Annotated[str, one_of(PLACES["attention"])] = "float"
    """Rule of the attention map, a key of `ATTENTION_RULES`."""
    value: Annotated[str, one_of(PLACES["value"])] = "float"
    """Rule of the value, a key of `VALUE_RULES`."""
    patch_weight: Annotated[str, one_of(PLACES["patch_weight"])] = "int8_channel"
    """Rule of the weights of the patch embedding, a key of `WEIGHT_RULES`."""
    patch_input: Annotated[str, one_of(PLACES["patch_input"])] = "float"
    """Rule of the patches, a key of `INPUT_RULES`."""
    head_weight: Annotated[str, one_of(PLACES["head_weight"])] = "int8"
    """Rule of the weights of the classification heads, a key of `WEIGHT_RULES`."""
    head_input: Annotated[str, one_of(PLACES["head_input"])] = "int8"
    """Rule of the inputs of the heads, a key of `INPUT_RULES`."""
    shift: Switch = False
    """Learned shifts are added to every tensor before it is binarized."""
    attention_shift: Switch = True
    """Query, key and value are among them; BiT's released code forgets theirs."""
    separate_qkv: Switch = False
    """The projections to query, key and value are layers of their own, each with its shift and scales."""
    qk_norm: Switch = False
    """A LayerNorm over the features of each head stands before query and key, as in timm's own models with such
    norms."""
    linear_bias: Literal["keep", "always", "never"] = "keep"
    """Biases of the binarized linear layers: "keep" (as the float model has them), "always" or "never"."""
    latent: Literal["free", "clipped", "centred"] = "free"
    """What happens to the latent weights before each training step: nothing ("free"), "clipped" to [-1, 1], or
    "centred" over the fan-in and clipped."""
    latent_init: tuple[Number, Number] | None = None
    """A training from nothing draws the latent weights uniformly from these two bounds; None leaves them as the
    float model starts. See `binvit.nn.init_latent_weights`."""
    output_factor: Switch = False
    """A learned factor per output, 1 at the start, multiplies what a 1-bit linear layer puts out."""
    norm: Literal["none", "before", "after"] = "none"
    """A LayerNorm stands "before" the 1-bit inputs that the block does not normalize (those of proj and fc2),
    "after" every 1-bit linear layer (one each for query, key and value), or nowhere ("none")."""
    own_input: Switch = False
    """The input of a 1-bit linear layer is added to its (normalized) output: repeated side by side where the output
    is wider, averaged over neighbouring features where it is narrower."""
    layer_activation: Annotated[str, one_of(LAYER_ACTIVATIONS)] = "none"
    """What follows then: "none", "clip" to [-1, 1] or "rprelu", ReActNet's shifted PReLU."""
    layer_scale: Switch = False
    """proj and fc2 end with a learned factor (0.1 at the start) and offset per channel."""
    context_norm: Switch = False
    """A LayerNorm follows the product of map and value, and what `layer_activation` says."""
    context_residual: Switch = False
    """Query, key and value are added to that (normalized) product before the activation."""
    activation: Literal["keep", "relu", "none"] = "keep"
    """The activation of the binarized MLP: "keep" (the float model's), "relu" or "none"."""
    activation_limit: Annotated[Number, Field(gt=0)] | None = None
    """The activation of every MLP, binarized or not, is clipped to [-limit, limit]; None leaves it as it is."""
    branches: Annotated[str, one_of(BRANCHES)] = "none"
    """Beside the MLP stand branches that mix neighbouring patches: "pool" (BinaryViT), "shift" (BHViT) or "none". A
    model with a class token, or any other before the patches, has none."""
    attention_bias: Literal["full", "relative", "none"] = "none"
    """A learned bias is added to the attention map after the softmax, of every block, binarized or not: "full", one
    value per head and pair of tokens; "relative", one per head and relative position of two patches, and the rows
    of class and distillation token in full; "none"."""
    thresholds: tuple[Number, ...] = ()
    """GSB: shares of the maximum above which groups 2, 3, ... start."""
    reduce: Annotated[str, one_of(REDUCTIONS)] = "row"
    """GSB: the set over which the maximum runs, "batch" (as released), "sample", "head" or "row"."""
    gradient: Literal["official", "masked"] = "official"
    """GSB: "official" or "masked"."""
    init: Literal["stacked", "official"] = "stacked"
    """GSB: "stacked" or "official" initialization of the scales."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "components", tuple(name for name in COMPONENTS if name in self.components))
        if self.latent_init is not None and not self.latent_init[0] < self.latent_init[1]:
            raise ValueError(f"The scheme's latent_init must be two numbers that increase, got {self.latent_init!r}.")
        check_thresholds(self.thresholds)

    def gsb_options(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("thresholds", "reduce", "gradient", "init")}

    def rule(self, place: str) -> Rule:
        """Return the rule of one place, a key of `PLACES`."""
        return PLACES[place][getattr(self, place)](self)

    def binarizes(self, component: str) -> bool:
        """Tell whether the component (an element of `COMPONENTS`) is binarized."""
        return component in self.components


def check_name(what: str, value: Any, valid: Iterable[str]) -> None:
    """Raise a ValueError that lists the valid names unless the value is one of them."""
    if not isinstance(value, str) or value not in valid:
        raise ValueError(f"Unknown {what} {show(value)}; valid are {', '.join(valid)}.")
