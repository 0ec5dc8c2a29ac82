"""Data sets of the experiments: balanced samples, disturbed labels and one image size, all decided by the seed."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from numbers import Integral, Real
from pathlib import Path
from typing import Literal, cast

import numpy as np

from binvit.config import show
from binvit.lab.data.images import ImageSet, check_image_memory
from binvit.lab.data.label_noise import disturbed, noise_weights
from binvit.lab.data.sources import SOURCES, read_source
from binvit.lab.data.splits import TEST_SHARE, UNDIVIDED, Statistics, divided

VALIDATION_SHARE = 0.2
_VALIDATION_SEED = [2, 24]  # one part for all seeds and releases
STATISTICS_IMAGES = 2000  # enough for three decimals of a mean, and decoded within seconds


@dataclass(frozen=True)
class ImageData:
    """A data set ready for an experiment.

    Args:
        name: as given to `load_data`.
        classes: class names in the order of the labels.
        train: training images; `.labels` as a model sees them, `.clean_labels` without noise.
        test: all test images; none where a model is measured on validation images.
        image_size: side in pixels.
        val: validation images, where the data set has a third split or the model is evaluated on them. Nothing in
            binvit trains on them.
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
    def evaluated(self) -> ImageSet:
        """The images that a model is measured on."""
        return self.test if len(self.test) or self.val is None else self.val

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
            check_image_memory(len(chosen), self.image_size)
            pixels = np.stack([np.asarray(self.train[i][0]) for i in chosen])
        # Counts of the 256 values give exact sums, without a float copy of all pixels.
        counts = np.stack([np.bincount(pixels[..., channel].ravel(), minlength=256) for channel in range(3)])
        values = np.arange(256) / 255
        mean = counts @ values / counts.sum(axis=1)
        std = np.sqrt(np.maximum(counts @ values**2 / counts.sum(axis=1) - mean**2, 1e-8))
        return tuple(mean.tolist()), tuple(std.tolist())


def list_datasets() -> list[str]:
    """Return the names that `load_data` knows; "folder" and "parquet" are followed by ":PATH"."""
    return list(SOURCES)


def load_data(
    name: str,
    samples_per_class: int | None = None,
    label_noise: float = 0.0,
    seed: int = 0,
    root: str | Path | None = None,
    image_size: int | None = None,
    noise: str | Sequence[Sequence[float]] | np.ndarray = "symmetric",
    evaluate_on: Literal["test", "val"] = "test",
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
        evaluate_on: "test", or "val" to choose something: the official validation images, else a fifth of the training
            images, the same for every seed and not trained on. The test images are not loaded then; a trial has them
            hashed for its identity, and nothing is evaluated on them.

    Returns:
        The data set.

    Raises:
        ValueError: an argument is out of range, or the data are damaged.
        FileNotFoundError: files are missing.

    References:
        Angluin and Laird, Learning from noisy examples, Machine Learning 2, 1988 (symmetric noise);
        Patrini et al., Making deep neural networks robust to label noise, CVPR 2017 (class-conditional noise).
    """
    _check_arguments(samples_per_class, label_noise, seed, image_size)
    if evaluate_on not in ("test", "val"):
        raise ValueError(f"evaluate_on must be 'test' or 'val', but {show(evaluate_on)} was given.")
    source = read_source(name, root, test=evaluate_on == "test")
    if UNDIVIDED in source.splits:
        source = divided(source, seed)
        counts = " and ".join(f"{len(images)} {split}" for split, images in source.splits.items())
        sentence = f"{name} has no split: seed {seed} draws {TEST_SHARE:.0%} of each class for testing"
        warnings.warn(f"{sentence} ({counts} images).", stacklevel=2)
    if evaluate_on == "val":
        source.splits["test"] = ImageSet([], [], source.splits["test"].origin)
        if "val" not in source.splits:
            source.splits.update(_held_out(source.splits["train"], source.classes))
    size = image_size or source.image_size or _native_size(source.splits, name)
    for images in source.splits.values():
        images.image_size = int(size)
    train = source.splits["train"]
    if samples_per_class is not None:
        train = train.select(balanced(train.labels, source.classes, int(samples_per_class), seed))
    weights = noise_weights(noise, len(source.classes))
    if label_noise:
        train.clean_labels = train.labels
        train.labels = disturbed(train.labels, weights, float(label_noise), seed)
    return ImageData(
        name, source.classes, train, source.splits["test"], int(size), source.splits.get("val"), source.statistics
    )


# Classes, training and test images of the official sets, to count what a training costs before they are there.
# Cifar: Krizhevsky 2009. Flowers-102: Nilsback and Zisserman 2008. Pets: Parkhi et al. 2012. Fashion-MNIST: Xiao et
# al. 2017. Chaoyang: Zhu et al. 2021.
_OFFICIAL = {
    "cifar10": (10, 50000, 10000),
    "cifar100": (100, 50000, 10000),
    "flowers102": (102, 1020, 6149),
    "pets": (37, 3680, 3669),
    "fashion_mnist": (10, 60000, 10000),
    "chaoyang": (4, 4021, 2139),
}


def blank_data(
    name: str,
    samples_per_class: int | None = None,
    root: str | Path | None = None,
    image_size: int | None = None,
    counts: tuple[int, int, int] | None = None,
) -> ImageData:
    """Return blank images in the number of a data set's, which stand for it where only their number counts.

    Args:
        name: as for `load_data`.
        samples_per_class: likewise.
        root: likewise; not looked into.
        image_size: likewise.
        counts: classes, training and test images; None takes an official data set's.

    Raises:
        FileNotFoundError: nobody knows how many images there are, as of a folder.
    """
    counts = counts or _OFFICIAL.get(name)
    if counts is None:
        raise FileNotFoundError(f"The data set {name} is not there, and how many images it has is not known.")
    classes, all_train, all_test = counts
    pixel = np.zeros((1, 1), dtype=np.uint8)
    chosen = all_train if samples_per_class is None else samples_per_class * classes
    train, test = (
        ImageSet([pixel] * count, np.arange(count) % classes, name, stored_size=1) for count in (chosen, all_test)
    )
    native = {"cifar10": 32, "cifar100": 32, "fashion_mnist": 28}.get(name, 224)
    return ImageData(name, [str(label) for label in range(classes)], train, test, image_size or native)


def _check_arguments(samples_per_class: object, label_noise: object, seed: object, image_size: object) -> None:
    for label, value, least in (
        ("samples_per_class", samples_per_class, 1),
        ("image_size", image_size, 1),
        ("seed", seed, 0),
    ):
        if value is None and label != "seed":
            continue
        if not isinstance(value, Integral) or isinstance(value, bool) or int(value) < least:
            raise ValueError(f"{label} must be an integer of at least {least}, but {show(value)} was given.")
    if not isinstance(label_noise, Real) or not 0 <= cast(float, label_noise) < 1:
        raise ValueError(f"label_noise must be a share in [0, 1), but {show(label_noise)} was given.")


def _native_size(splits: dict[str, ImageSet], name: str) -> int:
    sizes = {images.stored_size or images.common_size() for images in splits.values() if len(images)}
    if len(sizes) > 1 or None in sizes:
        hint = "give the image_size they shall have (--image-size on the command line)"
        raise ValueError(f"The images of {name} are not squares of one size; {hint}.")
    size = cast(int, sizes.pop())
    for images in splits.values():
        images.stored_size = size
    return size


def _held_out(images: ImageSet, classes: list[str]) -> dict[str, ImageSet]:
    """Divide training images into a fifth of each class for validation and the others; a single image is trained on."""
    generator = np.random.default_rng(_VALIDATION_SEED)
    chosen = np.zeros(len(images), dtype=bool)
    for label in range(len(classes)):
        members = generator.permutation(np.flatnonzero(images.labels == label))
        chosen[members[: max(round(VALIDATION_SHARE * len(members)), min(1, len(members) - 1))]] = True
    if not chosen.any():
        raise ValueError(f"{images.origin} has no validation images, and no class has two training images to take one.")
    return {name: images.select(np.flatnonzero(rows)) for name, rows in (("train", ~chosen), ("val", chosen))}


def balanced(labels: np.ndarray, classes: list[str], count: int, seed: int) -> np.ndarray:
    """Return the indices of `count` images of every class, in the order of the data set."""
    generator = np.random.default_rng([seed, 0])
    chosen = []
    for label, name in enumerate(classes):
        members = np.flatnonzero(labels == label)
        if len(members) < count:
            raise ValueError(
                f"samples_per_class is {show(count)}, but class {label} ({show(name)}) has only {len(members)} "
                "training images."
            )
        chosen.append(generator.permutation(members)[:count])
    return np.sort(np.concatenate(chosen))
