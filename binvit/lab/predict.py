"""Kept models at work: predictions for image files, and packing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from binvit.lab.data.images import open_image
from binvit.lab.training.checkpoint import load_checkpoint
from binvit.lab.training.classifier import Classifier
from binvit.nn import round_vectors
from binvit.packed import PackedViT, load, pack, save
from binvit.packed.files import is_packed

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm")


def image_files(path: Path) -> list[Path]:
    """Return the image itself, or all images of a folder and the folders in it, sorted by name.

    Raises:
        FileNotFoundError: there is no such file or folder, or no image in it.
    """
    if path.is_dir():
        found = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
        if not found:
            raise FileNotFoundError(f"The folder {path} holds no image ({', '.join(SUFFIXES)}).")
        return found
    if not path.is_file():
        raise FileNotFoundError(f"There is no image or folder {path}.")
    return [path]


def open_model(path: Path) -> Classifier:
    """Open a model that `binvit train` has kept or `binvit pack` has packed.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is neither, is damaged, or does not say what its images look like.
    """
    if not is_packed(path):
        network, info = load_checkpoint(path)
        return Classifier(network, info.classes, info.image_size, info.mean, info.std)
    packed = load(path)
    channels, height, width = packed.blueprint.image_shape
    mean, std = packed.blueprint.mean, packed.blueprint.std
    if height != width or channels != 3 or not mean:
        raise ValueError(
            f"The packed model {path} takes images of shape {(channels, height, width)} with the means {mean}; "
            "image files need square RGB images and a known normalization."
        )
    classes = packed.classes or [f"class {number}" for number in range(packed.blueprint.vit["num_classes"])]
    return Classifier(packed, classes, height, mean, std)


def open_packed(path: Path) -> PackedViT:
    """Open a packed model, or pack a model that `binvit train` has kept.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is neither, or is damaged.
    """
    if not path.is_file():
        raise FileNotFoundError(f"There is no model {path}.")
    if is_packed(path):
        return load(path)
    network, info = load_checkpoint(path)
    return pack(network, classes=info.classes, mean=info.mean, std=info.std)


def pack_checkpoint(model: Path, out: Path, exact: bool = False, float16: bool = False) -> PackedViT:
    """Pack a model that `binvit train` has kept, with its class names and the normalization of its images.

    Args:
        model: the checkpoint.
        out: the packed file.
        exact: as in `binvit.pack`.
        float16: pack what `binvit.round_vectors` makes of the model.

    Returns:
        The packed model.
    """
    network, info = load_checkpoint(model)
    if float16:
        network = round_vectors(network)
    packed = pack(network, exact=exact, classes=info.classes, mean=info.mean, std=info.std)
    save(packed, out)
    return packed


def predict_files(
    classifier: Classifier, images: Iterable[Path], top: int = 1
) -> Iterator[tuple[Path, list[tuple[str, float]]]]:
    """Predict the classes of image files.

    Each image is a batch of its own, so that its neighbours cannot change what a batch-dependent scheme sees in it.

    Args:
        classifier: what `open_model` returned.
        images: the files.
        top: how many classes to return per image, likeliest first.

    Yields:
        The file, and pairs of class name and probability.

    Raises:
        FileNotFoundError: an image is missing.
        ValueError: an image cannot be read.
    """
    for path in images:
        single = classifier.probabilities([open_image(path)])[0]
        probabilities, classes = single.topk(min(top, len(classifier.classes)))
        found = zip(classes.tolist(), probabilities.tolist(), strict=True)
        yield path, [(classifier.classes[number], probability) for number, probability in found]
