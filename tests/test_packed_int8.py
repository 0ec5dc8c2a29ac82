import numpy as np
import pytest
import reference
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from binvit.jit import JIT
from binvit.packed.exact import MOST_ROWS, few_rows_product


@pytest.mark.skipif(not JIT, reason="without a compiler the product is torch's")
@settings(deadline=None, max_examples=60)
@given(st.integers(1, MOST_ROWS), st.integers(1, 1000), st.integers(1, 40), st.integers(0, 2**32 - 1))
@example(1, 1023, 3, 0)
def test_sums_are_the_integers(rows, length, outputs, seed):
    rng = np.random.default_rng(seed)
    x, w = rng.integers(-128, 128, (rows, length)), rng.integers(-128, 128, (outputs, length)).astype(np.int8)
    x[0], w[0] = 127, -128  # the largest sum
    y = few_rows_product(torch.from_numpy(x.astype(np.float32)), torch.from_numpy(w))
    np.testing.assert_array_equal(y.numpy(), reference.integer_product(x, w))


def test_many_rows_and_other_weights_are_left_to_torch():
    x = torch.zeros(MOST_ROWS + 1, 8)
    assert few_rows_product(x, torch.zeros(3, 8, dtype=torch.int8)) is None
    assert few_rows_product(x[:1], torch.zeros(3, 8)) is None
    if JIT:
        assert few_rows_product(x[None, None, :1], torch.zeros(3, 8, dtype=torch.int8)).shape == (1, 1, 1, 3)
