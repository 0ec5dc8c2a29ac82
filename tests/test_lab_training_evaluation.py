"""Evaluation on bits: the same classes as the model's own, and the model itself where there is no packed form."""

import numpy as np
import pytest
import torch
from packed_models import images, trained, vit

import binvit
from binvit.lab.training.evaluation import classify, on_bits
from binvit.packed import PackedViT

BATCHES = [(images(40, seed), None, None) for seed in range(3)]


@pytest.mark.parametrize("name", ["gsb", "bit", "bivit"])
def test_classes_on_bits_are_the_models_own(name):
    model = trained(name)
    assert isinstance(on_bits(model), PackedViT)
    own, on_packed = classify(model, BATCHES), classify(on_bits(model), BATCHES)
    assert len(np.unique(own)) > 1
    np.testing.assert_array_equal(on_packed, own)


def test_models_without_a_fast_packed_form_classify_themselves():
    unseen = binvit.binarize(vit(), "gsb")  # its scales have no values yet
    partly = trained(binvit.scheme("gsb", components=("mlp",), input="float", hidden="float"))
    together = trained(binvit.scheme("gsb", reduce="batch"))
    for model in (vit(), unseen, partly, together, trained("xnor-k")):
        assert on_bits(model) is model


def test_classify_leaves_the_mode_as_it_was():
    for mode in (True, False):
        model = vit().train(mode)
        assert classify(model, BATCHES[:1]).shape == (40,)
        assert model.training is mode


def test_evaluating_on_bits_does_not_disturb_the_model():
    model = trained("gsb").train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    classify(on_bits(model), BATCHES[:1])
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
