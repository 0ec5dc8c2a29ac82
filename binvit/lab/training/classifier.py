"""A model ready for pictures: what a picture needs before it, and the names of the classes after it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL.Image import Image
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from binvit.images import resize_square
from binvit.lab.data.transforms import eval_transform
from binvit.packed import PackedViT


@dataclass(frozen=True)
class Classifier:
    """A model in evaluation mode with everything that pictures need on their way through it.

    Args:
        model: images float32 (B, 3, S, S) -> logits (B, classes); a timm model, binarized or not, or its packed form.
        classes: one name per class.
        image_size: pixels S of an image's side.
        mean: three channel means, for images from 0 to 1.
        std: three channel standard deviations.
    """

    model: VisionTransformer | PackedViT
    classes: Sequence[str]
    image_size: int
    mean: Sequence[float]
    std: Sequence[float]

    def tensor(self, pictures: Sequence[Image]) -> Tensor:
        """Turn RGB pictures into the model's input, float32 (B, 3, S, S)."""
        if isinstance(self.model, PackedViT):
            return self.model.preprocess(pictures)
        transform = eval_transform(self.image_size, self.mean, self.std)
        return transform.batch(np.stack([np.asarray(resize_square(picture, self.image_size)) for picture in pictures]))

    @torch.inference_mode()
    def probabilities(self, pictures: Sequence[Image]) -> Tensor:
        """Return how likely the model finds each class, float32 (B, classes)."""
        return self.model(self.tensor(pictures)).softmax(dim=1)

    @property
    def reads_batches(self) -> bool:
        """Whether what the model sees in a picture depends on the others of its batch."""
        owner = self.model if hasattr(self.model, "scheme") else getattr(self.model, "blueprint", None)
        scheme = getattr(owner, "scheme", None)
        return scheme is not None and scheme.name != "float" and scheme.reduce == "batch"

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches of a model that is not packed."""
        return tuple(self.model.patch_embed.grid_size)
