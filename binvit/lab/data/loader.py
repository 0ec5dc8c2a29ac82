"""Batches whose content depends on (seed, epoch, step) alone, whatever else draws random numbers."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import cast

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from binvit.config import show
from binvit.lab.data.images import ImageSet
from binvit.lab.data.transforms import Normalize, Transform
from binvit.lab.randomness import fixed_randomness

Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class Batches:
    """The batches of a data set, epoch by epoch.

    Two runs with the same seed see bit-identical batches, with any number of workers; an epoch can be repeated without
    the ones before it, so that a training run that was interrupted continues as if it had not been.

    Args:
        dataset: the images; read where they are, and kept decoded if they are small.
        transform: from `train_transform` or `eval_transform`.
        batch_size: images of a batch.
        shuffle: another order in every epoch.
        seed: decides order and augmentation.
        drop_last: leave out a last batch that is not full, unless it is the only one.
        workers: processes that decode and augment; the training process does it itself with 0, and always when the
            transform is deterministic and the decoded images are kept.
    """

    def __init__(
        self,
        dataset: ImageSet,
        transform: Transform,
        batch_size: int,
        shuffle: bool = False,
        seed: int = 0,
        drop_last: bool = False,
        workers: int = 0,
    ):
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, but {show(batch_size)} was given.")
        self.dataset = dataset
        self.transform = transform
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.drop_last = drop_last and len(dataset) >= batch_size
        self._whole = _takes_pixels(dataset, transform)
        if self._whole or (dataset.stored_size is not None and dataset.stored_size == dataset.image_size):
            self._keep_pixels()
        self._keys = _Keys()
        self._loader = None
        if workers and not self._whole:
            # Its own generator: drawing the workers' base seed must not move the training loop's random numbers.
            self._loader = DataLoader(
                _Steps(copy.copy(self)),  # not itself: what refers to itself ends late, and its workers later still
                batch_size=None,
                sampler=self._keys,
                num_workers=workers,
                persistent_workers=True,
                generator=torch.Generator(),
            )

    def __getstate__(self) -> dict[str, object]:
        """Leave out the workers' loader: workers that are not forked receive a copy of everything else."""
        return {**self.__dict__, "_loader": None}

    def close(self) -> None:
        """End the workers; what is asked for later is made without them."""
        self._loader = None

    def __len__(self) -> int:
        """Return the number of batches of an epoch."""
        count = len(self.dataset)
        return count // self.batch_size if self.drop_last else -(-count // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        """Iterate over epoch 0, all there is to a data set that is not shuffled."""
        return self.epoch(0)

    def epoch(self, epoch: int, first: int = 0, every: int = 1) -> Iterator[Batch]:
        """Iterate over the batches of one epoch.

        Args:
            epoch: its number, from 0.
            first: the first batch wanted.
            every: distance from a batch to the next one wanted, so that several processes can share an epoch.

        Returns:
            An iterator of images float32 (B, 3, S, S), labels int64 (B,) and indices into the data set int64 (B,).

        Raises:
            ValueError: an image cannot be decoded.
            OSError: an image has disappeared or may not be read.
        """
        steps = range(first, len(self), every)
        if self._loader is None:
            order = self.order(epoch)
            for step in steps:
                yield self.batch(epoch, step, order)
            return
        self._keys.epoch, self._keys.steps = epoch, steps
        for batch in self._loader:
            if isinstance(batch, Exception):
                raise batch
            yield batch

    def order(self, epoch: int) -> np.ndarray:
        """Return the order of the images in an epoch: indices into the data set."""
        if not self.shuffle:
            return np.arange(len(self.dataset))
        return np.random.default_rng([self.seed, epoch]).permutation(len(self.dataset))

    def batch(self, epoch: int, step: int, order: np.ndarray | None = None) -> Batch:
        """Make one batch: images, labels and indices, as `epoch` yields them."""
        order = self.order(epoch) if order is None else order
        indices = order[step * self.batch_size : (step + 1) * self.batch_size]
        if self._whole:
            images = cast(Normalize, self.transform).batch(self.dataset.pixels()[indices])
        else:
            with fixed_randomness(self.seed, epoch, step):
                images = torch.stack([self.transform(self.dataset.open(index)) for index in indices])
        return images, torch.from_numpy(self.dataset.labels[indices]), torch.from_numpy(indices)

    def _keep_pixels(self) -> None:
        if self.dataset.fits_in_memory():
            self.dataset.pixels()


def _takes_pixels(dataset: ImageSet, transform: Transform) -> bool:
    same_size = isinstance(transform, Normalize) and transform.image_size == dataset.image_size
    return same_size and dataset.fits_in_memory()


class _Steps(Dataset):
    """Whole batches as the items of a data set, so that torch's workers make them in order."""

    def __init__(self, batches: Batches):
        self.batches = batches

    def __getitem__(self, key: tuple[int, int]) -> Batch | Exception:
        try:
            return self.batches.batch(*key)
        except (ValueError, OSError) as error:
            return error  # raised in the worker, its sentence would come back wrapped in a traceback


class _Keys:
    """The keys of one epoch's batches."""

    def __init__(self) -> None:
        self.epoch, self.steps = 0, range(0)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter([(self.epoch, step) for step in self.steps])

    def __len__(self) -> int:
        return len(self.steps)
