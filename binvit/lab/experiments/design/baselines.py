"""What methods that know nothing but pixels reach on the images of a training."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from binvit.lab.data.datasets import load_data
from binvit.lab.data.images import ImageSet
from binvit.lab.experiments.design.plan import Run
from binvit.lab.trials.archive import find, is_present, known_fingerprint
from binvit.lab.trials.measurements import add_measurements, read_measurements
from binvit.lab.trials.trial import Trial

BASELINES: dict[str, Callable[[], Any]] = {
    "nearest neighbour": lambda: KNeighborsClassifier(1),
    "logistic regression": lambda: LogisticRegression(max_iter=200),
}
LARGEST = 64  # pixels of a side: larger images are made smaller, whose pixels say as much to these methods
_TABLE = "06_baselines"  # of the archive
_SAMPLE = ["samples_per_class", "seed"]
_NO_SCHEME: dict[str, Any] = {"scheme": "float", "scheme_options": {}}


def baselines(runs: Sequence[Run], archive: str | Path | None = None) -> pd.DataFrame:
    """Classify pixels with the two simplest methods there are, on the images of every training.

    Args:
        runs: a plan; trainings of the same images count once, and those of all images once for all seeds.
        archive: folder of archived measurements, which are read instead; those that are not there have no row.

    Returns:
        One row per kind of images, number of images, seed and method: condition, data, samples_per_class (0 for all),
        seed, test_accuracy, train_accuracy and gap.
    """
    columns = ["condition", "data", *_SAMPLE, "test_accuracy", "train_accuracy", "gap"]
    same_images = dict.fromkeys((run.data, _images_of(run.trial)) for run in runs)
    if archive:
        known = read_measurements(archive, _TABLE).reindex(columns=["fingerprint", *columns])
        asked = [(data, known_fingerprint(t, archive), t.samples_per_class or 0, t.seed) for data, t in same_images]
        wanted = pd.DataFrame(asked, columns=["data", "fingerprint", *_SAMPLE]).drop_duplicates()
        return wanted.merge(known.drop(columns="data"), on=["fingerprint", *_SAMPLE])[columns]
    rows = []
    for data, trial in same_images:
        size = trial.get_recipe().image_size
        small = min(size, LARGEST) if size else None
        images = load_data(trial.dataset, trial.samples_per_class, seed=trial.seed, root=trial.root, image_size=small)
        (x, y), (x_test, y_test) = (_pixels(part) for part in (images.train, images.test))
        for name, method in BASELINES.items():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ConvergenceWarning)  # a baseline is what its fixed budget gives
                fitted = method().fit(x, y)
            test, train = fitted.score(x_test, y_test), fitted.score(x, y)
            rows.append((name, data, trial.samples_per_class or 0, trial.seed, test, train, train - test))
    return pd.DataFrame(rows, columns=columns)


def _images_of(trial: Trial) -> Trial:
    seed = trial.seed if trial.samples_per_class else 0  # which draws the samples
    return dataclasses.replace(trial, **_NO_SCHEME, seed=seed)


def archive_baselines(runs: Sequence[Run], archive: str | Path) -> int:
    """Archive the `baselines` of those images that are here and have archived trials to stand beside.

    Args:
        runs: a plan.
        archive: folder of the archive.

    Returns:
        How many sets of images were classified.
    """
    known = read_measurements(archive, _TABLE)
    done = set(map(tuple, known[["fingerprint", *_SAMPLE]].to_numpy().tolist())) if len(known) else set()
    count = 0
    for run in runs:
        trial = run.trial
        if trial.scheme != "float" or not is_present(trial.dataset, trial.root) or find(trial, archive) is None:
            continue
        key = trial.fingerprint, trial.samples_per_class or 0, _images_of(trial).seed
        if key not in done:
            done.add(key)
            rows = baselines([run]).assign(fingerprint=trial.fingerprint).drop(columns="data")
            add_measurements(archive, _TABLE, rows, ["fingerprint", *_SAMPLE, "condition"])
            count += 1
    return count


def measurements_of(runs: Callable[[Any], Sequence[Run]]) -> Callable[[Any, str | Path, str | Path], int]:
    """Return the function of an experiment that archives the `baselines` of its images.

    Args:
        runs: a notebook's parameters -> what it trains.

    Returns:
        Parameters, folder of the results (unused, since pixels are all that is needed), folder of the archive -> how
        many sets of images were classified.
    """
    return lambda p, results_dir, archive: archive_baselines(runs(p), archive)


def _pixels(images: ImageSet) -> tuple[np.ndarray, np.ndarray]:
    pixels = [np.asarray(images[index][0], np.float32).ravel() / 255 for index in range(len(images))]
    return np.stack(pixels), images.labels
