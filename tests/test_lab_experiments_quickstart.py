"""Pictures that the quickstart shows, and what its models say about them."""

import numpy as np
import torch
from PIL import Image
from timm.models.vision_transformer import VisionTransformer

import binvit
from binvit.lab.experiments import quickstart
from binvit.lab.training.evaluation import Classifier


def test_predictions_name_the_class():
    torch.manual_seed(0)
    vit = VisionTransformer(img_size=8, patch_size=2, num_classes=3, embed_dim=16, depth=1, num_heads=2)
    binary = binvit.calibrate(binvit.binarize(vit, binvit.scheme("bit")).eval(), torch.randn(8, 3, 8, 8))
    trained = Classifier(binary, ("a", "b", "c"), 8, (0.5,) * 3, (0.2,) * 3)
    table = quickstart.predictions({"x": trained, "y": trained}, Image.new("RGB", (20, 20), "red"))
    assert list(table.columns) == ["model", "class", "probability"]
    assert set(table["class"]) <= {"a", "b", "c"}
    assert table["probability"].between(1 / 3, 1).all()
    assert trained.grid == (4, 4)
    packed = Classifier(binvit.pack(trained.model), trained.classes, 8, trained.mean, trained.std)
    assert quickstart.predictions({"x": packed}, Image.new("RGB", (8, 8), "red"))["class"][0] == table["class"][0]


def test_one_image_of_each_of_the_first_classes():
    assert quickstart.one_per_class(np.array([2, 0, 0, 1, 2]), 2) == [1, 3]
