"""Scheme: which rule binarizes which place of a vision transformer, and with which options."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from binvit.nn.attention_rules import (
    REDUCTIONS,
    GsbAttention,
    GsbValue,
    HeadSign,
    MapEde,
    MapLearned,
    MapThreshold,
    ScoreSign,
    ThreeMaps,
    check_thresholds,
)
from binvit.nn.rules import Bwn, Ede, Elastic, Float, LearnedOutput, LearnedRow, Rule, Sign

COMPONENTS = ("patch_embed", "mlp", "mhsa", "head")

# Rule names, by the kind of place they fit. Each entry makes the rule from the scheme, which carries the rules'
# options.
_FLOAT: dict[str, Callable[[Scheme], Rule]] = {"float": lambda s: Float()}
WEIGHT_RULES = _FLOAT | {
    "sign": lambda s: Sign(),
    "sign_mean": lambda s: Sign(scale="row"),
    "sign_mean_bare": lambda s: Sign(scale="row", bare_gradient=True),
    "sign_mean_centred": lambda s: Sign(scale="row", center=True, bare_gradient=True),
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
    "sign_mean": lambda s: Sign(scale="row"),
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
    "elastic_small": lambda s: Elastic(lo=0, start=0.005),
    "gsb": lambda s: GsbAttention(**s.gsb_options()),
}
_PLAIN = ("float", "sign", "sign_open", "sign_approx", "sign_ede", "elastic", "elastic_bit")
VALUE_RULES = {name: INPUT_RULES[name] for name in _PLAIN} | {
    "sign_mean": lambda s: Sign(scale="head"),
    "sign_mean_token": lambda s: Sign(scale="row"),
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
        attention_bias: A learned bias is added to the attention map after the softmax, of every block, binarized or
            not: "full", one value per head and pair of tokens; "relative", one per head and relative position of two
            patches, and the rows of class and distillation token in full; "none".
        activation: The activation of the binarized MLP: "keep" (the float model's) or "relu".
        activation_limit: The activation of every MLP, binarized or not, is clipped to [-limit, limit]; None leaves it
            as it is.
        qk_norm: A LayerNorm over the features of each head stands before query and key, as in timm's own models
            with such norms.
        linear_bias: Biases of the binarized linear layers: "keep" (as the float model has them), "always" or "never".
        rprelu: A shifted PReLU (ReActNet) follows every binarized linear layer.
        shortcut: A norm, the layer's own input and a shifted PReLU (BinaryViT) follow every binarized linear layer.
        context_residual: Query, key and value are added to the product of map and value.
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
    attention_bias: str = "none"
    activation: str = "keep"
    activation_limit: float | None = None
    qk_norm: bool = False
    linear_bias: str = "keep"
    rprelu: bool = False
    shortcut: bool = False
    context_residual: bool = False
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
        for name, kind in (
            ("shift", bool),
            ("attention_shift", bool),
            ("qk_norm", bool),
            ("rprelu", bool),
            ("shortcut", bool),
            ("context_residual", bool),
        ):
            if not isinstance(getattr(self, name), kind):
                raise ValueError(f"Scheme field {name} must be true or false, got {getattr(self, name)!r}.")
        limit = self.activation_limit
        if limit is not None and (
            isinstance(limit, bool) or not isinstance(limit, int | float) or not 0 < limit < math.inf
        ):
            raise ValueError(f"Scheme field activation_limit must be a positive number or None, got {limit!r}.")
        if any(isinstance(t, bool) or not isinstance(t, int | float) for t in self.thresholds):
            raise ValueError(f"Scheme field thresholds must hold numbers, got {self.thresholds}.")
        check_thresholds(self.thresholds)
        check_name("attention_bias", self.attention_bias, ("full", "relative", "none"))
        check_name("reduce", self.reduce, REDUCTIONS)
        check_name("activation", self.activation, ("keep", "relu"))
        check_name("linear_bias", self.linear_bias, ("keep", "always", "never"))
        check_name("gradient", self.gradient, ("official", "masked"))
        check_name("init", self.init, ("stacked", "official"))

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
