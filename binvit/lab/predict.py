"""Kept models at work: predictions for image files, and packing."""

from __future__ import annotations

import csv
import io
import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from binvit.images import is_readable, open_image, require_regular
from binvit.lab.data.folders import visible_files
from binvit.lab.training.checkpoint import load_checkpoint
from binvit.lab.training.evaluation import Classifier
from binvit.lab.training.model import CheckpointInfo
from binvit.lab.trials.store import read_result_file
from binvit.lab.trials.trial import Trial
from binvit.nn import round_vectors
from binvit.packed import Card, PackedViT, load, pack, save
from binvit.packed.files import is_packed
from binvit.packed.shipped import find_model

Skip = Callable[[str], None]
"""Told in a sentence what is left out; without one, what is no image ends the prediction with an error."""

BATCH_SIZE = 32


def image_files(path: Path, skip: Skip | None = None) -> list[Path]:
    """Return the image itself, or all images of a folder and the folders in it, sorted by name.

    Links are followed, hidden files and folders are left out, as in training.

    Args:
        path: an image or a folder.
        skip: told of files in the folder that are no images.

    Raises:
        FileNotFoundError: there is no such file or folder, or no image in it.
        ValueError: the path leads to something that is neither.
    """
    if not path.is_dir():
        return [require_regular(path, "image or folder")]
    files = visible_files(path)
    found = [file for file in files if is_readable(file) and file.is_file()]
    if not found:
        raise FileNotFoundError(f"The folder {path} holds no image that this machine's Pillow can read.")
    others = sorted(set(files) - set(found))
    if others and skip is not None:
        many = f"{len(others)} files that are no images, such as" if len(others) > 1 else "what is no image:"
        skip(f"Skipped {many} {others[0]}.")
    return found


def open_model(path: Path) -> Classifier:
    """Open a model that `binvit train` has kept, `binvit pack` has packed, or the package brings.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is neither, is damaged, or does not say what its images look like.
    """
    path = find_model(path)
    if not is_packed(path):
        network, info = load_checkpoint(path)
        return Classifier(network, info.classes, info.image_size, info.mean, info.std)
    packed = load(path)
    packed.preprocess([])  # refuses at once if images cannot be prepared
    plan = packed.blueprint
    if not plan.vit.num_classes or not plan.vit.global_pool:
        raise ValueError(f"The model {path} has no head that tells classes.")
    classes = packed.classes or [f"class {number}" for number in range(plan.vit.num_classes)]
    return Classifier(packed, classes, min(plan.vit.img_size), plan.mean, plan.std)


def open_packed(path: Path) -> PackedViT:
    """Open a packed model, or pack a model that `binvit train` has kept.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is neither, or is damaged.
    """
    path = find_model(path)
    if is_packed(path):
        return load(path)
    network, info = load_checkpoint(path)
    return pack(network, classes=info.classes, mean=info.mean, std=info.std, card=_card(path, info))


def _card(path: Path, info: CheckpointInfo, licence: str = "") -> Card:
    """Say what is known of a model that `binvit train` has kept; its result lies beside it."""
    if info.trial is None:
        return Card(recipe=info.recipe.name, licence=licence)
    trial = Trial.from_dict({name: value for name, value in info.trial.items() if name != "id"})
    try:  # by its name, which needs neither its images nor the rates of today
        accuracy = read_result_file(path.with_name(f"{info.trial['id']}.json")).test_accuracy
    except (OSError, KeyError, ValueError):  # a foreign file may name anything
        accuracy = None
    if trial.evaluate_on != "test":  # of images that something was chosen by
        accuracy = None
    return Card(data=trial.dataset, recipe=trial.describe(), accuracy=accuracy, seeds=(trial.seed,), licence=licence)


def pack_checkpoint(model: Path, out: Path, exact: bool = False, float16: bool = False, licence: str = "") -> PackedViT:
    """Pack a model that `binvit train` has kept, with its class names and the normalization of its images.

    Args:
        model: the checkpoint.
        out: the packed file.
        exact: as in `binvit.pack`.
        float16: pack what `binvit.round_vectors` makes of the model.
        licence: of the weights, for the model card.

    Returns:
        The packed model.
    """
    network, info = load_checkpoint(model)
    if float16:
        network = round_vectors(network)
    card = _card(model, info, licence)
    packed = pack(network, exact=exact, classes=info.classes, mean=info.mean, std=info.std, card=card)
    save(packed, out)
    return packed


def predict_files(
    classifier: Classifier, images: Sequence[Path], top: int = 1, skip: Skip | None = None
) -> Iterator[tuple[Path, list[tuple[str, float]]]]:
    """Predict the classes of image files, in batches, while other threads decode the next ones.

    Under a scheme whose scales look at the whole batch, each image is a batch of its own, so that its neighbours cannot
    change what the model sees in it.

    Args:
        classifier: what `open_model` returned.
        images: the files.
        top: how many classes to return per image, likeliest first.
        skip: told of files that cannot be read, which are left out.

    Yields:
        The file, and pairs of class name and probability.

    Raises:
        FileNotFoundError: an image is missing and `skip` is not given.
        ValueError: an image cannot be read and `skip` is not given.
    """
    size = 1 if classifier.reads_batches else BATCH_SIZE
    top = min(top, len(classifier.classes))
    with ThreadPoolExecutor(max_workers=torch.get_num_threads()) as decoders:
        waiting: deque[list[tuple[Path, Future[Tensor]]]] = deque()
        start, ahead = 0, max(2, 2 * BATCH_SIZE // size)
        try:
            while waiting or start < len(images):
                while start < len(images) and len(waiting) < ahead:
                    batch = images[start : start + size]
                    waiting.append([(path, decoders.submit(_prepare, classifier, path)) for path in batch])
                    start += size
                read = []
                for path, image in waiting.popleft():
                    try:
                        read.append((path, image.result()))
                    except (ValueError, OSError) as error:
                        if skip is None:
                            raise
                        why = getattr(error, "strerror", None)  # of the system, whose own text repeats the name
                        skip(f"Skipped {path}: {f'{why}.' if why else error}")
                if read:
                    shares_of_all = classifier.from_tensor(torch.cat([image for _, image in read]))
                    if shares_of_all.isnan().any():  # pixels of a file are finite
                        raise ValueError("The model gives no numbers: its normalization or weights are out of range.")
                    found = shares_of_all.topk(top)
                    for (path, _), shares, numbers in zip(
                        read, found.values.tolist(), found.indices.tolist(), strict=True
                    ):
                        names = [classifier.classes[number] for number in numbers]
                        yield path, list(zip(names, shares, strict=True))
        finally:
            decoders.shutdown(cancel_futures=True)  # whoever stops early does not wait for images nobody looks at


def written(predictions: Iterable[tuple[Path, list[tuple[str, float]]]], form: str | None = None) -> Iterator[str]:
    """Write predictions line by line, as they come.

    Args:
        predictions: what `predict_files` yields.
        form: "csv" (columns image, rank, class, probability), "json" (a list of images with their classes) or, by
            default, text.

    Yields:
        Lines without their ends.

    Raises:
        ValueError: there is no prediction.
    """
    count = 0
    for count, (path, classes) in enumerate(predictions, 1):
        if form == "csv":
            if count == 1:
                yield "image,rank,class,probability"
            for rank, (name, probability) in enumerate(classes, 1):
                row = io.StringIO()
                csv.writer(row, lineterminator="\n").writerow([path, rank, name, f"{probability:.6f}"])
                yield row.getvalue()[:-1]  # without an end, line breaks in names would not be quoted
        elif form == "json":
            found = [{"class": name, "probability": round(probability, 6)} for name, probability in classes]
            yield ("[" if count == 1 else ",") + json.dumps({"image": str(path), "classes": found}, ensure_ascii=False)
        else:
            yield f"{path}: " + ", ".join(f"{name} {probability:.3f}" for name, probability in classes)
    if not count:
        raise ValueError("None of the images can be read.")
    if form == "json":
        yield "]"


def _prepare(classifier: Classifier, path: Path) -> Tensor:
    return classifier.tensor([open_image(path)])  # one image at a time stays in a core's cache
