"""Small data sets on disk."""

import io

import numpy as np
import pandas as pd
from PIL import Image


def image_bytes(pixels):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png")
    return buffer.getvalue()


def image_folder(path, classes=("cat", "dog"), splits=("train", "test"), each=6, size=8, seed=0):
    """Make SPLIT/CLASS/IMAGE with classes that differ in brightness, and return the folder."""
    generator = np.random.default_rng(seed)
    for split in splits:
        for label, name in enumerate(classes):
            (path / split / name).mkdir(parents=True)
            for index in range(each):
                pixels = generator.integers(0, 99, (size, size, 3), dtype=np.uint8) + np.uint8(60 * label)
                (path / split / name / f"{index}.png").write_bytes(image_bytes(pixels))
    return path


def parquet_file(path, splits=("train", "test"), each=12, size=8, seed=0):
    """Make a Parquet file of two classes, and return its path."""
    generator = np.random.default_rng(seed)
    rows = [(split, index % 2) for split in splits for index in range(each)]
    images = [generator.integers(0, 99, (size, size, 3), dtype=np.uint8) + np.uint8(90 * label) for _, label in rows]
    pd.DataFrame(
        {
            "image": list(map(image_bytes, images)),
            "label": [label for _, label in rows],
            "split": [split for split, _ in rows],
        }
    ).to_parquet(path)
    return path
