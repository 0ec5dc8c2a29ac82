"""Compiled passes of rules with parameters per head: what the formulas give, to the last bit."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nn_helpers import arrays

import binvit
from binvit.lab.training.model import build_model
from binvit.lab.training.recipes import recipe
from binvit.nn.fused import heads, planes
from binvit.nn.layers import BinaryAttention
from binvit.nn.rules import HeadSign, ThreeMaps, superpose

RULES = [HeadSign("head"), ThreeMaps("head")]
# Quotients of these fall on the rules' edges: 0, 1, and halves that are rounded to even.
EDGES = st.sampled_from([-1.5, -1.0, -0.5, -0.0, 0.0, 0.25, 0.5, 1.0, 1.5, 3.0, np.inf, np.nan])


def same(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("rule", RULES, ids=["head_sign", "three_maps"])
@settings(max_examples=40)
@given(data=st.data())
def test_values_and_gradients(rule, data):
    b, h, n, m = data.draw(st.sampled_from([(1, 1, 1, 1), (2, 3, 5, 4), (1, 2, 17, 17), (3, 2, 1, 33)]))
    x, g = (torch.tensor(data.draw(arrays((b, h, n, m), EDGES)), dtype=torch.float32) for _ in range(2))
    scale, offset = (
        torch.tensor(data.draw(arrays((h, 1, 1), st.sampled_from(values))), dtype=torch.float32)
        for values in ([0.25, 0.5, 1.0, -0.5, 1e-5], [-2.5, -0.5, 0.0, 0.5, 1.3])
    )
    assert heads.takes_heads(rule, x, (scale, offset))
    same(planes.binarized(rule, x, scale, offset), superpose(rule.planes(x, scale, offset)))
    (fast, *_), (plain, *_) = planes.planes(rule, x, scale, offset), rule.planes(x, scale, offset)
    same(fast.integers, plain.integers)
    for mine, theirs in zip(
        planes.backward(rule, x, g, scale, offset), rule.backward(x, g, scale, offset), strict=True
    ):
        same(mine, theirs)


def test_what_the_kernels_do_not_take():
    """Another type, number of dimensions or of heads: then the formulas answer."""
    x, p = torch.randn(2, 3, 4, 5), (torch.ones(3, 1, 1), torch.zeros(3, 1, 1))
    rule = RULES[0]
    assert heads.takes_heads(rule, x, p)
    assert not heads.takes_heads(rule, x.double(), p)
    assert not heads.takes_heads(rule, x[0], p)
    assert not heads.takes_heads(rule, x[:, :2], p)
    assert not heads.takes_heads(rule, x, (torch.ones(()), torch.zeros(())))


@pytest.mark.parametrize("name", ["bivit-head", "bhvit-qd"])
def test_a_training_step_is_the_formulas_own(name, monkeypatch):
    """Attention with and without the kernels, value and gradients of a transposed value included."""
    torch.manual_seed(0)
    model = binvit.binarize(build_model(recipe("smoke"), 3, 8), name).train()
    x = torch.randn(4, 3, 8, 8)
    model(x)  # sets the scales
    layer = next(layer for layer in model.modules() if isinstance(layer, BinaryAttention))
    tokens, results = torch.randn(4, 17, 48), []
    for takes in (heads.takes_heads, lambda *arguments: False):
        monkeypatch.setattr(heads, "takes_heads", takes)
        own, given_ = copy.deepcopy(layer), tokens.clone().requires_grad_()
        y = own(given_)
        y.square().sum().backward()
        results.append([y.detach(), given_.grad, *(p.grad for p in own.parameters())])
    for fast, plain in zip(*results, strict=True):
        assert (fast is None) == (plain is None)
        if fast is not None:
            same(fast, plain)
