"""Scheme: which rule binarizes which place of a vision transformer, and with which options."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

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

COMPONENTS = ("patch_embed", "mlp", "mhsa", "head")

# Rule names, by the kind of place they fit. Each entry makes the rule from the scheme, which carries the rules'
# options.
_FLOAT: dict[str, Callable[[Scheme], Rule]] = {"float": lambda s: Float()}
WEIGHT_RULES = _FLOAT | {
    "sign": lambda s: Sign(),
    "sign_open": lambda s: Sign(window="open"),
    "sign_through": lambda s: Sign(window="through"),
    "sign_mean": lambda s: Sign(scale="row", window="open", factor="xnor"),
    "sign_mean_exact": lambda s: Sign(scale="row", window="open", center=True, factor="exact"),
    "sign_mean_bare": lambda s: Sign(scale="row", factor="bare"),
    "sign_mean_centred": lambda s: Sign(scale="row", center=True, factor="bare"),
    "sign_mean_centred_open": lambda s: Sign(scale="row", center=True, window="open"),
    "sign_learned_centred": lambda s: LearnedRow(),
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

_SWITCHES = (
    *("shift", "attention_shift", "separate_qkv", "qk_norm"),
    *("output_factor", "own_input", "layer_scale", "context_norm", "context_residual"),
)
_CHOICES: dict[str, tuple[str, ...]] = {
    "linear_bias": ("keep", "always", "never"),
    "latent": ("free", "clipped", "centred"),
    "norm": ("none", "before", "after"),
    "layer_activation": LAYER_ACTIVATIONS,
    "activation": ("keep", "relu", "none"),
    "branches": BRANCHES,
    "attention_bias": ("full", "relative", "none"),
    "reduce": REDUCTIONS,
    "gradient": ("official", "masked"),
    "init": ("stacked", "official"),
}


@dataclass(frozen=True)
class Scheme:
    """One way to binarize a vision transformer; fields are overridden by `binvit.scheme(name, field=value)`.

    Attributes:
        name: Name in the catalogue.
        description: One line for tables.
        reference: The paper, and what this project had to decide itself.
        components: What is binarized, a subset of "patch_embed", "mlp", "mhsa" (qkv, proj and the attention products)
            and "head"; everything else stays float.
        weight: Rule of the weights of qkv, proj, fc1 and fc2, a key of `WEIGHT_RULES`.
        mlp_weight: Rule of the weights of fc1 and fc2 where it is another one, a key of `WEIGHT_RULES` or "as_weight".
        input: Rule of the inputs of qkv, proj and fc1, a key of `INPUT_RULES`.
        hidden: Rule of the input of fc2, a key of `INPUT_RULES`.
        query: Rule of the query, a key of `QUERY_RULES`.
        key: Rule of the key, a key of `QUERY_RULES`.
        attention: Rule of the attention map, a key of `ATTENTION_RULES`.
        value: Rule of the value, a key of `VALUE_RULES`.
        patch_weight: Rule of the weights of the patch embedding, a key of `WEIGHT_RULES`.
        patch_input: Rule of the patches, a key of `INPUT_RULES`.
        head_weight: Rule of the weights of the classification heads, a key of `WEIGHT_RULES`.
        head_input: Rule of the inputs of the heads, a key of `INPUT_RULES`.
        shift: Learned shifts are added to every tensor before it is binarized.
        attention_shift: Query, key and value are among them; BiT's released code forgets theirs.
        separate_qkv: The projections to query, key and value are layers of their own, each with its shift and scales.
        qk_norm: A LayerNorm over the features of each head stands before query and key, as in timm's own models
            with such norms.
        linear_bias: Biases of the binarized linear layers: "keep" (as the float model has them), "always" or "never".
        latent: What happens to the latent weights before each training step: nothing ("free"), "clipped" to [-1, 1], or
            "centred" over the fan-in and clipped.
        latent_init: A training from nothing draws the latent weights uniformly from these two bounds; None leaves them
            as the float model starts. See `binvit.nn.init_latent_weights`.
        output_factor: A learned factor per output, 1 at the start, multiplies what a 1-bit linear layer puts out.
        norm: A LayerNorm stands "before" the 1-bit inputs that the block does not normalize (those of proj and fc2),
            "after" every 1-bit linear layer (one each for query, key and value), or nowhere ("none").
        own_input: The input of a 1-bit linear layer is added to its (normalized) output: repeated side by side where
            the output is wider, averaged over neighbouring features where it is narrower.
        layer_activation: What follows then: "none", "clip" to [-1, 1] or "rprelu", ReActNet's shifted PReLU.
        layer_scale: proj and fc2 end with a learned factor (0.1 at the start) and offset per channel.
        context_norm: A LayerNorm follows the product of map and value, and what `layer_activation` says.
        context_residual: Query, key and value are added to that (normalized) product before the activation.
        activation: The activation of the binarized MLP: "keep" (the float model's), "relu" or "none".
        activation_limit: The activation of every MLP, binarized or not, is clipped to [-limit, limit]; None leaves it
            as it is.
        branches: Beside the MLP stand branches that mix neighbouring patches: "pool" (BinaryViT), "shift" (BHViT) or
            "none". A model with a class token, or any other before the patches, has none.
        attention_bias: A learned bias is added to the attention map after the softmax, of every block, binarized or
            not: "full", one value per head and pair of tokens; "relative", one per head and relative position of two
            patches, and the rows of class and distillation token in full; "none".
        thresholds: GSB: shares of the maximum above which groups 2, 3, ... start.
        reduce: GSB: the set over which the maximum runs, "batch" (as released), "sample", "head" or "row".
        gradient: GSB: "official" or "masked".
        init: GSB: "stacked" or "official" initialization of the scales.
    """

    name: str
    description: str = field(default="", compare=False)
    reference: str = field(default="", compare=False)
    components: tuple[str, ...] = COMPONENTS
    weight: str = "float"
    mlp_weight: str = "as_weight"
    input: str = "float"
    hidden: str = "float"
    query: str = "float"
    key: str = "float"
    attention: str = "float"
    value: str = "float"
    patch_weight: str = "int8_channel"
    patch_input: str = "float"
    head_weight: str = "int8"
    head_input: str = "int8"
    shift: bool = False
    attention_shift: bool = True
    separate_qkv: bool = False
    qk_norm: bool = False
    linear_bias: str = "keep"
    latent: str = "free"
    latent_init: tuple[float, float] | None = None
    output_factor: bool = False
    norm: str = "none"
    own_input: bool = False
    layer_activation: str = "none"
    layer_scale: bool = False
    context_norm: bool = False
    context_residual: bool = False
    activation: str = "keep"
    activation_limit: float | None = None
    branches: str = "none"
    attention_bias: str = "none"
    thresholds: tuple[float, ...] = ()
    reduce: str = "row"
    gradient: str = "official"
    init: str = "stacked"

    def __post_init__(self) -> None:
        for name in ("name", "description", "reference"):
            if not isinstance(getattr(self, name), str):
                raise ValueError(f"Scheme field {name} must be a string, got {getattr(self, name)!r}.")
        for name in ("components", "thresholds"):
            value = getattr(self, name)
            if isinstance(value, str) or not hasattr(value, "__iter__"):
                raise ValueError(f"Scheme field {name} must be a list, got {value!r}.")
            object.__setattr__(self, name, tuple(value))
        for component in self.components:
            check_name("component", component, COMPONENTS)
        object.__setattr__(self, "components", tuple(c for c in COMPONENTS if c in self.components))
        for place, rules in PLACES.items():
            check_name(f"rule for {place}", getattr(self, place), rules)
        for name in _SWITCHES:
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"Scheme field {name} must be true or false, got {getattr(self, name)!r}.")
        for name, choices in _CHOICES.items():
            check_name(name, getattr(self, name), choices)
        self._check_latent_init()
        limit = self.activation_limit
        if limit is not None and (
            isinstance(limit, bool) or not isinstance(limit, int | float) or not 0 < limit < math.inf
        ):
            raise ValueError(f"Scheme field activation_limit must be a positive number or None, got {limit!r}.")
        if any(isinstance(t, bool) or not isinstance(t, int | float) for t in self.thresholds):
            raise ValueError(f"Scheme field thresholds must hold numbers, got {self.thresholds}.")
        check_thresholds(self.thresholds)

    def _check_latent_init(self) -> None:
        bounds = self.latent_init
        if bounds is None:
            return
        numbers = isinstance(bounds, list | tuple) and len(bounds) == 2
        if not numbers or any(isinstance(b, bool) or not isinstance(b, int | float) for b in bounds):
            raise ValueError(f"Scheme field latent_init must be two numbers or None, got {bounds!r}.")
        if not -math.inf < bounds[0] < bounds[1] < math.inf:
            raise ValueError(f"Scheme field latent_init must be two finite numbers that increase, got {bounds!r}.")
        object.__setattr__(self, "latent_init", tuple(bounds))

    def gsb_options(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("thresholds", "reduce", "gradient", "init")}

    def rule(self, place: str) -> Rule:
        """Return the rule of one place, a key of `PLACES`."""
        return PLACES[place][getattr(self, place)](self)

    def binarizes(self, component: str) -> bool:
        """Tell whether the component (an element of `COMPONENTS`) is binarized."""
        return component in self.components

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as JSON types."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Scheme:
        """Make a scheme from what `to_dict` returned.

        Raises:
            ValueError: If a field is unknown or has an invalid value.
        """
        check_fields(fields)
        if "name" not in fields:
            raise ValueError("A scheme needs a field name.")
        return cls(**fields)


def check_name(what: str, value: Any, valid: Iterable[str]) -> None:
    """Raise a ValueError that lists the valid names unless the value is one of them."""
    if not isinstance(value, str) or value not in valid:
        raise ValueError(f"Unknown {what} {value!r}; valid are {', '.join(valid)}.")


def check_fields(fields: Iterable[str]) -> None:
    """Raise a ValueError that lists the fields of `Scheme` unless all given names are among them."""
    valid = [f.name for f in dataclasses.fields(Scheme)]
    for name in fields:
        if name not in valid:
            raise ValueError(f"Unknown scheme field {name!r}; valid are {', '.join(valid)}.")
