import numpy as np
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st

from binvit import bits
from binvit.bits import linear
from binvit.bits.attention import bias, head, scores, value

FLOAT = np.float32
SEEDS = st.integers(0, 2**32 - 1)


def random_signs(rng, *shape):
    return rng.integers(0, 2, shape) * 2 - 1


@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 150), st.integers(1, 140), st.integers(1, 3), st.integers(1, 3), st.sampled_from([0, 1, 2]), SEEDS
)
def test_superposed_product_equals_its_exact_integers_combined_in_order(
    tokens, width, attention_groups, value_groups, spread, seed
):
    rng = np.random.default_rng(seed)
    inputs = int(rng.integers(1, 100))
    x, w = random_signs(rng, tokens, inputs), random_signs(rng, 2 * width, inputs)
    scale, offset, shift = rng.normal(size=(3, 2 * width)).astype(FLOAT) * 0.01
    scale[:] = np.exp(spread * rng.normal(size=2 * width))  # few elements of the higher groups, or many
    offset[rng.random(2 * width) < 0.5] = shift[rng.random(2 * width) < 0.5] = 0  # exact zeros among the values
    values = ((reference.integer_product(x, w).astype(FLOAT) * scale + offset) + shift)[:, width:]

    workspace = head.make_workspace(1, tokens, width, attention_groups, value_groups, True)
    workspace.attention[0] = -np.inf
    workspace.attention[0][:, :tokens] = rng.random((tokens, tokens)) ** 2
    offsets = np.sort(rng.random(attention_groups)).astype(FLOAT)
    cuts = np.repeat(offsets[:, None], tokens, axis=1)
    scores.planes_above(workspace.attention[0], cuts, workspace.planes[0], workspace.sizes[0], 0, tokens)
    groups = workspace.attention[0][:, :tokens] > offsets[:, None, None]

    packed = bits.pack_signs(x)
    panels = np.zeros((bits.word_count(tokens), 2 * packed.shape[1], 64), np.uint32)
    linear.words_to_panels(packed, panels, 0, tokens)
    least, largest = head.compute_values(
        workspace, 0, bits.pack_signs(w), width, panels, tokens, inputs, scale, offset, shift
    )
    np.testing.assert_array_equal(workspace.values[0][:, :tokens], values.T)
    assert (least, largest) == (values.min(), values.max())
    ratios = np.array([0, 0.2, 0.9], FLOAT)[:value_groups]
    lower, upper = ratios * least, ratios * largest
    if rng.random() < 0.3:
        lower[0], upper[0] = np.inf, -np.inf
    head.pack_values(workspace, 0, tokens, lower, upper)

    coefficients = rng.normal(size=(attention_groups, value_groups)).astype(FLOAT)
    move = rng.normal(size=width).astype(FLOAT)
    words = np.full((tokens, 2 * bits.word_count(width)), 5, np.uint64)
    floats = np.full((tokens, width + 3), 5, FLOAT)
    head.multiply(workspace, 0, tokens, coefficients, move, words, bits.word_count(width), floats, 2)
    expected = reference.superposed_product(groups, values, lower, upper, coefficients)
    np.testing.assert_array_equal(floats[:, 2:-1], expected)
    np.testing.assert_array_equal(words[:, bits.word_count(width) :], reference.words_of(expected + move >= 0))
    assert (words[:, : bits.word_count(width)] == 5).all()
    assert (floats[:, [0, 1, -1]] == 5).all()


def test_sparse_groups_are_listed_and_dense_ones_multiplied():
    values = np.full((4, 64), 0.1, FLOAT)
    values[0, 3], values[2, 5], values[:, 6:20] = 9, -9, 3
    planes, kinds = np.zeros((24, 2), np.uint32), np.zeros(3, np.int64)
    starts, entries = np.zeros((3, 5), np.int32), np.zeros((3, value.entry_capacity(4, 40)), np.int32)
    lower, upper = np.array([np.inf, -2, -8], FLOAT), np.array([-np.inf, 2, 8], FLOAT)
    value.value_planes(values, 40, lower, upper, planes, kinds, starts, entries)
    assert list(kinds) == [value.EVERYTHING, value.MASKED, value.LISTED]
    np.testing.assert_array_equal(starts[2], [0, 1, 1, 2, 2])
    np.testing.assert_array_equal(entries[2, :2], [2 * 3 + 1, 2 * 5])


def test_impossible_heads_and_biases_are_refused():
    with pytest.raises(ValueError, match=r"1 to 254 channels wide .* not 255"):
        head.make_workspace(1, 5, 255, 1, 1, False)
    with pytest.raises(ValueError, match=r"1 to 254 channels wide .* not 0"):
        head.make_workspace(1, 5, 0, 1, 1, False)
    with pytest.raises(ValueError, match=r"\(heads, tokens, tokens\), not \(2, 3, 4\)"):
        bias.full_bias(np.zeros((2, 3, 4)))
    with pytest.raises(ValueError, match=r"2 x 3 patches and 1 prefix .* \(heads, 23\), not \(2, 17\)"):
        bias.relative_bias(np.zeros((2, 17)), (2, 3), 1)
