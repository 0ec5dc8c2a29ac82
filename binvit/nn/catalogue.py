"""The catalogue of published binarizers; adding one is one record here and, if its rule is new, one rule class.

In every 1-bit scheme the patch embedding has 8-bit weights, and the heads 8-bit weights and inputs, as in GSB's code;
the codes of the others leave both float, but for BNN's, whose first layer has 1-bit weights.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from binvit.nn.schemes import Scheme, check_name


def _everywhere(rule: str, **fields: Any) -> dict[str, Any]:
    """Return the fields of a scheme that treats all inputs, the query and the key alike."""
    return dict.fromkeys(("input", "hidden", "query", "key"), rule) | fields


_GSB_PAPER = (
    "Gao et al., Group superposition binarization for vision transformer with limited training samples, "
    "Neural Networks 172, 2024, arXiv 2305.07931"
)
_ELASTIC: dict[str, Any] = _everywhere(
    "elastic", hidden="elastic_unsigned", shift=True, attention_bias="full", activation_limit=10.0, weight="bwn"
)
_REACTNET: dict[str, Any] = {
    "shift": True,
    "separate_qkv": True,
    "linear_bias": "never",
    "norm": "after",
    "own_input": True,
    "layer_activation": "rprelu",
    "context_norm": True,
    "context_residual": True,
    "activation": "none",
}
_CATALOGUE = (
    Scheme(
        "float",
        "full precision, the model as timm builds it",
        "Dosovitskiy et al., An image is worth 16x16 words, 2021; timm.",
        components=(),
    ),
    Scheme(
        "bnn",
        "plain signs without any factor, straight-through gradient, norms",
        "Hubara et al., Binarized neural networks, 2016. The map (half of the row's maximum) is this project's choice, "
        "as are LayerNorms where the nets have batch norms, the product of map and value included; the window of a "
        "sign is that of the Hardtanh before it; latent weights are clipped as the paper says (in the released code "
        "that line reaches the biases only).",
        norm="after",
        context_norm=True,
        activation="none",
        latent="clipped",
        **_everywhere("sign_open", weight="sign_through", attention="half_max", value="sign_open"),
    ),
    Scheme(
        "xnor",
        "signs with a mean-absolute-value factor per output channel, a norm before every sign",
        "Rastegari et al., XNOR-Net, 2016, with the weight gradient of the authors' released code. The map, its factor "
        "(mean of the kept entries per row), that of the value (mean |v| per head) and LayerNorms where the nets have "
        "batch norms are this project's choice.",
        norm="before",
        activation="none",
        latent="centred",
        **_everywhere("sign_open", weight="sign_mean", attention="half_max_mean", value="sign_mean"),
    ),
    Scheme(
        "xnor-k",
        "as xnor, with XNOR-Net's factor of the inputs: mean |x| per token",
        "Rastegari et al., XNOR-Net, 2016, with the input factor K, which no released code applies: the authors' does "
        "not compute it, a reimplementation computes and drops it. Map and value as in xnor; a value scaled per token "
        "cannot be summed over tokens as bits: that one product stays float.",
        norm="before",
        activation="none",
        latent="centred",
        **_everywhere("sign_mean", weight="sign_mean", attention="half_max_mean", value="sign_mean_token"),
    ),
    Scheme(
        "xnor++",
        "signs with one learned factor per output channel of every product, norms",
        "Bulat and Tzimiropoulos, XNOR-Net++: Improved binary neural networks, 2019. No code came with the paper; as "
        "in the first author's later library the factor multiplies the bias as well. One learned factor each for map "
        "and value, and LayerNorms where the nets have batch norms, are this project's choice.",
        output_factor=True,
        norm="after",
        context_norm=True,
        activation="none",
        **_everywhere("sign_open", weight="sign_open", attention="half_max_learned", value="sign_learned"),
    ),
    Scheme(
        "bireal",
        "approximate sign gradient, the own input added to every layer's normalized output",
        "Liu et al., Bi-Real Net, 2018. The attention map, with the paper's gradient at the distance from the "
        "threshold, and LayerNorms where the nets have batch norms are this project's choice.",
        linear_bias="never",
        latent_init=(0.0, 0.001),
        norm="after",
        own_input=True,
        activation="none",
        **_everywhere("sign_approx", weight="sign_mean_bare", attention="half_max_approx", value="sign_approx"),
    ),
    Scheme(
        "irnet",
        "standardized weights, a gradient that sharpens over training, own inputs",
        "Qin et al., Forward and backward information retention for accurate binary neural networks, 2020. The "
        "attention map, with the paper's gradient at the distance from the threshold, LayerNorms where the nets have "
        "batch norms, and a gradient that sharpens with every step, where the released code's does with every epoch, "
        "are this project's choice.",
        linear_bias="never",
        norm="after",
        own_input=True,
        layer_activation="clip",
        activation="none",
        **_everywhere("sign_ede", weight="standardized", attention="half_max_ede", value="sign_ede"),
    ),
    Scheme(
        "reactnet",
        "learned shifts before every sign, own inputs and a shifted PReLU after every linear layer",
        "Liu et al., ReActNet: Towards precise binary neural network with generalized activation functions, 2020, in "
        "the transformer version released with BinaryViT (Le and Li, 2023), whose weights are centred where those of "
        "the convolutional code are not; LayerNorms where its scripts put batch norms are this project's choice.",
        **_REACTNET,
        **_everywhere("sign_approx", weight="sign_mean_centred", attention="elastic_small", value="sign_approx"),
    ),
    Scheme(
        "bibert",
        "no softmax: the map is the sign of the scores",
        "Qin et al., BiBERT: Accurate fully binarized BERT, 2022, and its code, made for a post-norm BERT; blocks that "
        "norm first, as this ViT's do, are this project's adaptation. Its distillation is the field similarity of "
        "recipes.",
        **_everywhere("sign", weight="sign_mean_centred", attention="scores", value="sign_open")
        | dict.fromkeys(("query", "key"), "sign_open"),
    ),
    Scheme(
        "bivit",
        "learned weight factor per output channel, map thresholded at a quarter of the row's maximum",
        "He et al., BiViT: Extremely compressed binary vision transformer, 2023, arXiv 2211.07091, and its code: fc1 "
        "and fc2 have the row's mean |W| as factor, which is not learned.",
        latent_init=(-0.015, 0.015),
        linear_bias="always",
        mlp_weight="sign_mean_centred_open",
        **_everywhere("sign_open", weight="sign_learned_centred", attention="quarter_max", value="sign_open"),
    ),
    Scheme(
        "bivit-head",
        "learned step and offset per head for query, key, map and value",
        "Li et al., Bi-ViT: Pushing the limit of vision transformer quantization, 2024, and its code, whose training "
        "script lacks the paper's ranking-aware loss, and whose linear layers never add their bias. The map starts "
        "constant, as released.",
        linear_bias="never",
        qk_norm=True,
        activation_limit=10.0,
        **_everywhere("sign_approx", weight="sign_mean_bare", attention="head_sign", value="head_sign")
        | dict.fromkeys(("query", "key"), "head_sign"),
    ),
    Scheme(
        "binaryvit",
        "own inputs, norms, shifted PReLUs and scales around every linear layer, pooling branches",
        "Le and Li, BinaryViT: Pushing binary vision transformers towards convolutional models, 2023. LayerNorms where "
        "the released scripts put batch norms over tokens, and no pyramid, are this project's choice; a model with a "
        "class token has no pooling branches.",
        layer_scale=True,
        branches="pool",
        **_REACTNET,
        **_everywhere("sign_approx", weight="sign_mean_centred", attention="elastic_small", value="sign_approx"),
    ),
    Scheme(
        "bhvit-qd",
        "attention map decomposed into three binary maps, in BinaryViT's blocks with shifting branches",
        "Gao et al., BHViT: Binarized hybrid vision transformer, 2025, arXiv 2503.02394; its decomposition and blocks "
        "on a plain vision transformer, without the windows and convolutions of its first stages, with LayerNorms "
        "where the released scripts put batch norms; a model with a class token has no shifting branches. The penalty "
        "of its last epochs is the field weight_penalty of recipes.",
        layer_scale=True,
        branches="shift",
        **_REACTNET,
        **_everywhere("sign_approx", weight="sign_mean_centred", attention="three_maps", value="sign_approx"),
    ),
    Scheme(
        "bit",
        "learned (elastic) scale per tensor, one group, ReLU in the MLP",
        "Liu et al., BiT: Robustly binarized multi-distilled transformer, 2022, and its code, made for a post-norm "
        "BERT; blocks that norm first, as this ViT's do, are this project's adaptation. The released forward pass "
        "overwrites the shifted query, key and value, so that they have no shifts. Its distillation in several steps "
        "is a matter of recipes.",
        shift=True,
        attention_shift=False,
        separate_qkv=True,
        activation="relu",
        **_everywhere("elastic_bit", hidden="elastic_unsigned", weight="bwn", attention="elastic", value="elastic_bit"),
    ),
    Scheme(
        "elastic",
        "learned (elastic) scale and shift per tensor, one group: the baseline of gsb",
        "The one-group baseline of "
        + _GSB_PAPER
        + ", which goes by the name of BiT there and differs from BiT's code.",
        attention="elastic",
        value="elastic",
        **_ELASTIC,
    ),
    Scheme(
        "gsb",
        "three superposed binary groups for the attention map and the value",
        _GSB_PAPER
        + ". The released code takes the maxima over the whole batch (reduce='batch'); the default here takes them "
        "per row, so that an image's logits do not depend on its batch. Its scales stack up in the first step only "
        "(init='official'), here for good, and the patch embedding's 8-bit steps start from one value for all "
        "channels, here from one per channel.",
        attention="gsb",
        value="gsb",
        thresholds=(0.7, 0.9),
        **_ELASTIC,
    ),
)
CATALOGUE: dict[str, Scheme] = {s.name: s for s in sorted(_CATALOGUE, key=lambda s: s.name)}


def list_schemes() -> list[str]:
    """Return the names of all schemes of the catalogue, sorted."""
    return list(CATALOGUE)


def scheme(name: str, **overrides: Any) -> Scheme:
    """Return a scheme of the catalogue, with some fields changed.

    Args:
        name: a name from `list_schemes()`.
        overrides: fields of `Scheme` with their new values.

    Raises:
        ValueError: if the name, a field or a value is unknown; the sentence lists the valid ones.
    """
    check_name("scheme", name, CATALOGUE)
    return dataclasses.replace(CATALOGUE[name], **overrides)
