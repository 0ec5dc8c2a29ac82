"""The fingerprint of a data set: what its images, labels and splits are, wherever they lie."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np

from binvit.files import atomic_write
from binvit.lab.data.folders import visible_files
from binvit.lab.data.images import ImageSet
from binvit.lab.data.sources import Source, locate, read_source

LARGEST_WHOLE = 4 * 2**30  # bytes of images that are hashed whole
SAMPLE = 4096  # images whose content is hashed where there are more bytes
# Where torchvision puts its sets inside the root.
_FOLDERS = {
    "cifar10": "cifar-10-batches-py",
    "cifar100": "cifar-100-python",
    "flowers102": "flowers-102",
    "pets": "oxford-iiit-pet",
    "fashion_mnist": "FashionMNIST",
}


def fingerprint(name: str, root: str | Path | None = None) -> str:
    """Return the fingerprint of a data set; the same images, labels, splits and classes have the same everywhere.

    It is kept in the user's cache folder, by path, size and time of change of every file and by the code that reads.

    Args:
        name: as `load_data` takes it.
        root: folder of the data set, likewise.

    Returns:
        "sha256:" and 32 hexadecimal digits; "sampled:" and 32 digits where the images have more than 4 GiB, of which
        only names, sizes and a fixed sample were hashed.

    Raises:
        ValueError: the name is unknown, or the data are damaged.
        FileNotFoundError: files are missing.
    """
    kind, location = locate(name, root)
    if location is None:
        return _embedded(kind)
    require_present(name, root)
    stamp = _stamp(kind, location)
    known = _read_cache()
    key = f"{kind}:{location.resolve()}"
    if (entry := known.get(key)) and entry[:1] == [stamp]:
        return entry[1]
    found = hash_source(read_source(name, root))
    with suppress(OSError, RuntimeError, ValueError):  # a cache only saves time; there may be no home
        atomic_write(_cache_file(), json.dumps(_read_cache() | {key: [stamp, found]}, indent=1))
    return found


def require_present(name: str, root: str | Path | None = None) -> None:
    """Raise a FileNotFoundError if a data set's files are not there; nothing is downloaded."""
    kind, location = locate(name, root)
    place = location / _FOLDERS[kind] if location is not None and kind in _FOLDERS else location
    if place is not None and not place.exists():
        hint = "; if the archive's data.csv names a command for it, that makes it" if kind == "parquet" else ""
        raise FileNotFoundError(f"{place} (the data set {name}) does not exist{hint}.")


def hash_source(source: Source, largest: int = LARGEST_WHOLE) -> str:
    """Return the fingerprint of images that have been found but not decoded.

    Args:
        source: classes and splits.
        largest: bytes up to which all images are hashed.
    """
    whole = sum(_size(image) for images in source.splits.values() for image in images.images) <= largest
    total = hashlib.sha256(json.dumps(source.classes).encode())
    for split in sorted(source.splits):
        images = source.splits[split]
        total.update(f"{split} {len(images)}".encode() + images.labels.astype("<i8").tobytes())
        for part in _digests(images, whole):
            total.update(part)
    return f"{'sha256' if whole else 'sampled'}:{total.hexdigest()[:32]}"


def _digests(images: ImageSet, whole: bool) -> Iterator[bytes]:
    sample = range(0, len(images), 1 if whole else max(1, len(images) // SAMPLE))
    for index, image in enumerate(images.images):
        if not whole:
            yield f"{image.name if isinstance(image, Path) else ''} {_size(image)}\0".encode(errors="surrogateescape")
        if index in sample:
            content = image.read_bytes() if isinstance(image, Path) else image
            shape = repr(image.shape).encode() if isinstance(image, np.ndarray) else b""
            yield hashlib.sha256(shape + bytes(content)).digest()


def _size(image: bytes | Path | np.ndarray) -> int:
    if isinstance(image, Path):
        return image.stat().st_size
    return image.nbytes if isinstance(image, np.ndarray) else len(image)


@functools.cache
def _embedded(name: str) -> str:
    return hash_source(read_source(name))


@functools.cache
def _code() -> bytes:
    """Return a hash of the modules that decide what files hold; another release may read the same ones differently."""
    here = Path(__file__).parent
    sources = [here.parents[1] / "images.py", *sorted(here.glob("*.py"))]
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).digest()


def _stamp(kind: str, location: Path) -> str:
    """Return a hash of the path, size and times of change of every file of a data set, and of the code that reads."""
    if kind == "parquet":
        files = [location, location.with_name(f"{location.stem}.classes.json")]
    else:
        folder = location / _FOLDERS.get(kind, "")
        files = visible_files(folder)
    total = hashlib.sha256(_code())
    for path in sorted(files):
        with suppress(OSError):
            status = path.stat()
            total.update(
                f"{path.resolve()} {status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}\n".encode(
                    errors="surrogateescape"
                )
            )
    return total.hexdigest()


def _cache_file() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "binvit" / "fingerprints.json"


def _read_cache() -> dict[str, list[str]]:
    try:
        found = json.loads(_cache_file().read_bytes())
    except (OSError, RuntimeError, ValueError):  # RuntimeError: no home folder
        return {}
    return found if isinstance(found, dict) else {}
