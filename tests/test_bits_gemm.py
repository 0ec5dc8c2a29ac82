import time

import numpy as np
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st

from binvit import bits, jit
from binvit.bits import limit

SIDES = st.integers(0, 21)
LENGTHS = st.integers(1, 300)
SEEDS = st.integers(0, 2**32 - 1)


def random_signs(seed, *shape):
    return np.random.default_rng(seed).integers(0, 2, shape) * 2 - 1


@settings(deadline=None, max_examples=100)
@given(SIDES, LENGTHS, st.integers(0, 150), SEEDS)
def test_products_of_signs_are_exact(rows, length, columns, seed):
    a, w = random_signs(seed, rows, length), random_signs(seed + 1, columns, length)
    a_bits, w_bits = bits.pack_signs(a), bits.pack_signs(w)
    product = bits.binary_matmul(a_bits, w_bits, length)
    assert product.dtype == np.int32
    np.testing.assert_array_equal(product, reference.integer_product(a, w))
    np.testing.assert_array_equal(bits.binary_matmul(a_bits, bits.prepare_weights(w_bits), length), product)


@settings(deadline=None, max_examples=60)
@given(SIDES, LENGTHS, st.integers(0, 150), SEEDS)
def test_products_of_levels_with_signs_and_with_masked_signs_are_exact(rows, length, columns, seed):
    levels = (random_signs(seed, rows, length) + 1) // 2
    w = random_signs(seed + 1, columns, length)
    mask = (random_signs(seed + 2, columns, length) + 1) // 2
    a_bits, w_bits = bits.pack_levels(levels), bits.pack_signs(w)
    product = bits.binary_matmul(a_bits, w_bits, length, unsigned=True)
    np.testing.assert_array_equal(product, reference.integer_product(levels, w))
    sign_plane, mask_plane = bits.pack_planes(w * mask, 0, 0)
    ternary = bits.binary_matmul(a_bits, sign_plane, length, unsigned=True, mask=mask_plane)
    np.testing.assert_array_equal(ternary, reference.integer_product(levels, w * mask))
    prepared = bits.prepare_weights(sign_plane), bits.prepare_weights(mask_plane)
    np.testing.assert_array_equal(
        bits.binary_matmul(a_bits, prepared[0], length, unsigned=True, mask=prepared[1]), ternary
    )


@pytest.mark.parametrize("threads", [1, 2, 64])
def test_large_products_do_not_depend_on_the_threads(threads):
    a, w = random_signs(0, 197, 384), random_signs(1, 200, 384)
    product = bits.binary_matmul(bits.pack_signs(a), bits.pack_signs(w), 384, threads=threads)
    np.testing.assert_array_equal(product, reference.integer_product(a, w))


def test_operands_may_be_read_only_and_strided():
    a, w = random_signs(0, 20, 130), random_signs(1, 30, 130)
    a_bits, w_bits = bits.pack_signs(a), bits.pack_signs(w)
    a_bits.flags.writeable = w_bits.flags.writeable = False
    product = bits.binary_matmul(a_bits[::-3], np.asfortranarray(w_bits)[1::2], 130)
    np.testing.assert_array_equal(product, reference.integer_product(a[::-3], w[1::2]))


def test_out_is_written_and_returned():
    a, w = random_signs(0, 7, 70), random_signs(1, 65, 70)
    out = np.full((7, 65), 99, np.int32)
    assert bits.binary_matmul(bits.pack_signs(a), bits.pack_signs(w), 70, out=out) is out
    np.testing.assert_array_equal(out, reference.integer_product(a, w))


def test_no_columns_no_rows_and_no_bits_give_empty_sums():
    empty = np.zeros((3, 0), np.uint64)
    assert (bits.binary_matmul(empty, np.zeros((5, 0), np.uint64), 0) == np.zeros((3, 5))).all()
    assert bits.binary_matmul(np.zeros((0, 1), np.uint64), np.zeros((5, 1), np.uint64), 9).shape == (0, 5)
    assert bits.binary_matmul(np.zeros((4, 1), np.uint64), np.zeros((0, 1), np.uint64), 9).shape == (4, 0)


def test_prepared_weights_know_their_shape_and_sums():
    w = random_signs(3, 70, 100)
    prepared = bits.prepare_weights(bits.pack_signs(w))
    assert prepared.shape == (70, 2)
    assert prepared.nbytes == 128 * 2 * 8
    np.testing.assert_array_equal(prepared.sums(100)[:70], w.sum(axis=1))


WORDS = np.zeros((3, 2), np.uint64)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((WORDS.astype(np.int64), WORDS, 100), {}, "left operand must be .*uint64.* not int64"),
        ((WORDS, WORDS.astype(np.float32), 100), {}, "right operand must be .*uint64.* not float32"),
        ((WORDS[0], WORDS, 100), {}, r"left operand must be a matrix .* not of shape \(2,\)"),
        ((WORDS, WORDS[:, :1], 100), {}, r"shapes \(3, 2\) and \(3, 1\) .* K = 100 .* 2 words"),
        ((WORDS, WORDS, 129), {}, r"shapes \(3, 2\) and \(3, 2\) .* K = 129 .* 3 words"),
        ((WORDS, WORDS, 64), {}, r"K = 64 .* 1 words"),
        ((WORDS, WORDS, -1), {}, "K = -1"),
        ((WORDS, WORDS, 100), {"mask": WORDS}, "needs unsigned activations"),
        ((WORDS, WORDS, 100), {"mask": WORDS[:2], "unsigned": True}, r"mask of \(2, 2\) words .* signs of \(3, 2\)"),
        ((WORDS, WORDS, 100), {"mask": WORDS[:, :1], "unsigned": True}, r"\(3, 2\) and \(3, 1\) \(mask\)"),
        ((WORDS, WORDS, 100), {"out": np.zeros((3, 3))}, r"int32 `out` of shape \(3, 3\), not float64"),
        ((WORDS, WORDS, 100), {"out": np.zeros((2, 3), np.int32)}, r"of shape \(3, 3\), not int32 of shape \(2, 3\)"),
    ],
)
def test_operands_that_do_not_fit_are_refused_in_one_sentence(arguments, options, message):
    with pytest.raises(ValueError, match=message) as error:
        bits.binary_matmul(*arguments, **options)
    assert str(error.value).endswith(".")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("threads", [0, -1, 1.5, True, "2"])
def test_a_number_of_threads_is_a_whole_number_from_one(threads):
    with pytest.raises(ValueError, match="whole number of at least 1"):
        bits.set_threads(threads)


def test_threads_are_restored_after_a_block():
    before = bits.get_threads()
    with bits.use_threads(1) as used:
        assert used == bits.get_threads() == 1
    assert bits.get_threads() == before


def test_warm_up_tells_its_seconds():
    start = time.perf_counter()
    assert 0 < bits.warm_up() <= time.perf_counter() - start


def test_the_limit_is_measured_with_jit_only():
    if jit.JIT:
        with bits.use_threads(1):
            done = limit.run_in_registers()
        start = time.perf_counter()
        assert np.inf > bits.popcount_limit(repeats=3) >= 3 * done / (time.perf_counter() - start)
        before, every = bits.get_threads(), jit.config.NUMBA_NUM_THREADS
        assert bits.popcount_limit(every, repeats=3) < 3 * every * bits.popcount_limit(repeats=20)
        assert bits.get_threads() == before
        with bits.use_threads(every):
            assert limit.run_in_registers() == every * done
    else:
        with pytest.raises(ValueError, match="only be measured with numba's JIT"):
            bits.popcount_limit()


@pytest.mark.parametrize("length", [None, "70", 70.5, True])
def test_binary_matmul_needs_a_whole_number_of_bits(length):
    words = np.zeros((3, 2), np.uint64)
    with pytest.raises(ValueError, match=rf"^The number of bits K must be an integer, got {length!r}\.$"):
        bits.binary_matmul(words, words, length)
    assert bits.binary_matmul(words, words, np.int64(70)).shape == (3, 3)
