"""binarize() over many timm vision transformers: weights and class stay, training works, images stay independent."""

import copy
import re

import pytest
import torch
import torch.nn.functional as F
from nn_helpers import images, tiny_vit
from timm.layers import GluMlp, SwiGLU
from timm.models.resnet import resnet18
from timm.models.vision_transformer import (
    ParallelScalingBlock,
    ParallelThingsBlock,
    ResPostBlock,
    VisionTransformer,
)
from torch import nn

import binvit
from binvit import nn as bnn
from binvit.nn import Binarizer, BinaryAttention, BinaryLinear, BinaryMlp, BinaryPatchConv
from binvit.nn.convert import binarize_

SCHEMES = binvit.list_schemes()
BINARY = [name for name in SCHEMES if name != "float"]

SHAPES = {
    "plain": {},
    "distilled": {"distilled": True},
    "query and key norms": {"qk_norm": True},
    "norms inside": {"scale_attn_norm": True, "scale_mlp_norm": True},
    "layer scale": {"init_values": 0.1},
    "registers": {"reg_tokens": 3},
    "registers without class embedding": {"reg_tokens": 2, "no_embed_class": True},
    "average pooling": {"global_pool": "avg"},
    "average of everything": {"global_pool": "avg", "pool_include_prefix": True, "fc_norm": False},
    "maximum pooling": {"global_pool": "max"},
    "both poolings": {"global_pool": "avgmax"},
    "attention pooling": {"global_pool": "map"},
    "no class token": {"class_token": False, "global_pool": "avg"},
    "no class token, attention pooling": {"class_token": False, "global_pool": "map"},
    "stochastic depth": {"drop_path_rate": 0.2},
    "dropout": {"proj_drop_rate": 0.1, "attn_drop_rate": 0.1, "drop_rate": 0.1, "pos_drop_rate": 0.1},
    "odd sizes": {"img_size": 15, "patch_size": 5, "embed_dim": 35, "num_heads": 5, "mlp_ratio": 1.7, "depth": 3},
    "odd width": {"img_size": 15, "patch_size": 5, "embed_dim": 35, "num_heads": 5, "mlp_ratio": 3},
    "one head of one patch": {"img_size": 8, "num_heads": 1},
    "images higher than wide": {"img_size": (24, 16)},
    "patches wider than high": {"img_size": (16, 24), "patch_size": (4, 8)},
    "one channel": {"in_chans": 1},
    "no biases": {"qkv_bias": False, "proj_bias": False},
    "norm before the blocks": {"pre_norm": True},
    "no last norm": {"final_norm": False},
    "no positions": {"pos_embed": "none"},
    "another activation": {"act_layer": nn.ReLU},
    "normalized patches": {"embed_norm_layer": nn.LayerNorm},
}


def model_and_images(shape, n=4):
    options = {"seed": 1} | SHAPES[shape]
    model = tiny_vit(**options)
    height, width = model.patch_embed.img_size
    return model, images(n, height, width, model.patch_embed.proj.in_channels)


def distilled_loss(output, labels):
    outputs = output if isinstance(output, tuple) else (output,)
    return sum(F.cross_entropy(logits, labels) for logits in outputs) / len(outputs)


LABELS = torch.tensor([0, 1, 2, 3])


def train(model, x, steps, lr=3e-3):
    """Train on one batch and return the losses before each step; the first pass sets the scales."""
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    losses = []
    for _ in range(steps):
        loss = distilled_loss(model(x), LABELS)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def calibrated(model, scheme, x):
    return binvit.calibrate(binvit.binarize(model, scheme), x).eval()


# --- what conversion keeps


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ["gsb", "xnor++"])  # compiled steps and tensor formulas
def test_binarized_copies_of_every_shape_train(name, shape):
    model, x = model_and_images(shape)
    before = copy.deepcopy(model.state_dict())
    binary = binvit.binarize(model, name)

    assert isinstance(binary, type(model))
    assert binary.scheme == binvit.scheme(name)
    assert not hasattr(model, "scheme")
    after = binary.state_dict()
    for key, value in before.items():
        assert torch.equal(after[key], value), key
        assert torch.equal(model.state_dict()[key], value), key
        assert after[key].data_ptr() != value.data_ptr()

    binary.train()
    if hasattr(binary, "set_distilled_training"):
        binary.set_distilled_training(True)
        assert isinstance(binary(x), tuple)
    distilled_loss(binary(x), LABELS).backward()
    for key, parameter in binary.named_parameters():
        if parameter.grad is None:
            assert SHAPES[shape].get("drop_path_rate"), key
        else:
            assert torch.isfinite(parameter.grad).all(), key
    # A lucky first loss needs more steps to be beaten.
    lucky = name == "xnor++" or any("drop" in option for option in SHAPES[shape])
    losses = train(binary, x, 16 if lucky else 5)
    assert min(losses[1:]) < losses[0]

    binary.eval()
    with torch.no_grad():
        logits = binary(x)
    assert logits.shape == (4, 5)
    assert torch.isfinite(logits).all()


@pytest.mark.parametrize("name", SCHEMES)
def test_a_model_binarized_itself_is_what_its_copy_is(name):
    model, x = tiny_vit(True), images(4)
    copied = binvit.binarize(model, name).eval()
    itself = binarize_(model.eval(), name)
    assert itself is model
    assert type(itself) is type(copied)
    with torch.no_grad():
        assert torch.equal(itself(x), copied(x))
    if copied.scheme.components:
        with pytest.raises(ValueError, match="binarized already"):
            binarize_(model, name)


@pytest.mark.parametrize("distilled", [False, True])
@pytest.mark.parametrize("name", SCHEMES)
def test_every_scheme_trains_every_parameter(name, distilled):
    model = binvit.binarize(tiny_vit(distilled, seed=2), name).train()
    if distilled:
        model.set_distilled_training(True)
    x = images(4)
    distilled_loss(model(x), LABELS).backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert torch.isfinite(parameter.grad).all(), key
    for key in ("patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "blocks.1.mlp.fc2.weight", "head.weight"):
        assert model.get_parameter(key).grad.abs().max() > 0, key
    losses = train(model, x, 8)
    assert min(losses[1:]) < losses[0]


@pytest.mark.parametrize("shape", ["plain", "distilled", "registers", "norms inside", "attention pooling"])
def test_the_float_scheme_is_the_model(shape):
    model, x = model_and_images(shape)
    copied = binvit.binarize(model.eval(), "float")
    assert copied is not model
    assert isinstance(copied, type(model))
    assert {type(m) for n, m in copied.named_modules() if n} == {type(m) for n, m in model.named_modules() if n}
    with torch.no_grad():
        assert torch.equal(copied(x), model(x))


@pytest.mark.parametrize("shape", SHAPES)
def test_float_rules_in_binary_layers_are_the_model(shape):
    """With every rule float, what replaces timm's layers computes what they compute."""
    model, x = model_and_images(shape)
    places = dict.fromkeys(bnn.PLACES, "float")
    plain = binvit.binarize(model.eval(), binvit.scheme("float", components=bnn.COMPONENTS, **places))
    assert isinstance(plain.blocks[0].attn, BinaryAttention)
    with torch.no_grad():
        torch.testing.assert_close(plain(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_kept(training):
    model = tiny_vit().train(training)
    binary = binvit.binarize(model, "gsb")
    assert all(module.training == training for module in binary.modules())
    binvit.calibrate(binary, images(2))
    assert all(module.training == training for module in binary.modules())


def test_calibrate_sets_every_scale_whatever_it_was():
    x = images(4)
    model = calibrated(tiny_vit(), "gsb", x)
    flags = [value for key, value in model.state_dict().items() if key.endswith("initialized")]
    assert flags
    assert all(flags)
    before = copy.deepcopy(model.state_dict())
    binvit.calibrate(model, images(4, seed=1))
    assert any(not torch.equal(value, before[key]) for key, value in model.state_dict().items())
    binvit.calibrate(model, x)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", SCHEMES)
def test_state_dict_and_deepcopy_keep_the_logits(name):
    x = images(4)
    trained = binvit.binarize(tiny_vit(True), name).train()
    trained.set_distilled_training(True)
    train(trained, x, 2)
    trained.eval()
    loaded = binvit.binarize(tiny_vit(True, seed=5), name)
    loaded.load_state_dict(trained.state_dict())
    with torch.no_grad():
        want = trained(x)
        assert torch.equal(loaded.eval()(x), want)
        assert torch.equal(copy.deepcopy(trained)(x), want)
    loaded.train()
    loaded.set_distilled_training(True)
    with torch.no_grad():
        for mine, theirs in zip(loaded(2 * x), trained.train()(2 * x), strict=True):
            assert torch.equal(mine, theirs)  # no scale was set anew


# --- components and places


LAYERS = {
    "patch_embed": lambda model: [model.patch_embed.proj],
    "mhsa": lambda model: [block.attn for block in model.blocks],
    "mlp": lambda model: [block.mlp for block in model.blocks],
    "head": lambda model: [model.head, model.head_dist],
}
KINDS = {"patch_embed": BinaryPatchConv, "mhsa": BinaryAttention, "mlp": BinaryMlp, "head": BinaryLinear}


@pytest.mark.parametrize(
    "components",
    [(), ("mlp",), ("mhsa",), ("patch_embed",), ("head",), ("mlp", "mhsa"), ("patch_embed", "head"), bnn.COMPONENTS],
)
def test_components_say_what_is_binarized(components):
    model = tiny_vit(True)
    binary = binvit.binarize(model, binvit.scheme("gsb", components=components))
    for component, layers in LAYERS.items():
        for mine, theirs in zip(layers(binary), layers(model), strict=True):
            if component in components:
                assert isinstance(mine, KINDS[component])
            else:
                assert isinstance(mine, type(theirs))
    with torch.no_grad():
        assert binary.train()(images(2)).shape == (2, 5)
        if not components:  # the bias starts at zero
            torch.testing.assert_close(binary.eval()(images(2)), model.eval()(images(2)))


OVERRIDES = {
    "weight": ("sign_mean", lambda m: [m.blocks[1].attn.qkv.weight_binarizer, m.blocks[0].attn.proj.weight_binarizer]),
    "mlp_weight": ("sign", lambda m: [m.blocks[1].mlp.fc1.weight_binarizer, m.blocks[0].mlp.fc2.weight_binarizer]),
    "input": ("sign", lambda m: [m.blocks[0].attn.qkv.input_binarizer, m.blocks[1].mlp.fc1.input_binarizer]),
    "hidden": ("elastic", lambda m: [m.blocks[0].mlp.fc2.input_binarizer]),
    "query": ("sign_approx", lambda m: [m.blocks[0].attn.query_binarizer]),
    "key": ("float", lambda m: [m.blocks[0].attn.key_binarizer]),
    "attention": ("quarter_max", lambda m: [m.blocks[0].attn.attention_binarizer]),
    "value": ("sign_mean", lambda m: [m.blocks[1].attn.value_binarizer]),
    "patch_weight": ("bwn_channel", lambda m: [m.patch_embed.proj.weight_binarizer]),
    "patch_input": ("sign_mean", lambda m: [m.patch_embed.proj.input_binarizer]),
    "head_weight": ("bwn", lambda m: [m.head.weight_binarizer, m.head_dist.weight_binarizer]),
    "head_input": ("float", lambda m: [m.head.input_binarizer, m.head_dist.input_binarizer]),
}


@pytest.mark.parametrize("place", bnn.PLACES)
def test_one_place_is_overridden_alone(place):
    rule, binarizers = OVERRIDES[place]
    scheme, plain = binvit.scheme("gsb", **{place: rule}), binvit.scheme("gsb")
    model, usual = binvit.binarize(tiny_vit(True), scheme), binvit.binarize(tiny_vit(True), plain)
    assert all(b.rule == scheme.rule(place) for b in binarizers(model))
    touched = {id(b) for b in binarizers(model)}
    for (_, mine), (_, theirs) in zip(model.named_modules(), usual.named_modules(), strict=True):
        if isinstance(mine, Binarizer) and mine.rule != theirs.rule:
            assert mine.rule == scheme.rule(place)
            touched.discard(id(mine))
    assert not touched
    model.train()
    model.set_distilled_training(True)
    losses = train(model, images(4), 3)
    assert all(loss == loss for loss in losses)


@pytest.mark.parametrize("place", bnn.PLACES)
def test_every_rule_works_at_every_place_it_is_listed_for(place):
    x = images(2)
    for rule in bnn.PLACES[place]:
        model = binvit.binarize(tiny_vit(depth=1), binvit.scheme("gsb", **{place: rule})).train()
        model(x)
        loss = F.cross_entropy(model(x), LABELS[:2])
        loss.backward()
        assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None), rule
        with torch.no_grad():
            assert torch.isfinite(model.eval()(x)).all(), rule


@pytest.mark.parametrize("kind", ["full", "relative", "none"])
@pytest.mark.parametrize("shape", ["plain", "distilled", "registers", "no class token", "images higher than wide"])
def test_attention_bias_fits_the_tokens(kind, shape):
    model, x = model_and_images(shape)
    binary = binvit.binarize(model, binvit.scheme("gsb", attention_bias=kind)).train()
    tokens = model.patch_embed.num_patches + model.num_prefix_tokens
    bias = binary.blocks[0].attn.bias
    if kind == "none":
        assert bias is None
    else:
        assert bias().shape == (3, tokens, tokens)
    distilled_loss(binary(x), LABELS).backward()
    if bias is not None:
        assert bias.values.grad.shape == bias.values.shape
        assert bias.values.grad.abs().max() > 0
    loaded = binvit.binarize(model, binary.scheme)
    loaded.load_state_dict(binary.state_dict())


def test_parameters_of_the_full_bias_are_those_of_the_paper():
    deit = tiny_vit(True, img_size=224, patch_size=16, embed_dim=384, num_heads=6, depth=12, mlp_ratio=4)
    scheme = binvit.scheme("gsb", components=("mhsa",))
    model = binvit.binarize(deit, scheme)
    sizes = [p.numel() for key, p in model.named_parameters() if key.endswith("bias.values")]
    assert sum(sizes) == 2_822_688


# --- independence of the batch


@pytest.mark.parametrize("shape", ["distilled", "odd width", "images higher than wide"])
@pytest.mark.parametrize("name", BINARY)
@torch.no_grad()
def test_logits_of_an_image_do_not_depend_on_its_batch(name, shape):
    model, x = model_and_images(shape, n=5)
    model = calibrated(model, name, x)
    everything = model(x)
    for i in range(len(x)):
        assert torch.equal(everything[i : i + 1], model(x[i : i + 1]))
    assert torch.equal(model(x.flip(0)), everything.flip(0))


@pytest.mark.parametrize("reduce", ["row", "head", "sample"])
@torch.no_grad()
def test_reductions_within_an_image_keep_images_apart(reduce):
    x = images(5)
    model = calibrated(tiny_vit(True), binvit.scheme("gsb", reduce=reduce), x)
    assert torch.equal(model(x)[:1], model(x[:1]))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("scheme", [*BINARY, *(binvit.scheme("gsb", reduce=r) for r in ("batch", "sample", "head"))])
def test_no_images_give_no_logits(scheme, training):
    model = calibrated(tiny_vit(False), scheme, images(2)).train(training)
    logits = model(images(2)[:0])
    logits.sum().backward()
    assert logits.shape == (0, model.num_classes)
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())


@torch.no_grad()
def test_the_released_reduction_lets_images_depend_on_each_other():
    x = images(5)
    model = calibrated(tiny_vit(True), binvit.scheme("gsb", reduce="batch"), x)
    x[1:] *= torch.linspace(0.5, 4, 4).view(4, 1, 1, 1)
    assert (model(x)[:1] - model(x[:1])).abs().max() > 1e-4


@pytest.mark.parametrize("name", BINARY)
@torch.no_grad()
def test_evaluation_gives_training_up_to_rounding(name):
    """A sum of signs that equals its mean is exactly 0 after the norm in both forms, and has the same sign."""
    for seed in range(8):
        x = images(4)
        model = calibrated(tiny_vit(False, seed=seed), name, x)
        torch.testing.assert_close(model.train()(x), model.eval()(x), rtol=1e-3, atol=1e-3)


# --- schedules


def test_progress_reaches_every_schedule():
    model = binvit.binarize(tiny_vit(), "irnet")
    for done, want in ((0.0, 1e-3), (0.5, 0.1), (1.0, 10.0)):
        bnn.set_progress(model, done)
        found = [value for key, value in model.state_dict().items() if key.endswith("sharpness")]
        assert len(found) >= 2 * 12
        assert all(value.item() == pytest.approx(want) for value in found)


def test_progress_leaves_other_schemes_alone():
    model = binvit.binarize(tiny_vit(), "gsb")
    before = copy.deepcopy(model.state_dict())
    bnn.set_progress(model, 0.5)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", BINARY)
def test_two_forward_passes_before_one_backward_pass_give_both_gradients(name):
    model = binvit.calibrate(binvit.binarize(tiny_vit(), name), images(4)).train()
    views = images(3, seed=1), images(3, seed=2)
    apart = []
    for view in views:
        model.zero_grad()
        model(view).square().sum().backward()
        apart.append([parameter.grad for parameter in model.parameters()])
    model.zero_grad()
    sum(model(view).square().sum() for view in views).backward()
    for parameter, *gradients in zip(model.parameters(), *apart, strict=True):
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, sum(gradients), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", [{}, {"init": "official"}])
def test_checkpointing_may_be_on_from_the_first_batch(options):
    model = binvit.binarize(tiny_vit(), binvit.scheme("gsb", **options)).train()
    model.set_grad_checkpointing(True)
    model(x=images(4)).sum().backward()
    assert model.grad_checkpointing
    assert all(module.is_set for module in model.modules() if isinstance(module, Binarizer))


@pytest.mark.parametrize("name", ["gsb", "binaryvit", "bivit-head", "xnor++", "reactnet"])
@pytest.mark.parametrize("kind", [torch.float64, torch.bfloat16])
def test_new_parameters_have_the_type_of_the_model(name, kind):
    model = binvit.binarize(tiny_vit().to(kind), name).train()
    assert {parameter.dtype for parameter in model.parameters()} == {kind}
    model(images(4).to(kind)).float().sum().backward()


def test_new_parameters_are_where_the_model_is_and_frozen_weights_stay_frozen():
    model = binvit.binarize(tiny_vit().to("meta"), "gsb")
    assert {tensor.device.type for tensor in (*model.parameters(), *model.buffers())} == {"meta"}
    frozen = tiny_vit().requires_grad_(False)
    names = {name for name, parameter in binvit.binarize(frozen, "gsb").named_parameters() if parameter.requires_grad}
    assert names
    assert not names & {name for name, _ in frozen.named_parameters()}


@pytest.mark.parametrize("name", binvit.list_schemes())
def test_gradient_checkpointing_changes_nothing(name):
    x = images(4)
    gradients, weights = [], []
    for checkpointing in (False, True):
        model = binvit.binarize(tiny_vit(), name).train()
        model.set_grad_checkpointing(checkpointing)
        distilled_loss(model(x), LABELS).backward()
        gradients.append([p.grad for p in model.parameters()])
        weights.append(list(model.parameters()))
    for mine, theirs in (*zip(*gradients, strict=True), *zip(*weights, strict=True)):
        assert mine is theirs is None or torch.equal(mine, theirs)


def test_a_model_without_a_head_gives_features():
    model = binvit.binarize(tiny_vit(num_classes=0), "gsb").train()
    assert isinstance(model.head, nn.Identity)
    assert model(images(2)).shape == (2, 24)


def test_images_of_any_size_need_a_scheme_without_bias():
    model = tiny_vit(dynamic_img_size=True)
    binary = calibrated(model, binvit.scheme("gsb", attention_bias="none"), images(2))
    with torch.no_grad():
        assert binary(images(2, 24, 32)).shape == (2, 5)


# --- refusals


def refused(model, scheme, *fragments):
    with pytest.raises(ValueError, match=re.escape(fragments[0])) as caught:
        binvit.binarize(model, scheme)
    message = str(caught.value)
    assert message.endswith(".")
    assert "\n" not in message
    for fragment in fragments:
        assert fragment in message


def test_an_unknown_scheme_lists_the_valid_ones():
    refused(tiny_vit(), "gbs", "Unknown scheme 'gbs'; valid are", "xnor")


@pytest.mark.parametrize("scheme", [None, 3, {"name": "gsb"}])
def test_something_that_is_no_scheme(scheme):
    refused(tiny_vit(), scheme, "scheme must be a Scheme or a name", type(scheme).__name__)


@pytest.mark.parametrize("scheme", ["gsb", "float"])
@pytest.mark.parametrize("make", [resnet18, lambda: nn.Linear(3, 4), lambda: "vit", lambda: None])
def test_a_model_that_is_no_vit(make, scheme):
    model = make()
    refused(model, scheme, "takes a timm VisionTransformer", type(model).__name__)


@pytest.mark.parametrize("block", [ParallelScalingBlock, ParallelThingsBlock, ResPostBlock])
def test_blocks_of_another_kind(block):
    refused(tiny_vit(block_fn=block), "gsb", block.__name__, "only timm's pre-norm Block")


@pytest.mark.parametrize("mlp", [SwiGLU, GluMlp])
def test_an_mlp_of_another_kind(mlp):
    model = tiny_vit(mlp_layer=mlp)
    refused(model, "gsb", mlp.__name__, "only timm's Mlp")
    scheme = binvit.scheme("gsb", components=("mhsa",), activation_limit=None)
    assert isinstance(binvit.binarize(model, scheme), VisionTransformer)


def test_attention_of_another_kind():
    refused(tiny_vit(attn_layer="diff", depth=1), "gsb", "DiffAttention", "only timm's Attention")


def test_gated_attention():
    model = tiny_vit()
    model.blocks[1].attn.gate = nn.Linear(24, 24)
    refused(model, "gsb", "Block 1 has gated attention")
    scheme = binvit.scheme("gsb", components=("mlp",), attention_bias="none")
    assert isinstance(binvit.binarize(model, scheme), VisionTransformer)


def test_a_patch_embedding_of_another_kind():
    model = tiny_vit()
    model.patch_embed.proj = nn.Conv2d(3, 24, 8, stride=4)
    refused(model, "gsb", "patch embedding", "leave the component patch_embed out")


def test_a_binarized_model():
    binary = binvit.binarize(tiny_vit(), "elastic")
    refused(binary, "gsb", "The model is binarized already, by the scheme 'elastic'")


@pytest.mark.parametrize("options", [{"attention_bias": "full"}, {"activation_limit": 0.5}])
def test_a_float_model_with_parts_of_a_scheme(options):
    copy = binvit.binarize(tiny_vit(), binvit.scheme("float", **options))
    for scheme in ("float", "gsb"):
        refused(copy, scheme, "learned attention bias or an activation limit already, by the scheme 'float'")


def test_a_float_copy_can_still_be_binarized():
    binary = binvit.binarize(binvit.binarize(tiny_vit(), "float"), "gsb")
    assert isinstance(binary.blocks[0].attn, BinaryAttention)


def test_a_learned_bias_for_images_of_any_size():
    refused(tiny_vit(dynamic_img_size=True), "gsb", "needs a fixed image size")


def test_a_learned_bias_for_dropped_patches():
    model = tiny_vit(patch_drop_rate=0.5, img_size=32)
    refused(model, "gsb", "patch_drop_rate=0")
    assert binvit.binarize(model, "bnn").train()(images(2, 32)).shape == (2, 5)


def test_shortcuts_between_widths_that_do_not_divide():
    refused(tiny_vit(mlp_ratio=1.75), "binaryvit", "one of its widths divides the other, got 24 and 42")


def test_masks_reach_the_refusal_through_the_model():
    model = calibrated(tiny_vit(), "gsb", images(2))
    with pytest.raises(ValueError, match="takes no attention mask"):
        model.blocks[0](torch.randn(2, 5, 24), attn_mask=torch.zeros(5, 5))


def test_images_that_patches_do_not_cover_are_refused():
    model = VisionTransformer(img_size=(9, 8), patch_size=2, embed_dim=32, depth=1, num_heads=2)
    with pytest.raises(ValueError, match=r"The image size 9 x 8 is not divisible by the patch size 2 x 2\."):
        binvit.binarize(model, "gsb")
