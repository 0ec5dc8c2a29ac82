import numpy as np
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st

from binvit import bits
from binvit.bits import attention, bias, head, linear, softmax, value

FLOAT = np.float32
SEEDS = st.integers(0, 2**32 - 1)
SCALE = 0.15


def random_signs(rng, *shape):
    return rng.integers(0, 2, shape) * 2 - 1


def unpack_planes(planes, groups, tokens):
    """uint32 (G P, 2 P, 64) -> bits (G, T, T)."""
    panels = planes.shape[1] // 2
    shaped = planes.reshape(groups, panels, 2 * panels, 64).transpose(0, 1, 3, 2)  # group, panel, query, step
    octets = np.ascontiguousarray(shaped).view(np.uint8).reshape(groups, 64 * panels, -1)
    return np.unpackbits(octets, axis=-1, bitorder="little")[:, :tokens, :tokens]


def make_bias(rng, kind, grid, prefix):
    tokens = prefix + grid[0] * grid[1]
    if kind == "full":
        values = rng.normal(scale=0.01, size=(2, tokens, tokens)).astype(FLOAT)
        return bias.full_bias(values), values
    if kind == "relative":
        entries = (2 * grid[0] - 1) * (2 * grid[1] - 1) + prefix * prefix + 2 * prefix
        values = rng.normal(scale=0.01, size=(2, entries)).astype(FLOAT)
        return bias.relative_bias(values, grid, prefix), reference.relative_bias(values, grid, prefix)
    return bias.no_bias(), np.zeros((2, 1, 1))


@settings(deadline=None, max_examples=40)
@given(
    st.tuples(st.integers(1, 9), st.integers(1, 18)),
    st.integers(0, 2),
    st.integers(1, 140),
    st.sampled_from(["none", "full", "relative"]),
    st.booleans(),
    SEEDS,
)
def test_groups_of_a_map_are_its_elements_above_the_cuts(grid, prefix, width, kind, inclusive, seed):
    rng = np.random.default_rng(seed)
    tokens = prefix + grid[0] * grid[1]
    q, k = random_signs(rng, tokens, 2, width), random_signs(rng, tokens, 2, width)
    k = np.where(rng.random(k.shape) < rng.random(), q, k)
    words = [bits.pack_signs(x).reshape(tokens, -1) for x in (q, k)]
    table = softmax.exponential_table(SCALE, width)
    prepared, values = make_bias(rng, kind, grid, prefix)
    offsets, ratios = np.array([0.5 / tokens, 0, 0], FLOAT), np.array([0, 0.7, 0.9], FLOAT)
    workspace = head.make_workspace(1, tokens, width, 3, 1, kind != "none")
    first = bits.word_count(width)
    fixed = softmax.fixed_point_planes(table)
    head.compute_map(workspace, 0, *words, (first, first), width, table, fixed, prepared, 1)
    largest = workspace.largest[0]
    head.pack_map(workspace, 0, table, offsets, ratios, np.full(3, inclusive), largest)

    expected = reference.softmax_map(q[:, 1], k[:, 1], SCALE, values[1])
    np.testing.assert_allclose(largest, expected.max(axis=1), rtol=2e-6, atol=1e-7)
    groups = unpack_planes(workspace.planes[0], 3, tokens)
    np.testing.assert_array_equal(workspace.sizes[0][:, :tokens], groups.sum(axis=2))
    for group, offset, ratio in zip(groups, offsets, ratios, strict=True):
        cut = offset + ratio * expected.max(axis=1, keepdims=True)
        decided = np.abs(expected - cut) > 1e-6
        np.testing.assert_array_equal(group[decided], (expected > cut)[decided])


@pytest.mark.parametrize("width", [64, 130])
def test_rows_whose_scores_span_the_whole_table_sum_up(width):
    q = np.ones((3, width))
    k = np.stack([q[0], -q[0], q[0]])
    table = softmax.exponential_table(0.001, width)
    keys, counts = np.zeros((1, -(-width // 8), 64), np.uint8), np.zeros((3, 64), np.uint8)
    smallest, sums = np.zeros(3, np.uint8), np.zeros(3, FLOAT)
    attention.prepare_keys(bits.pack_signs(k), 0, width, keys)
    attention.score_counts(bits.pack_signs(q), 0, width, keys, counts, smallest, 0, 3)
    softmax.softmax_sums(counts, smallest, table, softmax.fixed_point_planes(table), sums, 0, 3)
    np.testing.assert_array_equal(counts[:, :3], [[0, width, 0]] * 3)
    assert (counts[:, 3:] == 255).all()
    np.testing.assert_allclose(sums, 2 + np.exp(-0.002 * width), rtol=1e-6)


def test_equal_elements_are_in_an_inclusive_group_only():
    words = bits.pack_signs(np.ones((5, 8)))
    table = softmax.exponential_table(SCALE, 8)
    workspace = head.make_workspace(1, 5, 8, 2, 1, False)
    fixed = softmax.fixed_point_planes(table)
    head.compute_map(workspace, 0, words, words, (0, 0), 8, table, fixed, bias.no_bias(), 0)
    ones = np.ones(2, FLOAT)
    head.pack_map(workspace, 0, table, 0 * ones, ones, np.array([False, True]), workspace.largest[0])
    np.testing.assert_array_equal(workspace.sizes[0][:, :5], [[0] * 5, [5] * 5])


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
    zeros = np.zeros(attention_groups)
    table = softmax.exponential_table(1, width)
    head.pack_map(workspace, 0, table, offsets, zeros.astype(FLOAT), zeros > 0, np.zeros(tokens, FLOAT))
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


def test_impossible_heads_scales_and_biases_are_refused():
    with pytest.raises(ValueError, match=r"1 to 254 channels wide .* not 255"):
        head.make_workspace(1, 5, 255, 1, 1, False)
    with pytest.raises(ValueError, match=r"1 to 254 channels wide .* not 0"):
        softmax.exponential_table(1, 0)
    with pytest.raises(ValueError, match="must be positive, not -1"):
        softmax.exponential_table(-1, 8)
    with pytest.raises(ValueError, match=r"\(heads, tokens, tokens\), not \(2, 3, 4\)"):
        bias.full_bias(np.zeros((2, 3, 4)))
    with pytest.raises(ValueError, match=r"2 x 3 patches and 1 prefix .* \(heads, 18\), not \(2, 17\)"):
        bias.relative_bias(np.zeros((2, 17)), (2, 3), 1)
