"""Attention over pictures: what fits is drawn, what does not is refused."""

import os

os.environ.setdefault("MPLBACKEND", "agg")

import matplotlib.pyplot as plt
import numpy as np
import pytest
from PIL import Image

from binvit.lab.figures import attention_maps


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    plt.close("all")


def texts(fig) -> list[str]:
    return [t.get_text() for t in fig.findobj(plt.Text) if t.get_text()]


def tokens(count: int = 18, batch: int = 2) -> np.ndarray:
    return np.random.default_rng(0).random((batch, count, count))


def test_attention_takes_token_maps_and_patch_maps():
    images = np.zeros((2, 8, 8, 3), np.uint8)
    fig = attention_maps.attention_maps(
        images, {"float": tokens(), "gsb": np.ones((2, 4, 4))}, (4, 4), names=["a", "b"]
    )
    assert len(fig.axes) == 6
    assert {"image", "float", "gsb", "a", "b"} <= set(texts(fig))


def test_the_class_tokens_row_dyes_its_patch():
    m = np.zeros((18, 18))
    m[0, 2 + 5] = 1.0  # two tokens stand before the patches; patch 5 is in row 1, column 1
    m[3, :] = 1.0  # other queries are not shown
    fig = attention_maps.attention_maps(np.ones((8, 8, 3)), {"gsb": m}, (4, 4))
    drawn = fig.axes[1].images[0].get_array()
    dyed = np.argwhere(np.ptp(np.asarray(drawn), axis=-1) > 0.1) // (len(drawn) // 4)
    assert {tuple(p) for p in dyed} == {(1, 1)}


def test_equal_weights_have_equal_colours_on_any_picture():
    picture = np.random.default_rng(0).random((8, 8, 3))
    m = np.repeat([[0.0, 0.5, 0.5, 1.0]], 4, axis=0)
    drawn = [attention_maps.attention_maps(p, {"gsb": m}, (4, 4)).axes[1].images[0] for p in (picture, 0 * picture)]
    colors = np.asarray(drawn[0].get_array())
    assert len(np.unique(colors.reshape(-1, 3), axis=0)) == 3
    np.testing.assert_array_equal(colors, np.asarray(drawn[1].get_array()))
    assert drawn[0].get_extent() == [-0.5, 7.5, 7.5, -0.5]


def test_without_a_class_token_all_queries_count():
    m = np.zeros((16, 16))
    m[3, 6] = 1.0
    fig = attention_maps.attention_maps(np.ones((8, 8, 3)), {"gsb": m}, (4, 4))
    drawn = np.asarray(fig.axes[1].images[0].get_array())
    assert {tuple(p) for p in np.argwhere(np.ptp(drawn, axis=-1) > 0.1) // (len(drawn) // 4)} == {(1, 2)}


def test_attention_over_a_single_pil_image_and_an_empty_map():
    fig = attention_maps.attention_maps(Image.new("L", (6, 9)), {"elastic": np.zeros((3, 2))}, (3, 2))
    assert len(fig.axes) == 2


@pytest.mark.parametrize(
    ("images", "maps", "message"),
    [
        (np.zeros((8, 8)), np.ones((4, 4)), "An image to draw has the shape"),
        (np.zeros((8, 8, 3)), np.ones((3, 4, 4)), "1 two-dimensional maps were expected"),
        (np.zeros((8, 8, 3)), np.ones((5, 5)), "fits neither the 4 x 4 patches"),
        (np.zeros((8, 8, 3)), -np.ones((4, 4)), "negative"),
        (np.zeros((8, 8, 3)), np.full((4, 4), np.nan), "not finite"),
    ],
)
def test_maps_that_do_not_fit_are_refused(images, maps, message):
    with pytest.raises(ValueError, match=message):
        attention_maps.attention_maps(images, {"float": maps}, (4, 4))


def test_each_image_needs_one_name():
    with pytest.raises(ValueError, match="1 images and 2 names"):
        attention_maps.attention_maps(np.zeros((8, 8, 3)), {"float": np.ones((4, 4))}, (4, 4), names=["a", "b"])
