"""Texts that name the images of an experiment and the changes of a recipe."""

import pytest

from binvit.lab.experiments.design import parse
from binvit.lab.experiments.design.parse import Images


def test_images_are_read_from_text():
    assert Images.parse("digits") == Images("digits")
    text = "parquet:folder/flowers102_64px.parquet, 10 per class, recipe cpu, 3 seeds"
    assert Images.parse(text) == Images("parquet:folder/flowers102_64px.parquet", 10, "cpu", 3)
    assert [part.title for part in parse.parse_images(f"digits; {text}")] == [
        "digits",
        "flowers102, 10 per class",
    ]
    assert Images.parse("cifar100,1 seed").seeds == 1


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("digit", "Unknown data set 'digit'"),
        ("", "Unknown data set ''"),
        ("digits, 20 images", "not understood at '20 images'"),
        (f"digits, {'9' * 5000} per class", "are not understood at"),
        ("digits, 0 per class", "not understood at '0 per class'"),
        ("digits, 3 seeds, 4 seeds", "not understood at '4 seeds'"),
        ("digits, recipe large", "valid recipes are cifar, cpu"),
        ("digits; digits, 2 seeds", "Two kinds of images of the experiment are called 'digits'"),
    ],
)
def test_images_that_are_not_understood(text, sentence):
    with pytest.raises(ValueError, match=sentence):
        parse.parse_images(text)


def test_changes_are_read_from_text():
    assert parse.parse_changes("width 32, global_pool avg, lr 1e-2") == {
        "width": 32,
        "global_pool": "avg",
        "lr": 0.01,
    }
    assert parse.parse_changes("") == parse.parse_changes(" ") == {}
    for text, sentence in {
        "width": "hold 'width', which is no name with a value",
        "weight 3": "Unknown recipe field 'weight'",
        "width wide": "recipe's width must be a whole number, got 'wide'",
        "stages [}": r"value '\[}', which the changes of the recipe set stages to, is no readable YAML",
        "width 2024-99-99": "recipe's width must be a whole number, got '2024-99-99'",
        f"width {'9' * 5000}": "recipe's width must be a whole number, got inf",
        f"stages {'[' * 1000 + ']' * 1000}": "which the changes of the recipe set stages to, is nested too deeply",
        "lr nan": "recipe's lr must be a finite number, got nan",
        "model nosuch": "timm knows no model named 'nosuch'",
        "optimizer nosuch": "Unknown optimizer 'nosuch'; valid are .*adamw",
        "auto_augment foo": "timm does not know the augmentation 'foo'",
    }.items():
        with pytest.raises(ValueError, match=sentence):
            parse.parse_changes(text)
