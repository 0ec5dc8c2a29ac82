import numpy as np
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st

from binvit import bits
from binvit.bits import linear
from binvit.bits.attention import bias, combine, extrema, head, scores, value
from binvit.jit import kernel

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

    workspace = head.make_workspace(
        1, tokens, width, attention_groups, value_groups, bias.full_bias(np.zeros((1, tokens, tokens)))
    )
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
    starts, entries = np.zeros((3, 5), np.int32), np.zeros((3, value.entry_capacity(4, 40) + 1), np.int32)
    lower, upper = np.array([np.inf, -2, -8], FLOAT), np.array([-np.inf, 2, 8], FLOAT)
    value.value_planes(values, 40, lower, upper, planes, kinds, starts, entries)
    assert list(kinds) == [value.EVERYTHING, value.MASKED, value.LISTED]
    np.testing.assert_array_equal(starts[2], [0, 1, 1, 2, 2])
    np.testing.assert_array_equal(entries[2, :3] >> combine.CHANNEL, [0, 2, 4])  # the last is of no channel
    np.testing.assert_array_equal(entries[2, :2] & ((1 << combine.CHANNEL) - 1), [2 * 3 + 1, 2 * 5])


@pytest.mark.parametrize("thresholds", [(2, 8, 4), (8, 2, 4), (4, 4, 0), (9.5, 9.5, 2)])
def test_groups_are_packed_in_any_order_of_their_thresholds(thresholds):
    values = np.random.default_rng(0).normal(scale=3, size=(70, 128)).astype(FLOAT)
    upper = np.array([-np.inf, *thresholds], FLOAT)
    planes, kinds = np.zeros((8 * 70, 4), np.uint32), np.zeros(4, np.int64)
    starts, entries = np.zeros((4, 71), np.int32), np.zeros((4, value.entry_capacity(70, 100) + 1), np.int32)
    value.value_planes(values, 100, -upper, upper, planes, kinds, starts, entries)
    masks = np.unpackbits(planes.view(np.uint8), axis=1, bitorder="little")[:, :100].reshape(4, 2, 70, 100).astype(bool)
    present = np.abs(values[:, :100]) > upper[:, None, None]
    np.testing.assert_array_equal(masks[:, 1], present)
    np.testing.assert_array_equal(masks[:, 0], present & (values[:, :100] >= 0))
    for group in np.flatnonzero(kinds == value.LISTED):
        channels, tokens = np.nonzero(present[group])
        signs = values[channels, tokens] >= 0
        listed = entries[group, : len(channels)]
        np.testing.assert_array_equal(listed, (channels << combine.CHANNEL) + 2 * tokens + signs)
        np.testing.assert_array_equal(starts[group], np.searchsorted(channels, np.arange(71)))


@pytest.mark.parametrize("length", [1, 15, 16, 17, 63, 64, 65, 128, 198])
def test_extrema_of_rows_leave_out_what_lies_behind_them(length):
    values = np.random.default_rng(length).normal(size=(9, 256)).astype(FLOAT)
    values[0::2, length:], values[1::2, length:] = np.inf, -np.inf
    part = values[2:7, :length]
    assert extrema.least_of_rows(values, 2, 5, length) == part.min()
    assert extrema.largest_of_rows(values, 2, 5, length) == part.max()


@pytest.mark.parametrize("shape", [(2, 5, 5), (3, 2, 70, 70)])
def test_a_bias_is_kept_in_halves_only_if_all_its_numbers_are(shape):
    rounded = np.random.default_rng(0).normal(size=shape).astype(np.float16).astype(FLOAT)
    rounded.flat[0], rounded.flat[1] = -0.0, 65504
    layers = rounded.reshape(-1, *shape[-3:])

    def stacked(values):
        biases = [bias.full_bias(layer) for layer in values]
        full = biases[0].full if len(shape) == 3 else np.stack([layer.full for layer in biases])
        return biases[0]._replace(full=full, halves=np.zeros((*shape[:-3], 0, 0, 0), np.uint16))

    halves = bias.in_halves(stacked(layers))
    assert halves.full.size == 0
    kept = halves.halves.view(np.float16)[..., : shape[-1]].astype(FLOAT)
    np.testing.assert_array_equal(kept.view(np.uint32), rounded.view(np.uint32))
    assert halves.full.ndim == halves.halves.ndim == len(shape)
    for other in (0.1, 70000, 1e-9, np.inf, np.nan):
        layers.flat[-1] = other
        whole = stacked(layers)
        assert bias.in_halves(whole) is whole
    assert bias.in_halves(bias.no_bias()).halves.size == 0


def test_impossible_heads_and_biases_are_refused():
    with pytest.raises(ValueError, match=r"1 to 254 channels wide .* not 255"):
        head.make_workspace(1, 5, 255, 1, 1, bias.no_bias())
    with pytest.raises(ValueError, match=r"1 to 254 channels wide .* not 0"):
        head.make_workspace(1, 5, 0, 1, 1, bias.no_bias())
    with pytest.raises(ValueError, match=r"1 to 524287 tokens, not 524288"):
        value.entry_capacity(64, 2**19)
    with pytest.raises(ValueError, match=r"\(heads, tokens, tokens\), not \(2, 3, 4\)"):
        bias.full_bias(np.zeros((2, 3, 4)))
    with pytest.raises(ValueError, match=r"2 x 3 patches and 1 prefix .* \(heads, 23\), not \(2, 17\)"):
        bias.relative_bias(np.zeros((2, 17)), (2, 3), 1)


@kernel
def add_to_row(total, counts, factor):
    combine.add_counts(total, 0, counts, 0, counts, 0, 0, factor, np.bool_(False))


def test_lanes_that_nobody_reads_may_hold_anything():
    """Signaling NaN and infinities, as memory that nobody has written may: without a compiler no warning either."""
    total, counts = np.zeros((1, 64), FLOAT), np.full((1, 64), 3, np.int32)
    total.view(np.uint32)[0, 20:40] = 0x7FA00000
    total[0, 40:] = np.inf
    add_to_row(total, counts, FLOAT(-2))
    np.testing.assert_array_equal(total[0, :20], np.full(20, -6, FLOAT))
    add_to_row(total, counts, FLOAT(-np.inf))
