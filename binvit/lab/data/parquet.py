"""Parquet files of encoded images, as they come from the Hugging Face Hub or are made by oneself."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from binvit.config import read_json, show
from binvit.files import is_of_system
from binvit.images import require_regular
from binvit.lab.data.images import ImageSet
from binvit.lab.data.splits import (
    UNDIVIDED,
    Source,
    checked_labels,
    checked_names,
    normal_name,
    read_json_file,
    split_names,
)


def read_parquet(location: Path, test: bool = True) -> Source:
    """Read a Parquet file with the columns image, label and, unless its images are undivided, split.

    Class names are those of FILE's stem + ".classes.json", else those of the Hugging Face metadata, else the texts of
    the labels, else their numbers.

    Args:
        location: the file.
        test: False leaves its test images unread.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no Parquet file, or its values are not what they should be.
    """
    import pyarrow
    import pyarrow.parquet

    require_regular(location, "Parquet file")
    try:
        schema = pyarrow.parquet.read_schema(location)
        columns = [name for name in ("image", "label", "split") if name in schema.names]
        for name in ("image", "label"):
            if name not in columns:
                raise ValueError(f"{location} lacks the column {name!r}; it has {show(schema.names)}.")
        for name in columns:
            if schema.names.count(name) > 1:
                raise ValueError(f"{location} has the column {name!r} more than once.")
        wanted = None if test or "split" not in columns else [("split", "!=", "test")]
        values = pyarrow.parquet.read_table(location, columns=columns, filters=wanted).to_pydict()
        unread = pyarrow.parquet.read_metadata(location).num_rows - len(values["label"])
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        if is_of_system(error):
            raise
        raise ValueError(f"{location} is not a readable Parquet file ({str(error).splitlines()[0]}).") from None
    rows_of: dict[str, list[int]] = {}
    if "split" in values:
        numbers: dict[str, list[int]] = {}
        for row, split in enumerate(values["split"]):
            if not isinstance(split, str):
                what = f"The split {show(split)} in row {row} of {location}"
                raise ValueError(f"{what} is no text; expected train, test or val.")
            numbers.setdefault(split, []).append(row)
        names = split_names(numbers, f"The column split of {location}")
        rows_of = {names[split]: rows for split, rows in numbers.items()} | ({"test": []} if unread else {})
    else:
        rows_of = {UNDIVIDED: list(range(len(values["label"])))}
    trained = rows_of.get("train", rows_of.get(UNDIVIDED, []))
    classes, labels = _labels(values["label"], trained, _known_names(location, schema.metadata), location)
    images = [_encoded(image, row, location) for row, image in enumerate(values["image"])]
    splits = {
        split: ImageSet([images[row] for row in rows], labels[rows], str(location), rows)
        for split, rows in rows_of.items()
    }
    for part in splits.values():
        if len(part):
            part.stored_size = part.common_size()  # also finds rows that are no images
    return Source(classes, splits)


def _labels(
    values: list[object], trained: list[int], classes: list[str] | None, location: Path
) -> tuple[list[str], np.ndarray]:
    """Return class names and the label of each row, which may be a number or, in all rows, a class name."""
    origin, why = str(location), ""
    if values and all(isinstance(value, str) for value in values):
        texts = [normal_name(str(value)) for value in values]
        names = classes or sorted({texts[row] for row in trained})
        number = {name: label for label, name in enumerate(names)}
        for row, text in enumerate(texts):
            if text not in number:
                known = "none of the given class names" if classes else "no class with training images"
                raise ValueError(f"The label {show(text)} in row {row} of {origin} names {known}.")
        return names, np.array([number[text] for text in texts], dtype=np.int64)
    if classes is None:
        count = len({values[row] for row in trained if isinstance(values[row], int)})
        classes = [str(label) for label in range(count)]
        why = f", as its {count} classes with training images are numbered"
    return classes, checked_labels(values, len(classes), origin, why)


def _known_names(location: Path, metadata: Mapping[bytes, bytes] | None) -> list[str] | None:
    """Return the class names of the JSON file beside a Parquet file, or of its Hugging Face metadata."""
    path = location.with_name(f"{location.stem}.classes.json")
    if path.exists():
        names = read_json_file(path)
        return checked_names(names.get("classes") if isinstance(names, dict) else names, str(path))
    origin = f"The Hugging Face metadata of {location}"
    value = read_json((metadata or {}).get(b"huggingface", b"{}"), origin)
    for key in ("info", "features", "label", "names"):
        value = value.get(key) if isinstance(value, dict) else None
    return None if value is None else checked_names(value, f"{origin} (ClassLabel)")


def _encoded(image: object, row: int, location: Path) -> bytes:
    """Return the bytes of an image, which may lie in the field `bytes` of a struct."""
    value = image.get("bytes") if isinstance(image, dict) else image
    if not isinstance(value, bytes):
        kind = "nothing" if value is None else f"a value of type {type(value).__name__}"
        raise ValueError(f"The image in row {row} of {location} holds {kind}; expected the bytes of an image file.")
    return value
