"""Data sets of the experiments: balanced samples, disturbed labels and one image size, all decided by the seed."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from numbers import Integral, Real
from pathlib import Path

import numpy as np

from binvit.lab.data.images import ImageSet
from binvit.lab.data.label_noise import disturbed, noise_weights
from binvit.lab.data.names import KINDS
from binvit.lab.data.sources import read_source
from binvit.lab.data.splits import TEST_SHARE, UNDIVIDED, Statistics, divided

STATISTICS_IMAGES = 2000  # enough for three decimals of a mean, and decoded within seconds


@dataclass(frozen=True)
class ImageData:
    """A data set ready for an experiment.

    Args:
        name: as given to `load_data`.
        classes: class names in the order of the labels.
        train: training images; `.labels` as a model sees them, `.clean_labels` without noise.
        test: all test images.
        image_size: side in pixels.
        val: validation images, where the data set has a third split. Nothing in binvit trains on them.
        known_statistics: published mean and standard deviation; None has them computed from `train`.
    """

    name: str
    classes: list[str]
    train: ImageSet
    test: ImageSet
    image_size: int
    val: ImageSet | None = None
    known_statistics: Statistics | None = None

    @property
    def mean(self) -> tuple[float, float, float]:
        """Mean of each channel, in 0 to 1."""
        return self._statistics[0]

    @property
    def std(self) -> tuple[float, float, float]:
        """Standard deviation of each channel."""
        return self._statistics[1]

    @cached_property
    def _statistics(self) -> Statistics:
        if self.known_statistics is not None:
            return self.known_statistics
        if self.train.fits_in_memory():
            pixels = self.train.pixels()
        else:
            chosen = np.unique(np.linspace(0, len(self.train) - 1, STATISTICS_IMAGES).astype(int))
            pixels = np.stack([np.asarray(self.train[i][0]) for i in chosen])
        # Counts of the 256 values give exact sums, without a float copy of all pixels.
        counts = np.stack([np.bincount(pixels[..., channel].ravel(), minlength=256) for channel in range(3)])
        values = np.arange(256) / 255
        mean = counts @ values / counts.sum(axis=1)
        std = np.sqrt(np.maximum(counts @ values**2 / counts.sum(axis=1) - mean**2, 1e-8))
        return tuple(mean.tolist()), tuple(std.tolist())


def list_datasets() -> list[str]:
    """Return the names that `load_data` knows; "folder" and "parquet" are followed by ":PATH"."""
    return list(KINDS)


def load_data(
    name: str,
    samples_per_class: int | None = None,
    label_noise: float = 0.0,
    seed: int = 0,
    root: str | Path | None = None,
    image_size: int | None = None,
    noise: str | Sequence[Sequence[float]] | np.ndarray = "symmetric",
) -> ImageData:
    """Load a data set, optionally with few training images per class and with wrong training labels.

    Everything random depends on `seed` alone. With the same seed, 5 images per class are among the 10, and the images
    that are mislabelled at 20 % are among those at 40 %, so that curves over either differ by nothing else.

    Args:
        name: "digits" (embedded; a fixed stratified split of 60 % train and 40 % test), "cifar10", "cifar100",
            "flowers102" (the official training split of 10 images per class; the validation split is `.val`), "pets",
            "fashion_mnist", "chaoyang", "folder:PATH" (PATH/train/CLASS/IMAGE, likewise test or val) or "parquet:FILE"
            (columns image: encoded bytes, label: numbers or class names, split: train, test or val; names of numbered
            classes in FILE's stem + ".classes.json" or in the Hugging Face metadata). A split "val" may be called
            valid, validation or dev. In a Parquet file without splits, the seed draws a fifth of each class for
            testing, and a warning says so. `~` and environment variables in a path are replaced.
        samples_per_class: number of training images of every class; None keeps all.
        label_noise: share of the training labels that are made wrong, in [0, 1). The number of wrong labels is exact:
            the share of all images, spread over the classes in proportion to their sizes.
        seed: decides samples and noise, and the split where the data have none.
        root: folder of the data set, which torchvision's sets are downloaded to if they are absent. Paths after a
            colon are relative to it.
        image_size: side in pixels that images are resized to (bicubic, centre square); None keeps the native size
            (224 for the photographs of flowers102, pets and chaoyang).
        noise: where wrong labels go: "symmetric", any other class with equal probability; "pairs", the next class; or
            a confusion matrix (C, C) whose row i weighs the labels that images of class i get. Its diagonal does not
            count, and a row without confusions is taken as symmetric.

    Returns:
        the data set.

    Raises:
        ValueError: an argument is out of range, or the data are damaged.
        FileNotFoundError: files are missing.

    References:
        Angluin and Laird, Learning from noisy examples, Machine Learning 2, 1988 (symmetric noise);
        Patrini et al., Making deep neural networks robust to label noise, CVPR 2017 (class-conditional noise).
    """
    _check_arguments(samples_per_class, label_noise, seed, image_size)
    source = read_source(name, root)
    if UNDIVIDED in source.splits:
        source = divided(source, seed)
        counts = " and ".join(f"{len(images)} {split}" for split, images in source.splits.items())
        sentence = f"{name} has no split: seed {seed} draws {TEST_SHARE:.0%} of each class for testing"
        warnings.warn(f"{sentence} ({counts} images).", stacklevel=2)
    size = image_size or source.image_size or _native_size(source.splits, name)
    for images in source.splits.values():
        images.image_size = int(size)
    train = source.splits["train"]
    if samples_per_class is not None:
        train = train.select(_balanced(train.labels, source.classes, int(samples_per_class), seed))
    weights = noise_weights(noise, len(source.classes))
    if label_noise:
        train.clean_labels = train.labels
        train.labels = disturbed(train.labels, weights, float(label_noise), seed)
    return ImageData(
        name, source.classes, train, source.splits["test"], int(size), source.splits.get("val"), source.statistics
    )


def _check_arguments(samples_per_class: object, label_noise: object, seed: object, image_size: object) -> None:
    for label, value, least in (
        ("samples_per_class", samples_per_class, 1),
        ("image_size", image_size, 1),
        ("seed", seed, 0),
    ):
        if value is None and label != "seed":
            continue
        if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
            raise ValueError(f"{label} must be an integer of at least {least}, but {value!r} was given.")
    if not isinstance(label_noise, Real) or not 0 <= label_noise < 1:
        raise ValueError(f"label_noise must be a share in [0, 1), but {label_noise!r} was given.")


def _native_size(splits: dict[str, ImageSet], name: str) -> int:
    sizes = {images.stored_size or images.common_size() for images in splits.values()}
    if len(sizes) > 1 or None in sizes:
        raise ValueError(f"The images of {name} are not squares of one size; give the image_size they shall have.")
    size = sizes.pop()
    for images in splits.values():
        images.stored_size = size
    return size


def _balanced(labels: np.ndarray, classes: list[str], count: int, seed: int) -> np.ndarray:
    """Return the indices of `count` images of every class, in the order of the data set."""
    generator = np.random.default_rng([seed, 0])
    chosen = []
    for label, name in enumerate(classes):
        members = np.flatnonzero(labels == label)
        if len(members) < count:
            raise ValueError(
                f"samples_per_class is {count}, but class {label} ({name!r}) has only {len(members)} training images."
            )
        chosen.append(generator.permutation(members)[:count])
    return np.sort(np.concatenate(chosen))
