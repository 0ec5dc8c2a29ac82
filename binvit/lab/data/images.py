"""Labelled images that stay encoded until somebody looks at them."""

from __future__ import annotations

import errno
import io
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from torch.utils.data import Dataset
from torchvision.transforms import functional as TF
from torchvision.transforms.functional import InterpolationMode

# Decoded pixels of a whole set are kept only below this size; 512 MB hold CIFAR or 100x100 thumbnails of 17,000 images.
CACHE_BYTES = 512 * 2**20


# What photographs are stored as; Pillow reads most, .heic only with a plugin, raw files of cameras never.
_NAMES = """
    apng arw avif bmp cr2 cr3 dib dng gif heic heif jfif jp2 jpe jpeg jpg jxl nef orf pbm pfm pgm png pnm ppm raf rw2
    svg tga tif tiff webp
"""
SUFFIXES = frozenset(f".{name}" for name in _NAMES.split())


def is_readable(path: Path) -> bool:
    """Return whether a file's name ends as the images do that this machine's Pillow can decode."""
    suffix = path.suffix.lower()
    return suffix in SUFFIXES and Image.registered_extensions().get(suffix) in Image.OPEN


def require_regular(path: Path, what: str) -> Path:
    """Return a path that leads to a regular file; to open a pipe or a device could take for ever.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is something else.
    """
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            raise
        raise FileNotFoundError(f"The {what} {path} does not exist.") from None
    if not stat.S_ISREG(mode):
        raise ValueError(f"The {what} {path} is no regular file.")
    return path


def open_image(source: str | Path | bytes, place: str | None = None) -> Image.Image:
    """Decode one image file, or its bytes, as RGB, turned as the camera was held (EXIF orientation).

    Args:
        source: path of the file, or the encoded bytes.
        place: what an error calls the image, by default its path.

    Returns:
        the decoded image; grayscale and palette images are converted, transparency is dropped. 16-bit images keep
        their eight high bits; floats and longer integers are scaled from [0, 1] (floats) or [0, 255] if they lie
        within, else from their own smallest to their own largest value.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the bytes are no image that Pillow can decode, or the file is no regular one.
    """
    with _opened(source, place or ("given as bytes" if isinstance(source, bytes) else str(source))) as image:
        image.load()
        with suppress(Exception):  # damaged notes about the camera do not make a damaged image
            ImageOps.exif_transpose(image, in_place=True)
        return _rgb(image)


def resize_square(image: Image.Image, size: int) -> Image.Image:
    """Resize the short side to `size` (bicubic) and cut the centre square."""
    if image.size == (size, size):
        return image
    return TF.center_crop(TF.resize(image, size, InterpolationMode.BICUBIC), [size, size])


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
        """Whether the decoded images may be kept: they have one size and take at most half a gigabyte."""
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


def stored_size(source: str | Path | bytes, place: str) -> tuple[int, int]:
    """Return width and height from an image's header.

    Raises:
        FileNotFoundError, ValueError: as `open_image` does.
    """
    with _opened(source, place) as image:
        return image.size


@contextmanager
def _opened(source: str | Path | bytes, place: str) -> Iterator[Image.Image]:
    """Open an image, and tell what is wrong with it, then and while it is decoded, in one sentence."""
    if not isinstance(source, bytes):
        require_regular(Path(source), "image")
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            yield image
    except Exception as error:  # Pillow's decoders raise almost anything on damaged bytes
        if isinstance(error, OSError) and error.errno is not None:  # the system's own: a disk, a limit, a permission
            raise
        raise ValueError(f"The image {place} cannot be decoded ({_first_line(error)}).") from None


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F" or image.mode.startswith("I"):  # convert() would clip to 0 and 255
        image = Image.fromarray(_to_bytes(np.asarray(image), image.mode == "I" and image.format in ("PNG", "PPM")))
    if image.mode == "P" and "transparency" in image.info:  # converted directly, Pillow warns
        image = image.convert("RGBA")
    return image.convert("RGB")


def _to_bytes(values: np.ndarray, widened: bool) -> np.ndarray:
    """Scale gray values to uint8; `widened` says that Pillow keeps 16 bits of the file in more."""
    if widened or values.dtype.itemsize == 2:
        return (values >> 8).astype(np.uint8)
    wide = values.astype(np.float64)
    finite = wide[np.isfinite(wide)]
    low, high = (finite.min(), finite.max()) if finite.size else (0.0, 1.0)
    if low >= 0 and high <= 255:
        low, high = 0.0, 1.0 if high <= 1 and values.dtype.kind == "f" else 255.0
    scaled = (np.nan_to_num(wide, nan=low, posinf=high, neginf=low) - low) / max(high - low, np.finfo(np.float64).tiny)
    return np.rint(255 * scaled).astype(np.uint8)


def _first_line(error: Exception) -> str:
    text = str(error).split("\n")[0]
    # Pillow names the address of the buffer, which says nothing and differs from run to run.
    return "not an image" if "cannot identify image file" in text else text or type(error).__name__
