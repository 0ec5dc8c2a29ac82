"""Parquet files of official data sets, made smaller: what archived trials were trained on."""

from __future__ import annotations

import io
import json
from pathlib import Path

from binvit.config import show
from binvit.files import atomic_write
from binvit.images import resize_square
from binvit.lab.data.datasets import balanced
from binvit.lab.data.images import ImageSet
from binvit.lab.data.sources import Source, locate, read_source

_COMMAND = b"binvit data"
OFFICIAL = ("cifar10", "cifar100", "flowers102", "pets", "fashion_mnist")


def write_parquet(
    name: str, out: Path, root: Path, size: int | None = None, per_class: int | None = None, seed: int = 0
) -> Source:
    """Write an official data set as a Parquet file, with its class names beside it.

    Resized images are stored as bitmaps, whose bytes depend on no compression library, so that the file has the same
    fingerprint wherever it is made.

    Args:
        name: one of `OFFICIAL`.
        out: the file.
        root: folder of torchvision's official files, which are downloaded to it if they are absent.
        size: side in pixels that images are resized to (bicubic, centre square); None keeps them as they are.
        per_class: training images drawn of every class; None keeps all. Validation and test images are kept.
        seed: decides which.

    Returns:
        What the file holds.

    Raises:
        ValueError: the name is no official data set, or a class has too few images.
        FileNotFoundError: the official files are absent and cannot be downloaded.
    """
    import pyarrow
    import pyarrow.parquet

    if name not in OFFICIAL:
        raise ValueError(
            f"There is no official data set {show(name)} to make a file of; there are {', '.join(OFFICIAL)}."
        )
    source = read_source(name, root)
    if per_class is not None:
        train = source.splits["train"]
        source.splits["train"] = train.select(balanced(train.labels, source.classes, per_class, seed))
    columns: dict[str, list] = {"image": [], "label": [], "split": []}
    for split, images in source.splits.items():
        columns["image"] += [_encoded(images, index, size) for index in range(len(images))]
        columns["label"] += images.labels.tolist()
        columns["split"] += [split] * len(images)
    options = {"--size": size, "--per-class": per_class, "--seed": None if per_class is None else seed}
    given = [f" {option} {value}" for option, value in options.items() if value is not None]
    command = f"binvit data {name}{''.join(given)} --out FILE"
    table = pyarrow.table(columns).replace_schema_metadata({_COMMAND: command.encode()})
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(table, buffer, compression="zstd")
    atomic_write(out.with_name(f"{out.stem}.classes.json"), json.dumps(source.classes, indent=1) + "\n")
    atomic_write(out, buffer.getvalue())
    return source


def command_of(name: str, root: str | Path | None = None) -> str:
    """Return the command that made a data set's file, as far as the file tells it; a set that needs none has none."""
    kind, location = locate(name, root)
    if kind != "parquet" or location is None:
        return ""
    import pyarrow.parquet

    return (pyarrow.parquet.read_schema(location).metadata or {}).get(_COMMAND, b"").decode()


def _encoded(images: ImageSet, index: int, size: int | None) -> bytes:
    """Return an image as a file's bytes; what is a file already and keeps its size stays as it is."""
    image = images.images[index]
    if size is None and isinstance(image, Path):
        return image.read_bytes()
    buffer = io.BytesIO()
    opened = images.open(index)
    (opened if size is None else resize_square(opened, size)).save(buffer, "bmp")
    return buffer.getvalue()
