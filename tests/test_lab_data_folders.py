import os
import shutil
import sys
import tempfile
import threading
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from binvit.lab.data.datasets import load_data
from binvit.lab.data.fingerprint import fingerprint

SPLITS = ("train", "test")


def save(path, shade=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (shade, 90, 10)).save(path)


@pytest.fixture
def photos(tmp_path):
    """Write two classes of three images each for training and testing."""
    for split in SPLITS:
        for name in ("cat", "dog"):
            for i in range(3):
                save(tmp_path / "photos" / split / name / f"{i}.png", 40 * i)
    return tmp_path / "photos"


def counts(folder):
    data = load_data(f"folder:{folder}", image_size=8)
    return data.classes, [np.bincount(part.labels).tolist() for part in (data.train, data.test)]


UNDISTURBED = (["cat", "dog"], [[3, 3], [3, 3]])


def refused(folder, sentence, error=ValueError):
    with pytest.raises(error, match=sentence) as caught:
        load_data(f"folder:{folder}", image_size=8)
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith(".")


@pytest.mark.parametrize("name", ["folder:a\0b", "parquet:a\0b.parquet"])
def test_a_path_with_a_nul_byte(name):
    with pytest.raises(ValueError, match=r"A path must not hold a NUL byte, got 'a\\x00b"):
        load_data(name)


# ------------------------------------------------------------------------------------------------------------- hidden


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("name", [".ipynb_checkpoints", "__MACOSX", "@eaDir", ".git"])
def test_hidden_folders_are_no_classes(photos, split, name):
    (photos / split / name).mkdir()
    save(photos / split / name / "x.png")
    save(photos / name / "cat" / "x.png")
    assert counts(photos) == UNDISTURBED


@pytest.mark.parametrize("split", SPLITS)
def test_hidden_files_and_folders_are_no_images(photos, split):
    folder = photos / split / "cat"
    save(folder / ".ipynb_checkpoints" / "0-checkpoint.png")
    save(folder / ".thumbnails" / "deep" / "0.png")
    (folder / "._0.png").write_bytes(b"\0\5\x16\7")
    for name in ("Thumbs.db", "desktop.ini", ".DS_Store", "notes.txt", "labels.json"):
        (folder / name).write_bytes(b"x")
    assert counts(photos) == UNDISTURBED


# ---------------------------------------------------------------------------------------------------- kinds of images


def test_images_of_every_common_ending_are_read(photos):
    for split in SPLITS:
        for path in sorted((photos / split / "dog").iterdir()):
            image = Image.open(path)
            image.save(path.with_suffix(".gif"))
            image.save(path.with_suffix(".jfif"), "JPEG")
            image.save(path.with_suffix(".TIFF"))
            if Image.registered_extensions().get(".avif") in Image.OPEN:
                image.save(path.with_suffix(".avif"))
            path.unlink()
    kinds = 4 if Image.registered_extensions().get(".avif") in Image.OPEN else 3
    assert counts(photos) == (["cat", "dog"], [[3, 3 * kinds]] * 2)
    assert load_data(f"folder:{photos}", image_size=8).train.pixels().shape == (3 + 3 * kinds, 8, 8, 3)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("ending", [".CR2", ".svg", ".heic"])
def test_images_that_pillow_cannot_read_are_named(photos, split, ending):
    if Image.registered_extensions().get(ending) in Image.OPEN:
        pytest.skip("a plugin reads them")
    (photos / split / "dog" / f"7{ending}").write_bytes(b"what a camera stores")
    refused(photos, f"Pillow cannot read {ending.lower()} images such as .*7{ending}")


# --------------------------------------------------------------------------------------------- nothing to learn from


@pytest.mark.parametrize("split", SPLITS)
def test_a_class_without_an_image_is_refused(photos, split):
    for path in (photos / split / "dog").iterdir():
        path.rename(path.with_suffix(".txt"))
    refused(photos, f"class folder .*{split}/dog holds no image that can be read")


@pytest.mark.parametrize("split", SPLITS)
def test_a_class_without_a_readable_image_is_refused(photos, split):
    for path in (photos / split / "dog").iterdir():
        path.write_bytes(b"")
    refused(photos, f"class folder .*{split}/dog holds no image that can be read .*png cannot be decoded")


def test_an_empty_split_is_refused(photos):
    (photos / "val").mkdir()
    refused(photos, "The split val of .* holds no images")
    shutil.rmtree(photos / "train")
    (photos / "train").mkdir()
    refused(photos, "train holds no class folders")


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="needs the users of a POSIX system")
@pytest.mark.parametrize("place", ["train/dog", "train"])
def test_a_folder_that_may_not_be_read_is_refused(photos, place):
    load_data(f"folder:{photos}", image_size=8)  # imports everything while we may
    with tempfile.TemporaryDirectory() as base:
        os.chmod(base, 0o755)
        copy = shutil.copytree(photos, Path(base) / "photos")
        (copy / place).chmod(0)
        user = os.geteuid()
        if user == 0:
            os.seteuid(65534)  # root may read everything
        try:
            refused(copy, f"The folder .*{place} may not be read by this user", PermissionError)
        finally:
            os.seteuid(user)
            (copy / place).chmod(0o755)


# -------------------------------------------------------------------------------------------------------------- links


def test_links_are_followed_but_never_in_a_circle(photos, tmp_path):
    for split in SPLITS:
        shutil.move(photos / split / "dog", tmp_path / f"dogs-{split}")
        (photos / split / "dog").symlink_to(tmp_path / f"dogs-{split}")
    assert counts(photos) == UNDISTURBED
    (photos / "train" / "cat" / "self").symlink_to(".")
    (photos / "train" / "cat" / "up").symlink_to("..")
    (photos / "train" / "again").symlink_to(".")
    (photos / "test" / "home").symlink_to(photos)
    (tmp_path / "dogs-train" / "back").symlink_to(photos / "train")
    (tmp_path / "dogs-test" / "deep").mkdir()
    (tmp_path / "dogs-test" / "deep" / "up").symlink_to(tmp_path / "dogs-test")
    assert counts(photos) == UNDISTURBED


def test_links_between_classes_give_no_image_two_labels(photos):
    for split in SPLITS:
        (photos / split / "cat" / "x").symlink_to("../dog")
        (photos / split / "dog" / "y").symlink_to("../cat")
    (photos / "train" / "cat" / "z").symlink_to(photos / "test" / "dog")
    (photos / "train" / "dog" / "w").symlink_to(photos / "test")
    assert counts(photos) == UNDISTURBED


def test_a_link_to_nowhere_is_refused(photos):
    (photos / "train" / "cat" / "7.png").symlink_to("7.png")
    refused(photos, r"image .*7\.png does not exist", FileNotFoundError)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
@pytest.mark.parametrize("place", ["train/cat/7.png", "test/dog/0.png"])
def test_a_pipe_never_hangs(photos, place):
    (photos / place).unlink(missing_ok=True)
    os.mkfifo(photos / place)
    sentences = []
    # A reader that opens the pipe waits for ever, in a thread that ends with the tests.
    reader = threading.Thread(target=lambda: sentences.append(sentence_of(photos)), daemon=True)
    reader.start()
    reader.join(20)
    assert f"{place} is no regular file" in "".join(sentences)


def sentence_of(folder):
    try:
        load_data(f"folder:{folder}", image_size=8).train.pixels()
    except ValueError as error:
        return str(error)
    return "read"


# -------------------------------------------------------------------------------------------------------------- names


def test_unicode_forms_of_a_class_name_are_one_class(photos):
    composed, decomposed = (unicodedata.normalize(form, "Äpfel") for form in ("NFC", "NFD"))
    save(photos / "train" / composed / "0.png")
    save(photos / "train" / decomposed / "1.png")
    save(photos / "test" / decomposed / "0.png")
    classes, numbers = counts(photos)
    assert classes == ["cat", "dog", composed]
    assert numbers == [[3, 3, 2], [3, 3, 1]]


@pytest.mark.parametrize("name", ["valid", "validation", "dev", "val"])
def test_every_name_of_validation_images(photos, name):
    shutil.copytree(photos / "test", photos / name)
    data = load_data(f"folder:{photos}")
    assert (len(data.val), len(data.test)) == (6, 6)
    shutil.rmtree(photos / "test")
    assert len(load_data(f"folder:{photos}").test) == 6


def test_two_splits_of_one_meaning_are_refused(photos):
    shutil.copytree(photos / "test", photos / "val")
    shutil.copytree(photos / "test", photos / "dev")
    refused(photos, "holds both 'dev' and 'val'; expected one of them")


def test_home_and_environment_variables_in_paths(photos, monkeypatch):
    monkeypatch.setenv("HOME", str(photos.parent))
    monkeypatch.setenv("PHOTOS", "photos")
    for name, root in (("folder:~/photos", None), ("folder:~/$PHOTOS", None), ("folder:${PHOTOS}", "~")):
        assert load_data(name, root=root).classes == ["cat", "dog"]


@pytest.mark.skipif(sys.platform != "linux", reason="names are texts there")
def test_names_that_are_no_text(photos):
    image = next((photos / "train" / "cat").iterdir())
    image.rename(os.fsdecode(os.fsencode(image.parent) + b"/caf\xe9.png"))
    assert counts(photos) == UNDISTURBED
    assert fingerprint(f"folder:{photos}").startswith("sha256:")
    (photos / "train" / "cat").rename(os.fsdecode(os.fsencode(photos / "train") + b"/caf\xe9"))
    refused(photos, r"has a name that is no text in UTF-8\.$")
