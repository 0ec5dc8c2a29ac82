"""Labelled images that stay encoded until somebody looks at them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import psutil
from PIL import Image
from torch.utils.data import Dataset

from binvit.images import open_image, resize_square, stored_size

# Decoded pixels of a whole set are kept only below this size; 512 MB hold CIFAR or 100x100 thumbnails of 17,000 images.
CACHE_BYTES = 512 * 2**20


def check_image_memory(count: int, side: int, item_bytes: int = 1) -> None:
    """Refuse images that this machine's memory cannot hold decoded: the system would end the process without a word.

    Args:
        count: how many are held at once.
        side: pixels of a side.
        item_bytes: bytes of a channel's value.

    Raises:
        ValueError: they are more than the memory.
    """
    needed, memory = count * 3 * side**2 * item_bytes, psutil.virtual_memory().total
    if needed > memory:
        raise ValueError(
            f"{count} images of {side} pixels a side, which are held at once, take at least {needed / 2**30:.1f} GiB, "
            f"more than the {memory / 2**30:.1f} GiB of this machine; give a smaller side with --image-size (the "
            "recipe's image_size)."
        )


class ImageSet(Dataset):
    """Images with labels: a map-style data set of `(RGB image of image_size x image_size, label)`.

    Args:
        images: encoded bytes, paths, or uint8 arrays (H, W) or (H, W, 3); decoded when they are asked for.
        labels: class of each image.
        origin: file or data set the images come from, for error messages.
        rows: row of each image in `origin`; by default 0, 1, 2, ...
        clean_labels: labels before noise was added; by default `labels`.
        image_size: side in pixels of the images that come out; None leaves them as they are stored.
        stored_size: the side, if all images are known to be stored as squares of one size.
    """

    def __init__(
        self,
        images: Sequence[bytes | Path | np.ndarray],
        labels: Sequence[int] | np.ndarray,
        origin: str,
        rows: Sequence[int] | None = None,
        clean_labels: np.ndarray | None = None,
        image_size: int | None = None,
        stored_size: int | None = None,
    ):
        self.images = images
        self.labels = np.asarray(labels, dtype=np.int64)
        self.clean_labels = self.labels if clean_labels is None else np.asarray(clean_labels, dtype=np.int64)
        self.origin = origin
        self.rows = range(len(images)) if rows is None else rows
        self.image_size = image_size
        self.stored_size = stored_size
        self._pixels: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        image = self.open(index)
        return (image if self.image_size is None else resize_square(image, self.image_size)), int(self.labels[index])

    def place(self, index: int) -> str:
        """Say where an image comes from, as errors do."""
        image = self.images[index]
        return str(image) if isinstance(image, Path) else f"in row {self.rows[index]} of {self.origin}"

    def open(self, index: int) -> Image.Image:
        """Decode one image as RGB at its stored size."""
        if self._pixels is not None and self.image_size == self.stored_size:
            return Image.fromarray(self._pixels[index])
        image = self.images[index]
        if isinstance(image, np.ndarray):
            return Image.fromarray(image).convert("RGB")
        return open_image(image, self.place(index))

    def select(self, indices: np.ndarray) -> ImageSet:
        """Return the images at `indices`, in that order."""
        return ImageSet(
            [self.images[i] for i in indices],
            self.labels[indices],
            self.origin,
            [self.rows[i] for i in indices],
            self.clean_labels[indices],
            self.image_size,
            self.stored_size,
        )

    def common_size(self) -> int | None:
        """Read the header of every image and return their side if all are squares of one size, else None.

        Raises:
            ValueError: something is no image.
        """
        sizes = {self._header_size(i) for i in range(len(self))}
        width, height = next(iter(sizes))
        return width if len(sizes) == 1 and width == height else None

    def fits_in_memory(self) -> bool:
        """Return whether the decoded images may be kept: they have one size and take at most half a gigabyte."""
        return self.image_size is not None and len(self) * 3 * self.image_size**2 <= CACHE_BYTES

    def pixels(self) -> np.ndarray:
        """Decode all images once and keep them: uint8 (N, image_size, image_size, 3)."""
        if self._pixels is None:
            side = self.image_size
            if side is None:
                raise ValueError(f"The images of {self.origin} have no common size to be kept decoded in.")
            pixels = np.empty((len(self), side, side, 3), dtype=np.uint8)
            for index in range(len(self)):
                pixels[index] = np.asarray(self[index][0])
            self._pixels = pixels
        return self._pixels

    def _header_size(self, index: int) -> tuple[int, int]:
        image = self.images[index]
        if isinstance(image, np.ndarray):
            return image.shape[1], image.shape[0]
        return stored_size(image, self.place(index))
