import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from timm.data import create_transform

from binvit.lab.data.transforms import Normalize, eval_transform, train_transform

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


def picture(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@settings(max_examples=40, deadline=None)
@given(width=st.integers(3, 40), height=st.integers(3, 40), size=st.integers(2, 24))
def test_evaluation_is_timms_bit_for_bit(width, height, size):
    expected = create_transform(size, crop_pct=1.0, interpolation="bicubic", mean=MEAN, std=STD)
    image = picture(width, height)
    result = eval_transform(size, MEAN, STD)(image)
    assert result.shape == (3, size, size)
    assert result.dtype == torch.float32
    assert torch.equal(result, expected(image))


def test_a_batch_of_pixels_is_what_single_images_give():
    transform = Normalize(8, MEAN, STD)
    images = [picture(8, 8, seed) for seed in range(5)]
    pixels = np.stack([np.asarray(image) for image in images])
    untouched = pixels.copy()
    assert torch.equal(transform.batch(pixels), torch.stack([transform(image) for image in images]))
    np.testing.assert_array_equal(pixels, untouched)


def test_training_without_augmentation_is_evaluation():
    image = picture(12, 9)
    assert torch.equal(train_transform(8, MEAN, STD)(image), eval_transform(8, MEAN, STD)(image))


@pytest.mark.parametrize(
    "options", [{"flip": 0.5}, {"crop": 0.3}, {"erasing": 0.9}, {"auto_augment": "rand-m9-mstd0.5"}]
)
def test_each_augmentation_changes_images_at_random(options):
    transform, image = train_transform(16, MEAN, STD, **options), picture(16, 16)
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    torch.manual_seed(0)
    results = [transform(image) for _ in range(12)]
    assert all(result.shape == (3, 16, 16) and result.isfinite().all() for result in results)
    assert any(not torch.equal(result, results[0]) for result in results)


def test_flipping_alone_neither_crops_nor_resizes():
    transform, image = train_transform(16, MEAN, STD, flip=1.0), picture(16, 16)
    assert torch.equal(transform(image), eval_transform(16, MEAN, STD)(image).flip(2))


@pytest.mark.parametrize("auto_augment", ["rand-m10-inc1", "rand-m9-mstd0.5-inc1", "original", "v0", "augmix-m5"])
def test_strongest_magnitudes_work_with_every_pillow(auto_augment):
    # Posterizing to no bits at all, which magnitude 10 means, is an error in Pillow 13.
    transform, image = train_transform(8, MEAN, STD, auto_augment=auto_augment), picture(8, 8)
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    for _ in range(300):
        assert transform(image).isfinite().all()


@pytest.mark.parametrize("auto_augment", ["rand-x9", "nonsense"])
def test_unknown_augmentation_gets_one_sentence(auto_augment):
    with pytest.raises(ValueError, match=f"timm does not know the augmentation '{auto_augment}'"):
        train_transform(8, MEAN, STD, auto_augment=auto_augment)
