"""Where images come from: every data set that `load_data` knows, each read by one small function."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from binvit.lab.data.images import ImageSet
from binvit.lab.data.names import split_name

Statistics = tuple[tuple[float, float, float], tuple[float, float, float]]

IMAGENET: Statistics = (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
CIFAR10: Statistics = ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
CIFAR100: Statistics = ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))
FASHION: Statistics = ((0.2860,) * 3, (0.3530,) * 3)


@dataclass(frozen=True)
class Source:
    """What a data set holds before samples are drawn, labels are disturbed and images are resized.

    Args:
        classes: class names in the order of the labels.
        splits: "train", "test" and, where the data set has it, "val".
        image_size: default side in pixels; None asks the images themselves.
        statistics: known mean and standard deviation per channel; None has them computed.
    """

    classes: list[str]
    splits: dict[str, ImageSet]
    image_size: int | None = None
    statistics: Statistics | None = None


def _digits(location: None) -> Source:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)  # sixteen gray levels, 8x8
    # One split for everybody: results of different seeds are compared on the same 719 test images.
    parts = train_test_split(np.arange(len(images)), test_size=0.4, stratify=digits.target, random_state=0)
    splits = {
        name: ImageSet(list(images[rows]), digits.target[rows], "digits", rows.tolist(), stored_size=8)
        for name, rows in zip(("train", "test"), parts, strict=True)
    }
    return Source([str(digit) for digit in range(10)], splits, 8)


def _cifar10(location: Path) -> Source:
    return _cifar("CIFAR10", location, CIFAR10)


def _cifar100(location: Path) -> Source:
    return _cifar("CIFAR100", location, CIFAR100)


def _cifar(name: str, location: Path, statistics: Statistics) -> Source:
    train, test = (_torchvision(name, location, train=train) for train in (True, False))
    splits = {
        split: ImageSet(list(part.data), part.targets, name, stored_size=32)
        for split, part in (("train", train), ("test", test))
    }
    return Source(list(train.classes), splits, 32, statistics)


def _fashion_mnist(location: Path) -> Source:
    train, test = (_torchvision("FashionMNIST", location, train=train) for train in (True, False))
    splits = {
        split: ImageSet(list(part.data.numpy()), part.targets.numpy(), "FashionMNIST", stored_size=28)
        for split, part in (("train", train), ("test", test))
    }
    return Source(list(train.classes), splits, 28, FASHION)


def _flowers102(location: Path) -> Source:
    splits = {}
    for split in ("train", "val", "test"):
        part = _torchvision("Flowers102", location, split=split)
        splits[split] = ImageSet(part._image_files, part._labels, "Flowers102")
    return Source(list(part.classes), splits, 224, IMAGENET)


def _pets(location: Path) -> Source:
    splits = {}
    for split, official in (("train", "trainval"), ("test", "test")):
        part = _torchvision("OxfordIIITPet", location, split=official)
        splits[split] = ImageSet(part._images, part._labels, "OxfordIIITPet")
    return Source(list(part.classes), splits, 224, IMAGENET)


def _torchvision(name: str, location: Path, **options: object) -> object:
    """Open one of torchvision's data sets, downloading it if `location` does not hold it."""
    from torchvision import datasets

    build = getattr(datasets, name)
    try:
        return build(location, **options)
    except (RuntimeError, OSError):
        _download(build, name, location, options)
    return build(location, **options)


def _download(build: Callable, name: str, location: Path, options: dict[str, object]) -> None:
    """Download into a hidden folder first, so that an interrupted or a second download leaves nothing half-written."""
    timeout = socket.getdefaulttimeout()
    new = not location.exists()
    try:
        location.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".download-", dir=location) as folder:
            socket.setdefaulttimeout(30)  # torchvision sets none and would wait forever behind a silent firewall
            build(folder, download=True, **options)
            # Moves file by file into folders that may be there already, and deletes nothing in them.
            shutil.copytree(folder, location, copy_function=os.replace, dirs_exist_ok=True)
    except Exception as error:  # urllib, tarfile and torchvision's integrity checks raise many kinds
        if new:
            with contextlib.suppress(OSError):
                location.rmdir()
        reason = str(error).split("\n")[0].rstrip(": ") or type(error).__name__
        raise FileNotFoundError(f"{location} does not hold {name} and it cannot be downloaded ({reason}).") from None
    finally:
        socket.setdefaulttimeout(timeout)


def _chaoyang(location: Path) -> Source:
    """Read the folder of Zhu et al., Hard Sample Aware Noise Robust Learning, IEEE TMI 2021."""
    classes = ["normal", "serrated", "adenocarcinoma", "adenoma"]
    splits = {}
    for split in ("train", "test"):
        path = _existing(location / f"{split}.json", "the Chaoyang list of images")
        entries = _read_json(path)
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise ValueError(f'{path} must be a list of {{"name": ..., "label": ...}}.')
        for row, entry in enumerate(entries):
            missing = [key for key in ("name", "label") if key not in entry]
            if missing:
                raise ValueError(f'Entry {row} of {path} lacks "{missing[0]}"; it has {", ".join(sorted(entry))}.')
        images = [_inside(location, entry["name"], row, path) for row, entry in enumerate(entries)]
        labels = _checked_labels([entry["label"] for entry in entries], len(classes), str(path))
        for row, image in enumerate(images):
            _existing(image, f"an image that entry {row} of {path} names")
        splits[split] = ImageSet(images, labels, str(path))
    return Source(classes, splits, 224, IMAGENET)


def _folder(location: Path) -> Source:
    from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

    _existing(_existing(location, "the image folder") / "train", "the folder of training images")
    held = [split for split in ("train", "val", "test") if (location / split).is_dir()]
    classes = sorted(entry.name for entry in (location / "train").iterdir() if entry.is_dir())
    if not classes:
        raise ValueError(f"{location / 'train'} holds no class folders.")
    splits = {}
    for split in held:
        # Labels follow the names in train/: a class that test/ lacks must not shift the others.
        unknown = {entry.name for entry in (location / split).iterdir() if entry.is_dir()} - set(classes)
        if unknown:
            raise ValueError(f"{location / split} has the class {min(unknown)!r}, which {location / 'train'} lacks.")
        numbers = {name: label for label, name in enumerate(classes) if (location / split / name).is_dir()}
        found = make_dataset(location / split, numbers, IMG_EXTENSIONS, allow_empty=True)
        splits[split] = ImageSet([Path(path) for path, _ in found], [label for _, label in found], str(location))
    return Source(classes, _with_test(splits, str(location)))


def _parquet(location: Path) -> Source:
    import pyarrow
    import pyarrow.parquet

    _existing(location, "the Parquet file")
    try:
        names = pyarrow.parquet.read_schema(location).names
        missing = [name for name in ("image", "label", "split") if name not in names]
        if missing:
            raise ValueError(f"{location} lacks the column {missing[0]!r}; it has {', '.join(names) or 'none'}.")
        table = pyarrow.parquet.read_table(location, columns=["image", "label", "split"])
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{location} is not a readable Parquet file ({str(error).splitlines()[0]}).") from None
    rows_of = {}
    for row, split in enumerate(table["split"].to_pylist()):
        rows_of.setdefault(split, []).append(row)
    unknown = sorted(str(split) for split in rows_of if split not in ("train", "val", "test"))
    if unknown:
        raise ValueError(f"The column split of {location} holds {unknown[0]!r}; expected train, test or val.")
    path = location.with_name(f"{location.stem}.classes.json")
    classes = _class_names(path) if path.is_file() else None
    labels = _checked_labels(table["label"].to_pylist(), len(classes) if classes else None, str(location))
    if classes is None:
        trained = np.unique(labels[rows_of.get("train", [])])
        classes = [str(label) for label in range(len(trained))]
        outside = np.flatnonzero(labels >= len(classes))
        if outside.size:
            raise ValueError(
                f"The label {labels[outside[0]]} in row {outside[0]} of {location} is out of range: "
                f"its {len(classes)} classes with training images must be numbered 0 to {len(classes) - 1}."
            )
    images = _encoded(table["image"], location)
    splits = {
        split: ImageSet([images[row] for row in rows], labels[rows], str(location), rows)
        for split, rows in rows_of.items()
    }
    sizes = {split: images.common_size() for split, images in splits.items()}  # also finds rows that are no images
    for split, images in splits.items():
        images.stored_size = sizes[split]
    return Source(classes, _with_test(splits, str(location)))


def _encoded(column: object, location: Path) -> list[bytes]:
    """Return the bytes of every image, which may lie in the field `bytes` of a struct."""
    images = column.to_pylist()
    for row, image in enumerate(images):
        if isinstance(image, dict):
            image = images[row] = image.get("bytes")
        if not isinstance(image, bytes):
            kind = "nothing" if image is None else f"a value of type {type(image).__name__}"
            raise ValueError(f"The image in row {row} of {location} holds {kind}; expected the bytes of an image file.")
    return images


def _class_names(path: Path) -> list[str]:
    names = _read_json(path)
    names = names.get("classes") if isinstance(names, dict) else names
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise ValueError(f'{path} must be a list of class names, or {{"classes": [...]}}.')
    return names


def _checked_labels(values: Iterable[object], classes: int | None, origin: str) -> np.ndarray:
    """Return labels as int64 if all are integers of 0 to classes - 1."""
    values = list(values)
    for row, value in enumerate(values):
        if not isinstance(value, int) or isinstance(value, bool):
            raise ValueError(f"The label {value!r} in row {row} of {origin} is not an integer.")
        if value < 0 or (classes is not None and value >= classes):
            limit = "not negative" if classes is None else f"0 to {classes - 1}"
            raise ValueError(f"The label {value} in row {row} of {origin} is out of range: labels must be {limit}.")
    return np.asarray(values, dtype=np.int64)


def _with_test(splits: dict[str, ImageSet], origin: str) -> dict[str, ImageSet]:
    """Take the validation images as test images where there are no others, and refuse empty splits."""
    if "test" not in splits and "val" in splits:
        splits = {**{name: part for name, part in splits.items() if name != "val"}, "test": splits["val"]}
    for split in ("train", "test"):
        if split not in splits or not len(splits[split]):
            raise ValueError(f"{origin} holds no {split} images; expected the splits train and test (or val).")
    return splits


def _inside(folder: Path, name: object, row: int, origin: Path) -> Path:
    """Join a path named by a file to its folder, refusing any that leaves it."""
    path = os.path.normpath(name) if isinstance(name, str) and name else ".."
    if os.path.isabs(path) or path.split(os.sep)[0] == "..":
        raise ValueError(f"Entry {row} of {origin} names {name!r}, which is no path inside {folder}.")
    return folder / path


def _existing(path: Path, what: str) -> Path:
    if not path.exists():
        raise FileNotFoundError(f"{path} ({what}) does not exist.")
    return path


def _read_json(path: Path) -> object:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ValueError(f"{path} is not a readable JSON file ({error}).") from None


SOURCES: dict[str, Callable[[Path], Source]] = {
    "digits": _digits,
    "cifar10": _cifar10,
    "cifar100": _cifar100,
    "flowers102": _flowers102,
    "pets": _pets,
    "fashion_mnist": _fashion_mnist,
    "chaoyang": _chaoyang,
    "folder": _folder,
    "parquet": _parquet,
}

_NEEDS = {
    "chaoyang": "root=FOLDER, the official folder with train.json and test.json",
    "folder": "a path: folder:PATH, with PATH/train/CLASS/IMAGE inside",
    "parquet": "a path: parquet:FILE, with the columns image, label and split",
}


def _locate(name: str, root: str | Path | None) -> tuple[str, Path | None]:
    """Return the kind of a data set and where it lies."""
    kind, path = split_name(name)
    location = Path(root, path) if root is not None else Path(path) if path else None
    if location is None and kind != "digits":
        needs = _NEEDS.get(kind, "root=FOLDER, the folder that holds it or that it shall be downloaded to")
        raise ValueError(f"The data set {kind} needs {needs}.")
    return kind, location


def require_files(name: str, root: str | Path | None = None) -> None:
    """Refuse a data set whose files are missing and cannot be downloaded, without reading it.

    Raises:
        ValueError: the name is unknown or lacks a path.
        FileNotFoundError: there is no such file or folder.
    """
    kind, location = _locate(name, root)
    if kind in _NEEDS:
        _existing(location, f"the data set {name}")


def read_source(name: str, root: str | Path | None = None) -> Source:
    """Read the data set called `name`, which is one of `SOURCES`, optionally with a path: "parquet:FILE".

    Raises:
        ValueError: the name is unknown, or the data are not what they should be.
        FileNotFoundError: the files are missing and cannot be downloaded.
    """
    kind, location = _locate(name, root)
    return SOURCES[kind](location)
