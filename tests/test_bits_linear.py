import numpy as np
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st

from binvit import bits
from binvit.bits import linear

TOKENS, WIDTHS, SEEDS = st.integers(1, 20), st.integers(1, 200), st.integers(0, 2**32 - 1)
FLOAT = np.float32


def random_signs(rng, *shape):
    return rng.integers(0, 2, shape) * 2 - 1


@settings(deadline=None, max_examples=40)
@given(TOKENS, WIDTHS, st.integers(1, 150), SEEDS)
def test_linear_to_bits_keeps_the_integers_of_an_interval_or_its_complement(tokens, length, outputs, seed):
    rng = np.random.default_rng(seed)
    a, w = random_signs(rng, tokens, length), random_signs(rng, outputs, length)
    first, last = rng.integers(-length - 2, length + 3, (2, outputs))
    first[rng.random(outputs) < 0.2], last[rng.random(outputs) < 0.2] = -(2**31), 2**31 - 1
    outside = rng.random(outputs) < 0.5
    out = np.zeros((tokens, bits.word_count(outputs)), np.uint64)
    panels = bits.prepare_weights(bits.pack_signs(w)).panels
    intervals = linear.make_intervals(first, last, outside)
    linear.linear_to_bits(bits.pack_signs(a), panels, length, *intervals, out, 0, tokens)
    integers = reference.integer_product(a, w)
    np.testing.assert_array_equal(out, reference.words_of(((first <= integers) & (integers <= last)) ^ outside))


@settings(deadline=None, max_examples=40)
@given(TOKENS, WIDTHS, st.integers(1, 150), st.booleans(), st.booleans(), SEEDS)
def test_linear_to_floats_rounds_as_scale_bias_residual_one_after_the_other(
    tokens, length, outputs, unsigned, residual, seed
):
    rng = np.random.default_rng(seed)
    a, w = random_signs(rng, tokens, length), random_signs(rng, outputs, length)
    scale, bias = rng.normal(size=(2, outputs)).astype(FLOAT)
    out = rng.normal(size=(tokens, outputs)).astype(FLOAT)
    weights = bits.prepare_weights(bits.pack_signs(w))
    sums = weights.sums(length) if unsigned else np.zeros(64 * bits.word_count(outputs), np.int32)
    y = reference.integer_product((a + 1) // 2 if unsigned else a, w).astype(FLOAT) * scale + bias
    want = out + y if residual else y
    vectors = linear.pad_outputs(scale), linear.pad_outputs(bias)
    words = bits.pack_signs(a)
    linear.linear_to_floats(words, weights.panels, length, sums, unsigned, *vectors, out, residual, 0, tokens)
    np.testing.assert_array_equal(out, want)


def test_words_to_panels_rearranges_as_prepare_weights_does():
    words = bits.pack_signs(np.random.default_rng(0).normal(size=(70, 100)))
    prepared = bits.prepare_weights(words)
    panels = np.zeros_like(prepared.panels)
    linear.words_to_panels(words, panels, 0, 33)
    linear.words_to_panels(words, panels, 33, 70)
    np.testing.assert_array_equal(panels, prepared.panels)


def test_intervals_refuse_what_does_not_fit():
    with pytest.raises(ValueError, match=r"shapes \(2,\), \(3,\) and \(2,\)"):
        linear.make_intervals(np.zeros(2), np.zeros(3))
    with pytest.raises(ValueError, match="between -2147483648 and 2147483647"):
        linear.make_intervals(np.zeros(1), np.full(1, 2**31))
