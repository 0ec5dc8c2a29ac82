import os
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from image_files import image_folder, parquet_file

from binvit.lab.data import fingerprint as module
from binvit.lab.data.fingerprint import fingerprint, hash_source, require_present
from binvit.lab.data.sources import read_source


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "binvit" / "fingerprints.json"


def test_the_same_images_have_one_fingerprint_wherever_they_lie(tmp_path):
    image_folder(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "far" / "b")
    found = fingerprint("folder:a", tmp_path)
    assert found == fingerprint(f"folder:{tmp_path / 'far' / 'b'}")
    assert found.startswith("sha256:")
    parquet_file(tmp_path / "one.parquet")
    shutil.copy(tmp_path / "one.parquet", tmp_path / "two.parquet")
    assert fingerprint("parquet:one.parquet", tmp_path) == fingerprint("parquet:two.parquet", tmp_path) != found
    assert fingerprint("digits") == fingerprint("digits", tmp_path)


def _image(path):
    next((path / "test").rglob("*.png")).write_bytes(next((path / "train").rglob("*.png")).read_bytes())


def _class(path):
    (path / "train" / "dog").rename(path / "train" / "cow")
    (path / "test" / "dog").rename(path / "test" / "cow")


def _label(path):
    image = next((path / "train" / "dog").glob("*.png"))
    image.rename(path / "train" / "cat" / "zzz.png")


def _split(path):
    image = next((path / "test" / "dog").glob("*.png"))
    image.rename(path / "train" / "dog" / "zzz.png")


def _fewer(path):
    next((path / "train" / "dog").glob("*.png")).unlink()


@pytest.mark.parametrize("change", [_image, _class, _label, _split, _fewer])
def test_other_images_labels_splits_or_classes_have_another_although_the_path_stays(tmp_path, change):
    path = image_folder(tmp_path / "a")
    before = fingerprint("folder:a", tmp_path)
    change(path)
    assert fingerprint("folder:a", tmp_path) != before


def test_a_file_replaced_by_one_of_the_same_size_and_time_is_noticed(tmp_path):
    path = parquet_file(tmp_path / "a.parquet")
    before, status = fingerprint("parquet:a.parquet", tmp_path), path.stat()
    table = pd.read_parquet(path)
    table["label"] = 1 - table["label"]
    table.to_parquet(path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert fingerprint("parquet:a.parquet", tmp_path) != before


def test_class_names_beside_a_file_count(tmp_path):
    parquet_file(tmp_path / "a.parquet")
    before = fingerprint("parquet:a.parquet", tmp_path)
    (tmp_path / "a.classes.json").write_text('["ant", "bee"]')
    assert fingerprint("parquet:a.parquet", tmp_path) != before


def test_unchanged_data_are_not_read_again_and_a_damaged_cache_does_no_harm(tmp_path, cache, monkeypatch):
    parquet_file(tmp_path / "a.parquet")
    found = fingerprint("parquet:a.parquet", tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(module, "read_source", lambda *_: pytest.fail("read again"))
        assert fingerprint("parquet:a.parquet", tmp_path) == found
    for damage in ("", "[]", '{"a": 1}', cache.read_text().replace(found, "sha256:0")[:-9]):
        cache.write_text(damage)
        assert fingerprint("parquet:a.parquet", tmp_path) == found
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "a.parquet"))  # no folder: nothing can be kept there
    assert fingerprint("parquet:a.parquet", tmp_path) == found


@pytest.mark.parametrize("edited", ["lab/data/folders.py", "lab/data/sources.py", "images.py"])
def test_another_release_that_reads_the_same_files_differently_reads_them_again(tmp_path, monkeypatch, edited):
    image_folder(tmp_path / "a")
    before = fingerprint("folder:a", tmp_path)
    home, code = Path(module.__file__).parents[2], tmp_path / "binvit"
    for path in (home / "images.py", *(home / "lab" / "data").glob("*.py")):
        (code / path.relative_to(home)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, code / path.relative_to(home))
    with monkeypatch.context() as patch:
        patch.setattr(module, "__file__", str(code / "lab" / "data" / "fingerprint.py"))
        patch.setattr(module, "read_source", lambda *_: read_source("digits"))
        module._code.cache_clear()
        assert fingerprint("folder:a", tmp_path) == before
        with open(code / edited, "a") as file:
            file.write("# reads differently\n")
        module._code.cache_clear()
        assert fingerprint("folder:a", tmp_path) == fingerprint("digits") != before
    module._code.cache_clear()


def test_beyond_the_limit_sizes_and_a_sample_are_hashed_and_the_fingerprint_says_so(tmp_path, monkeypatch):
    path = image_folder(tmp_path / "a", size=16)
    source = read_source("folder:a", tmp_path)
    sampled = hash_source(source, largest=10)
    assert sampled.startswith("sampled:")
    assert sampled == hash_source(source, largest=10) != hash_source(source)
    monkeypatch.setattr(module, "SAMPLE", 2)
    partly = hash_source(source, largest=10)
    last = sorted((path / "train" / "dog").glob("*.png"))[-1]
    last.write_bytes(last.read_bytes() + b"\0")  # another size, outside the sample
    assert hash_source(read_source("folder:a", tmp_path), largest=10) != partly


@pytest.mark.parametrize("sample", [2, 4096])
def test_beyond_the_limit_the_name_of_every_file_counts(tmp_path, monkeypatch, sample):
    path = image_folder(tmp_path / "a")
    monkeypatch.setattr(module, "SAMPLE", sample)
    before = hash_source(read_source("folder:a", tmp_path), largest=10)
    for image in sorted((path / "train" / "dog").iterdir()):
        other = image.rename(image.with_name(f"{image.stem}-.png"))  # the order stays
        assert hash_source(read_source("folder:a", tmp_path), largest=10) != before
        other.rename(image)
    assert hash_source(read_source("folder:a", tmp_path), largest=10) == before


def test_missing_files_are_named_and_nothing_is_downloaded(tmp_path):
    for name in ("cifar100", "folder:a", "parquet:a.parquet", "chaoyang"):
        with pytest.raises(FileNotFoundError, match="does not exist"):
            fingerprint(name, tmp_path / "none")
    with pytest.raises(ValueError, match="Unknown data set 'digit'"):
        fingerprint("digit")
    require_present("digits")
    assert not (tmp_path / "none").exists()


def test_arrays_count_with_their_shape():
    source = read_source("digits")
    before = hash_source(source)
    source.splits["test"].images[3] = np.ascontiguousarray(source.splits["test"].images[3].reshape(4, 16))
    assert hash_source(source) != before
