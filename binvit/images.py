"""One image on its way into a model: decoded, resized, cut, normalized; training and packed models do it alike."""

from __future__ import annotations

import errno
import io
import os
import stat
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms import functional as TF

from binvit.files import plain_path

Source = Image.Image | str | Path | bytes | np.ndarray
"""One image: decoded, a file, the bytes of a file, or pixels."""
_one_at_a_time = threading.Lock()
_LARGEST = 2**26  # pixels of an image that is resized as a whole
_MODES = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


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
        ValueError: it is something else, or the path holds a NUL byte.
    """
    try:
        mode = os.stat(plain_path(path)).st_mode
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG):
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
        The decoded image; grayscale and palette images are converted, transparency is dropped. 16-bit images keep
        their eight high bits; floats and longer integers are scaled from [0, 1] (floats) or [0, 255] if they lie
        within, else from their own smallest to their own largest value.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the bytes are no image that Pillow can decode, or the file is no regular one.
    """
    with _opened(source, place or ("given as bytes" if isinstance(source, bytes) else str(source))) as image:
        return _upright(image)


def _upright(image: Image.Image) -> Image.Image:
    image.load()
    kind = image.format  # which a copy has not
    with suppress(Exception):  # damaged notes about the camera do not make a damaged image
        image = ImageOps.exif_transpose(image)
    return _rgb(image, kind)


def resize_square(image: Image.Image, size: int) -> Image.Image:
    """Resize the short side to `size` (bicubic) and cut the centre square."""
    return resize_and_cut(image, (size, size))


def resize_and_cut(
    image: Image.Image, size: tuple[int, int], resize: int | None = None, interpolation: str = "bicubic"
) -> Image.Image:
    """Resize an image so that it just covers a size or more, and cut out the centre.

    Args:
        image: any image.
        size: height and width of what is cut out.
        resize: what the short side of `size` is enlarged to, and the other side with it, before it is covered; by
            default `size` itself is covered.
        interpolation: "bilinear" or "bicubic".
    """
    height, width = size
    if image.size == (width, height) and resize in (None, min(size)):
        return image
    if resize is not None:
        height, width = (int(side * resize / min(size)) for side in size)
    if image.width * height <= image.height * width:
        width, height = width, int(width * image.height / image.width)
    else:
        width, height = int(height * image.width / image.height), height
    if width * height > _LARGEST:  # a thin image: what would be cut off is not made
        x, y = image.width / width, image.height / height
        left, top = (width - size[1]) // 2, (height - size[0]) // 2
        box = (left * x, top * y, min(image.width, (left + size[1]) * x), min(image.height, (top + size[0]) * y))
        return image.resize((size[1], size[0]), _MODES[interpolation], box)
    if image.size != (width, height):
        image = image.resize((width, height), _MODES[interpolation])
    return TF.center_crop(image, list(size))


def normalize(pixels: np.ndarray, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Scale pixels to 0 to 1 and normalize their channels: uint8 (B, H, W, C) -> float32 (B, C, H, W)."""
    values = torch.tensor(pixels, device="cpu").permute(0, 3, 1, 2).contiguous().to(torch.float32)
    center, spread = (torch.tensor(x, dtype=torch.float32, device="cpu").view(-1, 1, 1) for x in (mean, std))
    return values.div_(255).sub_(center).div_(spread)


def to_pixels(
    source: Source, channels: int, size: tuple[int, int], resize: int | None = None, interpolation: str = "bicubic"
) -> np.ndarray:
    """Decode, resize and cut one image.

    Args:
        source: an image, its path, its encoded bytes, or uint8 (H, W) or (H, W, 3).
        channels: 3 for RGB, 1 for grey.
        size: as for `resize_and_cut`.
        resize: as for `resize_and_cut`.
        interpolation: as for `resize_and_cut`.

    Returns:
        uint8 (*size, channels).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no image.
    """
    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or source.shape[2:] not in ((), (3,)) or source.ndim < 2 or not source.size:
            raise ValueError(
                "An image must be a PIL image, a path, encoded bytes, or a uint8 array of shape (H, W) or (H, W, 3), "
                f"got {source.dtype} of shape {source.shape}."
            )
        image = Image.fromarray(np.ascontiguousarray(source)).convert("RGB")
    elif isinstance(source, Image.Image):
        if not (source.width and source.height):
            raise ValueError(f"An image must have pixels, got one of {source.width} x {source.height}.")
        with _told("given"):
            image = _upright(source)
    elif isinstance(source, str | Path | bytes):
        image = open_image(source)
    else:
        raise ValueError(
            f"An image must be a PIL image, a path, encoded bytes, or a uint8 array, got {type(source).__name__}."
        )
    image = resize_and_cut(image, size, resize, interpolation)
    return np.asarray(image if channels == 3 else image.convert("L")).reshape(*size, channels)


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
    with _told(place):
        with _one_at_a_time, warnings.catch_warnings():  # which changes the filters of all threads
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # it names no file; Pillow refuses more
            image = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)
        with image:
            yield image


@contextmanager
def _told(place: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # Pillow's decoders raise almost anything on damaged bytes
        # The system's own: a disk, a limit, a permission. But a damaged file may send its decoder to before its start.
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise
        raise ValueError(f"The image {place} cannot be decoded ({_first_line(error)}).") from None


def _rgb(image: Image.Image, kind: str | None) -> Image.Image:
    if image.mode == "F" or image.mode.startswith("I"):  # convert() would clip to 0 and 255
        image = Image.fromarray(_to_bytes(np.asarray(image), image.mode == "I" and kind in ("PNG", "PPM")))
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
