"""Schemes: the catalogue, overrides, the round trip through JSON, and one sentence for every wrong field."""

import dataclasses
import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import binvit
from binvit.nn import COMPONENTS, PLACES, Scheme
from binvit.nn.rules import Rule

SCHEMES = binvit.list_schemes()
REQUIRED = ["float", "bnn", "xnor", "xnor-k", "bireal", "irnet", "reactnet", "bibert", "bit", "bivit", "elastic", "gsb"]
FIELDS = [f.name for f in dataclasses.fields(Scheme)]

overrides = st.fixed_dictionaries(
    {},
    optional={place: st.sampled_from(list(rules)) for place, rules in PLACES.items()}
    | {
        "components": st.lists(st.sampled_from(COMPONENTS), unique=True),
        "shift": st.booleans(),
        "attention_shift": st.booleans(),
        "qk_norm": st.booleans(),
        "linear_bias": st.sampled_from(["keep", "always", "never"]),
        "activation": st.sampled_from(["keep", "relu", "none"]),
        "separate_qkv": st.booleans(),
        "latent": st.sampled_from(["free", "clipped", "centred"]),
        "latent_init": st.none() | st.tuples(st.floats(-1, 0), st.floats(0.1, 1)).map(list),
        "output_factor": st.booleans(),
        "norm": st.sampled_from(["none", "before", "after"]),
        "own_input": st.booleans(),
        "layer_activation": st.sampled_from(["none", "clip", "rprelu"]),
        "layer_scale": st.booleans(),
        "branches": st.sampled_from(["none", "pool", "shift"]),
        "context_norm": st.booleans(),
        "context_residual": st.booleans(),
        "attention_bias": st.sampled_from(["full", "relative", "none"]),
        "activation_limit": st.none() | st.floats(0.1, 100),
        "thresholds": st.lists(st.floats(0.01, 0.99), max_size=3, unique=True).map(sorted),
        "reduce": st.sampled_from(["batch", "sample", "head", "row"]),
        "gradient": st.sampled_from(["official", "masked"]),
        "init": st.sampled_from(["stacked", "official"]),
    },
)


def test_the_catalogue_is_sorted_and_complete():
    assert sorted(SCHEMES) == SCHEMES
    assert set(REQUIRED) <= set(SCHEMES)


@pytest.mark.parametrize("name", SCHEMES)
def test_every_scheme_says_what_it_is(name):
    scheme = binvit.scheme(name)
    assert scheme.name == name
    assert scheme.description
    assert "\n" not in scheme.description
    assert re.search(r"20\d\d", scheme.reference)
    assert {f.name for f in dataclasses.fields(scheme)} == set(FIELDS)


@pytest.mark.parametrize("name", SCHEMES)
def test_every_place_of_every_scheme_has_a_rule(name):
    scheme = binvit.scheme(name)
    for place in PLACES:
        rule = scheme.rule(place)
        assert isinstance(rule, Rule)
        name = getattr(scheme, place)
        assert rule.is_float == ((scheme.weight if name == "as_weight" else name) == "float")


def test_float_binarizes_nothing_and_all_others_everything():
    for name in SCHEMES:
        scheme = binvit.scheme(name)
        assert [scheme.binarizes(c) for c in COMPONENTS] == [name != "float"] * 4
        if name != "float":
            places = ("weight", "input", "hidden", "query", "key", "attention", "value")
            assert all(getattr(scheme, place) != "float" for place in places)


# What the papers ask for, place by place.
RULES = {
    "bnn": {"weight": "sign_through", "input": "sign_open", "norm": "after", "latent": "clipped", "activation": "none"},
    "xnor": {"weight": "sign_mean", "input": "sign_open", "norm": "before", "latent": "centred", "value": "sign_mean"},
    "xnor-k": {"weight": "sign_mean", "input": "sign_mean", "hidden": "sign_mean", "value": "sign_mean_token"},
    "bireal": {"weight": "sign_mean_bare", "input": "sign_approx", "norm": "after", "own_input": True},
    "irnet": {"weight": "standardized", "input": "sign_ede", "own_input": True, "layer_activation": "clip"},
    "reactnet": {
        "weight": "sign_mean_centred",
        "input": "sign_approx",
        "attention": "elastic_small",
        "shift": True,
        "own_input": True,
        "layer_activation": "rprelu",
        "layer_scale": False,
        "branches": "none",
    },
    "bibert": {
        "weight": "sign_mean_centred",
        "input": "sign",
        "query": "sign_open",
        "attention": "scores",
        "value": "sign_open",
    },
    "bit": {
        "weight": "bwn",
        "input": "elastic_bit",
        "hidden": "elastic_unsigned",
        "attention": "elastic",
        "shift": True,
        "attention_shift": False,
        "attention_bias": "none",
        "activation": "relu",
        "activation_limit": None,
    },
    "elastic": {"weight": "bwn", "input": "elastic", "hidden": "elastic_unsigned", "attention": "elastic"},
    "xnor++": {"weight": "sign_open", "output_factor": True, "attention": "half_max_learned", "value": "sign_learned"},
    "bivit-head": {
        "weight": "sign_mean_bare",
        "input": "sign_approx",
        "query": "head_sign",
        "attention": "head_sign",
        "value": "head_sign",
        "qk_norm": True,
        "linear_bias": "never",
        "activation_limit": 10.0,
    },
    "binaryvit": {"attention": "elastic_small", "layer_scale": True, "branches": "pool", "context_residual": True},
    "bhvit-qd": {"attention": "three_maps", "layer_scale": True, "branches": "shift", "context_residual": True},
    "bivit": {
        "weight": "sign_learned_centred",
        "mlp_weight": "sign_mean_centred_open",
        "input": "sign_open",
        "attention": "quarter_max",
        "value": "sign_open",
    },
    "gsb": {
        "weight": "bwn",
        "hidden": "elastic_unsigned",
        "attention": "gsb",
        "value": "gsb",
        "thresholds": (0.7, 0.9),
    },
}


@pytest.mark.parametrize("name", RULES)
def test_published_schemes_have_the_published_rules(name):
    scheme = binvit.scheme(name)
    assert {field: getattr(scheme, field) for field in RULES[name]} == RULES[name]


def test_bias_and_limit_belong_to_the_schemes_that_were_published_with_them():
    schemes = [binvit.scheme(name) for name in SCHEMES]
    assert {s.name for s in schemes if s.attention_bias != "none"} == {"elastic", "gsb"}
    assert {s.name for s in schemes if s.activation_limit is not None} == {"bivit-head", "elastic", "gsb"}


def test_gsb_is_elastic_with_two_more_groups():
    gsb, elastic = binvit.scheme("gsb").to_dict(), binvit.scheme("elastic").to_dict()
    differing = {field for field in FIELDS if gsb[field] != elastic[field]}
    assert differing == {"name", "description", "reference", "attention", "value", "thresholds"}
    assert binvit.scheme("gsb").reduce == "row"  # no image depends on another
    assert binvit.scheme("gsb").attention_bias == "full"
    assert binvit.scheme("gsb").activation_limit == 10


@pytest.mark.parametrize("name", SCHEMES)
@settings(max_examples=25)
@given(overrides=overrides)
def test_json_round_trip(name, overrides):
    scheme = binvit.scheme(name, **overrides)
    restored = Scheme.from_dict(json.loads(json.dumps(scheme.to_dict(), allow_nan=False)))
    assert restored == scheme
    assert restored.description == scheme.description
    assert restored.reference == scheme.reference
    assert hash(restored) == hash(scheme)
    for place in PLACES:
        assert restored.rule(place) == scheme.rule(place)


@given(overrides=overrides)
def test_overrides_change_what_they_name_and_nothing_else(overrides):
    before, after = binvit.scheme("gsb").to_dict(), binvit.scheme("gsb", **overrides).to_dict()
    for field in FIELDS:
        if field == "components" and field in overrides:
            assert set(after[field]) == set(overrides[field])
        else:
            want = overrides.get(field, before[field])
            assert after[field] == want
    assert binvit.scheme("gsb").to_dict() == before


def test_the_order_of_components_means_nothing():
    assert binvit.scheme("gsb", components=["head", "mlp"]) == binvit.scheme("gsb", components=("mlp", "head"))


def test_options_reach_the_rules():
    scheme = binvit.scheme("gsb", thresholds=(0.5,), reduce="head", gradient="masked", init="official")
    for place in ("attention", "value"):
        rule = scheme.rule(place)
        assert (rule.thresholds, rule.reduce, rule.gradient, rule.init) == ((0.5,), "head", "masked", "official")


def test_schemes_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        binvit.scheme("gsb").weight = "sign"


def refused(call, *fragments):
    with pytest.raises(ValueError, match=re.escape(fragments[0])) as caught:
        call()
    message = str(caught.value)
    assert message.endswith(".")
    assert "\n" not in message
    for fragment in fragments:
        assert fragment in message


def test_an_unknown_scheme_lists_the_valid_ones():
    refused(lambda: binvit.scheme("gbs"), "Unknown scheme 'gbs'", ", ".join(SCHEMES))
    refused(lambda: binvit.scheme(None), "Unknown scheme None", "gsb")
    refused(lambda: binvit.scheme(["gsb"]), "Unknown scheme ['gsb']", "gsb")


def test_an_unknown_field_lists_the_valid_ones():
    refused(
        lambda: binvit.scheme("gsb", wieght="sign"),
        "Unknown scheme field 'wieght'",
        "weight, mlp_weight, input, hidden",
    )
    fields = binvit.scheme("gsb").to_dict() | {"wieght": "sign"}
    refused(lambda: Scheme.from_dict(fields), "Unknown scheme field 'wieght'", "weight")


def test_a_scheme_without_a_name_is_refused():
    refused(lambda: Scheme.from_dict({"weight": "sign"}), "A scheme needs the field name.")


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("rule", ["ternary", None, 3, ["sign"]])
def test_an_unknown_rule_lists_the_valid_ones(place, rule):
    refused(
        lambda: binvit.scheme("gsb", **{place: rule}),
        f"The scheme's {place} must be one of ",
        f"{', '.join(PLACES[place])}, got {rule!r}.",
    )


@pytest.mark.parametrize("field", ["attention_bias", "reduce", "gradient", "init"])
@pytest.mark.parametrize("value", ["whatever", None, 1, True])
def test_an_unknown_choice_lists_the_valid_ones(field, value):
    refused(
        lambda: binvit.scheme("gsb", **{field: value}), f"The scheme's {field} must be one of ", f", got {value!r}."
    )


@pytest.mark.parametrize(
    ("field", "value", "sentence"),
    [
        (
            "components",
            ("mlp", "attention"),
            "The scheme's components[1] must be one of 'patch_embed', 'mlp', 'mhsa' or 'head', got 'attention'.",
        ),
        ("components", "mlp", "The scheme's components must be a list, got 'mlp'."),
        ("components", None, "The scheme's components must be a list, got None."),
        ("components", [1], "The scheme's components[0] must be one of 'patch_embed', 'mlp', 'mhsa' or 'head', got 1."),
        ("thresholds", 0.7, "The scheme's thresholds must be a list, got 0.7."),
        ("thresholds", ["0.7"], "The scheme's thresholds[0] must be a number, got '0.7'."),
        ("thresholds", [True], "The scheme's thresholds[0] must be a number, got True."),
        (
            "thresholds",
            [2**30000],
            "The scheme's thresholds[0] must be a number, got a whole number of about 9031 digits.",
        ),
        ("thresholds", (float("nan"),), "The scheme's thresholds[0] must be a finite number, got nan."),
        ("shift", "yes", "The scheme's shift must be true or false, got 'yes'."),
        ("shift", 1, "The scheme's shift must be true or false, got 1."),
        ("own_input", 0, "The scheme's own_input must be true or false, got 0."),
        ("norm", "Before", "The scheme's norm must be one of 'none', 'before' or 'after', got 'Before'."),
        ("layer_activation", "relu", "The scheme's layer_activation must be one of none, clip, rprelu, got 'relu'."),
        ("branches", None, "The scheme's branches must be one of none, pool, shift, got None."),
        ("latent", 1, "The scheme's latent must be one of 'free', 'clipped' or 'centred', got 1."),
        ("latent_init", 0.1, "The scheme's latent_init must be a list, got 0.1."),
        ("latent_init", ["a", 1], "The scheme's latent_init[0] must be a number, got 'a'."),
        ("latent_init", [1, 1], "The scheme's latent_init must be two numbers that increase, got (1.0, 1.0)."),
        ("context_residual", "no", "The scheme's context_residual must be true or false, got 'no'."),
        ("layer_scale", None, "The scheme's layer_scale must be true or false, got None."),
        ("activation_limit", 0, "The scheme's activation_limit must be above 0, got 0."),
        ("activation_limit", "10", "The scheme's activation_limit must be a number, got '10'."),
        ("activation_limit", True, "The scheme's activation_limit must be a number, got True."),
        ("activation_limit", float("nan"), "The scheme's activation_limit must be a finite number, got nan."),
        ("activation_limit", float("inf"), "The scheme's activation_limit must be a finite number, got inf."),
        ("description", None, "The scheme's description must be a text, got None."),
        ("name", 3, "The scheme's name must be a text, got 3."),
        ("thresholds", (0.9, 0.7), "thresholds must increase strictly and lie between 0 and 1, got (0.9, 0.7)."),
        ("thresholds", (0.7, 0.7), "thresholds must increase strictly and lie between 0 and 1, got (0.7, 0.7)."),
        ("thresholds", (0, 0.5), "thresholds must increase strictly and lie between 0 and 1, got (0.0, 0.5)."),
        ("latent_init", [1, 2, 3], "The scheme's latent_init must be a list of at most 2 entries, got [1, 2, 3]."),
    ],
)
def test_a_wrong_value_is_one_sentence(field, value, sentence):
    fields = binvit.scheme("gsb").to_dict() | {field: value}
    refused(lambda: Scheme.from_dict(fields), sentence)
    if field != "name":
        refused(lambda: binvit.scheme("gsb", **{field: value}), sentence)


def test_a_scheme_can_be_made_without_the_catalogue():
    scheme = Scheme("mine", weight="bwn_channel", components=["mlp"])
    assert scheme.binarizes("mlp")
    assert not scheme.binarizes("mhsa")
    assert Scheme.from_dict(scheme.to_dict()) == scheme
