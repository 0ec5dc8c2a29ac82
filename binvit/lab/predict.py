"""Predictions of a kept model for image files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from binvit.lab.checkpoint import load_checkpoint
from binvit.lab.images import open_image
from binvit.lab.transforms import eval_transform

__all__ = ["image_files", "predict_files"]

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm")


def image_files(path: Path) -> list[Path]:
    """Return the image itself, or all images of a folder and the folders in it, sorted by name.

    Raises:
        FileNotFoundError: there is no such file or folder, or no image in it.
    """
    if path.is_dir():
        found = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
        if not found:
            raise FileNotFoundError(f"The folder {path} holds no image ({', '.join(SUFFIXES)}).")
        return found
    if not path.is_file():
        raise FileNotFoundError(f"There is no image or folder {path}.")
    return [path]


@torch.inference_mode()
def predict_files(model: Path, images: Iterable[Path], top: int = 1) -> Iterator[tuple[Path, list[tuple[str, float]]]]:
    """Predict the classes of image files with a model that `binvit train` has kept.

    Each image is a batch of its own, so that its neighbours cannot change what a batch-dependent scheme sees in it.

    Args:
        model: the checkpoint.
        images: the files.
        top: how many classes to return per image, likeliest first.

    Yields:
        The file, and pairs of class name and probability.

    Raises:
        FileNotFoundError: the checkpoint or an image is missing.
        ValueError: the checkpoint or an image cannot be read.
    """
    network, info = load_checkpoint(model)
    transform = eval_transform(info.image_size, info.mean, info.std)
    for path in images:
        logits = network(transform(open_image(path))[None])  # (1, classes)
        probabilities, classes = logits.softmax(dim=-1)[0].topk(min(top, len(info.classes)))
        yield path, [(info.classes[i], p) for i, p in zip(classes.tolist(), probabilities.tolist(), strict=True)]
