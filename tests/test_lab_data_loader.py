import contextlib
import random

import numpy as np
import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from binvit.lab.data.images import ImageSet
from binvit.lab.data.loader import Batches
from binvit.lab.data.transforms import eval_transform, train_transform
from binvit.lab.randomness import fixed_randomness

SIZES = (6, (0.5, 0.4, 0.3), (0.2, 0.25, 0.3))
AUGMENTED = {"auto_augment": "rand-m9-mstd0.5-inc1", "erasing": 0.5, "crop": 0.5, "flip": 0.5}


def images(count=10, stored=6):
    pixels = np.random.default_rng(0).integers(0, 256, (count, stored, stored, 3), dtype=np.uint8)
    return ImageSet(list(pixels), np.arange(count) % 3, "here", image_size=6, stored_size=stored)


def equal(first, second):
    return len(first) == len(second) and all(
        torch.equal(a, b) for one, two in zip(first, second, strict=True) for a, b in zip(one, two, strict=True)
    )


@settings(max_examples=40, deadline=None)
@given(
    count=st.integers(1, 30),
    batch_size=st.integers(1, 12),
    shuffle=st.booleans(),
    drop_last=st.booleans(),
    epoch=st.integers(0, 5),
)
def test_an_epoch_shows_every_image_once_with_its_label(count, batch_size, shuffle, drop_last, epoch):
    dataset = images(count)
    batches = Batches(dataset, eval_transform(*SIZES), batch_size, shuffle, seed=3, drop_last=drop_last)
    made = list(batches.epoch(epoch))
    assert len(made) == len(batches)
    indices = torch.cat([batch[2] for batch in made]).numpy()
    drops = drop_last and count >= batch_size
    assert len(indices) == (count - count % batch_size if drops else count)
    assert len(set(indices.tolist())) == len(indices)
    if not shuffle:
        assert indices.tolist() == list(range(len(indices)))
    transform = eval_transform(*SIZES)
    for values, labels, chosen in made:
        assert (values.dtype, labels.dtype) == (torch.float32, torch.int64)
        assert labels.tolist() == dataset.labels[chosen.numpy()].tolist()
        assert torch.equal(values, torch.stack([transform(dataset.open(i)) for i in chosen.tolist()]))


@pytest.mark.parametrize("stored", [6, 9])
def test_augmented_batches_depend_on_seed_and_epoch_alone(stored):
    def make(seed, epoch):
        batches = Batches(images(stored=stored), train_transform(*SIZES, **AUGMENTED), 4, shuffle=True, seed=seed)
        made = []
        for batch in batches.epoch(epoch):
            made.append(batch)
            random.random(), np.random.rand(), torch.rand(3)  # noqa: NPY002 - a training loop draws, too
        return made

    reference = make(0, 2)
    torch.manual_seed(99)
    assert equal(make(0, 2), reference)
    assert not equal(make(0, 3), reference)
    assert not equal(make(1, 2), reference)


def test_batches_do_not_move_the_generators_of_the_training_loop():
    def state():
        numpy_state = np.random.get_state()  # noqa: NPY002
        return random.getstate(), numpy_state[1].tolist(), numpy_state[2], torch.get_rng_state().tolist()

    before = state()
    for workers in (0, 1):
        for _ in Batches(images(), train_transform(*SIZES, **AUGMENTED), 4, shuffle=True, workers=workers):
            assert state() == before


def test_fixed_randomness_repeats_and_restores_even_after_an_error():
    before, drawn = torch.get_rng_state(), []
    for _ in range(2):
        with contextlib.suppress(KeyError), fixed_randomness(1, 2):
            drawn.append((random.random(), np.random.rand(), torch.rand(1).item()))  # noqa: NPY002
            raise KeyError
    assert drawn[0] == drawn[1]
    assert torch.equal(torch.get_rng_state(), before)


def test_workers_make_the_same_batches():
    arguments = (images(), train_transform(*SIZES, **AUGMENTED), 4, True, 5)
    alone, together = Batches(*arguments), Batches(*arguments, workers=2)
    for epoch in (0, 1, 7, 1):
        assert equal(list(alone.epoch(epoch)), list(together.epoch(epoch)))


def test_workers_end_at_once():
    """Collected late, a loader of torch waits five seconds for each of its workers."""
    arguments = (images(), train_transform(*SIZES, **AUGMENTED), 4, True, 5)
    others = set(psutil.Process().children())
    ends = [Batches.close, lambda batches: None]
    for end in ends:
        batches = Batches(*arguments, workers=2)
        first = next(batches.epoch(0))
        mine = set(psutil.Process().children()) - others
        assert len(mine) >= 2
        end(batches)
        if end is ends[0]:
            assert equal([next(batches.epoch(0))], [first])
        del batches
        assert not psutil.wait_procs(mine, timeout=2)[1]


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_is_the_same_sentence_with_and_without_workers(workers, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"broken")
    dataset = ImageSet([tmp_path / "broken.png"], [0], "here", image_size=6)
    batches = Batches(dataset, train_transform(*SIZES, flip=0.5), 1, workers=workers)
    with pytest.raises(ValueError, match=r"^The image .*broken\.png cannot be decoded \(not an image\)\.$"):
        list(batches)


def test_labels_are_read_when_the_batch_is_made():
    dataset = images()
    batches = Batches(dataset, eval_transform(*SIZES), 10)
    dataset.labels = np.full(10, 2)
    assert next(iter(batches))[1].tolist() == [2] * 10


def test_batch_size_must_be_positive():
    with pytest.raises(ValueError, match="batch_size must be at least 1, but 0 was given"):
        Batches(images(), eval_transform(*SIZES), 0)
