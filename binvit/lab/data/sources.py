"""Where images come from: every data set that `load_data` knows, each read by one small function."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from binvit.config import show
from binvit.files import is_shortage, made_folders, plain_path, remove_leftovers, temporary_folder
from binvit.images import require_regular
from binvit.lab.data.folders import read_folder
from binvit.lab.data.images import ImageSet
from binvit.lab.data.parquet import read_parquet
from binvit.lab.data.splits import Source, Statistics, checked_labels, finished, read_json_file

IMAGENET: Statistics = (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
CIFAR10: Statistics = ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
CIFAR100: Statistics = ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))
FASHION: Statistics = ((0.2860,) * 3, (0.3530,) * 3)


def _wanted(test: bool) -> tuple[str, ...]:
    return ("train", "test") if test else ("train",)


def _source(
    classes: list[str], splits: dict[str, ImageSet], image_size: int, statistics: Statistics | None = None
) -> Source:
    """Make a source of a data set that has test images, even if they were not read."""
    splits.setdefault("test", ImageSet([], [], splits["train"].origin))
    return Source(classes, splits, image_size, statistics)


def _digits(location: Path | None, test: bool) -> Source:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    # One split for everybody: results of different seeds are compared on the same 719 test images.
    parts = train_test_split(np.arange(len(digits.target)), test_size=0.4, stratify=digits.target, random_state=1)
    splits = {}
    for name, rows in zip(_wanted(test), parts, strict=test):
        images = np.rint(digits.images[rows] * (255 / 16)).astype(np.uint8)  # sixteen gray levels, 8x8
        splits[name] = ImageSet(list(images), digits.target[rows], "digits", rows.tolist(), stored_size=8)
    return _source([str(digit) for digit in range(10)], splits, 8)


def _cifar10(location: Path, test: bool) -> Source:
    return _cifar("CIFAR10", location, CIFAR10, test)


def _cifar100(location: Path, test: bool) -> Source:
    return _cifar("CIFAR100", location, CIFAR100, test)


def _cifar(name: str, location: Path, statistics: Statistics, test: bool) -> Source:
    parts = {split: _torchvision(name, location, train=split == "train") for split in _wanted(test)}
    splits = {split: ImageSet(list(part.data), part.targets, name, stored_size=32) for split, part in parts.items()}
    return _source(list(parts["train"].classes), splits, 32, statistics)


def _fashion_mnist(location: Path, test: bool) -> Source:
    parts = {split: _torchvision("FashionMNIST", location, train=split == "train") for split in _wanted(test)}
    splits = {
        split: ImageSet(list(part.data.numpy()), part.targets.numpy(), "FashionMNIST", stored_size=28)
        for split, part in parts.items()
    }
    return _source(list(parts["train"].classes), splits, 28, FASHION)


def _flowers102(location: Path, test: bool) -> Source:
    splits = {}
    for split in ("train", "val", "test") if test else ("train", "val"):
        part = _torchvision("Flowers102", location, split=split)
        splits[split] = ImageSet(part._image_files, part._labels, "Flowers102")
    return _source(list(part.classes), splits, 224, IMAGENET)


def _pets(location: Path, test: bool) -> Source:
    splits = {}
    for split in _wanted(test):
        part = _torchvision("OxfordIIITPet", location, split={"train": "trainval"}.get(split, split))
        splits[split] = ImageSet(part._images, part._labels, "OxfordIIITPet")
    return _source(list(part.classes), splits, 224, IMAGENET)


def _torchvision(name: str, location: Path, **options: object) -> Any:
    """Open one of torchvision's data sets, downloading it if `location` does not hold it."""
    from torchvision import datasets

    build = getattr(datasets, name)
    try:
        return build(location, **options)
    except (RuntimeError, FileNotFoundError):  # absent or damaged; what the system refuses to read may be complete
        _download(build, name, location, options)
    return build(location, **options)


def _download(build: Callable[..., Any], name: str, location: Path, options: dict[str, object]) -> None:
    """Download into a hidden folder first, so that an interrupted or a second download leaves nothing half-written."""
    timeout = socket.getdefaulttimeout()
    try:
        with made_folders(location):
            remove_leftovers(location)
            with temporary_folder(location, "download") as folder:
                socket.setdefaulttimeout(30)  # torchvision sets none and would wait forever behind a silent firewall
                build(folder, download=True, **options)
                _move(folder, location)
    except Exception as error:  # urllib, tarfile and torchvision's integrity checks raise many kinds
        if is_shortage(error):
            raise
        reason = str(error).split("\n")[0].rstrip(": ") or type(error).__name__
        raise FileNotFoundError(f"{location} does not hold {name} and it cannot be downloaded ({reason}).") from None
    finally:
        socket.setdefaulttimeout(timeout)


def _move(folder: Path, target: Path) -> None:
    """Move file by file into folders that may be there already, of which nothing is deleted or changed."""
    for path in sorted(folder.rglob("*")):
        place = target / path.relative_to(folder)
        if path.is_dir():
            place.mkdir(exist_ok=True)
        else:
            os.replace(path, place)


def _chaoyang(location: Path, test: bool) -> Source:
    """Read the folder of Zhu et al., Hard Sample Aware Noise Robust Learning, IEEE TMI 2021."""
    classes = ["normal", "serrated", "adenocarcinoma", "adenoma"]
    splits = {}
    for split in _wanted(test):
        path = require_regular(location / f"{split}.json", "Chaoyang list of images")
        entries = read_json_file(path)
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise ValueError(f'{path} must be a list of {{"name": ..., "label": ...}}.')
        for row, entry in enumerate(entries):
            missing = [key for key in ("name", "label") if key not in entry]
            if missing:
                raise ValueError(f'Entry {row} of {path} lacks "{missing[0]}"; it has {show(sorted(entry))}.')
        images = [_inside(location, entry["name"], row, path) for row, entry in enumerate(entries)]
        labels = checked_labels([entry["label"] for entry in entries], len(classes), str(path))
        for row, image in enumerate(images):
            require_regular(image, f"image that entry {row} of {path} names,")
        splits[split] = ImageSet(images, labels, str(path))
    return _source(classes, splits, 224, IMAGENET)


def _inside(folder: Path, name: object, row: int, origin: Path) -> Path:
    """Join a path named by a file to its folder, refusing any that leaves it or cannot be printed."""
    path = os.path.normpath(name) if isinstance(name, str) and name.isprintable() and name else ".."
    if os.path.isabs(path) or path.split(os.sep)[0] == "..":
        raise ValueError(f"Entry {row} of {origin} names {show(name)}, which is no path inside {folder}.")
    return folder / path


SOURCES: dict[str, Callable[..., Source]] = {
    "digits": _digits,
    "cifar10": _cifar10,
    "cifar100": _cifar100,
    "flowers102": _flowers102,
    "pets": _pets,
    "fashion_mnist": _fashion_mnist,
    "chaoyang": _chaoyang,
    "folder": read_folder,
    "parquet": read_parquet,
}

EMBEDDED = ("digits",)
"""Those that come with a package and are always there."""

_NEEDS = {
    "chaoyang": "root=FOLDER, the official folder with train.json and test.json",
    "folder": "a path: folder:PATH, with PATH/train/CLASS/IMAGE inside",
    "parquet": "a path: parquet:FILE, with the columns image, label and, if the images are divided already, split",
}


def split_name(name: Any) -> tuple[str, str]:
    """Return the kind of a data set and the path behind the colon, which may be empty.

    Args:
        name: what `load_data` takes.

    Raises:
        ValueError: it is no such name.
    """
    kind, colon, path = name.partition(":") if isinstance(name, str) else ("", "", "")
    if kind not in SOURCES or (colon and (not path or kind in EMBEDDED)):
        valid = ", ".join(f"{known}:PATH" if known in ("folder", "parquet") else known for known in SOURCES)
        raise ValueError(f"Unknown data set {show(name)}; valid names are {valid}.")
    return kind, path


def data_name(dataset: str) -> str:
    """Return the name of a data set without its place: "parquet:data/flowers102_64px.parquet" is flowers102_64px.

    Official sets have their own name wherever they lie, which no file or folder of that name shares: it is another set.
    """
    kind, path = split_name(dataset)
    if kind not in ("folder", "parquet"):
        return kind
    name = Path(path).stem
    return f"{kind}-{name}" if name in EMBEDDED else name


def expanded(path: str | Path) -> Path:
    """Return a path with `~` and environment variables replaced.

    Raises:
        ValueError: it holds a NUL byte, which no system takes.
    """
    return Path(os.path.expandvars(os.path.expanduser(plain_path(path))))


def locate(name: str, root: str | Path | None) -> tuple[str, Path | None]:
    """Return the kind of a data set and where it lies."""
    kind, path = split_name(name)
    if kind in EMBEDDED:
        return kind, None
    given = [expanded(part) for part in (root, path) if part not in (None, "")]
    location = Path(*given) if given else None
    if location is None:
        needs = _NEEDS.get(kind, "root=FOLDER, the folder that holds it or that it shall be downloaded to")
        raise ValueError(f"The data set {kind} needs {needs}.")
    return kind, location


def require_files(name: str, root: str | Path | None = None) -> None:
    """Refuse a data set whose files are missing and cannot be downloaded, without reading it.

    Raises:
        ValueError: the name is unknown or lacks a path.
        FileNotFoundError: there is no such file or folder.
    """
    kind, location = locate(name, root)
    if kind in _NEEDS and location is not None and not location.exists():
        raise FileNotFoundError(f"{location} (the data set {name}) does not exist.")


def read_source(name: str, root: str | Path | None = None, test: bool = True) -> Source:
    """Read the data set called `name`, which is one of `SOURCES`, optionally with a path: "parquet:FILE".

    Args:
        name: the data set.
        root: folder of its files.
        test: False leaves the split "test" empty; no image of it is read then.

    Raises:
        ValueError: the name is unknown, or the data are not what they should be.
        FileNotFoundError: the files are missing and cannot be downloaded.
    """
    kind, location = locate(name, root)
    source = SOURCES[kind](location, test)
    return finished(source, name if location is None else str(location), test)
