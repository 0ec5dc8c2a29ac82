"""What the tests of `binvit.nn` share: data with zeros and window edges, the comparison with an oracle, tiny models."""

import numpy as np
import reference_nn as reference
import torch
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer

from binvit.nn import products

# Multiples of 1/64 add up exactly in any order, so a mean cannot tip a comparison; the named values are zeros, edges of
# windows (|x| = a, x = a/2 for the scales below, |x| = 1) and steps of 8 bits beyond the range.
EDGES = (0.0, -0.0, 0.25, -0.25, 0.5, -0.5, 1.0, -1.0, 2.0, -2.0, 0.125, -0.125, 1.5, 40.0, -40.0)
values = st.one_of(st.sampled_from(EDGES), st.integers(-160, 160).map(lambda i: i / 64))
scales = st.sampled_from([0.25, 0.5, 1.0, 2.0])
PARAMETERS = {
    "scale": scales,
    "sharpness": st.sampled_from([1e-3, 0.5, 1.0, 10.0]),
    "offset": st.sampled_from([-0.5, 0.0, 0.25, 1.0]),
}


def arrays(shape, elements=values):
    """Draw every element on its own, where hypothesis would fill most of the array with one value."""
    if elements is values:  # by numpy, in a tenth of the time
        return st.integers(0, 2**32 - 1).map(lambda seed: _drawn(np.random.default_rng(seed), shape))
    return hnp.arrays(np.float64, shape, elements=elements, fill=st.nothing())


def _drawn(rng, shape):
    """Return an array of `values`: all different, one edge everywhere, or a mixture of edges and others."""
    if rng.integers(8) == 0:
        return np.full(shape, rng.choice(EDGES))
    return np.where(rng.random(shape) < rng.random(), rng.choice(EDGES, shape), rng.integers(-160, 161, shape) / 64)


def parameters_of(rule, data, *, channels=1, heads=1):
    """Draw the parameters of a rule, each of the shape the rule asks for."""
    shape = rule.parameter_shape(channels=channels, heads=heads)
    drawn = []
    for name in rule.parameters:
        strategy = PARAMETERS["scale" if name.startswith("scale") else name]
        drawn.append(data.draw(hnp.arrays(np.float64, shape, elements=strategy), label=name))
    return drawn


def outcome(rule, x, g, parameters):
    """Run a rule through autograd in float64."""
    x = torch.tensor(x, requires_grad=True)
    parameters = [torch.tensor(p, requires_grad=rule.learned) for p in parameters]
    y = products.binarize(x, rule, *parameters)
    y.backward(torch.tensor(g))
    return reference.Outcome(
        y.detach().numpy(), x.grad.numpy(), [None if p.grad is None else p.grad.numpy() for p in parameters]
    )


def agree(got, want):
    np.testing.assert_allclose(got.y, want.y, rtol=1e-12, atol=1e-12, err_msg="value")
    np.testing.assert_allclose(got.dx, want.dx, rtol=1e-9, atol=1e-11, err_msg="gradient to x")
    assert len(got.dparameters) == len(want.dparameters)
    for mine, theirs in zip(got.dparameters, want.dparameters, strict=True):
        if theirs is None:
            assert mine is None
        else:
            assert mine.shape == np.shape(theirs)
            np.testing.assert_allclose(mine, theirs, rtol=1e-9, atol=1e-11, err_msg="gradient to a parameter")


def upstream(shape, seed):
    return np.random.default_rng(seed).standard_normal(shape)


def tiny_vit(distilled=False, seed=0, **options):
    """Return a timm ViT of 16x16 images, patch 8, width 24, 3 heads, depth 2, 5 classes."""
    torch.manual_seed(seed)
    sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "num_heads": 3, "depth": 2, "mlp_ratio": 2} | options
    kind = VisionTransformerDistilled if distilled else VisionTransformer
    return kind(**({"num_classes": 5} | sizes))


def images(n, height=16, width=None, channels=3, seed=0):
    """Return n normalized-looking random images."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, channels, height, width or height, generator=generator)
