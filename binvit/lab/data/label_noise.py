"""Wrong labels: drawn at random or from a confusion matrix, spread evenly over the classes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from binvit.config import show
from binvit.images import resize_square
from binvit.lab.data.images import ImageSet

Matrix = tuple[tuple[float, ...], ...]


def pixel_confusion(train: ImageSet, classes: int, side: int = 8) -> Matrix:
    """Return which classes look alike: how often an image lies nearer to the mean image of another class.

    The model behind it is the weakest there is, the nearest class mean of small thumbnails; an image's own class mean
    is taken without it. It needs no training, so the matrix is the same everywhere.

    Args:
        train: training images with their clean labels.
        classes: how many there are.
        side: thumbnails have side x side pixels.

    Returns:
        A row-stochastic matrix: row i holds the shares of class i's images that are nearest to each class. `load_data`
        takes it as `noise`, which makes class-conditional label noise (Patrini et al. 2017) of it.
    """
    labels = train.clean_labels
    x = np.stack([np.asarray(resize_square(train[i][0], side), dtype=np.float64).ravel() for i in range(len(train))])
    counts = np.bincount(labels, minlength=classes)
    sums = np.zeros((classes, x.shape[1]))
    np.add.at(sums, labels, x)
    means = sums / np.maximum(counts, 1)[:, None]
    distance = (x**2).sum(1)[:, None] - 2 * x @ means.T + (means**2).sum(1)
    distance[:, counts == 0] = math.inf
    others = counts[labels] - 1
    own = ((x - (sums[labels] - x) / np.maximum(others, 1)[:, None]) ** 2).sum(1)
    distance[np.arange(len(x)), labels] = np.where(others > 0, own, math.inf)
    confused = np.zeros((classes, classes))
    np.add.at(confused, (labels, distance.argmin(1)), 1)
    shares = np.where(counts[:, None] > 0, confused / np.maximum(counts, 1)[:, None], np.eye(classes))
    return tuple(map(tuple, shares.tolist()))


def noise_weights(noise: str | Sequence[Sequence[float]] | np.ndarray, classes: int) -> np.ndarray:
    """Return (C, C): the probability that a wrong label of class i is j; the diagonal is zero."""
    symmetric = 1.0 - np.eye(classes)
    if isinstance(noise, str):
        if noise not in ("symmetric", "pairs"):
            raise ValueError(f"Unknown noise {show(noise)}; expected symmetric, pairs or a confusion matrix.")
        weights = symmetric if noise == "symmetric" else np.roll(np.eye(classes), 1, axis=1)
    else:
        try:
            weights = np.array(noise, dtype=np.float64)
        except (TypeError, ValueError):
            raise ValueError("noise must be symmetric, pairs or a confusion matrix of numbers.") from None
        if weights.shape != (classes, classes):
            raise ValueError(f"The confusion matrix has the shape {weights.shape}; expected {(classes, classes)}.")
        if not np.isfinite(weights).all() or (weights < 0).any():
            raise ValueError("The confusion matrix holds negative or non-finite values; expected shares or counts.")
        weights *= symmetric
        weights = np.where(weights.sum(axis=1, keepdims=True) > 0, weights, symmetric)
    return weights / np.maximum(weights.sum(axis=1, keepdims=True), 1e-300)


def disturbed(labels: np.ndarray, weights: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Return labels of which floor(share * N + 1/2) are wrong, spread evenly over the classes."""
    classes = len(weights)
    if classes < 2:
        raise ValueError("label_noise needs at least two classes, but the data set has one.")
    generator = np.random.default_rng([seed, 1])
    # Orders and targets are drawn for all images, whatever the share: a larger share only adds wrong labels.
    order = generator.permutation(len(labels))
    targets = (generator.random(len(labels))[:, None] >= np.cumsum(weights, axis=1)[labels]).sum(axis=1)
    # Rounding of the sums may leave the last sum just below one; the last class with weight takes what is above it.
    last = classes - 1 - np.argmax(weights[:, ::-1] > 0, axis=1)
    targets = np.minimum(targets, last[labels])
    # Each class is walked through at the same pace, so a prefix of the walk is spread evenly and prefixes are nested.
    pace = np.empty(len(labels))
    for label in range(classes):
        members = order[labels[order] == label]
        pace[members] = (np.arange(len(members)) + 0.5) / max(len(members), 1)
    wrong = order[np.argsort(pace[order], kind="stable")][: int(np.floor(share * len(labels) + 0.5))]
    noisy = labels.copy()
    noisy[wrong] = targets[wrong]
    return noisy
