"""Attention is read as the blocks use it, curves as trials wrote them, predictions as single images get them."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from timm.models.vision_transformer import VisionTransformer

import binvit
from binvit.lab.analysis import attention
from binvit.lab.experiments import quickstart
from binvit.lab.training.model import CheckpointInfo
from binvit.lab.training.recipes import recipe
from binvit.lab.trials.store import TrialResult, write_result
from binvit.lab.trials.trained import Trained, histories
from binvit.lab.trials.trial import Trial


def model(scheme: str, **options) -> torch.nn.Module:
    torch.manual_seed(0)
    vit = VisionTransformer(img_size=8, patch_size=2, num_classes=3, embed_dim=16, depth=2, num_heads=2, qk_norm=True)
    made = binvit.binarize(vit, binvit.scheme(scheme, **options)).train()
    made(torch.randn(8, 3, 8, 8))  # sets the scales
    return made.eval()


def images(count: int = 4) -> torch.Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def test_float_attention_is_what_timm_computes():
    vit = model("float")
    weights = attention.attention_weights(vit, images())
    assert weights.shape == (2, 4, 2, 17, 17)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 2, 17))
    x = vit.blocks[0].norm1(vit._pos_embed(vit.patch_embed(images())))
    layer = vit.blocks[0].attn
    value = layer.qkv(x).view(4, 17, 3, 2, 8).permute(2, 0, 3, 1, 4)[2]
    by_hand = layer.proj((weights[0] @ value).transpose(1, 2).reshape(4, 17, 16))
    torch.testing.assert_close(layer(x), by_hand)


@pytest.mark.parametrize(
    ("scheme", "options", "most"), [("bit", {}, 2), ("gsb", {}, 6), ("gsb", {"thresholds": ()}, 2)]
)
def test_binary_attention_has_few_levels(scheme, options, most):
    vit = model(scheme, **options)
    weights = attention.attention_weights(vit, images())
    assert 1 <= attention.levels(weights) <= most
    assert weights.min() == 0


def test_reading_attention_leaves_no_trace():
    for scheme in ("float", "gsb"):
        vit = model(scheme)
        before = vit(images())
        attention.attention_weights(vit, images())
        assert torch.equal(vit(images()), before)
        assert not any(block.attn._forward_pre_hooks for block in vit.blocks)
        assert not any(getattr(block.attn, "record", False) for block in vit.blocks)


def test_predictions_name_the_class():
    info = CheckpointInfo(recipe("smoke"), binvit.scheme("bit"), ("a", "b", "c"), (0.5,) * 3, (0.2,) * 3, 8)
    trained = Trained(model("bit"), info)
    table = quickstart.predictions({"x": trained, "y": trained}, Image.new("RGB", (20, 20), "red"))
    assert list(table.columns) == ["model", "class", "probability"]
    assert set(table["class"]) <= {"a", "b", "c"}
    assert table["probability"].between(1 / 3, 1).all()
    assert trained.grid == (4, 4)


def test_histories_are_one_table(tmp_path):
    record = {"stage": 0, "train_loss": 1.0, "train_accuracy": 0.5, "lr": 0.1}
    trials = [Trial("digits", "bit", seed=seed, recipe_options={"epochs": 2}) for seed in (0, 1)]
    for trial in trials:
        history = [record | {"epoch": 1, "test_accuracy": None}, record | {"epoch": 2, "test_accuracy": 0.5}]
        numbers = {"test_accuracy": 0.5, "train_accuracy": 0.5, "clean_train_accuracy": None, "memorized": None}
        made = {"recipe": trial.get_recipe().to_dict(), "scheme": trial.get_scheme().to_dict()}
        rest = {"seconds": 1.0, "parameters": 1, "versions": {}, "threads": 1, "device": "cpu"}
        write_result(TrialResult(trial=trial, history=history, **numbers, **made, **rest), tmp_path)
    table = histories(trials, tmp_path)
    assert list(table["seed"]) == [0, 0, 1, 1]
    assert math.isnan(table["test_accuracy"][0])
    assert set(table["recipe_options"]) == {"epochs=2"}
    with pytest.raises(FileNotFoundError):
        histories([Trial("digits", "gsb")], tmp_path)


def test_one_image_of_each_of_the_first_classes():
    assert quickstart.one_per_class(np.array([2, 0, 0, 1, 2]), 2) == [1, 3]
