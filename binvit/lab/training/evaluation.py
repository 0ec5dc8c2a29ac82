"""Evaluation: the classes that a model gives to images, on bits where that is the same and faster."""

from collections.abc import Callable
from typing import cast

import numpy as np
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from binvit.lab.data.loader import Batches
from binvit.lab.training.devices import Team
from binvit.packed import pack

Classifier = Callable[[Tensor], Tensor]


def on_bits(model: VisionTransformer) -> Classifier:
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
    return model if packed.reason else cast(Classifier, packed)  # tensors give tensors


@torch.inference_mode()
def classify(model: Classifier, images: Batches, team: Team | None = None) -> np.ndarray:
    """Return the class a model gives to each image; the model ends in the mode it came in.

    Several processes share the batches, and each returns all classes.

    Args:
        model: images (B, 3, H, W) -> logits (B, classes).
        images: the images in order.
        team: where the model is; None means this process and the CPU.

    Returns:
        Classes, int64 (N,).
    """
    module = model if isinstance(model, nn.Module) else nn.Identity()
    training = module.training
    module.eval()
    team = team or Team("cpu")
    batches = images if team.size == 1 else images.epoch(0, team.rank, team.size)
    own = [model(batch.to(team.device)).argmax(1).cpu() for batch, _, _ in batches]
    module.train(training)
    shares = team.collect(own)
    return torch.cat([shares[step % team.size][step // team.size] for step in range(len(images))]).numpy()
