import contextlib
import errno
import io
import json
import os
import pickle
import random
import socket
import stat
import tarfile
import urllib.error
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import scipy.io
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from binvit.files import temporary_folder
from binvit.images import open_image
from binvit.lab.data.datasets import list_datasets, load_data
from binvit.lab.data.images import ImageSet
from binvit.lab.data.sources import read_source


def encode(image, kind="PNG"):
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def flat(color, size=(6, 6), mode="RGB"):
    return Image.new(mode, size, color)


@pytest.fixture
def parquet(tmp_path):
    """Write a tiny Parquet file: three classes, five training and two test images each; `change` may spoil its rows."""

    def write(change=None, **columns):
        rows = [
            {"image": encode(flat((40 * label, 10 * i, 0))), "label": label, "split": "train" if i < 5 else "test"}
            for i in range(7)
            for label in range(3)
        ]
        if change is not None:
            change(rows)
        path = tmp_path / "tiny.parquet"
        pd.DataFrame(rows).assign(**columns).to_parquet(path)
        return path

    return write


@pytest.fixture
def chaoyang(tmp_path):
    """Write a tiny folder in the official layout, 4 classes; `change` may spoil the lists before they are written."""

    def write(change=None):
        lists = {}
        for split, count in (("train", 3), ("test", 1)):
            (tmp_path / split).mkdir()
            lists[split] = [{"name": f"{split}/{c}-{i}.png", "label": c} for c in range(4) for i in range(count)]
            for entry in lists[split]:
                flat((60 * entry["label"], 0, 0), (10, 8)).save(tmp_path / entry["name"])
        if change is not None:
            change(lists)
        for split, entries in lists.items():
            (tmp_path / f"{split}.json").write_text(json.dumps(entries))
        return tmp_path

    return write


# ------------------------------------------------------------------------------------------------------------- digits


def test_digits_are_rgb_images_in_a_stratified_split():
    data = load_data("digits")
    assert (len(data.train), len(data.test), data.image_size, len(data.classes)) == (1078, 719, 8, 10)
    image, label = data.train[0]
    assert (image.mode, image.size, type(label)) == ("RGB", (8, 8), int)
    assert label == data.train.labels[0]
    shares = [np.bincount(part.labels) / len(part) for part in (data.train, data.test)]
    np.testing.assert_allclose(*shares, atol=2e-3)


def test_split_does_not_depend_on_the_seed():
    first, second = load_data("digits", seed=0), load_data("digits", seed=1)
    np.testing.assert_array_equal(first.train.pixels(), second.train.pixels())
    np.testing.assert_array_equal(first.test.labels, second.test.labels)


def test_train_and_test_share_no_image():
    data = load_data("digits")
    assert not set(data.train.rows) & set(data.test.rows)


def test_statistics_normalise_the_training_images():
    data = load_data("digits", samples_per_class=20)
    pixels = data.train.pixels() / 255
    np.testing.assert_allclose(data.mean, pixels.mean(axis=(0, 1, 2)), rtol=1e-9)
    np.testing.assert_allclose(data.std, pixels.std(axis=(0, 1, 2)), rtol=1e-9)


def test_image_size_resizes_every_image():
    data = load_data("digits", image_size=12)
    assert data.image_size == 12
    assert data.train[3][0].size == data.test[5][0].size == (12, 12)
    assert data.train.pixels().shape == (1078, 12, 12, 3)


# ---------------------------------------------------------------------------------------- samples, noise: any data set


@settings(max_examples=20, deadline=None)
@given(count=st.integers(1, 100), seed=st.integers(0, 2**40))
def test_samples_are_balanced_deterministic_and_nested(count, seed):
    data, again = (load_data("digits", samples_per_class=count, seed=seed) for _ in range(2))
    assert np.bincount(data.train.labels).tolist() == [count] * 10
    assert data.train.rows == again.train.rows
    assert len(data.test) == 719
    fewer = load_data("digits", samples_per_class=max(count // 2, 1), seed=seed)
    assert set(fewer.train.rows) <= set(data.train.rows)


def test_other_seeds_draw_other_samples():
    rows = [load_data("digits", samples_per_class=5, seed=seed).train.rows for seed in range(3)]
    assert rows[0] != rows[1] != rows[2]


@settings(max_examples=20, deadline=None)
@given(
    share=st.floats(0, 0.95),
    seed=st.integers(0, 2**40),
    count=st.one_of(st.none(), st.integers(1, 100)),
    noise=st.sampled_from(["symmetric", "pairs"]),
)
def test_noise_is_exact_spread_over_classes_and_keeps_clean_labels(share, seed, count, noise):
    clean = load_data("digits", samples_per_class=count, seed=seed).train
    data = load_data("digits", samples_per_class=count, label_noise=share, seed=seed, noise=noise)
    train = data.train
    np.testing.assert_array_equal(train.clean_labels, clean.labels)
    wrong = train.labels != train.clean_labels
    assert wrong.sum() == int(np.floor(share * len(train) + 0.5))
    members = np.bincount(train.clean_labels, minlength=10)
    assert np.abs(np.bincount(train.clean_labels[wrong], minlength=10) - share * members).max() <= 1
    assert train.labels.min() >= 0
    assert train.labels.max() <= 9
    np.testing.assert_array_equal(data.test.labels, data.test.clean_labels)
    if noise == "pairs":
        np.testing.assert_array_equal(train.labels[wrong], (train.clean_labels[wrong] + 1) % 10)
    # More noise adds wrong labels and changes none.
    more = load_data("digits", samples_per_class=count, label_noise=(share + 1) / 2.1, seed=seed, noise=noise).train
    if (share + 1) / 2.1 >= share:
        np.testing.assert_array_equal(more.labels[wrong], train.labels[wrong])


def test_symmetric_noise_reaches_every_other_class_evenly():
    counts = np.zeros((10, 10))
    for seed in range(30):
        train = load_data("digits", label_noise=0.6, seed=seed).train
        np.add.at(counts, (train.clean_labels, train.labels), 1)
    np.fill_diagonal(counts, 0)
    shares = counts / counts.sum(axis=1, keepdims=True)
    assert np.abs(shares[~np.eye(10, dtype=bool)] - 1 / 9).max() < 0.03


def test_confusion_matrix_says_where_wrong_labels_go():
    confusion = 0.9 * np.eye(10)
    confusion[3, 8], confusion[3, 5] = 0.075, 0.025
    confusion[0, 9] = 7.0  # rows may hold counts
    counts = np.zeros((10, 10))
    for seed in range(10):
        train = load_data("digits", label_noise=0.5, seed=seed, noise=confusion.tolist()).train
        wrong = train.labels != train.clean_labels
        np.add.at(counts, (train.clean_labels[wrong], train.labels[wrong]), 1)
    assert set(np.flatnonzero(counts[3])) == {5, 8}
    assert 0.65 < counts[3, 8] / counts[3].sum() < 0.85
    assert np.flatnonzero(counts[0]).tolist() == [9]
    assert (np.delete(counts[1], 1) > 0).all()  # never confused: as symmetric noise


# ------------------------------------------------------------------------------------------------------ Parquet, folder


def test_parquet_with_class_names(parquet):
    path = parquet()
    path.with_name("tiny.classes.json").write_text(json.dumps({"classes": ["a", "b", "c", "never seen"]}))
    data = load_data(f"parquet:{path}", samples_per_class=None)
    assert data.classes == ["a", "b", "c", "never seen"]
    assert (len(data.train), len(data.test), data.image_size, data.val) == (15, 6, 6, None)
    image, label = data.train[4]
    assert (image.getpixel((0, 0)), label) == ((40, 10, 0), 1)
    assert load_data(f"parquet:{path.name}", root=path.parent).image_size == 6


def test_parquet_takes_dicts_of_bytes_val_as_test_and_numbers_as_names(parquet):
    def change(rows):
        for row in rows:
            row["image"] = {"bytes": row["image"], "path": None}
            row["split"] = row["split"].replace("test", "val")

    data = load_data(f"parquet:{parquet(change)}")
    assert (data.classes, len(data.test), data.val) == (["0", "1", "2"], 6, None)


def test_third_split_is_kept_as_validation(parquet):
    data = load_data(f"parquet:{parquet(lambda rows: rows[-1].update(split='val'))}")
    assert (len(data.train), len(data.test), len(data.val)) == (15, 5, 1)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda rows: rows[4].update(image=b"no image"), r"image in row 4 of .*tiny\.parquet cannot be decoded"),
        (lambda rows: rows[4].update(image=None), r"image in row 4 of .* holds nothing"),
        (lambda rows: rows[5].update(label=-1), r"label -1 in row 5 of .* out of range"),
        (lambda rows: rows[5].update(label=7), r"label 7 in row 5 of .* 0 to 3"),
        (lambda rows: rows[20].update(label=3), r"label 3 in row 20 of .* 3 classes with training images"),
        (lambda rows: [row.update(label=[row["label"]]) for row in rows], r"label \[0\] in row 0 .* not an integer"),
        (lambda rows: rows[2].update(label=None), r"label 0\.0 in row 0 .* not an integer"),
        (lambda rows: [row.pop("label") for row in rows], r"lacks the column 'label'; it has \['image', 'split'\]"),
        (lambda rows: rows[1].update(split="extra"), r"holds 'extra'; expected train, test or val"),
        (lambda rows: [row.update(split="train") for row in rows], r"holds no test images"),
        (lambda rows: rows[0].update(image=encode(flat(0, (9, 9)))), r"not squares of one size; give the image_size"),
    ],
)
def test_spoiled_parquet_gets_one_sentence(parquet, change, sentence):
    with pytest.raises(ValueError, match=sentence) as error:
        load_data(f"parquet:{parquet(change)}")
    assert "\n" not in str(error.value)


def test_labels_beyond_the_class_names_are_refused(parquet):
    path = parquet()
    path.with_name("tiny.classes.json").write_text('["a", "b"]')
    with pytest.raises(ValueError, match=r"label 2 in row 2 of .* must be 0 to 1"):
        load_data(f"parquet:{path}")
    path.with_name("tiny.classes.json").write_text('{"names": []}')
    with pytest.raises(ValueError, match="must be a list of class names"):
        load_data(f"parquet:{path}")


def test_a_file_that_is_no_parquet_is_refused(tmp_path):
    path = tmp_path / "x.parquet"
    path.write_bytes(b"PAR1 and nothing else")
    with pytest.raises(ValueError, match="not a readable Parquet file"):
        load_data(f"parquet:{path}")
    with pytest.raises(FileNotFoundError, match=r"y\.parquet does not exist"):
        load_data(f"parquet:{tmp_path / 'y.parquet'}")


def test_truncated_image_is_named_when_it_is_decoded(parquet):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 6, 3), dtype=np.uint8))
    data = load_data(f"parquet:{parquet(lambda rows: rows[3].update(image=encode(noise)[:-40]))}")
    with pytest.raises(ValueError, match=r"image in row 3 of .* cannot be decoded"):
        data.train.pixels()


def make_folder(root, splits):
    for split, classes in splits.items():
        for number, name in enumerate(classes):
            (root / split / name).mkdir(parents=True)
            for i in range(2):
                flat((0, 90 * number, 0), (12, 9)).save(root / split / name / f"{i}.jpg")
            (root / split / name / "notes.txt").write_text("no image")


def test_folder_labels_follow_the_training_classes(tmp_path):
    make_folder(tmp_path, {"train": ["ant", "bee", "cat"], "val": ["ant", "cat"]})
    data = load_data(f"folder:{tmp_path}", image_size=8)
    assert data.classes == ["ant", "bee", "cat"]
    assert data.test.labels.tolist() == [0, 0, 2, 2]
    assert data.train[0][0].size == (8, 8)
    assert data.train.open(0).size == (12, 9)  # random crops see the whole image


def test_spoiled_folder_gets_one_sentence(tmp_path):
    with pytest.raises(FileNotFoundError, match="image folder"):
        load_data(f"folder:{tmp_path / 'none'}")
    make_folder(tmp_path, {"train": ["ant"], "test": ["bee"]})
    with pytest.raises(ValueError, match="has the class 'bee', which"):
        load_data(f"folder:{tmp_path}", image_size=8)
    (tmp_path / "test" / "bee").rename(tmp_path / "test" / "ant")
    with pytest.raises(ValueError, match="give the image_size"):
        load_data(f"folder:{tmp_path}")
    (tmp_path / "train" / "ant" / "0.jpg").write_bytes(b"")
    data = load_data(f"folder:{tmp_path}", image_size=8)
    with pytest.raises(ValueError, match=r"train/ant/0\.jpg cannot be decoded"):
        data.train[0]


# ------------------------------------------------------------------------------------------------------------- Chaoyang


def test_chaoyang_folder(chaoyang):
    data = load_data("chaoyang", root=chaoyang(), samples_per_class=2, image_size=8)
    assert data.classes == ["normal", "serrated", "adenocarcinoma", "adenoma"]
    assert np.bincount(data.train.labels).tolist() == [2] * 4
    image, label = data.test[2]
    assert (image.size, image.getpixel((0, 0)), label) == ((8, 8), (120, 0, 0), 2)
    assert load_data(f"chaoyang:{data.train.images[0].parents[1]}").image_size == 224


@pytest.mark.parametrize(
    ("change", "error", "sentence"),
    [
        (lambda lists: lists["train"][1].pop("label"), ValueError, r'Entry 1 of .*train\.json lacks "label"'),
        (lambda lists: lists["test"][0].pop("name"), ValueError, r'Entry 0 of .*test\.json lacks "name"'),
        (lambda lists: lists["train"][2].update(label=4), ValueError, r"label 4 in row 2 of .* 0 to 3"),
        (lambda lists: lists["train"][2].update(label=1.0), ValueError, r"label 1\.0 .* not an integer"),
        (lambda lists: lists["train"][2].update(name="../secret.png"), ValueError, r"'\.\./secret\.png'.* inside"),
        (lambda lists: lists["train"][2].update(name="train/../../x"), ValueError, r"no path inside"),
        (lambda lists: lists["train"][2].update(name="/etc/passwd"), ValueError, r"'/etc/passwd'.* no path inside"),
        (lambda lists: lists["train"][2].update(name=None), ValueError, r"None.* no path inside"),
        (lambda lists: lists["train"][2].update(name="a\n.png"), ValueError, r"names 'a\\n\.png', which is no path"),
        (
            lambda lists: lists["train"].__setitem__(1, {"name": "a", "la\nbel": 0}),
            ValueError,
            r"has \['la\\nbel', 'na",
        ),
        (
            lambda lists: lists["train"][2].update(name="train/x.png"),
            FileNotFoundError,
            r"entry 2 .*x\.png does not exist",
        ),
        (lambda lists: lists["train"][2].update(name="x" * 5000), FileNotFoundError, r"entry 2 .* does not exist"),
        (lambda lists: lists.update(train={"name": []}), ValueError, r"train\.json must be a list of"),
        (lambda lists: lists.pop("test"), FileNotFoundError, r"test\.json does not exist"),
    ],
)
def test_spoiled_chaoyang_folder_gets_one_sentence(chaoyang, change, error, sentence):
    with pytest.raises(error, match=sentence):
        load_data("chaoyang", root=chaoyang(change))


def test_chaoyang_list_that_is_no_json(chaoyang):
    root = chaoyang()
    (root / "train.json").write_text("[{")
    with pytest.raises(ValueError, match=r"train\.json is no readable JSON"):
        load_data("chaoyang", root=root)


# ---------------------------------------------------------------------------------------------------------- torchvision


def write_idx(path, array):
    header = bytes([0, 0, 8, array.ndim]) + b"".join(int(n).to_bytes(4, "big") for n in array.shape)
    path.write_bytes(header + array.tobytes())


def test_fashion_mnist_from_its_files(tmp_path):
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    labels = np.arange(20, dtype=np.uint8) % 10
    for part in ("train", "t10k"):
        write_idx(raw / f"{part}-images-idx3-ubyte", np.full((20, 28, 28), 7, dtype=np.uint8))
        write_idx(raw / f"{part}-labels-idx1-ubyte", labels)
    data = load_data("fashion_mnist", root=tmp_path, samples_per_class=1)
    assert (len(data.train), len(data.test), data.image_size, data.classes[1]) == (10, 20, 28, "Trouser")
    assert data.train[0][0].getpixel((3, 3)) == (7, 7, 7)
    assert data.mean == (0.2860,) * 3


def test_test_images_that_nobody_asks_for_are_not_read(tmp_path):
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    write_idx(raw / "train-images-idx3-ubyte", np.full((20, 28, 28), 7, dtype=np.uint8))
    write_idx(raw / "train-labels-idx1-ubyte", np.arange(20, dtype=np.uint8) % 10)
    for part in ("images-idx3", "labels-idx1"):
        (raw / f"t10k-{part}-ubyte").write_bytes(b"damaged")
    data = load_data("fashion_mnist", root=tmp_path, evaluate_on="val")
    assert (len(data.train), len(data.val), len(data.test), data.image_size) == (10, 10, 0, 28)


@pytest.mark.filterwarnings("ignore:Python 3.14 will, by default, filter:DeprecationWarning")
@pytest.mark.parametrize(
    ("name", "file", "sizes"),
    [
        ("cifar10", "cifar-10-batches-py/test_batch", (8, 2)),
        ("cifar100", "cifar-100-python/test", (2, 0)),
        ("pets", "oxford-iiit-pet/annotations/test.txt", (2, 2)),
    ],
)
def test_test_images_of_torchvision_s_sets_are_not_read_either(tmp_path, network, name, file, sizes):
    network |= SERVED[name]
    load_data(name, root=tmp_path)
    (tmp_path / file).write_bytes(b"damaged")
    source = read_source(name, tmp_path, test=False)
    assert (len(source.splits["train"]), len(source.splits["test"])) == (sum(sizes), 0)
    if sizes[1]:  # enough to hold some out
        data = load_data(name, root=tmp_path, evaluate_on="val")
        assert (len(data.train), len(data.val), len(data.test)) == (*sizes, 0)


def archive(files):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


def matlab(**arrays):
    buffer = io.BytesIO()
    scipy.io.savemat(buffer, arrays)
    return buffer.getvalue()


def cifar_part(key, shade):
    return pickle.dumps({"data": np.full((2, 3072), shade, np.uint8), key: [0, 1]})


PHOTO = encode(flat((90, 60, 30), (40, 30)))
PETS = {"Beagle_1": 1, "Pug_1": 2, "Beagle_2": 1, "Pug_2": 2}
LISTS = {
    "trainval": "".join(f"{name} {label} 2 1\n" for name, label in PETS.items()),
    "test": "Pug_2 2 2 1\nBeagle_2 1 2 1\nPug_1 2 2 1\n",
}
# What the official servers hold, file by file, with a few images each.
SERVED = {
    "cifar10": {
        "cifar-10-python.tar.gz": archive(
            {f"cifar-10-batches-py/data_batch_{i}": cifar_part("labels", i) for i in range(1, 6)}
            | {"cifar-10-batches-py/test_batch": cifar_part("labels", 9)}
            | {"cifar-10-batches-py/batches.meta": pickle.dumps({"label_names": ["plane", "car"]})}
        ),
    },
    "cifar100": {
        "cifar-100-python.tar.gz": archive(
            {f"cifar-100-python/{part}": cifar_part("fine_labels", i) for i, part in ((1, "train"), (9, "test"))}
            | {"cifar-100-python/meta": pickle.dumps({"fine_label_names": ["apple", "fish"]})}
        )
    },
    "flowers102": {
        "102flowers.tgz": archive({f"jpg/image_{i:05d}.jpg": PHOTO for i in range(1, 410)}),
        "imagelabels.mat": matlab(labels=np.arange(408) % 102 + 1),
        "setid.mat": matlab(trnid=np.arange(1, 103), valid=np.arange(103, 205), tstid=np.arange(205, 409)),
    },
    "pets": {
        "images.tar.gz": archive({f"images/{name}.jpg": PHOTO for name in PETS}),
        "annotations.tar.gz": archive({f"annotations/{part}.txt": text.encode() for part, text in LISTS.items()}),
    },
}


@pytest.fixture
def network(monkeypatch):
    """Put a dictionary of files in the place of the network; torchvision takes them whatever their checksums."""
    files = {}

    def answer(request, **options):
        assert socket.getdefaulttimeout()  # else a server that says nothing is waited for
        if (name := request.full_url.rpartition("/")[2]) not in files:
            raise urllib.error.URLError("Name or service not known\nand more")
        response = io.BytesIO(files[name])
        return SimpleNamespace(url=request.full_url, length=len(files[name]), read=response.read)

    monkeypatch.setattr("urllib.request.urlopen", lambda *args, **options: contextlib.nullcontext(answer(*args)))
    monkeypatch.setattr("torchvision.datasets.utils.check_md5", lambda *args, **options: True)
    return files


@pytest.mark.filterwarnings("ignore:Python 3.14 will, by default, filter:DeprecationWarning")  # torchvision's own
@pytest.mark.parametrize(
    ("name", "sizes", "classes", "pixel"),
    [
        ("cifar10", (10, 2, None), ["plane", "car"], (1, 1, 1)),
        ("cifar100", (2, 2, None), ["apple", "fish"], (1, 1, 1)),
        ("flowers102", (102, 204, 102), ["pink primrose", "hard-leaved pocket orchid"], (90, 60, 30)),
        ("pets", (4, 3, None), ["Beagle", "Pug"], (90, 60, 30)),
    ],
)
def test_torchvision_sets_are_downloaded_into_root_once(tmp_path, network, name, sizes, classes, pixel):
    network |= SERVED[name]
    folder = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python", "flowers102": "flowers-102"}
    kept = tmp_path / "new" / folder.get(name, "oxford-iiit-pet") / "mine.txt"
    kept.parent.mkdir(parents=True)
    kept.write_text("kept")
    data = load_data(name, root=tmp_path / "new")
    assert (len(data.train), len(data.test), data.val and len(data.val)) == sizes
    assert data.classes[:2] == classes
    assert data.image_size == (32 if "cifar" in name else 224)
    assert data.train[0][0].getpixel((5, 5)) == pixel
    assert data.train.labels[:2].tolist() == [0, 1]
    assert kept.read_text() == "kept"
    assert not list((tmp_path / "new").glob(".*"))  # the download's own folder is gone
    network.clear()
    assert load_data(name, root=tmp_path / "new").test.labels.tolist() == data.test.labels.tolist()


@pytest.mark.filterwarnings("ignore:Python 3.14 will, by default, filter:DeprecationWarning")
@pytest.mark.parametrize(("name", "missing"), [("cifar10", "cifar-10-python.tar.gz"), ("pets", "annotations.tar.gz")])
def test_failed_download_is_one_sentence_and_leaves_nothing(tmp_path, network, name, missing):
    network |= {file: content for file, content in SERVED[name].items() if file != missing}
    with pytest.raises(FileNotFoundError, match=r"does not hold .* and it cannot be downloaded .*not known") as error:
        load_data(name, root=tmp_path / "new" / "and" / "deep")
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="needs root=FOLDER, the folder that holds it or"):
        load_data(name)


@pytest.mark.filterwarnings("ignore:Python 3.14 will, by default, filter:DeprecationWarning")
def test_a_download_leaves_the_folder_s_permissions_and_removes_what_a_killed_one_has_left(tmp_path, network):
    network |= SERVED["cifar10"]
    (tmp_path / "cifar-10-batches-py").mkdir()
    for folder in (tmp_path, tmp_path / "cifar-10-batches-py"):
        folder.chmod(0o775)
    with temporary_folder(tmp_path, "download") as folder:
        dead = folder.with_name(folder.name.replace(f".{os.getpid()}.", ".99999999."))
        (dead / "cifar-10-batches-py").mkdir(parents=True)
    load_data("cifar10", root=tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cifar-10-batches-py", "cifar-10-python.tar.gz"]
    for folder in (tmp_path, tmp_path / "cifar-10-batches-py"):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o775


def test_a_full_disk_is_no_missing_network(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("torchvision.datasets.CIFAR10.download", full)
    with pytest.raises(OSError, match="No space left on device") as error:
        load_data("cifar10", root=tmp_path / "a" / "b")
    assert error.value.errno == errno.ENOSPC
    assert not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore:Python 3.14 will, by default, filter:DeprecationWarning")
@pytest.mark.parametrize("number", [errno.EMFILE, errno.EACCES, errno.EIO])
def test_a_complete_set_that_cannot_be_read_is_not_downloaded_again(tmp_path, network, monkeypatch, number):
    network |= SERVED["cifar10"]
    load_data("cifar10", root=tmp_path)
    before = {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in tmp_path.rglob("*")}

    def refuse(*_, **__):
        raise OSError(number, "refused", "batch")

    monkeypatch.setattr("torchvision.datasets.cifar.open", refuse, raising=False)
    with pytest.raises(OSError, match="refused: 'batch'") as error:
        load_data("cifar10", root=tmp_path)
    assert error.value.errno == number
    assert {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in tmp_path.rglob("*")} == before


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"name": "imagenet"}, "Unknown data set 'imagenet'; valid names are digits, cifar10"),
        ({"name": "digits:x"}, "Unknown data set"),
        ({"name": "parquet:"}, "Unknown data set 'parquet:'"),
        ({"name": "parquet"}, "needs a path: parquet:FILE"),
        ({"name": "folder"}, "needs a path: folder:PATH"),
        ({"name": "chaoyang"}, "needs root=FOLDER"),
        ({"samples_per_class": 106}, r"samples_per_class is 106, but class 8 \('8'\) has only 104 training images"),
        ({"samples_per_class": 0}, "samples_per_class must be an integer of at least 1, but 0"),
        ({"samples_per_class": 2.5}, "samples_per_class must be an integer of at least 1, but 2.5"),
        ({"label_noise": 1.0}, r"label_noise must be a share in \[0, 1\), but 1.0"),
        ({"label_noise": -0.1}, "label_noise must be"),
        ({"label_noise": float("nan")}, "label_noise must be"),
        ({"label_noise": "0.2"}, "label_noise must be"),
        ({"image_size": 0}, "image_size must be an integer of at least 1, but 0"),
        ({"seed": -1}, "seed must be an integer of at least 0, but -1"),
        ({"noise": "asymmetric"}, "Unknown noise 'asymmetric'; expected symmetric, pairs or a confusion matrix"),
        ({"noise": [[1.0]]}, r"has the shape \(1, 1\); expected \(10, 10\)"),
        ({"noise": [["x"]]}, "confusion matrix of numbers"),
        ({"noise": -np.eye(10)}, "negative or non-finite"),
    ],
)
def test_bad_arguments_get_one_sentence(arguments, sentence):
    with pytest.raises(ValueError, match=sentence) as error:
        load_data(**{"name": "digits", **arguments})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", [name for name in list_datasets() if name != "digits"])
def test_every_listed_name_says_what_it_needs(name):
    with pytest.raises(ValueError, match=f"The data set {name} needs (root=FOLDER|a path: {name}:)"):
        load_data(name)


# --------------------------------------------------------------------------------------------------------------- images


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (flat(200, mode="L"), (200, 200, 200)),
        (flat(1, mode="1"), (255, 255, 255)),
        (flat((10, 20, 30, 0), mode="RGBA"), (10, 20, 30)),
        (Image.fromarray(np.full((6, 6), 0x8040, dtype=np.uint16)), (0x80, 0x80, 0x80)),
    ],
)
def test_images_of_every_mode_become_rgb(image, expected):
    opened = open_image(encode(image))
    assert (opened.mode, opened.getpixel((0, 0))) == ("RGB", expected)


def test_palette_with_transparency_opens_without_a_warning():
    image = flat((1, 2, 3)).convert("P")
    buffer = io.BytesIO()
    image.save(buffer, "PNG", transparency=bytes([128] * 256))
    assert open_image(buffer.getvalue()).mode == "RGB"


def test_missing_and_broken_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.png does not exist"):
        open_image(tmp_path / "none.png")
    (tmp_path / "text.png").write_text("hello")
    with pytest.raises(ValueError, match=r"text\.png cannot be decoded \(not an image\)\."):
        open_image(tmp_path / "text.png")


def test_decoded_pixels_are_what_indexing_gives():
    generator = np.random.default_rng(0)
    arrays = [generator.integers(0, 256, (5, 7, 3), dtype=np.uint8) for _ in range(4)]
    images = ImageSet(arrays, [0, 1, 0, 1], "here", image_size=4)
    expected = np.stack([np.asarray(images[i][0]) for i in range(4)])
    np.testing.assert_array_equal(images.pixels(), expected)
    assert images.open(1).size == (7, 5)


def test_loading_leaves_the_random_generators_alone():
    before = generators()
    load_data("digits", samples_per_class=3, label_noise=0.3, seed=5)
    assert generators() == before


def generators():
    numpy_state = np.random.get_state()  # noqa: NPY002
    return random.getstate(), numpy_state[1].tolist(), torch.get_rng_state().tolist()


@pytest.mark.parametrize(
    "arguments",
    [
        {"label_noise": 10**5000},
        {"label_noise": 10**30},
        {"label_noise": float("nan")},
        {"samples_per_class": 10**5000},
        {"seed": -(10**5000)},
        {"image_size": 5000 * "9"},
        {"evaluate_on": 5000 * "x"},
        {"label_noise": 0.1, "noise": 5000 * "x"},
        {"label_noise": json.loads(900 * "[" + 900 * "]")},
    ],
    ids=["many digits", "large", "nan", "samples", "seed", "text", "split", "noise", "deep"],
)
def test_odd_arguments_are_refused_in_one_short_sentence(arguments):
    with pytest.raises(ValueError, match=r"^[^\n]{10,400}\.$"):
        load_data("digits", **arguments)
