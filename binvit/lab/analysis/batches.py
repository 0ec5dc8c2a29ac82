"""How far what a model says of an image hangs on the images beside it."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn


@torch.inference_mode()
def batch_dependence(model: nn.Module, images: Tensor, batch_size: int = 32, seed: int = 0) -> dict[str, float]:
    """Measure how much an image's logits depend on which other images share its batch.

    Args:
        model: images (B, 3, H, W) -> logits; evaluated in evaluation mode and left in the mode it came in.
        images: the model's input, (N, 3, H, W).
        batch_size: images of a batch; the same in both compositions, so that nothing but the company changes.
        seed: decides the second composition; the first is the given order.

    Returns:
        "largest_change" of a logit, "flipped", the share of predictions that change, and "images", their number.

    Raises:
        ValueError: there are not enough images for two batches, so that no composition could change.
    """
    count = len(images) // batch_size * batch_size if batch_size > 0 else 0
    if count < 2 * batch_size or batch_size < 1:
        raise ValueError(
            f"Two batches of at least one image are needed to change a batch's composition, and {len(images)} images "
            f"in batches of {batch_size} came."
        )
    images, training = images[:count], model.training
    order = torch.from_numpy(np.random.default_rng(seed).permutation(count)).to(images.device)
    model.eval()
    first = torch.cat([model(batch) for batch in images.split(batch_size)])
    second = torch.empty_like(first)
    second[order] = torch.cat([model(batch) for batch in images[order].split(batch_size)])
    model.train(training)
    flipped = (first.argmax(1) != second.argmax(1)).double().mean()
    return {"largest_change": float((first - second).abs().max()), "flipped": float(flipped), "images": count}
