"""Evaluation: the classes that a model gives to images, on bits where that is as good and faster, and to pictures."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from PIL.Image import Image
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from binvit.images import normalize, to_pixels
from binvit.lab.data.loader import Batches
from binvit.lab.training.devices import Team
from binvit.packed import PackedViT, pack

Network = Callable[[Tensor], Tensor]


def on_bits(model: VisionTransformer) -> Network:
    """Return the packed form of a model if it has a fast one, else the model itself.

    The packed form gives the same classes several times as fast, and says so in its own tests. It reads nothing but the
    model's tensors: a model whose hooks or replaced methods change what it computes must not come here.

    Args:
        model: any model; only binarized ones on a CPU have a packed form.
    """
    if getattr(model, "scheme", None) is None or next(model.parameters()).device.type != "cpu":
        return model
    if model.scheme.reduce == "batch":  # the fast form would take single images only
        return model
    try:
        packed = pack(model)
    except ValueError:  # parts that stay float in this stage, or scales without a value yet
        return model
    return model if packed.reason else cast(Network, packed)  # tensors give tensors


class LogitsNotFinite(ValueError):
    """A model gives logits that are infinite or not numbers, which have no largest."""


@torch.inference_mode()
def classify(model: Network, images: Batches, team: Team | None = None) -> np.ndarray:
    """Return the class a model gives to each image; the model ends in the mode it came in.

    Several processes share the batches, and each returns all classes.

    Args:
        model: images (B, 3, H, W) -> logits (B, classes).
        images: the images in order.
        team: where the model is; None means this process and the CPU.

    Returns:
        Classes, int64 (N,).

    Raises:
        LogitsNotFinite: in every process, if some logits of an image are not finite.
    """
    module = model if isinstance(model, nn.Module) else nn.Identity()
    training = module.training
    module.eval()
    team = team or Team("cpu")
    batches = images if team.size == 1 else images.epoch(0, team.rank, team.size)
    own = [_largest(model(batch.to(team.device))).cpu() for batch, _, _ in batches]
    module.train(training)
    shares = team.collect(own)
    classes = torch.cat([shares[step % team.size][step // team.size] for step in range(len(images))]).numpy()
    if unknown := int((classes < 0).sum()):
        raise LogitsNotFinite(f"The model's logits are not finite for {unknown} of {len(classes)} images.")
    return classes


def _largest(logits: Tensor) -> Tensor:
    """Return the class of each row of logits, -1 where they are not finite."""
    return torch.where(logits.isfinite().all(1), logits.argmax(1), -1)


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

    model: Any
    classes: Sequence[str]
    image_size: int
    mean: Sequence[float]
    std: Sequence[float]

    def tensor(self, pictures: Sequence[Image]) -> Tensor:
        """Turn RGB pictures into the model's input, float32 (B, 3, S, S)."""
        size, resize, interpolation = (self.image_size, self.image_size), None, "bicubic"
        if isinstance(self.model, PackedViT):  # it may read oblong images, or more of a picture than its centre square
            plan = self.model.blueprint
            size, resize, interpolation = plan.vit.img_size, plan.resize, plan.interpolation
        pixels = [to_pixels(picture, len(self.mean), size, resize, interpolation) for picture in pictures]
        return normalize(np.stack(pixels), self.mean, self.std)

    def probabilities(self, pictures: Sequence[Image]) -> Tensor:
        """Return how likely the model finds each class, float32 (B, classes)."""
        return self.from_tensor(self.tensor(pictures))

    @torch.inference_mode()
    def from_tensor(self, images: Tensor) -> Tensor:
        """Return how likely the model finds each class of what `tensor` has made, float32 (B, classes)."""
        return self.model(images).softmax(dim=1)

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
