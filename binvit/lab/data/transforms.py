"""From images to normalised tensors: one deterministic transform for evaluation, timm's random ones for training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform
from timm.data.auto_augment import posterize

from binvit.config import show
from binvit.images import normalize, resize_square

Transform = Callable[[Image.Image], torch.Tensor]


class Normalize:
    """Resize an RGB image to a square, scale it to 0 to 1 and normalise its channels.

    The same arithmetic as timm's evaluation transform with `crop_pct=1` and bicubic interpolation, bit for bit; unlike
    that one it also takes a whole batch of pixels at once, which makes an epoch of small images cost milliseconds.

    Args:
        image_size: side of the square in pixels.
        mean: subtracted per channel.
        std: divided by, per channel.
    """

    def __init__(self, image_size: int, mean: Sequence[float], std: Sequence[float]):
        self.image_size, self.mean, self.std = image_size, mean, std

    def __call__(self, image: Image.Image) -> torch.Tensor:
        """Transform one image: any RGB image -> float32 (3, image_size, image_size)."""
        return self.batch(np.asarray(resize_square(image, self.image_size))[None])[0]

    def batch(self, pixels: np.ndarray) -> torch.Tensor:
        """Transform pixels that already have the right size: uint8 (B, S, S, 3) -> float32 (B, 3, S, S)."""
        return normalize(pixels, self.mean, self.std)


def eval_transform(image_size: int, mean: Sequence[float], std: Sequence[float]) -> Normalize:
    """Return the transform of evaluation and prediction.

    Args:
        image_size: side in pixels of the model's input.
        mean: of each channel, as in `ImageData.mean`.
        std: of each channel, as in `ImageData.std`.

    Returns:
        A callable: RGB image -> float32 (3, image_size, image_size).
    """
    return Normalize(image_size, mean, std)


def train_transform(
    image_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    auto_augment: str = "",
    erasing: float = 0.0,
    crop: float = 1.0,
    flip: float = 0.0,
    interpolation: str = "bicubic",
) -> Transform:
    """Return the transform of training, random unless every augmentation is off.

    Args:
        image_size: side in pixels of the model's input.
        mean: of each channel, as in `ImageData.mean`.
        std: of each channel, as in `ImageData.std`.
        auto_augment: timm's string, such as "rand-m9-mstd0.5-inc1"; "" is off.
        erasing: probability of erasing a random rectangle.
        crop: smallest area of a random crop as a share of the image, its sides within 3:4 and 4:3; 1 does not crop.
        flip: probability of a horizontal flip.
        interpolation: how crops are resized, "bilinear" or "bicubic".

    Returns:
        A callable: RGB image -> float32 (3, image_size, image_size).

    Raises:
        ValueError: timm does not know the augmentation string.
    """
    if not auto_augment and not erasing and crop == 1 and not flip:
        return Normalize(image_size, mean, std)
    try:
        transform = create_transform(
            image_size,
            is_training=True,
            scale=(crop, 1.0),
            ratio=(3 / 4, 4 / 3) if crop < 1 else (1.0, 1.0),
            hflip=flip,
            color_jitter=None,
            auto_augment=auto_augment or None,
            interpolation=interpolation,
            mean=mean,
            std=std,
            re_prob=erasing,
            re_mode="pixel",  # noise instead of a constant, as DeiT and the released GSB code erase
        )
    except (AssertionError, KeyError, ValueError) as error:
        raise ValueError(f"timm does not know the augmentation {show(auto_augment)} ({show(error)}).") from None
    for step in transform.transforms:
        # RandAugment and AugMix hold a list of operations, AutoAugment a list of lists.
        for op in getattr(step, "ops", None) or chain(*getattr(step, "policy", ())):
            if op.name.startswith("Posterize"):
                op.aug_fn = _posterize
    return transform


def _posterize(image: Image.Image, bits: int, **options: object) -> Image.Image:
    """Keep the leading bits of every channel; none leaves black, which Pillow 13 refuses and timm still asks for."""
    return posterize(image, bits, **options) if bits > 0 else Image.new(image.mode, image.size)
