import numpy as np
import reference
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from binvit import bits
from binvit.packed.fast import layernorm

FLOAT = np.float32


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 40), st.integers(2, 400), st.integers(0, 2**32 - 1))
@example(3, 384, 0)
@example(9, 768, 1)
def test_normalize_and_pack_keeps_the_signs_of_layer_norm(tokens, width, seed):
    rng = np.random.default_rng(seed)
    x, (gamma, beta, shift) = rng.normal(3, 2, (tokens, width)).astype(FLOAT), rng.normal(size=(3, width)).astype(FLOAT)
    start, stop = sorted(rng.integers(0, tokens + 1, 2))
    words = np.full((tokens, bits.word_count(width)), 7, np.uint64)
    layernorm.normalize_and_pack(x, gamma, beta, shift, 1e-6, words, start, stop)
    y = reference.signs_of_layer_norm(x, gamma, beta, shift, 1e-6)[start:stop]
    decided = np.abs(y) > 1e-4
    unpacked = bits.unpack_signs(words[start:stop], width)
    np.testing.assert_array_equal(unpacked[decided], np.where(y >= 0, 1, -1)[decided])
    np.testing.assert_array_equal(bits.pack_signs(unpacked), words[start:stop])  # padding bits are zero
    assert (np.delete(words, np.s_[start:stop], axis=0) == 7).all()


def test_no_value_is_rounded_otherwise_than_by_torch():
    """Thresholds at torch's values and one step above them: any other rounding flips a bit."""
    rng = np.random.default_rng(0)
    for width in (8, 64, 96, 192, 384, 500, 768, 1024):
        x = rng.normal(1, 2, (11, width)).astype(FLOAT)
        gamma, beta = rng.normal(size=(2, width)).astype(FLOAT)
        tensors = [torch.from_numpy(array) for array in (x, gamma, beta)]
        y = torch.layer_norm(tensors[0], (width,), *tensors[1:], 1e-6).numpy()
        for row in range(len(x)):
            rows = np.repeat(x[row : row + 1], layernorm.ROWS + 1, axis=0)  # all that are taken side by side, and one
            for shift in (-y[row], -np.nextafter(y[row], FLOAT(np.inf))):
                words = np.zeros((len(rows), bits.word_count(width)), np.uint64)
                layernorm.normalize_and_pack(rows, gamma, beta, shift, 1e-6, words, 0, len(rows))
                expected = bits.pack_signs(np.where(y[row] + shift >= 0, 1, -1))
                np.testing.assert_array_equal(words, np.tile(expected, (len(rows), 1)))
