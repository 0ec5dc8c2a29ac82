"""The attention map on bits: exponentials from a table, bias, groups, against torch and against double precision."""

import numba
import numpy as np
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from binvit import bits
from binvit.bits.attention import bias
from binvit.bits.attention import scores as kernels
from binvit.packed.fast import biased_map, softmax
from binvit.packed.fast.forward import _set_cuts

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
    if kind == "halves":
        values = rng.normal(scale=0.01, size=(2, tokens, tokens)).astype(np.float16).astype(FLOAT)
        return bias.in_halves(bias.full_bias(values)), values
    if kind == "relative":
        entries = (2 * grid[0] - 1) * (2 * grid[1] - 1) + prefix * (tokens + 1)
        values = rng.normal(scale=0.01, size=(2, entries)).astype(FLOAT)
        return bias.relative_bias(values, grid, prefix), reference.relative_bias(values, grid, prefix)
    return bias.no_bias(), np.zeros((2, 1, 1))


def count(q, k):
    """Signs (T, d) twice -> the popcounts of their differences, padded, and the least of each row."""
    tokens, width = q.shape
    panels = bits.word_count(tokens)
    keys = np.zeros((panels, -(-width // 8), 64), np.uint8)
    counts, smallest = np.zeros((tokens, 64 * panels), np.uint8), np.zeros(tokens, np.uint8)
    kernels.prepare_keys(bits.pack_signs(k), 0, width, keys)
    kernels.score_counts(bits.pack_signs(q), 0, width, keys, counts, smallest, 0, tokens)
    return counts, smallest


def fill_map(counts, smallest, table, lanes, tokens, prepared, head):
    """Popcounts -> the map (without a bias an empty one), the reciprocal sums and the maximum of each row."""
    biased = prepared.full.shape[0] + prepared.halves.shape[0] + prepared.runs.shape[0] > 0
    map_ = np.full(counts.shape if biased else (0, counts.shape[1]), -np.inf, FLOAT)
    reciprocals, largest = np.zeros(tokens, FLOAT), np.zeros(tokens, FLOAT)
    softmax.exponentiate(counts, smallest, table, lanes, tokens, reciprocals, map_, 0, tokens)
    if prepared.full.shape[0]:
        biased_map.add_bias(map_, reciprocals, prepared.full[head], largest, 0, tokens)
    elif prepared.halves.shape[0]:
        biased_map.add_half_bias(map_, reciprocals, prepared.halves[head], largest, 0, tokens)
    elif biased:
        unfolded = np.full(bias.unfolded_shape(prepared), np.nan, FLOAT)
        rows, keys, width = prepared.prefix_rows[head], prepared.prefix_keys[head], prepared.width
        bias.unfold_runs(prepared.runs[head], len(keys), width, unfolded)
        for start in range(0, tokens, 7):  # also parts that hold queries of both kinds
            stop = min(start + 7, tokens)
            biased_map.add_relative_bias(map_, reciprocals, unfolded, rows, keys, width, largest, start, stop)
    else:
        largest[:] = table[smallest, 0] * reciprocals
    return map_, reciprocals, largest


def pack_groups(counts, smallest, table, map_, reciprocals, cuts):
    """What `fill_map` returned -> the groups above the cuts (G, T, T) and the number of tokens in each (G, T)."""
    groups, tokens = cuts.shape
    panels = counts.shape[1] // 64
    planes = np.zeros((groups * panels, 2 * panels, 64), np.uint32)
    sizes, bounds = np.zeros((groups, 64 * panels), np.int32), np.zeros((groups, tokens), np.uint8)
    if len(map_):
        kernels.planes_above(map_, cuts, planes, sizes, 0, tokens)
    else:
        softmax.group_bounds(table, smallest, reciprocals, cuts, bounds, 0, tokens)
        kernels.planes_below(counts, bounds, planes, sizes, 0, tokens)
    return unpack_planes(planes, groups, tokens), sizes[:, :tokens]


@settings(deadline=None, max_examples=40)
@given(
    st.tuples(st.integers(1, 9), st.integers(1, 18)),
    st.sampled_from([0, 1, 2, 5, 16, 17, 33]),
    st.integers(1, 140),
    st.sampled_from(["none", "full", "halves", "relative"]),
    st.booleans(),
    st.sampled_from(softmax.WIDTHS),
    SEEDS,
)
def test_groups_of_a_map_are_its_elements_above_the_cuts(grid, prefix, width, kind, inclusive, lanes, seed):
    rng = np.random.default_rng(seed)
    tokens = prefix + grid[0] * grid[1]
    q, k = random_signs(rng, tokens, width), random_signs(rng, tokens, width)
    k = np.where(rng.random(k.shape) < rng.random(), q, k)
    table = softmax.score_table(None, torch.tensor(SCALE), width)
    prepared, values = make_bias(rng, kind, grid, prefix)
    counts, smallest = count(q, k)
    map_, reciprocals, largest = fill_map(counts, smallest, table, lanes, tokens, prepared, 1 % len(values))

    expected = reference.softmax_map(q, k, SCALE, values[1 % len(values)])
    np.testing.assert_allclose(largest, expected.max(axis=1), rtol=2e-6, atol=1e-7)
    offsets, ratios, cuts = np.array([0.5 / tokens, 0, 0]), np.array([0, 0.7, 0.9]), np.zeros((3, tokens), FLOAT)
    for g in range(3):
        _set_cuts(cuts[g], FLOAT(offsets[g]), FLOAT(ratios[g]), inclusive, largest)
    groups, sizes = pack_groups(counts, smallest, table, map_, reciprocals, cuts)
    np.testing.assert_array_equal(sizes, groups.sum(axis=2))
    for group, offset, ratio in zip(groups, offsets, ratios, strict=True):
        cut = offset + ratio * expected.max(axis=1, keepdims=True)
        decided = np.abs(expected - cut) > 1e-6
        np.testing.assert_array_equal(group[decided], (expected > cut)[decided])


@pytest.mark.parametrize("width", [1, 64, 130, 254])
@pytest.mark.parametrize("tokens", [3, 16, 197])
def test_exponentials_and_sums_have_the_bits_of_torch(width, tokens):
    rng = np.random.default_rng(width)
    q, k = random_signs(rng, tokens, width), random_signs(rng, tokens, width)
    table, lanes = softmax.score_table(None, torch.tensor(SCALE), width), softmax.torch_lanes()
    counts, smallest = count(q, k)
    map_, reciprocals = np.zeros(counts.shape, FLOAT), np.zeros(tokens, FLOAT)
    softmax.exponentiate(counts, smallest, table, lanes, tokens, reciprocals, map_, 0, tokens)
    scores = torch.from_numpy(reference.integer_product(q, k)).float() * torch.tensor(SCALE)
    np.testing.assert_array_equal(map_[:, :tokens] * reciprocals[:, None], torch.softmax(scores, -1).numpy())


@pytest.mark.parametrize("width", [64, 130])
def test_rows_whose_scores_span_the_whole_table_sum_up(width):
    q = np.ones((3, width))
    counts, smallest = count(q, np.stack([q[0], -q[0], q[0]]))
    np.testing.assert_array_equal(counts[:, :3], [[0, width, 0]] * 3)
    assert (counts[:, 3:] == 255).all()
    table = softmax.score_table(None, torch.tensor(0.001), width)
    _, reciprocals, _ = fill_map(counts, smallest, table, 16, 3, bias.no_bias(), 0)
    np.testing.assert_allclose(1 / reciprocals, 2 + np.exp(-0.002 * width), rtol=1e-6)


def test_equal_elements_are_in_an_inclusive_group_only():
    counts, smallest = count(np.ones((5, 8)), np.ones((5, 8)))
    table = softmax.score_table(None, torch.tensor(SCALE), 8)
    map_, reciprocals, largest = fill_map(counts, smallest, table, 16, 5, bias.no_bias(), 0)
    cuts = np.zeros((2, 5), FLOAT)
    for cut, inclusive in zip(cuts, (False, True), strict=True):
        _set_cuts(cut, FLOAT(0), FLOAT(1), inclusive, largest)
    _, sizes = pack_groups(counts, smallest, table, map_, reciprocals, cuts)
    np.testing.assert_array_equal(sizes, [[0] * 5, [5] * 5])


@pytest.mark.parametrize("instructions", [True, False])
def test_every_finite_float16_number_is_read_exactly(instructions, monkeypatch):
    if instructions and not biased_map.HALF_FLOATS:
        pytest.skip("this CPU, or this test run, has no instructions for float16")
    monkeypatch.setattr(biased_map, "HALF_FLOATS", instructions)
    add = biased_map._make_add_bias(half=True)
    numbers = np.arange(2**16, dtype=np.uint16)
    bias = numbers[np.isfinite(numbers.view(np.float16))].reshape(-1, 64)
    attention = np.zeros((len(bias), 64), FLOAT)

    def run(attention, bias, largest):
        for row in range(len(bias)):
            largest[row] = add(attention, row, 64, FLOAT(1), bias, row)

    largest = np.zeros(len(bias), FLOAT)
    numba.njit(run)(attention, bias, largest)
    expected = bias.view(np.float16).astype(FLOAT)
    np.testing.assert_array_equal(attention, expected)
    np.testing.assert_array_equal(largest, expected.max(axis=1))
