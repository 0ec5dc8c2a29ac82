"""The compiled training step on data made of zeros and window edges, against the rules in float64."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from nn_helpers import arrays, values

import binvit
from binvit.nn import products, rules
from binvit.nn.fused import autograd
from binvit.nn.rules import GsbAttention, GsbValue
from binvit.nn.schemes import WEIGHT_RULES

scale = st.sampled_from([0.25, 0.5, 1.0, 2.0])
shifts = st.none() | arrays((3, 1, 4), st.sampled_from([0.0, 0.25, -0.5]))


def leaves(arrays_, dtype):
    return [None if a is None else torch.tensor(a, dtype=dtype, requires_grad=True) for a in arrays_]


def compare(run, arrays_):
    """Run both forms, each with its own leaves, and compare values and gradients."""
    results = []
    for dtype in (torch.float32, torch.float64):
        tensors = leaves(arrays_, dtype)
        y = run(dtype, tensors)
        g = torch.tensor(np.random.default_rng(0).standard_normal(y.shape), dtype=torch.float32)
        y.backward(g.to(dtype))
        grads = [None if t is None or t.grad is None else t.grad.double() for t in tensors]
        results.append([y.detach().double(), *grads])
    for fast, slow in zip(*results, strict=True):
        assert (fast is None) == (slow is None)
        if fast is not None:
            size = max(1.0, slow.abs().max().item())
            torch.testing.assert_close(fast, slow, rtol=1e-5, atol=2e-6 * size)


@pytest.mark.parametrize("weight", ["sign", "sign_mean", "bwn", "bwn_channel", "bwn_unscaled", "sign_learned_centred"])
@pytest.mark.parametrize("unsigned", [False, True])
@settings(max_examples=20)
@given(data=st.data())
def test_linear_layers(weight, unsigned, data):
    rule_x, rule_w = rules.Elastic(lo=0 if unsigned else -1), WEIGHT_RULES[weight](binvit.scheme("gsb"))
    x, w = data.draw(arrays((2, 3, 8))), data.draw(arrays((5, 8)))
    shift = data.draw(st.none() | arrays((8,), st.sampled_from([0.0, 0.25, -0.5])))
    bias = data.draw(st.none() | arrays((5,)))
    pw = [np.full((5, 1), data.draw(scale)) for _ in rule_w.parameters]

    def run(dtype, tensors):
        x, w, shift, bias, a, *pw = tensors
        if dtype == torch.float32:
            assert autograd.takes_linear(rule_x, rule_w, x, w, shift, bias)
            return autograd.elastic_linear(x, w, rule_x, rule_w, a, pw, shift, bias)
        return products.binary_product(x, w, rule_x, rule_w, [a], pw, shift, bias)

    compare(run, [x, w, shift, bias, np.array(data.draw(scale)), *pw])


@pytest.mark.parametrize("groups", [1, 2, 3, 4])
@settings(max_examples=20)
@given(data=st.data())
def test_attention(groups, data):
    """Query, key and value lie on edges; the map cannot, since a softmax is no round number.

    The thresholds of the value are no round numbers either: 0.7 of a maximum differs between float32 and float64.
    """
    thresholds = (0.5, 0.7, 0.9)[: groups - 1]
    rule_a, rule_v = GsbAttention(thresholds=thresholds), GsbValue(thresholds=thresholds)
    elastic = rules.Elastic()
    b, n, heads, d = 2, 5, 3, 4
    qkv = data.draw(arrays((b, n, 3 * heads * d), values))
    bias = np.random.default_rng(data.draw(st.integers(0, 9))).uniform(-0.1, 0.4, (heads, n, n))
    scales = [data.draw(scale) for _ in range(2 + groups)] + [0.11, 0.23, 0.17, 0.13][:groups]
    given_shifts = [data.draw(shifts) for _ in range(3)]

    def run(dtype, tensors):
        qkv, bias, *rest = tensors
        shifts, scale_q, scale_k, scales = rest[:3], rest[3], rest[4], rest[5:]
        scales_v, scales_a = scales[:groups], scales[groups:]
        if dtype == torch.float32:
            assert autograd.takes_attention(elastic, elastic, rule_a, rule_v, qkv, bias)
            return autograd.attention_core(
                qkv, heads, bias, tuple(shifts), (rule_a, rule_v), scale_q, scale_k, scales_a, scales_v
            )
        q, k, v = qkv.view(b, n, 3, heads, d).permute(2, 0, 3, 1, 4).unbind(0)
        q, k, v = (x if shift is None else x + shift for x, shift in zip((q, k, v), shifts, strict=True))
        product = products.binary_product(q, k, elastic, elastic, [scale_q], [scale_k])
        a = (product * d**-0.5).softmax(-1) + bias
        top = a.amax(-1, keepdim=True)
        edges = [t * top for t in thresholds] + [0 * top, scales_a[0] / 2, scales_a[0]]
        assume(all((a - edge).abs().min() > 1e-6 for edge in edges))  # else float32 may fall on the other side
        for extreme in (v.amax((-1, -2), keepdim=True), v.amin((-1, -2), keepdim=True)):
            edges = [t * extreme for t in thresholds]
            assume(not any((((v - edge).abs() < 1e-6) & (edge != 0)).any() for edge in edges))
        y = products.binarize(a, rule_a, *scales_a) @ products.binarize(v, rule_v, *scales_v)
        return y.transpose(1, 2).reshape(b, n, heads * d)

    compare(run, [qkv, bias, *given_shifts, *(np.array(s) for s in scales)])


def test_thresholds_are_compared_alike():
    """0.7 of a maximum is rounded the same way by the kernels and by the rules."""
    rng = np.random.default_rng(0)
    n = 64
    v = torch.tensor(rng.integers(-10, 11, (1, n, 1, 8)) / 10, dtype=torch.float32)  # many entries at 0.7 and 0.9
    qkv = torch.zeros(1, n, 3, 1, 8)
    qkv[:, :, 2] = v
    rule_a, rule_v = GsbAttention(thresholds=()), GsbValue()
    one = torch.tensor(1.0)
    for a1, a2, a3 in itertools.product((0.3, 0.7), repeat=3):
        scales_v = [torch.tensor(s) for s in (a1, a2, a3)]
        # With equal scores and a scale far below 1/n the map is a constant: every row sums the binarized value.
        y = autograd.attention_core(
            qkv.view(1, n, 24), 1, None, (None,) * 3, (rule_a, rule_v), one, one, [torch.tensor(1e-3)], scales_v
        )
        want = 1e-3 * products.binarize(v.transpose(1, 2), rule_v, *scales_v).sum(2)
        torch.testing.assert_close(y[0, 0], want[0, 0], rtol=1e-5, atol=1e-6)
