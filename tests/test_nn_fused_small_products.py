"""Small float products: a chain of fused multiply-adds, number by number, in every shape of the tiles."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from binvit.nn.fused import float_products, small_products
from binvit.nn.fused.float_products import library, product, product_over_rows
from binvit.nn.fused.small_products import CHAIN, LANES

needs_vectors = pytest.mark.skipif(not small_products.WIDE_VECTORS, reason="this CPU's vectors hold fewer floats")


def numbers(rng, *shape):
    """Draw numbers of 12 bits: a product of two and any sum of it are exact in float64, and so rounded once."""
    return torch.tensor(rng.integers(-2047, 2048, shape) / 256, dtype=torch.float32)


def chain(a, b):
    """Multiply a (M, K) and b (K, N) term by term, begun anew after CHAIN terms, each sum rounded to float32."""
    a, b = a.double().numpy(), b.double().numpy()
    total = None
    for first in range(0, a.shape[1], CHAIN):
        part = np.zeros((len(a), b.shape[1]))
        for k in range(first, min(first + CHAIN, a.shape[1])):
            part = (part + a[:, k, None] * b[k]).astype(np.float32).astype(float)
        total = part if total is None else (total + part).astype(np.float32).astype(float)
    return torch.tensor(total, dtype=torch.float32)


@needs_vectors
@settings(max_examples=80)
@given(
    m=st.integers(1, 20),
    k=st.integers(1, 2 * CHAIN + 3),
    vectors=st.integers(1, 8),
    gap=st.integers(0, 3),
    seed=st.integers(0, 2**32 - 1),
)
def test_products_are_chains_in_every_shape(m, k, vectors, gap, seed):
    """Also of matrices whose rows have a gap between them, as parts of a wider one have."""
    rng, n = np.random.default_rng(seed), vectors * LANES
    a, b = numbers(rng, m, k + gap)[:, gap:], numbers(rng, k, n + gap)[:, :n]
    expected = chain(a, b)
    assert small_products.takes(a, b)
    assert torch.equal(small_products.multiply(a, b), expected)
    turned = torch.zeros(k, m + gap)[:, gap:].copy_(a.mT)
    assert torch.equal(small_products.multiply_over_rows(turned, b), expected)


@needs_vectors
@settings(max_examples=60)
@given(
    count=st.integers(1, 5),
    m=st.integers(1, 20),
    k=st.integers(1, CHAIN),
    vectors=st.integers(1, 5),
    seed=st.integers(0, 2**32 - 1),
)
def test_products_of_many_matrices_are_chains(count, m, k, vectors, seed):
    rng, n = np.random.default_rng(seed), vectors * LANES
    a, b = numbers(rng, count, m, k), numbers(rng, count, k, n)
    expected = torch.stack([chain(*pair) for pair in zip(a, b, strict=True)])
    turned = a.mT.contiguous().mT
    assert small_products.takes_each(a, b)
    assert small_products.takes_each(turned, b)
    assert torch.equal(small_products.multiply_each(a, b), expected)
    assert torch.equal(small_products.multiply_each(turned, b), expected)


@pytest.mark.parametrize("shape", [(40, 65, 65, 32), (20, 3, 40, 100, 64), (30, 30, 200, 32), (30, 30, 60, 24)])
def test_products_of_heads_are_those_of_torch(shape):
    """Also of what tiles leave to torch: longer chains, and widths that are no whole vectors."""
    torch.manual_seed(0)
    *many, m, k, n = shape
    a, b = torch.randn(*many, m, k), torch.randn(*many, k, n)
    for left in (a, a.mT.contiguous().mT):
        close = {"rtol": 1e-5, "atol": 1e-4}
        torch.testing.assert_close(float_products.products(left, b), left @ b, **close)
    assert not small_products.takes_each(a[..., ::2], b[..., ::2, :])
    assert not small_products.takes_each(a, b.mT.contiguous().mT)


@pytest.mark.parametrize("vectors", [1, 2, 3])
def test_a_tile_in_numpy_is_the_same_chain(vectors):
    """What runs without a compiler: a short tile that repeats its last row, and sums that go on."""
    rng = np.random.default_rng(0)
    a, b, n = numbers(rng, 5, 9), numbers(rng, 9, vectors * LANES), vectors * LANES
    tile, out = small_products._twin(vectors), np.full((5, n), 7, np.float32)
    tile(a.numpy().ravel(), 0, 4, 9, 1, b.numpy().ravel(), n, 0, 0, 6, out, False)
    tile(a.numpy().ravel(), 0, 4, 9, 1, b.numpy().ravel(), n, 0, 6, 3, out, True)
    assert np.array_equal(out, chain(a[:, :6], b[:6]).numpy() + chain(a[:, 6:], b[6:]).numpy())


@needs_vectors
def test_a_nan_stays_in_its_row():
    a, b = torch.ones(9, 5), torch.ones(5, 32)
    a[3, 2] = torch.nan
    assert small_products.multiply(a, b).isnan().any(1).tolist() == [i == 3 for i in range(9)]


@needs_vectors
def test_what_tiles_do_not_cover_is_torchs(monkeypatch):
    monkeypatch.setenv("BINVIT_PRODUCTS", "oneDNN")
    if library() == "torch":
        pytest.skip("torch has no oneDNN here")
    monkeypatch.setattr(float_products, "_SMALLEST", 0)
    used = []
    for name in ("multiply", "multiply_over_rows"):
        whole = getattr(small_products, name)
        monkeypatch.setattr(small_products, name, lambda *x, f=whole: (used.append(1), f(*x))[1])
    a, b = torch.randn(7, 5), torch.randn(5, 16)
    product(a, b), product_over_rows(a.mT.contiguous(), b)
    assert len(used) == 2
    for left, right in [(a, b[:, :15]), (a, b.mT.contiguous().mT), (a[:0], b), (a.double(), b.double())]:
        assert torch.equal(product(left, right), left @ right)
        rows = left.mT.contiguous()  # of which torch may make another product than of `left`
        assert torch.equal(product_over_rows(rows, right), rows.mT @ right)
    monkeypatch.setenv("BINVIT_PRODUCTS", "torch")
    assert torch.equal(product(a, b), a @ b)
    assert len(used) == 2
