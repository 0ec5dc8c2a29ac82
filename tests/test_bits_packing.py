import numpy as np
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from binvit import bits

SMALL_SHAPES = st.tuples(st.integers(0, 4), st.integers(0, 300))
REALS = st.sampled_from([-np.inf, -2.5, -1.0, -1e-45, -0.0, 0.0, 1e-45, 1.0, 2.5, np.inf, np.nan])


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_pack_signs_is_one_where_x_is_not_negative(data):
    shape = data.draw(SMALL_SHAPES)
    dtype = data.draw(st.sampled_from([np.float32, np.float64, np.float16]))
    x = data.draw(arrays(np.float64, shape, elements=REALS)).astype(dtype)
    words = bits.pack_signs(x)
    np.testing.assert_array_equal(words, reference.words_of(x >= 0))
    np.testing.assert_array_equal(bits.unpack_signs(words, shape[-1]), np.where(x >= 0, 1, -1))


@pytest.mark.parametrize("length", [1, 63, 64, 65, 127, 128, 129, 384])
def test_padding_bits_are_zero(length):
    last = bits.pack_signs(np.ones((2, length), np.float32))[:, -1]
    used = length % 64 or 64
    assert all(int(word) == (1 << used) - 1 for word in last)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int64, np.float16, np.float32, np.float64])
def test_all_real_types_pack_alike(dtype):
    x = np.arange(-3, 97).reshape(2, 50)
    np.testing.assert_array_equal(bits.pack_signs(np.abs(x).astype(dtype)), reference.words_of(np.ones_like(x)))
    if np.dtype(dtype).kind != "u":
        np.testing.assert_array_equal(bits.pack_signs(x.astype(dtype)), reference.words_of(x >= 0))


def test_strided_read_only_and_nested_inputs_pack_like_their_copies():
    x = np.random.default_rng(0).standard_normal((4, 6, 140)).astype(np.float32)
    x.flags.writeable = False
    for view in (x[::2, ::-1, ::2], x.transpose(2, 1, 0), x[:, 0], x[0, 0]):
        np.testing.assert_array_equal(bits.pack_signs(view), reference.words_of(view >= 0))
        np.testing.assert_array_equal(bits.pack_levels(view, 0.3), reference.words_of(view > np.float32(0.3)))


@pytest.mark.parametrize("shape", [(0,), (0, 5), (5, 0), (2, 0, 70), (0, 0)])
def test_empty_arrays_pack_to_empty_words(shape):
    words = bits.pack_signs(np.zeros(shape, np.float32))
    assert words.shape == (*shape[:-1], -(-shape[-1] // 64))
    assert bits.unpack_signs(words, shape[-1]).shape == shape


@settings(deadline=None, max_examples=40)
@given(SMALL_SHAPES, st.integers(0, 2**32 - 1))
def test_planes_hold_the_elements_beyond_both_thresholds(shape, seed):
    x = np.random.default_rng(seed).integers(-4, 5, shape).astype(np.float32)
    lower, upper = np.full((shape[0], 1), -2, np.float32), 1.5
    sign, mask = bits.pack_planes(x, lower, upper)
    inside = (x < -2) | (x > 1.5)
    np.testing.assert_array_equal(mask, reference.words_of(inside))
    np.testing.assert_array_equal(sign, reference.words_of(inside & (x > 0)))


def test_a_group_of_everything_leaves_out_exact_zeros():
    sign, mask = bits.pack_planes(np.array([-1.0, 0.0, 2.0]), np.inf, -np.inf)
    assert (int(sign[0]), int(mask[0])) == (0b100, 0b101)


def test_levels_compare_in_the_precision_of_x():
    assert bits.unpack_levels(bits.pack_levels(np.array([0.1], np.float32), 0.1), 1).item() == 0


@pytest.mark.parametrize("bad", [np.array(1.0), np.ones(3, bool), np.ones(3, complex), np.array(["a"]), [None]])
def test_what_has_no_signs_is_refused(bad):
    for pack in (bits.pack_signs, bits.pack_levels, lambda x: bits.pack_planes(x, 0, 0)):
        with pytest.raises(ValueError, match="floats or integers with at least one axis, not"):
            pack(bad)


def test_thresholds_that_do_not_fit_are_refused_with_both_shapes():
    with pytest.raises(ValueError, match=r"threshold of shape \(4,\) does not broadcast to x of shape \(2, 3\)"):
        bits.pack_levels(np.zeros((2, 3)), np.zeros(4))
    with pytest.raises(ValueError, match="real number"):
        bits.pack_levels(np.zeros((2, 3)), "high")


@pytest.mark.parametrize("length", [130.0, "130", None, True])
def test_a_number_of_bits_is_an_integer(length):
    words = np.zeros((2, 3), np.uint64)
    for call in (lambda: bits.unpack_signs(words, length), lambda: bits.word_count(length)):
        with pytest.raises(ValueError, match="number of bits length must be an integer"):
            call()
    assert bits.unpack_signs(words, np.int64(130)).shape == (2, 130)


def test_unpack_refuses_other_words():
    with pytest.raises(ValueError, match=r"int64 of shape \(2,\)"):
        bits.unpack_signs(np.zeros(2, np.int64), 128)
    with pytest.raises(ValueError, match=r"shape \(2,\) cannot hold 129 bits .* 3 words"):
        bits.unpack_levels(np.zeros(2, np.uint64), 129)
    with pytest.raises(ValueError, match="cannot hold -1 bits"):
        bits.unpack_levels(np.zeros(0, np.uint64), -1)
