"""Folders of images: which files count, for training and for prediction, and the layout SPLIT/CLASS/IMAGE."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NoReturn

from binvit.images import SUFFIXES, is_readable, require_regular, stored_size
from binvit.lab.data.images import ImageSet
from binvit.lab.data.splits import SPLITS, Source, normal_name, split_names

Identity = tuple[int, int]  # of a folder: its device and its number there

# Folders that file managers, archives and disk stations put beside images; they may hold thumbnails of them.
_HIDDEN = ("thumbs.db", "desktop.ini", "__macosx", "@eadir", "$recycle.bin", "lost+found")


def is_hidden(name: str) -> bool:
    """Return whether a file or folder is no content: its name starts with a dot or is one that systems use."""
    return name.startswith(".") or name.lower() in _HIDDEN


def visible_files(folder: Path) -> list[Path]:
    """Return the files of a folder and of the folders in it, sorted by folder and name.

    Hidden files and folders are left out. Links are followed, but no folder is entered twice, nor from within itself.

    Raises:
        PermissionError: a folder may not be read.
    """
    return _visible_files(folder, set())


def _visible_files(folder: Path, others: set[Identity]) -> list[Path]:
    found: list[Path] = []
    seen = _above(folder) | others
    for top, folders, files in os.walk(folder, onerror=_refuse, followlinks=True):
        folders[:] = [name for name in sorted(folders) if not is_hidden(name) and _is_new(Path(top, name), seen)]
        found += [Path(top, name) for name in sorted(files) if not is_hidden(name)]
    return sorted(found, key=lambda path: (str(path.parent), path.name))


def read_folder(location: Path, test: bool = True) -> Source:
    """Read a folder with the layout train/CLASS/IMAGE and the same for test or val, or both.

    Labels follow the names in train/, whichever classes the other splits lack.

    Args:
        location: the folder.
        test: False leaves its test images unread.

    Raises:
        FileNotFoundError: the folder, or train/ in it, is missing.
        ValueError: a class holds nothing that can be read, or one of another split is no class of train.
    """
    for path, what in ((location, "image folder"), (location / "train", "folder of training images")):
        if not path.is_dir():
            raise FileNotFoundError(f"{path} (the {what}) does not exist.")
    names = split_names((name for name in _subfolders(location) if name in SPLITS), str(location))
    folders = {split: _class_folders(location / name) for name, split in names.items()}
    classes = sorted(folders["train"])
    if not classes:
        raise ValueError(f"{location / 'train'} holds no class folders.")
    parts = [folder for split in folders.values() for found in split.values() for folder in found]
    known = {_identity(part) for part in [*parts, *(location / name for name in names)]}
    splits = {}
    for name, split in sorted(names.items(), key=lambda item: ("train", "val", "test").index(item[1])):
        for unknown in sorted(folders[split].keys() - set(classes)):
            raise ValueError(f"{location / name} has the class {unknown!r}, which {location / 'train'} lacks.")
        images: list[Path] = []
        labels: list[int] = []
        for label, class_name in enumerate(classes):
            if class_name in folders[split] and (test or split != "test"):
                own = folders[split][class_name]
                found = _images(own, known - {_identity(folder) for folder in own})
                images += found
                labels += [label] * len(found)
        splits[split] = ImageSet(images, labels, str(location / name))
    return Source(classes, splits)


def _class_folders(folder: Path) -> dict[str, list[Path]]:
    """Return the folders of each class; names that differ by their Unicode form alone are one class."""
    found: dict[str, list[Path]] = {}
    for name in _subfolders(folder):
        try:
            name.encode()
        except UnicodeEncodeError:
            raise ValueError(f"The class folder {folder / name} has a name that is no text in UTF-8.") from None
        found.setdefault(normal_name(name), []).append(folder / name)
    return found


def _subfolders(folder: Path) -> list[str]:
    """Return the names of the visible folders in a folder; links that lead back to where they lie are none."""
    above = _above(folder)
    try:
        names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not is_hidden(entry.name))
    except OSError as error:
        _refuse(error)
    return [name for name in names if _identity(folder / name) not in above]


def _images(folders: list[Path], others: set[Identity]) -> list[Path]:
    """Return the images of one class in one split, of which at least one has to be readable.

    Folders of other classes and splits are not entered, wherever links lead.
    """
    files = [path for folder in folders for path in _visible_files(folder, others) if path.suffix.lower() in SUFFIXES]
    for path in files:
        require_regular(path, "image")
        if not is_readable(path):
            raise ValueError(f"This machine's Pillow cannot read {path.suffix.lower()} images such as {path}.")
    reason = "it holds no file with the ending of an image"
    for path in files:
        try:
            stored_size(path, str(path))
        except ValueError as error:
            reason = f"for example: {str(error).rstrip('.')}"
        else:
            return files
    raise ValueError(f"The class folder {folders[0]} holds no image that can be read ({reason}).")


def _above(folder: Path) -> set[Identity]:
    """Return the identities of a folder and of all that it lies in, by its name and by where links lead."""
    return {_identity(path) for start in (folder.absolute(), folder.resolve()) for path in (start, *start.parents)}


def _is_new(folder: Path, seen: set[Identity]) -> bool:
    identity = _identity(folder)
    new = identity not in seen
    seen.add(identity)
    return new


def _identity(path: Path) -> Identity:
    status = os.stat(path)
    return status.st_dev, status.st_ino


def _refuse(error: OSError) -> NoReturn:
    if isinstance(error, PermissionError):
        raise PermissionError(f"The folder {error.filename} may not be read by this user.") from None
    raise error
