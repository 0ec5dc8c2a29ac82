import io

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from binvit import images
from binvit.images import open_image
from binvit.lab.data.datasets import ImageData
from binvit.lab.data.images import ImageSet

GRADIENT = np.arange(0, 192, dtype=np.uint8).reshape(12, 16)


def encode(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def red(encoded):
    return np.asarray(open_image(encoded))[..., 0]


# ------------------------------------------------------------------------------------------------- what cameras turn


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_images_are_turned_as_the_camera_was_held(kind, orientation):
    upright = np.zeros((24, 16), dtype=np.uint8)
    upright[:12, :8] = 250  # bright top left, dark elsewhere
    upright[12:, :8] = 120
    # What a camera stores: the transposition that the tag's meaning undoes (EXIF 2.3, tag 274).
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.T,
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].T,
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[274] = orientation
    options = {"lossless": True} if kind == "WEBP" else {"quality": 95} if kind == "JPEG" else {}
    found = red(encode(Image.fromarray(np.ascontiguousarray(stored)), kind, exif=exif.tobytes(), **options))
    np.testing.assert_allclose(found.astype(int), upright, atol=12)


def test_training_and_random_crops_see_the_turned_image():
    exif = Image.Exif()
    exif[274] = 6
    encoded = encode(Image.new("L", (20, 10)), "JPEG", exif=exif.tobytes())
    images = ImageSet([encoded], [0], "here")
    assert images.open(0).size == images[0][0].size == (10, 20)


def test_damaged_camera_notes_do_not_damage_the_image():
    encoded = encode(Image.fromarray(GRADIENT), "PNG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x12")
    np.testing.assert_array_equal(red(encoded), GRADIENT)
    notes = PngImagePlugin.PngInfo()
    notes.add_text("Raw profile type exif", "\nexif\n  9\nzz")
    np.testing.assert_array_equal(red(encode(Image.fromarray(GRADIENT), "PNG", pnginfo=notes)), GRADIENT)


# --------------------------------------------------------------------------------------- more bits than eight, floats


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM", "JPEG2000"])
def test_sixteen_bits_keep_their_high_byte_in_every_container(kind):
    wide = GRADIENT.astype(np.uint16) << 8 | 0x7F
    options = {"irreversible": False} if kind == "JPEG2000" else {}
    np.testing.assert_array_equal(red(encode(Image.fromarray(wide), kind, **options)), GRADIENT)


def test_big_endian_tiff():
    wide = (GRADIENT.astype(np.uint16) << 8).astype(">u2")
    image = Image.frombytes("I;16B", (16, 12), wide.tobytes())
    np.testing.assert_array_equal(red(encode(image, "TIFF")), GRADIENT)


def test_a_pgm_of_twelve_bits_reaches_white():
    values = (GRADIENT.astype(int) * 4095 // 191).astype(">u2")
    found = red(b"P5 16 12 4095\n" + values.tobytes())
    np.testing.assert_allclose(found.astype(int), np.rint(GRADIENT * (255 / 191)), atol=1)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.0, 1.0, (0, 255)),
        (0.0, 0.5, (0, 128)),  # a dark image stays dark
        (0.0, 200.0, (0, 200)),
        (0.0, 1000.0, (0, 255)),
        (-3.0, 5.0, (0, 255)),
        (7000.0, 7000.0, (0, 0)),
    ],
)
@pytest.mark.parametrize("kind", ["TIFF", "PPM"])
def test_floats_are_scaled_by_their_range(kind, low, high, expected):
    values = np.linspace(low, high, 192, dtype=np.float32).reshape(12, 16)
    found = red(encode(Image.fromarray(values), kind))
    assert (found.min(), found.max()) == expected
    steps = expected[0] + (expected[1] - expected[0]) * np.linspace(0, 1, 192).reshape(12, 16)
    np.testing.assert_allclose(found.astype(int), steps, atol=1)


def test_long_integers_are_scaled_by_their_range():
    for values, expected in ((GRADIENT, GRADIENT), (GRADIENT.astype(int) * 10**6, np.rint(GRADIENT * (255 / 191)))):
        found = red(encode(Image.fromarray(values.astype(np.int32)), "TIFF"))
        np.testing.assert_allclose(found.astype(int), expected, atol=1)


def test_values_that_are_no_number_become_black_and_infinite_ones_white():
    values = np.linspace(-1, 3, 192, dtype=np.float32).reshape(12, 16)
    values[3, :3] = np.nan, np.inf, -np.inf
    found = red(encode(Image.fromarray(values), "TIFF"))
    assert found[3, :3].tolist() == [0, 255, 0]
    assert (found[0, 0], found[-1, -1]) == (0, 255)
    assert red(encode(Image.fromarray(np.full((4, 4), np.nan, dtype=np.float32)), "TIFF")).max() == 0


@pytest.mark.parametrize("mode", ["LA", "RGBA", "CMYK", "YCbCr", "1", "P"])
def test_other_modes_become_rgb(mode):
    image = Image.fromarray(GRADIENT).convert("RGB").convert(mode)
    assert open_image(encode(image, "JPEG" if mode in ("CMYK", "YCbCr") else "PNG")).mode == "RGB"


def test_an_opened_picture_is_turned_as_its_file_is(tmp_path):
    pixels = np.zeros((6, 9, 3), np.uint8)
    pixels[:2, :3] = 255, 0, 0
    notes = Image.Exif()
    notes[274] = 6
    Image.fromarray(pixels).save(tmp_path / "held.png", exif=notes)
    expected = images.to_pixels(tmp_path / "held.png", 3, (6, 6))
    with Image.open(tmp_path / "held.png") as opened:
        np.testing.assert_array_equal(images.to_pixels(opened, 3, (6, 6)), expected)
    assert (images.to_pixels(Image.fromarray(pixels), 3, (6, 6)) != expected).any()
    turned = images.open_image(tmp_path / "held.png")  # and what was turned already is not turned again
    np.testing.assert_array_equal(images.to_pixels(turned, 3, (6, 6)), expected)


def test_pictures_that_cannot_be_used_are_refused_in_a_sentence(tmp_path):
    path = tmp_path / "cut.jpg"
    path.write_bytes(
        encode(Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)), "JPEG")[:-900]
    )
    with Image.open(path) as cut, pytest.raises(ValueError, match="cannot be decoded"):
        images.to_pixels(cut, 3, (8, 8))
    with pytest.raises(ValueError, match="must have pixels, got one of 0 x 5"):
        images.to_pixels(Image.new("RGB", (0, 5)), 3, (8, 8))
    # Pillow seeks to before this file's start, which is its fault and not the system's.
    with pytest.raises(ValueError, match="cannot be decoded"):
        images.open_image(bytes.fromhex("0a050108000000000d000b0001016400") + bytes(112))


@pytest.mark.parametrize(("size", "resize"), [((1, 2_000_000), None), ((20, 20), 2**15), ((3_000_000, 2), 64)])
def test_thin_pictures_and_huge_enlargements_take_little_memory(size, resize, monkeypatch):
    made = []
    whole = Image.Image.resize
    monkeypatch.setattr(Image.Image, "resize", lambda self, size, *more: made.append(size) or whole(self, size, *more))
    picture = Image.new("RGB", size, (10, 200, 30))
    cut = images.resize_and_cut(picture, (8, 8), resize)
    assert cut.size == (8, 8)
    assert np.asarray(cut).reshape(-1, 3).tolist() == [[10, 200, 30]] * 64
    assert all(width * height <= 2**26 for width, height in made)


def test_what_is_cut_from_a_huge_picture_is_its_centre(monkeypatch):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 400, 3), dtype=np.uint8))
    whole = np.asarray(images.resize_and_cut(picture, (24, 24), 40), int)
    monkeypatch.setattr(images, "_LARGEST", 1)
    part = np.asarray(images.resize_and_cut(picture, (24, 24), 40), int)
    assert abs(whole - part).max() <= 3  # weights that start at a fraction of a pixel


def test_a_large_image_is_opened_without_a_word(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    Image.fromarray(GRADIENT).save(tmp_path / "large.png")  # 192 pixels; a filter of the tests makes warnings errors
    assert open_image(tmp_path / "large.png").size == (16, 12)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    with pytest.raises(ValueError, match=r"large\.png cannot be decoded \(Image size \(192 pixels\) exceeds limit"):
        open_image(tmp_path / "large.png")


def test_images_beyond_the_memory_are_refused_before_they_are_decoded():
    images = ImageSet([b"no image"] * 3000, [0] * 3000, "photos", image_size=2**20)
    data = ImageData("photos", ["a"], images, images, 2**20)
    with pytest.raises(
        ValueError, match=r"^2000 images of 1048576 pixels a side, .* GiB of this machine; give a smaller"
    ):
        _ = data.mean
