"""A model's dependence on the company of an image is found where it is, and only there."""

import numpy as np
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

import binvit
from binvit.lab.analysis.batches import batch_dependence


def float_model() -> torch.nn.Module:
    torch.manual_seed(0)
    shape = {"img_size": 8, "patch_size": 2, "num_classes": 10, "embed_dim": 16, "depth": 2, "num_heads": 2}
    return binvit.binarize(VisionTransformer(**shape), "float").eval()


def images(count: int) -> torch.Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def test_only_maxima_over_the_batch_make_images_depend_on_each_other():
    def binary(reduce: str) -> torch.nn.Module:
        scheme = binvit.scheme("gsb", reduce=reduce)
        return binvit.calibrate(binvit.binarize(float_model(), scheme), images(32)).train()

    model = binary("row")
    alone = batch_dependence(model, images(32), batch_size=4)
    assert alone == {"largest_change": 0.0, "flipped": 0.0, "images": 32}
    assert model.training
    together = batch_dependence(binary("batch"), images(34), batch_size=4)
    assert together["largest_change"] > 1e-3
    assert together["images"] == 32


def test_flipped_predictions_are_counted():
    class BatchMean(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            score = (x - x.mean()).flatten(1).sum(1)
            return torch.stack([score, torch.zeros_like(score)], 1)

    x = torch.arange(4.0).view(4, 1, 1, 1)
    for seed in range(4):
        order = np.random.default_rng(seed).permutation(4)
        pairs = {frozenset(order[:2].tolist()), frozenset(order[2:].tolist())}
        found = batch_dependence(BatchMean(), x, batch_size=2, seed=seed)
        same = pairs == {frozenset({0, 1}), frozenset({2, 3})}
        assert (found["largest_change"] == 0) == same
        assert found["flipped"] == (0.0 if same else 0.5)


@pytest.mark.parametrize(("count", "size"), [(3, 2), (4, 0), (0, 1)])
def test_too_few_images_cannot_change_their_company(count, size):
    with pytest.raises(ValueError, match="Two batches"):
        batch_dependence(float_model(), images(8)[:count], batch_size=size)
