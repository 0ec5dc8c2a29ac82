import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer

from binvit.cli.group import RECIPES
from binvit.lab.training.model import build_model
from binvit.lab.training.recipe import Recipe, Stage
from binvit.lab.training.recipes import list_recipes, mlp_weights_stage, recipe


@pytest.mark.parametrize("name", ["smoke", "digits", "cpu", "flowers", "cifar", "pretrained", "paper"])
def test_registered_recipes_survive_json(name):
    assert name in list_recipes()
    original = recipe(name)
    assert Recipe.from_dict(json.loads(json.dumps(original.to_dict()))) == original
    assert hash(original) == hash(recipe(name))


def test_the_command_line_names_all_recipes():
    assert set(RECIPES[1:-1].split("|")) == set(list_recipes())


def test_paper_recipe_is_the_papers():
    paper = recipe("paper")
    assert paper.model == "deit_small_distilled_patch16_224"
    assert (paper.epochs, [stage.epochs for stage in paper.stages]) == (300, [600])
    assert (paper.lr, paper.lr_batch, paper.min_lr, paper.weight_decay, paper.warmup) == (1e-3, 512, 1e-6, 0.05, 0)
    assert (paper.auto_augment, paper.erasing, paper.interpolation) == ("rand-m9-mstd0.5-inc1", 0.25, "bicubic")
    assert (paper.distillation, paper.alpha) == ("hard", 0.5)
    assert (paper.mixup, paper.cutmix, paper.label_smoothing, paper.drop_path) == (0, 0, 0, 0)


def test_the_pretrained_recipe_names_its_weights_by_their_hash():
    """Which are in no clone: without them a training says what it lacks, and a model of that shape can be built."""
    given = recipe("pretrained")
    assert given.starts_from_weights
    assert not given.has_teacher
    with torch.device("meta"):
        model = build_model(given, 102, 56)
    assert (model.embed_dim, len(model.blocks), model.patch_embed.num_patches) == (384, 12, 16)
    with pytest.raises(FileNotFoundError, match=f"weights with the hash {given.weights_hash}; give their file"):
        build_model(given, 102, 56, pretrained=True)


def test_values_take_their_declared_type():
    assert recipe("smoke", optimizer="lookahead_AdamW").optimizer == "lookahead_AdamW"
    made = recipe("smoke", lr=1, epochs=3.0, stages=[{"epochs": 2, "scheme_options": {"components": ["mlp"]}}])
    assert isinstance(made.lr, float)
    assert isinstance(made.epochs, int)
    assert made.stages == (Stage(2, {"components": ("mlp",)}),)
    assert made.to_dict()["stages"] == [{"epochs": 2, "scheme_options": {"components": ["mlp"]}}]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"epoch": 3}, "Unknown recipe field 'epoch'; valid fields are .*epochs"),
        ({"name": "mine"}, "registered name"),
        ({"epochs": "3"}, "epochs must be a whole number, got '3'"),
        ({"epochs": True}, "epochs must be a whole number, got True"),
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"lr": "1e-4"}, "lr must be a number, got '1e-4'"),
        ({"lr": float("nan")}, "lr must be a finite number, got nan"),
        ({"lr": 10**400}, "lr must be a number, got a whole number of about 400 digits"),
        ({"epochs": 10**30}, "epochs must be at most 1048576, got 10{30}"),
        ({"depth": 10**6}, "depth must be at most 1024, got 1000000"),
        ({"distilled": 1}, "distilled must be true or false, got 1"),
        ({"erasing": 1.5}, "erasing must be at most 1, got 1.5"),
        ({"distillation": "warm"}, "distillation must be one of 'none', 'soft' or 'hard', got 'warm'"),
        ({"schedule": "zigzag"}, "schedule must be one of 'cosine', .*, got 'zigzag'"),
        ({"width": 50, "heads": 4}, "width 50 must be divisible by its 4 heads"),
        ({"warmup": 5}, "warmup must be at most 1, got 5"),
        ({"pretrained": True}, "Pretrained weights need a timm model name"),
        ({"distilled": True, "global_pool": "avg"}, "global_pool must be 'token'"),
        ({"model": "no_such_model"}, "timm knows no model named 'no_such_model'"),
        ({"optimizer": "adamq"}, "Unknown optimizer 'adamq'; valid are .*adamw.*, also after 'lookahead_'"),
        ({"auto_augment": "foo"}, "timm does not know the augmentation 'foo'"),
        ({"auto_augment": "rand-q9"}, "timm does not know the augmentation 'rand-q9'"),
        ({"stages": [3]}, r"stages\[0\] must be a mapping of field names to values, got 3"),
        ({"stages": "abc"}, "stages must be a list, got 'abc'"),
        ({"stages": [{"epochs": 1, "lr": 2}]}, r"Unknown recipe field 'stages\[0\].lr'"),
        ({"stages": [{"epochs": 0}]}, r"stages\[0\].epochs must be at least 1, got 0"),
        (
            {"stages": [{"epochs": 1, "scheme_options": 3}]},
            "scheme_options must be a mapping of names to values, got 3",
        ),
    ],
)
def test_bad_fields_get_one_sentence(options, words):
    with pytest.raises(ValueError, match=words):
        recipe("smoke", **options)


def test_unknown_recipe_lists_the_valid_ones():
    with pytest.raises(ValueError, match="'tiny'; valid recipes are cifar, cpu, digits, flowers, paper, pretr"):
        recipe("tiny")


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "epochs": st.integers(1, 1000),
            "lr": st.floats(0, 10),
            "patch_size": st.none() | st.integers(1, 32),
            "flip": st.floats(0, 1),
            "auto_augment": st.sampled_from(["", "rand-m9-mstd0.5-inc1", "original-mstd0.5", "augmix-m5"]),
            "distillation": st.sampled_from(["none", "soft", "hard"]),
            "stages": st.lists(st.builds(mlp_weights_stage, st.integers(1, 9)), max_size=3),
        },
    )
)
def test_every_recipe_survives_json(options):
    made = recipe("smoke", **options)
    assert Recipe.from_dict(json.loads(json.dumps(made.to_dict()))) == made


@pytest.mark.parametrize(
    ("size", "options", "patches"), [(8, {}, 16), (32, {}, 64), (64, {}, 64), (32, {"patch_size": 16}, 4)]
)
def test_patches_follow_the_image(size, options, patches):
    model = build_model(recipe("smoke", **options), 5, size)
    assert model.patch_embed.num_patches == patches
    assert model(torch.zeros(1, 3, size, size)).shape == (1, 5)


def test_models_have_the_shape_asked_for():
    plain = build_model(recipe("smoke", width=24, depth=1, heads=3, mlp_ratio=3.0, global_pool="avg"), 4, 8)
    assert type(plain) is VisionTransformer
    assert (plain.embed_dim, len(plain.blocks), plain.blocks[0].attn.num_heads, plain.cls_token) == (24, 1, 3, None)
    assert plain.blocks[0].mlp.fc1.out_features == 72
    distilled = build_model(recipe("smoke", distilled=True), 4, 8)
    assert type(distilled) is VisionTransformerDistilled


@pytest.mark.parametrize(
    ("options", "size", "words"),
    [
        ({"patch_size": 3}, 8, "image size 8 is not divisible by the patch size 3"),
        ({}, 11, "11.*--image-size"),
        ({"model": "vit_tiny_patch16_224"}, 100, "image size 100 is not divisible by the patch size 16"),
        ({"model": "resnet10t"}, 224, "timm cannot build 'resnet10t' for images of 224 pixels"),
        ({"model": "cait_xxs24_224"}, 224, "must be a vision transformer, got 'cait_xxs24_224'"),
    ],
)
def test_impossible_models_get_one_sentence(options, size, words):
    with pytest.raises(ValueError, match=words):
        build_model(recipe("smoke", **options), 10, size)
