"""Training under autocast: binarized products stay exact, and no scheme mixes types."""

import pytest
import torch
from nn_helpers import images, tiny_vit
from torch.overrides import _get_current_function_mode_stack

import binvit
from binvit.nn import products
from binvit.nn.precision import full_precision, on_cpu
from binvit.nn.rules import Sign


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", binvit.list_schemes())
def test_every_scheme_trains_under_autocast(name, kind):
    model, x = binvit.calibrate(binvit.binarize(tiny_vit(), name), images(4)), images(3, seed=1)
    model.train()
    with torch.autocast("cpu", dtype=kind):
        y = model(x)
        loss = y.float().square().sum()
    loss.backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert len(gradients) > 20
    assert all(gradient.dtype == torch.float32 and gradient.isfinite().all() for gradient in gradients)
    (model(x).square().sum()).backward()
    with torch.autocast("cpu", dtype=kind):
        model(x).float().sum().backward()  # a backward pass inside the context, too


def test_a_device_context_surrounds_packed_models_only_where_the_caller_has_another_device():
    """Such a context leads every call of torch through Python, a twentieth of a prediction's time."""
    with on_cpu():
        assert not _get_current_function_mode_stack()
        assert torch.empty(1).device.type == "cpu"
    with torch.device("meta"), on_cpu():
        assert torch.empty(1).device.type == "cpu"
    with torch.device("meta"):
        assert torch.empty(1).device.type == "meta"


def test_products_of_signs_stay_exact_integers_under_autocast():
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(shape, generator=generator) for shape in ((7, 999), (5, 999)))
    expected = products.binary_product(x, w, Sign(), Sign())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        product = products.binary_product(x, w, Sign(), Sign())
        assert (x @ w.mT).dtype == torch.bfloat16
    assert torch.equal(product, expected)


def test_arguments_are_widened_inside_autocast_only():
    half, double = torch.ones(2, dtype=torch.float16), torch.ones(2, dtype=torch.float64)

    @full_precision
    def kinds(x, others, *, last):
        return [x.dtype, *(other.dtype for other in others), last.dtype, torch.is_autocast_enabled("cpu")]

    assert kinds(half, [half, double], last=half) == [torch.float16, torch.float16, torch.float64, torch.float16, False]
    with torch.autocast("cpu"):
        widened = kinds(half, (half, double), last=half)
        assert torch.is_autocast_enabled("cpu")
    assert widened == [torch.float32, torch.float32, torch.float64, torch.float32, False]
