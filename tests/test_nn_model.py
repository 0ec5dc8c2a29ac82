"""Binarized models in use: first batches, NaN, other heads and sizes, optimizers, averages, compilers."""

import copy
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from nn_helpers import images, tiny_vit
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV2, ModelEmaV3
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

import binvit
from binvit.nn import BinaryLinear

SCHEMES = binvit.list_schemes()
BINARY = [name for name in SCHEMES if name != "float"]
X = images(4)
LABELS = torch.tensor([0, 1, 2, 3])
SCALES = ("scale", "scale2", "scale3", "offset")


def scales(model):
    return {name: p for name, p in model.named_parameters() if name.rpartition(".")[2] in SCALES}


def same(first, second):
    return all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def steps(model, count=2, lr=1e-3):
    optimizer = torch.optim.AdamW(model.parameters(), lr)
    for step in range(count):
        optimizer.zero_grad()
        F.cross_entropy(model(images(4, seed=step)), LABELS).backward()
        optimizer.step()
        yield model


# --- the first batch

UNUSABLE = {
    "NaN": X * torch.nan,
    "one NaN": torch.cat([X[:3], X[3:] * torch.nan]),
    "infinite": torch.cat([X[:3], X[3:] * torch.inf]),
    "empty": X[:0],
}


@pytest.mark.parametrize("first", UNUSABLE)
@pytest.mark.parametrize("name", ["gsb", "bit", "bivit", "bivit-head", "bhvit-qd", "xnor++"])
def test_an_unusable_first_batch_sets_no_scale(name, first):
    model, fresh = (binvit.binarize(tiny_vit(), name).train() for _ in range(2))
    model(UNUSABLE[first])
    assert not any(flag for key, flag in model.state_dict().items() if key.endswith("initialized"))
    model(X)
    fresh(X)
    assert scales(model)
    assert same(scales(model), scales(fresh))
    binvit.calibrate(model, images(4, seed=7))
    assert same(scales(model), scales(binvit.calibrate(fresh, images(4, seed=7))))


@pytest.mark.parametrize("first", UNUSABLE)
def test_calibrate_refuses_an_unusable_batch_and_leaves_the_model_alone(first):
    model = binvit.calibrate(binvit.binarize(tiny_vit(), "gsb"), X)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"calibrate.. needs images with finite pixels, got a batch of shape"):
        binvit.calibrate(model, UNUSABLE[first])
    assert same(before, model.state_dict())


@pytest.mark.parametrize("shape", [(2, 3, 8, 12), (2, 1, 16, 16), (2, 3, 4, 4)])
def test_calibrate_refuses_images_of_another_size(shape):
    with pytest.raises(ValueError, match=rf"takes images of shape \(3, .*got a batch of shape \(2, {shape[1]}, "):
        binvit.calibrate(binvit.binarize(tiny_vit(), "gsb"), torch.rand(shape))


def test_calibrate_says_when_the_weights_are_not_finite():
    model = binvit.binarize(tiny_vit(), "gsb")
    with torch.no_grad():
        model.blocks[0].attn.qkv.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="the model's weights are not finite"):
        binvit.calibrate(model, X)


def test_calibrate_takes_binarized_models_alone():
    with pytest.raises(ValueError, match=r"calibrate.. takes a model made by binvit.binarize.., got VisionTransformer"):
        binvit.calibrate(tiny_vit(), X)


@pytest.mark.parametrize("name", SCHEMES)
def test_a_batch_without_images_trains_nothing(name):
    model = binvit.calibrate(binvit.binarize(tiny_vit(), name), X).train()
    model(X[:0]).sum().backward()
    assert all(p.grad is None or (p.grad == 0).all() for p in model.parameters())


def test_the_first_batch_draws_no_random_numbers():
    model = binvit.binarize(tiny_vit(proj_drop_rate=0.1), "gsb").train()
    torch.manual_seed(0)
    first, drawn = model(X), torch.rand(1)
    torch.manual_seed(0)
    assert torch.equal(model(X), first)
    assert torch.equal(torch.rand(1), drawn)


@pytest.mark.parametrize("name", ["gsb", "bivit", "binaryvit"])
def test_a_whole_model_may_be_checkpointed_from_the_first_batch(name):
    plain, model = (binvit.binarize(tiny_vit(), name).train() for _ in range(2))
    plain(X).square().sum().backward()
    checkpoint(model, X, use_reentrant=False).square().sum().backward()
    for mine, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)


def test_parts_that_stand_still_get_scales_and_keep_standing_still():
    model, whole = (binvit.binarize(tiny_vit(), "gsb").train() for _ in range(2))
    model.blocks[0].eval()
    model(X)
    whole(X)
    assert same(scales(model), scales(whole))
    assert not any(module.training for module in model.blocks[0].modules())
    assert model.blocks[1].training


def test_features_alone_set_the_scales():
    model = binvit.binarize(tiny_vit(), "gsb").train()
    model.forward_features(X)
    other = binvit.binarize(tiny_vit(), "gsb").train()
    other(X)
    assert same(scales(model), scales(other))


# --- numbers that are not finite


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", SCHEMES)
def test_a_pixel_that_is_no_number_gives_no_answer_for_its_image(name, value):
    model = binvit.calibrate(binvit.binarize(tiny_vit(distilled=True), name), X).eval()
    x = X.clone()
    x[1, 2, 5, 7] = value
    forms = {"exact": binvit.pack(model, exact=True), "fast": binvit.pack(model), "trained": model}
    for form, answer in forms.items():
        with torch.no_grad():
            assert answer(x).isnan().all(1).tolist() == [False, True, False, False], form
    model.train().set_distilled_training(True)
    for logits in model(x):
        assert logits.isnan().all(1)[1]
    for packed in (forms["exact"], forms["fast"]):
        with pytest.raises(ValueError, match="Images need finite pixels, but those of image 1 in the batch are not"):
            packed.predict(x)


@pytest.mark.parametrize("name", SCHEMES)
def test_features_of_an_image_that_is_not_finite_are_nan(name):
    model = binvit.binarize(tiny_vit(), binvit.scheme(name, head_weight="sign", head_input="sign")).train()
    x = X.clone()
    x[1, 0, 0, 0] = torch.nan
    model(X)
    for mode in (True, False):
        model.train(mode)
        features = model.forward_features(x)
        last, between = model.forward_intermediates(x, return_prefix_tokens=True)
        kept = model.forward_intermediates(x, output_dict=True)["image_features"]
        for output in (features, last, kept, *between[0], *between[-1], *model.get_intermediate_layers(x)):
            assert output.isnan().flatten(1).all(1).tolist() == [False, True, False, False]
            assert output[[0, 2, 3]].isfinite().all()


def test_features_before_the_first_batch_set_the_scales():
    model = binvit.binarize(tiny_vit(), "gsb").train()
    model.set_grad_checkpointing(True)
    model.forward_intermediates(X)[0].sum().backward()
    other = binvit.binarize(tiny_vit(), "gsb").train()
    other(X)
    assert same(scales(model), scales(other))


# --- what owners change


@pytest.mark.parametrize("name", SCHEMES)
def test_timms_optimizer_decays_weights_alone(name):
    model = binvit.binarize(tiny_vit(), binvit.scheme(name, attention_bias="full"))
    names = {id(p): n for n, p in model.named_parameters()}
    groups = create_optimizer_v2(model, opt="adamw", weight_decay=0.1).param_groups
    decayed = {names[id(p)] for group in groups if group["weight_decay"] for p in group["params"]}
    assert decayed
    assert all(name.endswith(".weight") for name in decayed)


@pytest.mark.parametrize("distilled", [False, True])
def test_new_classes_get_heads_of_eight_bits(distilled):
    model = binvit.binarize(tiny_vit(distilled), "gsb").train()
    model(X)
    model.reset_classifier(7)
    for head in [model.head, *([model.head_dist] if distilled else [])]:
        assert isinstance(head, BinaryLinear)
        assert head.training
    model(X)
    assert binvit.pack(model.eval(), exact=True)(X).shape == (4, 7)
    assert torch.equal(binvit.pack(model, exact=True)(X), model(X))
    model.reset_classifier(0)
    assert isinstance(model.head, nn.Identity)


def test_a_scheme_with_float_heads_keeps_them_float():
    model = binvit.binarize(tiny_vit(), binvit.scheme("gsb", components=("mlp", "mhsa")))
    model.reset_classifier(7)
    assert type(model.head) is nn.Linear


@pytest.mark.parametrize("name", BINARY)
def test_another_input_size_where_nothing_depends_on_it(name):
    vit = tiny_vit(class_token=False, global_pool="avg")
    model = binvit.calibrate(binvit.binarize(vit, binvit.scheme(name, attention_bias="none")), X)
    for size, both in ((24, (24, 24)), ((24, 16), (24, 16)), ([16, 24], (16, 24))):
        model.set_input_size(size)
        assert model.eval()(images(2, *both)).shape == (2, 5)
        model.train()(images(2, *both)).sum().backward()
    packed = binvit.pack(model.eval(), exact=True)
    assert torch.equal(packed(images(2, 16, 24)), model(images(2, 16, 24)))


def test_another_input_size_is_refused_where_something_does():
    biased, plain = binvit.binarize(tiny_vit(), "gsb"), binvit.binarize(tiny_vit(), "bit")
    with pytest.raises(ValueError, match=r"bias is for images of size \(16, 16\) .*, got \(24, 16\)"):
        biased.set_input_size((24, 16))
    with pytest.raises(ValueError, match=r"keeps its patch size \(8, 8\), got \(4, 4\)"):
        plain.set_input_size(patch_size=(4, 4))
    with pytest.raises(ValueError, match=r"size \(18, 16\) cannot be cut into patches of size \(8, 8\)"):
        plain.set_input_size((18, 16))
    blocks = binvit.binarize(tiny_vit(), binvit.scheme("gsb", components=("mlp", "mhsa")))
    with pytest.raises(ValueError, match=r"in patches of size \(8, 8\), got \(16, 16\) in \(4, 4\)"):
        blocks.set_input_size(patch_size=4)
    for same_size in ((16, 16), [16, 16], 16):
        biased.set_input_size(same_size)
    blocks.set_input_size(32, 16)  # as many patches
    assert blocks.train()(images(2, 32, 32)).shape == (2, 5)


def test_a_float_model_with_a_bias_trains_and_is_kept(tmp_path):
    scheme = binvit.scheme("float", attention_bias="relative", activation_limit=0.5)
    model = binvit.binarize(tiny_vit(), scheme).train()
    for _ in steps(model):
        pass
    assert all(block.attn.bias.values.abs().max() > 0 for block in model.blocks)
    assert model.blocks[0].mlp.act(torch.tensor([-3.0, 3.0])).abs().max() <= 0.5
    loaded = binvit.binarize(tiny_vit(seed=1), scheme)
    loaded.load_state_dict(model.state_dict())
    want = model.eval()(X)
    assert torch.equal(loaded.eval()(X), want)
    packed = binvit.load(binvit.save(binvit.pack(model, exact=True), tmp_path / "model.safetensors"))
    assert torch.equal(packed(X), want)


def test_the_bias_of_float_attention_is_added_after_the_softmax():
    model, plain = binvit.binarize(tiny_vit(), binvit.scheme("float", attention_bias="full")), tiny_vit()
    block, attention = model.blocks[0].attn, plain.blocks[0].attn
    with torch.no_grad():
        block.bias.values.normal_()
    x = torch.randn(2, 5, 24)
    q, k, v = attention.qkv(x).view(2, 5, 3, 3, 8).permute(2, 0, 3, 1, 4)
    map_ = (q @ k.mT / 8**0.5).softmax(-1) + block.bias.values
    want = attention.proj((map_ @ v).transpose(1, 2).reshape(2, 5, 24))
    torch.testing.assert_close(block(x), want)
    with pytest.raises(ValueError, match="is for 5 tokens, got 4"):
        block(x[:, :4])


@pytest.mark.parametrize("name", ["gsb", "float"])
def test_copies_and_pickles_are_whole(name):
    model = binvit.calibrate(binvit.binarize(tiny_vit(True), name), X).eval()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):  # noqa: S301 - what was just made
        assert type(other) is type(model)
        assert torch.equal(other(X), model(X))


# --- averages of copies that were made before the first batch


def test_an_average_made_before_the_first_batch_follows():
    for make in (ModelEmaV2, ModelEmaV3):
        model = binvit.binarize(tiny_vit(), "gsb").train()
        average, decay = make(model, decay=0.9), 0.9
        want, weight = dict.fromkeys(scales(model), 0.0), 0.0
        for _ in steps(model, 3):
            average.update(model)
            weight = decay * weight + 1 - decay
            want = {name: decay * want[name] + (1 - decay) * p.detach() for name, p in scales(model).items()}
        averaged = average.module.eval()
        binarizer = averaged.blocks[0].attn.value_binarizer
        for place, value in zip(("scale", "scale2", "scale3"), binarizer.limited(), strict=True):
            torch.testing.assert_close(value, want[f"blocks.0.attn.value_binarizer.{place}"] / weight)
        assert torch.equal(binvit.pack(averaged, exact=True)(X), averaged(X))
        resumed = binvit.binarize(tiny_vit(), "gsb")
        resumed.load_state_dict(averaged.state_dict())
        with torch.no_grad():
            resumed.train()(X)
        torch.testing.assert_close(resumed.eval()(X), averaged(X))


def test_an_average_of_torch_made_before_the_first_batch_follows():
    model = binvit.binarize(tiny_vit(), "gsb").train()
    average = AveragedModel(model)
    for _ in steps(model, 1):
        average.update_parameters(model)
    assert torch.equal(average.eval()(X), model.eval()(X))


# --- compilers


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "calibrated"), [("gsb", False), ("bivit-head", False), ("irnet", True)])
def test_a_compiled_model_trains(name, calibrated):
    torch._dynamo.reset()
    model = binvit.binarize(tiny_vit(depth=1), name).train()
    if calibrated:
        binvit.calibrate(model, X)
    other = copy.deepcopy(model)
    F.cross_entropy(torch.compile(model, backend="aot_eager")(X), LABELS).backward()
    F.cross_entropy(other(X), LABELS).backward()
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", SCHEMES)
def test_every_scheme_is_exported(name):
    model = binvit.calibrate(binvit.binarize(tiny_vit(depth=1), name), X).eval()
    loaded = binvit.binarize(tiny_vit(depth=1), name).eval()  # has never been run
    loaded.load_state_dict(model.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exported = torch.export.export(loaded, (X,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},)).module()
    for batch in (X, torch.cat([X, X.flip(3), X[:1]])):
        torch.testing.assert_close(exported(batch), model(batch))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_images_of_another_type_than_the_weights_are_refused(dtype):
    model = binvit.binarize(tiny_vit(), "gsb")
    with pytest.raises(ValueError, match=rf"weights are torch.float32, got images of {dtype}"):
        binvit.calibrate(model, images(2).to(dtype))
    with torch.autocast("cpu", torch.bfloat16):
        binvit.calibrate(model, images(2).bfloat16())
    binvit.calibrate(model.double(), images(2).double())
