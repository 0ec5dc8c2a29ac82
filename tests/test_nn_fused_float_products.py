"""What multiplies floats in a training step: the same numbers from either library, and who chooses."""

import os

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import binvit
from binvit import lab
from binvit.lab.training.devices import Team
from binvit.lab.training.resume import environment
from binvit.lab.trials.retrain import Archived, retrain
from binvit.lab.trials.store import read_result, write_result
from binvit.nn.fused import float_products
from binvit.nn.fused.float_products import LIBRARIES, library, multiply_by, product, product_over_rows

SIDE = st.integers(1, 40)
needs_onednn = pytest.mark.skipif(not float_products._has_onednn(), reason="torch has no oneDNN here")


@pytest.fixture(scope="module", autouse=True)
def onednn():
    """It multiplies on every processor, whoever has made it."""
    with multiply_by("oneDNN"):
        yield


@needs_onednn
@settings(max_examples=60)
@given(m=SIDE, n=SIDE, k=SIDE, turned=st.tuples(st.booleans(), st.booleans()), seed=st.integers(0, 99))
def test_products_are_those_of_float64(m, n, k, turned, seed):
    rng = np.random.default_rng(seed)
    a, b = (torch.tensor(rng.standard_normal(shape), dtype=torch.float32) for shape in ((m, n), (n, k)))
    a, b = (t.mT.contiguous().mT if turn else t for t, turn in zip((a, b), turned, strict=True))
    exact = a.double() @ b.double()
    wide, ways = a.mT, (product, float_products._product, product_over_rows, float_products._product_over_rows)
    for way in ways:
        y = way(wide if "rows" in way.__name__ else a, b)
        assert y.shape == (m, k)
        assert y.is_contiguous()
        torch.testing.assert_close(y.double(), exact, rtol=1e-5, atol=1e-5)


@needs_onednn
def test_integers_are_exact_and_nan_stays():
    a, b = (torch.randint(-9, 10, shape).float() for shape in ((300, 260), (260, 280)))
    assert a.shape[0] * b.numel() >= float_products._LARGE
    assert torch.equal(product(a, b), a @ b)
    assert torch.equal(product_over_rows(a.mT.contiguous(), b), a @ b)
    a[3, 5] = torch.nan
    assert product(a, b)[3].isnan().all()
    assert not product(a, b)[:3].isnan().any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types_are_torchs(dtype):
    a, b = torch.randn(300, 260, dtype=dtype), torch.randn(260, 280, dtype=dtype)
    assert torch.equal(product(a, b), a @ b)
    assert torch.equal(product_over_rows(a.mT, b), a @ b)


def test_the_environment_chooses(monkeypatch):
    monkeypatch.setenv("BINVIT_PRODUCTS", "torch")
    assert library() == "torch"
    assert environment(Team("cpu"))["products"] == "torch"
    with multiply_by("oneDNN"):
        assert library() in LIBRARIES
    assert os.environ["BINVIT_PRODUCTS"] == "torch"
    monkeypatch.setenv("BINVIT_PRODUCTS", "MKL")
    with pytest.raises(ValueError, match=r"^BINVIT_PRODUCTS must be oneDNN or torch, got 'MKL'\.$"):
        library()


@needs_onednn
@pytest.mark.parametrize(("intels", "name"), [(True, "torch"), (False, "oneDNN")])
def test_mkl_multiplies_where_it_is_at_home(monkeypatch, intels, name):
    monkeypatch.delenv("BINVIT_PRODUCTS")
    monkeypatch.setattr(float_products, "_is_intels", lambda: intels)
    assert library() == name


@pytest.mark.filterwarnings("ignore:TF32")
def test_who_turns_onednn_off_is_heard():
    with torch.backends.mkldnn.flags(enabled=False):
        assert library() == "torch"


@needs_onednn
@pytest.mark.parametrize("scheme", ["gsb", "bit", "bhvit-qd"])
def test_large_products_of_a_step_and_no_others_go_to_onednn(scheme, monkeypatch):
    """Two for each of a block's four layers: the gradients of its inputs and of its weights."""
    calls = []
    for name in ("_product", "_product_over_rows"):
        whole = getattr(float_products, name)
        monkeypatch.setattr(float_products, name, lambda *x, f=whole, n=name: (calls.append(n), f(*x))[1])
    model = binvit.binarize(lab.build_model(lab.recipe("smoke", depth=1), 10, 8), scheme).train()
    images = torch.randn(4, 3, 8, 8)
    model(images)  # sets the scales
    counts = []
    for least, name in ((0, "oneDNN"), (0, "torch"), (float_products._LARGE, "oneDNN")):
        monkeypatch.setattr(float_products, "_LARGE", least)
        with multiply_by(name):
            model(images).sum().backward()
        counts.append((calls.count("_product"), calls.count("_product_over_rows")))
        calls.clear()
    assert min(counts[0]) >= 4
    assert counts[1:] == [(0, 0), (0, 0)]


@needs_onednn
@pytest.mark.parametrize("scheme", ["gsb", "bivit-head", "xnor"])
def test_a_training_step_is_the_same_up_to_rounding(scheme, monkeypatch):
    monkeypatch.setattr(float_products, "_LARGE", 0)
    steps = []
    for name in LIBRARIES:
        torch.manual_seed(0)
        model = binvit.binarize(lab.build_model(lab.recipe("smoke"), 10, 8), scheme).train()
        with multiply_by(name):
            for _ in range(2):  # the second one is fused
                model.zero_grad()
                model(torch.linspace(-1, 1, 4 * 192).view(4, 3, 8, 8)).logsumexp(1).sum().backward()
        steps.append([p.grad for p in model.parameters() if p.grad is not None])
    for ours, torchs in zip(*steps, strict=True):
        torch.testing.assert_close(ours, torchs, rtol=1e-4, atol=1e-5)


def test_a_result_is_trained_again_by_what_had_trained_it(tmp_path, monkeypatch):
    """In this process and in children; results of before have no such field and were torch's."""
    trials = [lab.Trial("digits", "gsb", seed=s, samples_per_class=4, recipe_options={"epochs": 1}) for s in range(2)]
    with multiply_by("torch"):
        lab.run_trials(trials, tmp_path / "old", progress=False)
    known = [read_result(trial, tmp_path / "old") for trial in trials]
    assert {result.products for result in known} == {"torch"}
    content = known[0].to_dict()
    del content["products"]
    assert type(known[0]).from_dict(content) == known[0]
    chosen = [Archived("04", trial, result, 1.0) for trial, result in zip(trials, known, strict=True)]
    monkeypatch.delenv("BINVIT_PRODUCTS", raising=False)
    table = retrain(chosen, known, tmp_path / "new", progress=False)
    assert set(table["verdict"]) == {"identical"}
    assert {read_result(trial, tmp_path / "new").products for trial in trials} == {"torch"}
    assert write_result(known[0], tmp_path / "again").read_text().count('"products"') == 1
