import itertools

import numpy as np
import pytest
import reference
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from packed_models import CLASSES, images, logits_of, trained, vit

import binvit
from binvit.jit import JIT
from binvit.nn import COMPONENTS
from binvit.nn.schemes import PLACES
from binvit.packed.products import MOST_ROWS, few_rows_product

X = images(5)


def check_exact(model, x=X):
    logits = binvit.pack(model, exact=True)(x)
    assert torch.isfinite(logits).all()
    assert torch.equal(logits, logits_of(model, x))


@pytest.mark.parametrize("distilled", [False, True])
@pytest.mark.parametrize("name", binvit.list_schemes())
def test_every_scheme_gives_the_logits_of_the_evaluation_mode(name, distilled):
    check_exact(trained(name, distilled))


@pytest.mark.parametrize("name", ["gsb", "xnor-k", "reactnet"])
@pytest.mark.parametrize(
    "components", [c for n in range(len(COMPONENTS)) for c in itertools.combinations(COMPONENTS, n)], ids="-".join
)
def test_parts_that_stay_float_stay_float(name, components):
    model = trained(binvit.scheme(name, components=components), depth=1)
    check_exact(model)
    assert any("float" in part for part in binvit.pack(model).nbytes) == (not {"mlp", "mhsa"} <= set(components))


@pytest.mark.parametrize("place", PLACES)
def test_every_rule_of_every_place(place):
    for rule in PLACES[place]:
        for name in ("gsb", "xnor"):
            scheme = binvit.scheme(name, **{place: rule})
            check_exact(trained(scheme, depth=1, steps=1), X[:3])


PARTS = {
    "layers of their own": {"separate_qkv": True},
    "norms before": {"norm": "before"},
    "norms after, own inputs, clips": {"norm": "after", "own_input": True, "layer_activation": "clip"},
    "factors and scales": {"output_factor": True, "layer_scale": True, "layer_activation": "rprelu"},
    "centred latent weights": {"latent": "centred", "weight": "sign_mean"},
    "clipped latent weights": {"latent": "clipped"},
    "a norm of the context": {"context_norm": True},
    "a context with query, key and value": {"context_residual": True},
    "no activation": {"activation": "none"},
    "pooling branches": {"branches": "pool"},
    "shifting branches": {"branches": "shift"},
}


@pytest.mark.parametrize("name", ["gsb", "xnor"])
@pytest.mark.parametrize("part", PARTS)
def test_every_part_of_a_block(name, part):
    model = trained(binvit.scheme(name, **PARTS[part]), depth=1, class_token=False, global_pool="avg")
    check_exact(model, X[:3])
    assert binvit.pack(model).reason or part in ("no activation", "centred latent weights", "clipped latent weights")


@pytest.mark.parametrize("reduce", ["batch", "sample", "head", "row"])
@pytest.mark.parametrize("thresholds", [(), (0.6,), (0.5, 0.7, 0.9)])
def test_reductions_and_numbers_of_groups(reduce, thresholds):
    check_exact(trained(binvit.scheme("gsb", reduce=reduce, thresholds=thresholds)))


@pytest.mark.parametrize("bias", ["full", "relative", "none"])
@pytest.mark.parametrize("distilled", [False, True])
def test_attention_biases(bias, distilled):
    check_exact(trained(binvit.scheme("gsb", attention_bias=bias), distilled))


VARIANTS = {
    "query-key norm": {"qk_norm": True},
    "layer scale": {"init_values": 0.1},
    "registers": {"reg_tokens": 3},
    "registers outside the position embedding": {"reg_tokens": 2, "no_embed_class": True},
    "norm before the blocks": {"pre_norm": True},
    "more norms": {"scale_attn_norm": True, "scale_mlp_norm": True},
    "no biases": {"qkv_bias": False, "proj_bias": False},
    "no position embedding": {"pos_embed": "none"},
    "no class token": {"class_token": False, "global_pool": "avg"},
    "mean": {"global_pool": "avg"},
    "mean of all tokens": {"global_pool": "avg", "pool_include_prefix": True, "fc_norm": False},
    "mean and maximum": {"global_pool": "avgmax"},
    "maximum": {"global_pool": "max"},
    "attention pooling": {"global_pool": "map"},
    "rms norm": {"norm_layer": "rmsnorm"},
    "quick gelu": {"act_layer": "quick_gelu"},
    "silu": {"act_layer": "silu"},
    "stochastic depth and dropout": {"drop_path_rate": 0.3, "drop_rate": 0.2, "proj_drop_rate": 0.1},
    "heads of 6 channels": {"num_heads": 8},
    "one head of 130 channels": {"embed_dim": 130, "num_heads": 1},
    "heads of 65 channels": {"embed_dim": 195},
    "mlp ratio": {"mlp_ratio": 2.75},
    "mlp ratio that is no float": {"embed_dim": 152, "num_heads": 8, "mlp_ratio": 8 / 3},
    "patches that are no squares": {"patch_size": (4, 8)},
    "65 tokens": {"patch_size": 2},
}


@pytest.mark.parametrize("name", ["gsb", "xnor"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_of_the_transformer(name, variant):
    check_exact(trained(name, depth=1, **VARIANTS[variant]), X[:3])


def test_a_model_made_by_timm():
    import timm

    float_model = timm.create_model("deit_tiny_distilled_patch16_224", img_size=32, num_classes=CLASSES)
    model = trained("gsb", model=float_model, steps=0)
    x = torch.randn(3, 3, 32, 32)
    packed = binvit.pack(binvit.calibrate(model, x).eval(), exact=True)
    assert torch.equal(packed(x), logits_of(model, x))
    assert packed.blueprint.mean == (0.485, 0.456, 0.406)


@pytest.mark.parametrize("layer", ["SwiGLU", "SwiGLUPacked", "GluMlp"])
def test_other_mlps_are_refused_in_a_sentence(layer):
    import timm.layers

    scheme = binvit.scheme("gsb", components=("mhsa",), activation_limit=None)
    model = binvit.binarize(vit(depth=1, mlp_layer=getattr(timm.layers, layer)), scheme)
    with pytest.raises(ValueError, match=r"Block 0 has (SwiGLU|GluMlp) as MLP.*only timm's Mlp has\.$"):
        binvit.pack(binvit.calibrate(model, X).eval())


def test_a_model_that_has_seen_no_batch_is_refused():
    with pytest.raises(ValueError, match=r"run one batch in training mode or use binvit.calibrate"):
        binvit.pack(binvit.binarize(vit(), "gsb"))


def test_models_that_cannot_be_packed_are_refused():
    with pytest.raises(ValueError, match=r"made by binvit.binarize\(\), got VisionTransformer"):
        binvit.pack(vit())
    with pytest.raises(ValueError, match="got int"):
        binvit.pack(3)
    model = trained("bibert", steps=1)
    with pytest.raises(ValueError, match="5 classes, but 2 class names came"):
        binvit.pack(model, classes=["a", "b"])
    model.blocks[1].norm1.eps = 0.1
    with pytest.raises(ValueError, match="norm1"):
        binvit.pack(model)
    model.blocks[0].mlp.act = torch.nn.Softplus()
    with pytest.raises(ValueError, match="activation Softplus cannot be packed"):
        binvit.pack(model)
    dynamic = trained("bnn", steps=1, dynamic_img_size=True)
    with pytest.raises(ValueError, match="one image size"):
        binvit.pack(dynamic)


@pytest.mark.parametrize("name", ["gsb", "elastic", "bivit-head", "bivit"])
@pytest.mark.parametrize("exact", [False, True])
def test_scales_that_a_step_took_below_zero_are_clamped_as_in_evaluation(name, exact):
    model, x = trained(name), images(5)
    with torch.no_grad():
        for parameter, values in model.named_parameters():
            if parameter.rpartition(".")[2].startswith("scale"):
                values[values == values.max()] = -0.3
    assert torch.equal(binvit.pack(model, exact=exact)(x), logits_of(model, x))


@pytest.mark.skipif(not JIT, reason="without a compiler the product is torch's")
@settings(deadline=None, max_examples=60)
@given(st.integers(1, MOST_ROWS), st.integers(1, 1000), st.integers(1, 40), st.integers(0, 2**32 - 1))
@example(1, 1023, 3, 0)
def test_sums_are_the_integers(rows, length, outputs, seed):
    rng = np.random.default_rng(seed)
    x, w = rng.integers(-128, 128, (rows, length)), rng.integers(-128, 128, (outputs, length)).astype(np.int8)
    x[0], w[0] = 127, -128  # the largest sum
    y = few_rows_product(torch.from_numpy(x.astype(np.float32)), torch.from_numpy(w))
    np.testing.assert_array_equal(y.numpy(), reference.integer_product(x, w))


def test_many_rows_and_other_weights_are_left_to_torch():
    x = torch.zeros(MOST_ROWS + 1, 8)
    assert few_rows_product(x, torch.zeros(3, 8, dtype=torch.int8)) is None
    assert few_rows_product(x[:1], torch.zeros(3, 8)) is None
    if JIT:
        assert few_rows_product(x[None, None, :1], torch.zeros(3, 8, dtype=torch.int8)).shape == (1, 1, 1, 3)
