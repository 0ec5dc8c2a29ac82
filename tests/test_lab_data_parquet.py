import io
import json
import os

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from binvit.lab.data.datasets import load_data


def png(shade=0):
    buffer = io.BytesIO()
    Image.new("RGB", (6, 6), (shade, 20, 30)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def write(tmp_path):
    """Write a Parquet file of two classes: five training and three test images each, with some columns replaced."""

    def write(metadata=None, **columns):
        rows = range(16)
        table = {
            "image": [png(10 * row) for row in rows],
            "label": [row % 2 for row in rows],
            "split": ["train" if row < 10 else "test" for row in rows],
        } | columns
        table = pyarrow.table({name: values for name, values in table.items() if values is not None})
        pyarrow.parquet.write_table(table.replace_schema_metadata(metadata), tmp_path / "tiny.parquet")
        return f"parquet:{tmp_path / 'tiny.parquet'}"

    return write


def refused(name, sentence):
    with pytest.raises(ValueError, match=sentence) as caught:
        load_data(name)
    assert "\n" not in str(caught.value)


def hub(names, depth=0):
    features = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
    return {"huggingface": "[" * depth + json.dumps({"info": {"features": features}}) + "]" * depth}


# -------------------------------------------------------------------------------------------------------- class names


def test_names_of_the_hugging_face_metadata(write, tmp_path):
    name = write(hub(["cat", "dog"]), image=[{"bytes": png(), "path": "a.png"}] * 16)
    assert load_data(name).classes == ["cat", "dog"]
    (tmp_path / "tiny.classes.json").write_text('["Katze", "Hund"]')  # who writes a file of names means it
    assert load_data(name).classes == ["Katze", "Hund"]


def test_labels_that_are_class_names(write, tmp_path):
    texts = ["dog", "cat"] * 8
    for column in (texts, pyarrow.array(texts).dictionary_encode()):
        data = load_data(write(label=column))
        assert data.classes == ["cat", "dog"]
        assert data.train.labels.tolist() == [1, 0] * 5
    (tmp_path / "tiny.classes.json").write_text('["dog", "bird", "cat"]')
    data = load_data(write(label=texts))
    assert (data.classes, data.test.labels.tolist()) == (["dog", "bird", "cat"], [0, 2] * 3)


def test_unicode_forms_of_a_class_name_are_one_class(write):
    data = load_data(write(label=["\u00e9", "e\u0301", "z", "z"] * 4))
    assert (data.classes, data.train.labels[:4].tolist()) == (["z", "\u00e9"], [1, 1, 0, 0])


@pytest.mark.parametrize("names", [["a", "a"], ["\u00e9", "e\u0301"], ["a", " "]])
def test_doubled_and_empty_class_names_are_refused(write, tmp_path, names):
    refused(write(hub(names)), r"Hugging Face metadata of .* has the class name .* (twice|\(empty\))")
    (tmp_path / "tiny.classes.json").write_text(json.dumps(names))
    refused(write(), r"tiny\.classes\.json has the class name")


def test_class_names_that_labels_do_not_know(write, tmp_path):
    texts = ["a", "b"] * 8
    refused(write(label=[*texts[:-1], "c"]), "label 'c' in row 15 .* no class with training images")
    refused(write(hub(["a", "c"]), label=texts), "label 'b' in row 1 .* none of the given class names")
    refused(write(hub("cat")), "must be a list of class names")
    (tmp_path / "tiny.classes.json").mkdir()
    refused(write(), "tiny.classes.json is no regular file")


# ------------------------------------------------------------------------------------------------------------- splits


@pytest.mark.parametrize("name", ["valid", "validation", "dev", "val"])
def test_every_name_of_validation_images(write, name):
    assert len(load_data(write(split=["train"] * 10 + [name] * 6)).test) == 6
    data = load_data(write(split=["train"] * 8 + [name] * 2 + ["test"] * 6))
    assert (len(data.val), len(data.test)) == (2, 6)


def test_two_splits_of_one_meaning_are_refused(write):
    refused(write(split=["train"] * 8 + ["dev"] * 4 + ["valid"] * 4), "holds both 'dev' and 'valid'")


def test_without_splits_the_seed_divides_and_a_sentence_says_so(write):
    name = write(split=None)

    def load(seed):
        with pytest.warns(UserWarning, match=f"has no split: seed {seed} draws 20% .*12 train and 4 test images"):
            return load_data(name, seed=seed)

    first = load(0)
    assert np.bincount(first.test.labels).tolist() == [2, 2]
    assert sorted([*first.train.rows, *first.test.rows]) == list(range(16))
    assert load(0).test.rows == first.test.rows
    assert len({tuple(load(seed).test.rows) for seed in range(5)}) > 1
    image, label = first.train[3]
    row = first.train.rows[3]
    assert (image.getpixel((0, 0)), label) == ((10 * row, 20, 30), row % 2)


@pytest.mark.filterwarnings("ignore:.*has no split")
def test_what_cannot_be_divided_is_refused(write):
    name = write(image=[png()] * 2, label=[0, 1], split=None)
    refused(name, "too few images to divide")
    nothing = {"image": pyarrow.array([], pyarrow.binary()), "label": pyarrow.array([], pyarrow.int64())}
    refused(write(**nothing, split=None), r"tiny\.parquet holds no images")
    data = load_data(write(image=[png()] * 4, label=[0, 1, 1, 1], split=None))
    assert (data.train.labels.tolist().count(0), data.test.labels.tolist()) == (1, [1])


# ---------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("columns", "sentence"),
    [
        ({"label": pyarrow.array([0] * 15 + [2**64 - 1], pyarrow.uint64())}, "label 18446744073709551615 in row 15"),
        ({"label": pyarrow.array([2**64 - 1] * 16, pyarrow.uint64())}, "label 18446744073709551615 in row 0"),
        ({"label": [[0]] * 16}, r"label \[0\] in row 0 .* not an integer"),
        ({"label": ["a"] * 15 + [None]}, "label 'a' in row 0 .* not an integer"),
        ({"label": [b"\xff"] * 16}, "not an integer"),
        (
            {"label": ["x" * 10**6] + ["a"] * 15, "split": ["test"] + ["train"] * 15},
            r"label .x+\.\.\.x+. in row 0",
        ),
        ({"split": [["train"]] * 16}, r"split \['train'\] in row 0 .* is no text; expected train, test or val"),
        ({"split": [{"name": "train"}] * 16}, "split .* in row 0 .* is no text"),
        ({"split": [None] * 16}, "split None in row 0"),
        ({"image": [1.5] * 16}, "image in row 0 .* a value of type float"),
        ({"image": [{"path": "a.png"}] * 16}, "image in row 0 .* holds nothing"),
    ],
)
def test_spoiled_columns_get_one_sentence(write, columns, sentence):
    refused(write(**columns), sentence)


def test_metadata_that_are_no_json_get_one_sentence(write):
    refused(write({"huggingface": "{"}), "Hugging Face metadata of .* no readable JSON")
    refused(write(hub(["a", "b"], depth=200_000)), "Hugging Face metadata of .* no readable JSON")
    assert load_data(write({"huggingface": "[1]"})).classes == ["0", "1"]


def test_deep_json_gets_one_sentence(write, tmp_path):
    (tmp_path / "tiny.classes.json").write_text("[" * 200_000 + "]" * 200_000)
    refused(write(), r"classes\.json is no readable JSON")


def test_a_column_that_comes_twice(tmp_path):
    columns = [pyarrow.array([png()] * 4), pyarrow.array([0, 1, 0, 1]), pyarrow.array([1, 0, 1, 0])]
    table = pyarrow.table(columns, names=["image", "label", "label"])
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
    refused(f"parquet:{tmp_path / 'x.parquet'}", "has the column 'label' more than once")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_never_hangs(tmp_path):
    os.mkfifo(tmp_path / "x.parquet")
    refused(f"parquet:{tmp_path / 'x.parquet'}", "is no regular file")
    refused(f"parquet:{tmp_path}", "is no regular file")
