"""Evaluation on bits: the same classes as the model's own, and the model itself where there is no packed form."""

import numpy as np
import pytest
import torch
from packed_models import CLASSES, images, logits_of, trained, vit
from PIL import Image

import binvit
from binvit.lab.training.evaluation import Classifier, classify, on_bits
from binvit.packed import PackedViT

BATCHES = [(images(40, seed), None, None) for seed in range(3)]


@pytest.mark.parametrize("name", ["gsb", "elastic", "bivit"])
def test_classes_on_bits_are_the_models_own(name):
    model = trained(name)
    model.head.bias.data -= logits_of(model, images(40, 9)).mean(0)  # else one class may win whatever the image
    assert isinstance(on_bits(model), PackedViT)
    own, on_packed = classify(model, BATCHES), classify(on_bits(model), BATCHES)
    assert len(np.unique(own)) == CLASSES
    np.testing.assert_array_equal(on_packed, own)


def test_models_without_a_fast_packed_form_classify_themselves():
    unseen = binvit.binarize(vit(), "gsb")  # its scales have no values yet
    partly = trained(binvit.scheme("gsb", components=("mlp",), input="float", hidden="float"))
    together = trained(binvit.scheme("gsb", reduce="batch"))
    for model in (vit(), unseen, partly, together, trained("bit"), trained("xnor-k")):
        assert on_bits(model) is model


def test_classify_leaves_the_mode_as_it_was():
    for mode in (True, False):
        model = vit().train(mode)
        assert classify(model, BATCHES[:1]).shape == (40,)
        assert model.training is mode


def test_logits_that_are_not_finite_have_no_class():
    model = vit().train()
    model.head.bias.data[1] = torch.nan
    with pytest.raises(ValueError, match=r"^The model's logits are not finite for 40 of 40 images\.$"):
        classify(model, BATCHES[:1])
    assert model.training
    model.head.bias.data[1] = 0
    pictures = images(4)
    pictures[1, 0, 0, 0] = torch.inf
    with pytest.raises(ValueError, match="not finite for 1 of 4 images"):
        classify(trained("gsb"), [(pictures, None, None)])


def test_evaluating_on_bits_does_not_disturb_the_model():
    model = trained("gsb").train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    classify(on_bits(model), BATCHES[:1])
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("known", [True, False])
def test_a_packed_model_reads_pictures_as_it_is_described(known):
    """The resizing is its own, the normalization is the classifier's, which the packed model need not know."""
    model = trained("gsb")
    mean, std = (0.2, 0.5, 0.7), (0.3, 0.2, 0.4)
    options = {"resize": 20, "interpolation": "bilinear"}
    described = binvit.pack(model, mean=mean, std=std, **options)
    packed = described if known else binvit.pack(model, **options)
    picture = Image.effect_noise((40, 30), 80).convert("RGB")
    classifier = Classifier(packed, range(CLASSES), 16, mean, std)
    torch.testing.assert_close(classifier.tensor([picture] * 2), described.preprocess([picture] * 2), rtol=0, atol=0)
    torch.testing.assert_close(classifier.probabilities([picture]), packed(described.preprocess(picture)).softmax(1))
