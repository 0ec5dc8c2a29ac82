"""What a data set holds, whoever has read it: class names, labels and splits, checked in one place."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from binvit.config import read_json, show
from binvit.images import require_regular
from binvit.lab.data.images import ImageSet

Statistics = tuple[tuple[float, float, float], tuple[float, float, float]]

UNDIVIDED = "all"
"""The one split of a source that does not say which images are for training."""

TEST_SHARE = 0.2

SPLITS = {"train": "train", "test": "test", "val": "val", "valid": "val", "validation": "val", "dev": "val"}


@dataclass(frozen=True)
class Source:
    """What a data set holds before samples are drawn, labels are disturbed and images are resized.

    Nothing is decoded yet: the encoded images, or their paths, are `splits[NAME].images`, their classes
    `splits[NAME].labels`.

    Args:
        classes: class names in the order of the labels.
        splits: "train", "test" and, where the data set has it, "val"; or "all" alone, which `divided` divides.
        image_size: default side in pixels; None asks the images themselves.
        statistics: known mean and standard deviation per channel; None has them computed.
    """

    classes: list[str]
    splits: dict[str, ImageSet]
    image_size: int | None = None
    statistics: Statistics | None = None


def finished(source: Source, origin: str, test: bool = True) -> Source:
    """Take the validation images as test images where there are no others, and refuse what cannot be learned from.

    Args:
        source: what was read.
        origin: what it was read from, for the sentences.
        test: whether the test images were read, too.

    Raises:
        ValueError: a split is missing or empty, or a class name is empty or comes twice.
    """
    refuse_doubles(source.classes, origin)
    splits = source.splits
    if UNDIVIDED not in splits:
        if "test" not in splits and "val" in splits:
            splits = {**{name: part for name, part in splits.items() if name != "val"}, "test": splits["val"]}
        for split in ("train", "test"):
            if split not in splits:
                raise ValueError(f"{origin} holds no {split} images; expected the splits train and test (or val).")
    for split, images in splits.items():
        if not len(images) and (test or split != "test"):
            where = origin if split == UNDIVIDED else f"The split {split} of {origin}"
            raise ValueError(f"{where} holds no images.")
    return replace(source, splits=splits)


def divided(source: Source, seed: int) -> Source:
    """Draw a fifth of each class of an undivided source as test images; a class of one image has none.

    Args:
        source: what `read_source` returned.
        seed: decides which images.

    Returns:
        The source with the splits "train" and "test".

    Raises:
        ValueError: no class has two images.
    """
    images = source.splits[UNDIVIDED]
    generator = np.random.default_rng([seed, 2])
    test = np.zeros(len(images), dtype=bool)
    for label in range(len(source.classes)):
        members = generator.permutation(np.flatnonzero(images.labels == label))
        test[members[: max(round(TEST_SHARE * len(members)), min(1, len(members) - 1))]] = True
    if not test.any():
        raise ValueError(f"{images.origin} has no split and too few images to divide: no class has two.")
    splits = {name: images.select(np.flatnonzero(chosen)) for name, chosen in (("train", ~test), ("test", test))}
    return replace(source, splits=splits)


def split_names(found: Iterable[str], origin: str) -> dict[str, str]:
    """Return what each of a data set's split names means: "train", "val" or "test".

    Raises:
        ValueError: a name is unknown, or two mean the same.
    """
    names: dict[str, str] = {}
    for name in found:
        if name not in SPLITS:
            raise ValueError(f"{origin} holds {show(name)}; expected train, test or val (valid, validation, dev).")
        for other, meaning in names.items():
            if meaning == SPLITS[name]:
                raise ValueError(f"{origin} holds both {other!r} and {name!r}; expected one of them.")
        names[name] = SPLITS[name]
    return names


def normal_name(name: str) -> str:
    """Return the form of a class name that all its Unicode forms share (NFC); file systems choose theirs freely."""
    return unicodedata.normalize("NFC", name)


def checked_names(names: object, origin: str) -> list[str]:
    """Return class names in their normal form if they are a list of different names.

    Raises:
        ValueError: they are something else.
    """
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise ValueError(f'{origin} must be a list of class names, or {{"classes": [...]}}.')
    names = [normal_name(name) for name in names]
    refuse_doubles(names, origin)
    return names


def refuse_doubles(names: Sequence[str], origin: str) -> None:
    """Raise a ValueError if a class name is empty or comes twice."""
    seen: set[str] = set()
    for name in names:
        if not name.strip() or name in seen:
            raise ValueError(f"{origin} has the class name {name!r} {'twice' if name.strip() else '(empty)'}.")
        seen.add(name)


def checked_labels(values: Sequence[object], classes: int, origin: str, why: str = "") -> np.ndarray:
    """Return labels as int64 (N,) if all are integers of 0 to classes - 1.

    Raises:
        ValueError: one is not, which the sentence names with its row; `why` ends the sentence.
    """
    for row, value in enumerate(values):
        if not isinstance(value, int) or isinstance(value, bool):
            raise ValueError(f"The label {show(value)} in row {row} of {origin} is not an integer.")
        if not 0 <= value < classes:
            limit = f"labels must be 0 to {classes - 1}{why}"
            raise ValueError(f"The label {show(value)} in row {row} of {origin} is out of range: {limit}.")
    return np.asarray(values, dtype=np.int64)


def read_json_file(path: Path) -> object:
    """Return what a JSON file holds.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no regular file, or no JSON.
    """
    return read_json(require_regular(path, "JSON file").read_bytes(), str(path))
