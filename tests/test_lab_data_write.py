import json

import numpy as np
import pytest
from image_files import image_bytes
from PIL import Image

from binvit.lab.data import write
from binvit.lab.data.datasets import load_data
from binvit.lab.data.fingerprint import fingerprint
from binvit.lab.data.images import ImageSet
from binvit.lab.data.splits import Source
from binvit.lab.data.write import command_of, write_parquet


@pytest.fixture
def official(tmp_path, monkeypatch):
    """Stand in for torchvision's files: photographs of several sizes, ten per class and split."""
    generator = np.random.default_rng(0)
    splits = {}
    for split in ("train", "val", "test"):
        paths = []
        for index in range(20):
            pixels = generator.integers(0, 255, (20 + index, 30, 3), dtype=np.uint8)
            paths.append(tmp_path / f"{split}{index}.png")
            paths[-1].write_bytes(image_bytes(pixels))
        splits[split] = ImageSet(paths, np.arange(20) % 2, "Flowers102")
    monkeypatch.setattr(write, "read_source", lambda name, root: Source(["ant", "bee"], dict(splits)))
    return splits


def test_images_are_resized_and_drawn_as_asked_for(tmp_path, official):
    out = tmp_path / "out" / "flowers.parquet"
    write_parquet("flowers102", out, tmp_path, size=16, per_class=3, seed=1)
    data = load_data("parquet:flowers.parquet", root=tmp_path / "out")
    assert (data.classes, data.image_size) == (["ant", "bee"], 16)
    assert (len(data.train), len(data.val), len(data.test)) == (6, 20, 20)
    assert list(np.bincount(data.train.labels)) == [3, 3]
    first = Image.open(official["test"].images[0]).convert("RGB").resize((24, 16), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(data.test.pixels()[0], np.asarray(first.crop((4, 0, 20, 16))))
    assert json.loads((tmp_path / "out" / "flowers.classes.json").read_text()) == ["ant", "bee"]
    command = command_of("parquet:flowers.parquet", tmp_path / "out")
    assert command == "binvit data flowers102 --size 16 --per-class 3 --seed 1 --out FILE"


def test_the_same_command_makes_the_same_fingerprint_and_another_one_another(tmp_path, official):
    found = []
    for name, options in {"a": {}, "b": {}, "c": {"seed": 1}, "d": {"size": 15}}.items():
        write_parquet("flowers102", tmp_path / f"{name}.parquet", tmp_path, **({"size": 16, "per_class": 3} | options))
        found.append(fingerprint(f"parquet:{name}.parquet", tmp_path))
    assert found[0] == found[1]
    assert len(set(found)) == 3


def test_images_that_keep_their_size_keep_their_bytes(tmp_path, official):
    write_parquet("flowers102", tmp_path / "a.parquet", tmp_path)
    data = load_data("parquet:a.parquet", root=tmp_path, image_size=8)
    assert data.train.images == [path.read_bytes() for path in official["train"].images]
    assert command_of("parquet:a.parquet", tmp_path) == "binvit data flowers102 --out FILE"
    assert command_of("digits") == ""


def test_what_cannot_be_made_is_refused_with_a_sentence(tmp_path, official):
    with pytest.raises(ValueError, match="no official data set 'digits' to make a file of; there are cifar10"):
        write_parquet("digits", tmp_path / "a.parquet", tmp_path)
    with pytest.raises(ValueError, match="has only 10 training images"):
        write_parquet("flowers102", tmp_path / "a.parquet", tmp_path, per_class=11)
    assert not (tmp_path / "a.parquet").exists()


def test_without_a_network_one_sentence_says_what_is_missing(tmp_path, monkeypatch):
    def silent(*_):
        raise OSError("no network")

    monkeypatch.setattr("urllib.request.urlopen", silent)
    sentence = r"does not hold CIFAR100 and it cannot be downloaded \(.*no network.*\)\.$"
    with pytest.raises(FileNotFoundError, match=sentence):
        write_parquet("cifar100", tmp_path / "a.parquet", tmp_path / "root", per_class=100)
    assert list(tmp_path.iterdir()) == []
