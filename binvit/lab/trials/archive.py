"""The archive: finished trials as lines of text that are committed, and the data sets they were trained on."""

from __future__ import annotations

import csv
import functools
import io
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from filelock import FileLock

from binvit.config import read_json, show
from binvit.files import atomic_write
from binvit.lab.data import sources
from binvit.lab.data.datasets import ImageData, blank_data, load_data
from binvit.lab.data.fingerprint import require_present
from binvit.lab.data.label_noise import Matrix, pixel_confusion
from binvit.lab.data.sources import locate, read_source, split_name
from binvit.lab.data.write import command_of
from binvit.lab.trials.history import in_columns, in_records, thinned
from binvit.lab.trials.store import OutdatedResult, TrialResult, check_current
from binvit.lab.trials.trial import Trial, teacher_trial

# Kept in full by each line's scheme; a line needs no description.
_UNTOLD = ("description", "reference")
# Where files lay on the machine that trained; their hashes stay.
_PLACES = ("weights", "teacher")


@dataclass(frozen=True)
class DataSet:
    """A data set of archived trials.

    Args:
        name: of the archive's file, and of the data where they are absent.
        fingerprint: of its images, labels and splits.
        classes: how many there are.
        train: number of training images.
        val: number of validation images.
        test: number of test images.
        command: what makes the file.
    """

    name: str
    fingerprint: str
    classes: str = ""
    train: str = ""
    val: str = ""
    test: str = ""
    command: str = ""


def find(trial: Trial, archive: str | Path) -> TrialResult | None:
    """Return a trial's result from an archive, None if it is not there.

    Where the data are absent, those that the archive knows under the same name are meant.

    Args:
        trial: the configuration.
        archive: the folder with data.csv and trials/.
    """
    fingerprint = known_fingerprint(trial, archive)
    if fingerprint is None:
        return None
    for name in [item.name for item in read_data(archive) if item.fingerprint == fingerprint]:
        path = _path(archive, name)
        values = _line_of(trial, fingerprint, _lines(path))
        if values is not None:
            result = _result(values, path)
            result = result if result.trial == trial else replace(result, trial=trial)  # its images may lie elsewhere
            try:
                check_current(result, trial, fingerprint, f"The archived trial {result.id}")
            except OutdatedResult:
                continue
            return result
    return None


def _line_of(trial: Trial, fingerprint: str, lines: Mapping[str, dict[str, Any]]) -> dict[str, Any] | None:
    """Return a trial's line; an older one of a distilled trial, which names no teacher, had the one archived beside."""
    found = lines.get(trial.identity(fingerprint))
    if found is None and trial.get_recipe().trains_teacher and teacher_trial(trial).identity(fingerprint) in lines:
        return lines.get(trial.untaught_identity(fingerprint))
    return found


def known_fingerprint(trial: Trial, archive: str | Path) -> str | None:
    """Return the fingerprint of a trial's data; where they are absent, of those that an archive knows by their name.

    Args:
        trial: the configuration.
        archive: the folder with data.csv and trials/.

    Returns:
        The fingerprint; None if the data are absent and the archive does not know them.
    """
    try:
        return trial.fingerprint
    except FileNotFoundError:
        return next((item.fingerprint for item in _namesakes(trial.dataset, archive)), None)


def _namesakes(dataset: str, archive: str | Path) -> list[DataSet]:
    """Return what an archive knows under the name of a data set, of the same kind: files, a folder, an official set."""
    kind, name = split_name(dataset)[0], data_name(dataset)
    found = [item for item in read_data(archive) if item.name == name]
    kinds = {item: _kind(_path(archive, item.name)) for item in found}
    return [item for item in found if kinds[item] in (None, kind)]


def _kind(path: Path) -> str | None:
    first = next(iter(_lines(path).values()), None)
    return None if first is None else str(first["trial"].get("dataset")).partition(":")[0]


def is_present(dataset: str, root: str | Path | None = None) -> bool:
    """Say whether the files of a data set are there."""
    try:
        require_present(dataset, root)
    except FileNotFoundError:
        return False
    return True


def counted_data(
    dataset: str,
    samples_per_class: int | None = None,
    *,
    root: str | Path | None = None,
    image_size: int | None = None,
    archive: str | Path,
) -> ImageData:
    """Load an embedded data set, or blank images in the number that an archive knows.

    Files are not looked at, so that an archive says the same whether they are there or not.

    Args:
        dataset: as `load_data` takes it.
        samples_per_class: likewise.
        root: likewise.
        image_size: likewise.
        archive: the folder with data.csv and trials/.

    Raises:
        FileNotFoundError: the archive does not know the data set.
    """
    if locate(dataset, root)[1] is None:
        return load_data(dataset, samples_per_class, root=root, image_size=image_size)
    known = (item for item in _namesakes(dataset, archive) if item.train)
    counts = next(((int(item.classes or 0), int(item.train), int(item.test or 0)) for item in known), None)
    return blank_data(dataset, samples_per_class, root, image_size, counts)


def confusion(dataset: str, data: ImageData, archive: str | Path | None = None) -> Matrix | None:
    """Return which classes of a data set look alike (`pixel_confusion`).

    Args:
        dataset: as `load_data` takes it.
        data: its images.
        archive: whose trials with class-conditional noise tell the matrix, if `counted_data` has given blank images.

    Returns:
        The matrix; None if no archived trial tells it.
    """
    if not archive or locate(dataset, None)[1] is None:
        return pixel_confusion(data.train, len(data.classes))
    path = _path(archive, data_name(dataset))
    trials = (_result(values, path).trial for values in _lines(path).values() if values["trial"].get("label_noise"))
    return next((trial.noise for trial in trials if not isinstance(trial.noise, str)), None)


def add(results: Iterable[TrialResult], archive: str | Path) -> int:
    """Add finished trials to an archive; lines are sorted, and a trial that is there already stays as it is.

    A line that no longer says what its trial is, since a default has changed, is replaced. Several processes may add to
    one archive: one waits until another has written.

    Args:
        results: what was measured.
        archive: the folder with data.csv and trials/; made if it is absent.

    Returns:
        How many were new.
    """
    Path(archive).mkdir(parents=True, exist_ok=True)
    with FileLock(Path(archive) / ".lock"):
        data = read_data(archive) if (Path(archive) / "data.csv").exists() else []
        sorted_by_name: dict[str, dict[str, TrialResult]] = {}
        for result in results:
            item = next((item for item in data if item.fingerprint == result.fingerprint), None)
            if item is None:
                item = _describe(result, {item.name for item in data})
                data.append(item)
            sorted_by_name.setdefault(item.name, {})[result.id] = result
        new = 0
        for name, found in sorted_by_name.items():
            path = _path(archive, name)
            old = {
                key: values for key, values in _lines(path).items() if not _is_outdated(values, found.get(key), path)
            }
            lines = {key: _text(values) for key, values in old.items()}
            before = len(lines)
            lines = {key: _line(result) for key, result in found.items()} | lines
            new += len(lines) - before
            if len(lines) > before:
                atomic_write(path, "".join(f"{lines[key]}\n" for key in sorted(lines, key=_order)))
        _write_data(sorted(data, key=lambda item: item.name), archive)
    return new


def _is_outdated(values: Mapping[str, Any], new: TrialResult | None, path: Path) -> bool:
    """Say whether a stored line was made with another recipe or scheme than a new result of the same identity."""
    if new is None:
        return False
    try:
        check_current(_result(dict(values), path), new.trial, new.fingerprint, f"The archived trial {new.id}")
    except OutdatedResult:
        return True
    return False


def read_data(archive: str | Path) -> list[DataSet]:
    """Return the data sets that an archive names in its data.csv.

    Raises:
        FileNotFoundError: there is no such folder, or no such file in it.
        ValueError: the file is no table in UTF-8, has other columns, names that lead elsewhere, or counts that are no
            numbers or too large ones.
    """
    path = Path(archive) / "data.csv"
    if not path.is_file():
        raise FileNotFoundError(f"There is no archive {archive}: {path} is not there.")
    columns = [item.name for item in fields(DataSet)]
    try:
        rows = list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8"))))
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no readable table of data sets ({error}).") from None
    if any(list(row) != columns or None in row.values() for row in rows):
        raise ValueError(f"{path} must have the columns {', '.join(columns)}.")
    for row in rows:
        if not re.fullmatch(r"[^/\\:\0]+", row["name"]) or row["name"] in (".", ".."):
            raise ValueError(f"{path} names a data set {show(row['name'])}, which is no plain name of a file.")
        for name in ("classes", "train", "val", "test"):
            if not re.fullmatch(r"([0-9]{1,8})?", row[name]):
                raise ValueError(
                    f"{path} counts {name} of {show(row['name'])} as {show(row[name])}, expected at most 8 digits."
                )
    return [DataSet(**row) for row in rows]


def data_name(dataset: str) -> str:
    """Return the name of a data set in an archive: its kind, or the name of its file or folder."""
    name = sources.data_name(dataset)
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or split_name(dataset)[0]


def _path(archive: str | Path, name: str) -> Path:
    return Path(archive) / "trials" / f"{name}.jsonl"


def _describe(result: TrialResult, taken: set[str]) -> DataSet:
    """Return a new row of data.csv; counts stay empty where the data are no longer there."""
    trial, name = result.trial, data_name(result.trial.dataset)
    if name in taken:
        name = f"{name}-{result.fingerprint.partition(':')[2][:6]}"
    try:
        if trial.fingerprint != result.fingerprint:  # they have changed since
            return DataSet(name, result.fingerprint)
        source = read_source(trial.dataset, trial.root)
    except FileNotFoundError:
        return DataSet(name, result.fingerprint)
    counts = {split: str(len(images)) for split, images in source.splits.items() if split in ("train", "val", "test")}
    command = command_of(trial.dataset, trial.root)
    return DataSet(name, result.fingerprint, str(len(source.classes)), command=command, **counts)


def _write_data(data: Iterable[DataSet], archive: str | Path) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, [item.name for item in fields(DataSet)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(map(asdict, data))
    atomic_write(Path(archive) / "data.csv", text.getvalue())


def _order(key: str) -> tuple[str, int, str]:
    """Sort by scheme and recipe, then by seed."""
    name, seed, digest = key.rsplit("-", 2)
    return name, int(seed), digest


def _line(result: TrialResult) -> str:
    """Return a result as one line, its history rounded to four digits."""
    values = {"id": result.id} | result.to_dict()
    values["trial"].pop("root")
    for options in (values["trial"]["recipe_options"], values["recipe"]):
        options |= {name: "" for name in _PLACES if name in options}
    values["scheme"] = {name: value for name, value in values["scheme"].items() if name not in _UNTOLD}
    values["history"] = {
        name: [float(f"{record[name]:.4g}") if isinstance(record[name], float) else record[name] for record in history]
        for history in [values["history"]]
        for name in history[0]
    }
    return _text(values)


def _text(values: Mapping[str, Any]) -> str:
    return json.dumps({**values, "history": in_columns(thinned(values["history"]))}, separators=(",", ":"))


def _lines(path: Path) -> dict[str, dict[str, Any]]:
    """Return the lines of an archive's file by the identities of their trials."""
    if not path.is_file():
        return {}
    status = path.stat()
    return _parsed(path, status.st_mtime_ns, status.st_size)


@functools.lru_cache(maxsize=16)
def _parsed(path: Path, time: int, size: int) -> dict[str, dict[str, Any]]:
    found = {}
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8 ({error}).") from None
    for number, line in enumerate(text.splitlines(), 1):
        values = read_json(line, f"Line {number} of {path}")
        key = values.get("id") if isinstance(values, dict) and isinstance(values.get("trial"), dict) else None
        if not isinstance(key, str) or not re.fullmatch(r".{1,200}-[0-9]{1,19}-[0-9a-f]{16}", key):
            raise ValueError(f"Line {number} of {path} is no archived trial.")
        found[key] = values
    return found


def _result(values: dict[str, Any], path: Path) -> TrialResult:
    try:
        history = values.get("history")
        if not isinstance(history, dict) or not history:
            raise ValueError("its history must have columns of one length.")
        return TrialResult.from_dict(values | {"history": in_records(history)})
    except (TypeError, ValueError) as error:
        raise ValueError(f"The trial {values['id']} of {path} is damaged: {error}") from None
