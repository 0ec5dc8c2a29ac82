import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_models import images, logits_of, trained

import binvit
from binvit.jit import JIT
from binvit.packed.fast.head import fold_heads, run_heads

pytestmark = pytest.mark.skipif(not JIT, reason="without a compiler the model's own heads stay")
WIDTHS = [(48, 3), (50, 1)]
MODELS: dict = {}


def packed_model(distilled, width, heads):
    """The exact path's model, whose heads are the reference."""
    key = distilled, width
    if key not in MODELS:
        model = trained("gsb", distilled, depth=1, embed_dim=width, num_heads=heads, num_classes=7)
        MODELS[key] = binvit.pack(model)._fast._model
    return MODELS[key]


def test_scales_of_each_class():
    model = binvit.pack(trained(binvit.scheme("gsb", head_weight="int8_channel"), depth=1))._fast._model
    tokens = torch.randn(3, 17, 48)
    assert torch.equal(run_heads(fold_heads(model), tokens), model.forward_head(tokens))


@given(
    st.booleans(),
    st.sampled_from(WIDTHS),
    st.integers(1, 20),
    st.integers(0, 2),
    st.floats(-3, 3),
    st.integers(0, 2**32 - 1),
)
@settings(deadline=None, max_examples=60)
def test_folded_heads_give_the_models_logits(distilled, width, batch, more, magnitude, seed):
    """To the last bit, on tokens that fill no level, some, or lie beyond the last, and on ties between two."""
    model, generator = packed_model(distilled, *width), np.random.default_rng(seed)
    heads, size = fold_heads(model), width[0]
    x = generator.normal(0, 10**magnitude, (batch, 1 + distilled + more, size)).astype(np.float32)
    for i, head in enumerate(heads):
        ties = (generator.integers(-140, 140, (batch, size)) + np.float32(0.5)) * head.step - head.shift
        x[:, i] = np.where(generator.random((batch, size)) < 0.3, ties, x[:, i])
    tokens = torch.from_numpy(x)
    assert len(heads) == 1 + distilled
    assert torch.equal(run_heads(heads, tokens), model.forward_head(tokens))


def test_tokens_that_are_a_part_of_others():
    model = packed_model(True, *WIDTHS[0])
    tokens = torch.randn(3, 9, 48)[:, :2]
    assert torch.equal(run_heads(fold_heads(model), tokens), model.forward_head(tokens))


OTHERS = {
    "mean of the tokens": ("gsb", {"global_pool": "avg"}),
    "a norm behind the mean": ("gsb", {"global_pool": "avg", "fc_norm": True}),
    "a norm before the head": ("gsb", {"fc_norm": True}),
    "no classes": ("gsb", {"num_classes": 0}),
    "a float head": (binvit.scheme("gsb", components=("mlp", "mhsa")), {}),
    "one bit": (binvit.scheme("gsb", head_weight="bwn", head_input="elastic"), {}),
    "one bit of the input": (binvit.scheme("gsb", head_input="elastic"), {}),
    "float inputs": (binvit.scheme("gsb", head_input="float"), {}),
    "float weights": (binvit.scheme("gsb", head_weight="float"), {}),
}


@pytest.mark.parametrize("other", OTHERS)
def test_other_heads_are_left_to_the_model(other):
    scheme, options = OTHERS[other]
    steps = 0 if other == "no classes" else 2
    model = trained(scheme, depth=1, steps=steps, **options)
    if not steps:
        with torch.no_grad():
            model.train()(images(8))
        model.eval()
    packed = binvit.pack(model)
    assert not packed.reason
    assert fold_heads(packed._fast._model) == []
    torch.testing.assert_close(packed(images(6)), logits_of(model, images(6)), rtol=1e-5, atol=1e-5)
