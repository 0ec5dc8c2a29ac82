"""Files that other processes may read: written under a temporary name, then renamed; and what is left of failures."""

import errno
import os
import platform
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_TEMPORARY = re.compile(r"\..*\.(?P<machine>[^.]*)\.(?P<process>\d+)\.[0-9a-f]{8}\.tmp")
_DAY = 86_400


def is_of_system(error: BaseException) -> bool:
    """Say whether an error of a reader is the system's own: a disk, a limit, a permission, not what the file holds."""
    # A damaged file may send its decoder to before its start, which the system calls an invalid argument.
    return isinstance(error, OSError) and error.errno not in (None, errno.EINVAL)


def is_shortage(error: BaseException) -> bool:
    """Say whether this machine ran out of room or of open files, which is no fault of a file or of a network."""
    numbers = (errno.EDQUOT, errno.EFBIG, errno.EMFILE, errno.ENFILE, errno.ENOSPC)
    return isinstance(error, OSError) and error.errno in numbers


def plain_path(path: str | Path) -> Path:
    """Return a path that a system can take.

    Raises:
        ValueError: it holds a NUL byte.
    """
    if "\0" in str(path):
        raise ValueError(f"A path must not hold a NUL byte, got {str(path)!r}.")
    return Path(path)


def atomic_write(path: str | Path, content: str | bytes) -> Path:
    """Write a file so that a reader, and whoever comes after a power cut, sees either the old content or the new one.

    Args:
        path: the file; missing parent folders are made, a symbolic link stays and its target is written, and the
            permissions of an existing file stay.
        content: text (stored as UTF-8) or bytes.

    Returns:
        The path written.

    Raises:
        ValueError: if the path leads to something that is no plain file, such as a folder or a device, or holds a NUL
            byte.
        OSError: if it cannot be written; the error names the path.
    """
    path, target = plain_path(path), _target(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = _beside(target)
    try:
        with open(temporary, "xb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())  # a rename that survives a power cut must not point at an empty file
        with suppress(FileNotFoundError):
            temporary.chmod(target.stat().st_mode)
        os.replace(temporary, target)
    except OSError as error:
        error.filename, error.filename2 = str(path), None  # a full disk names no file, others the temporary one
        raise
    finally:
        temporary.unlink(missing_ok=True)
    _sync_folder(target.parent)
    return path


def _target(path: str | Path) -> Path:
    target = Path(os.path.realpath(plain_path(path)))
    if target.is_symlink() or (target.exists() and not target.is_file()):
        raise ValueError(f"Expected a plain file to write to, but {path} is a folder, a device, a pipe or a link loop.")
    return target


def require_writable(path: str | Path) -> Path:
    """Return a path that `atomic_write` can write to, as far as it can be told before long work and without a change.

    Raises:
        ValueError: as `atomic_write` does.
        OSError: the folder may not be written in, or cannot be made; the error names the path.
    """
    folder = next(place for place in _target(path).parents if place.exists())
    if not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
    return Path(path)


def _sync_folder(folder: Path) -> None:
    with suppress(OSError):  # not every system lets a folder be opened, nor every file system that it be synchronized
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _beside(target: Path) -> Path:
    """Return a new temporary name that says whose it is; `remove_leftovers` reads it."""
    return target.with_name(f".{target.name[:30]}.{_machine()}.{os.getpid()}.{secrets.token_hex(4)}.tmp")


def _machine() -> str:
    # Containers share a host's name, but not its process numbers.
    namespace = Path("/proc/self/ns/pid")
    return f"{platform.node()}-{namespace.stat().st_ino if namespace.exists() else 0}".replace(".", "-")


def remove_leftovers(folder: str | Path) -> list[Path]:
    """Remove the temporary files and folders that writers left in a folder when they were killed.

    Args:
        folder: the folder, which need not exist; folders of other names inside it are left alone.

    Returns:
        What was removed: that of dead processes of this machine, and of any machine if it is older than a day.
    """
    removed = []
    for path in Path(folder).glob(".*.tmp"):
        found = _TEMPORARY.fullmatch(path.name)
        with suppress(OSError):  # removed by another process, or not ours to remove
            if found and (_is_dead(**found.groupdict()) or time.time() - path.lstat().st_mtime > _DAY):
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink()
                removed.append(path)
    return removed


def _is_dead(machine: str, process: str) -> bool:
    if machine != _machine() or os.name != "posix":
        return False
    try:
        os.kill(int(process), 0)
    except (ProcessLookupError, OverflowError):
        return True
    except PermissionError:
        pass
    return False


@contextmanager
def temporary_folder(parent: str | Path, name: str) -> Iterator[Path]:
    """Make an empty hidden folder for a while; `remove_leftovers` removes that of a process that was killed.

    Args:
        parent: an existing folder.
        name: what the hidden name begins with.

    Yields:
        The folder, which is removed with all that is in it afterwards.
    """
    folder = _beside(Path(parent) / name)
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def made_folders(folder: str | Path) -> Iterator[Path]:
    """Make a folder with those above it; if what is done in it fails, those that were made and are empty go again.

    Folders that were there before, or that another process has made, stay.

    Args:
        folder: the folder, which may exist.

    Yields:
        Its path.

    Raises:
        OSError: it cannot be made.
    """
    folder = Path(folder)
    made: list[Path] = []
    try:
        for place in reversed([place for place in (folder, *folder.parents) if not place.exists()]):
            with suppress(FileExistsError):  # another process was faster, or the name ends with ".."
                place.mkdir()
                made.append(place)
        folder.mkdir(parents=True, exist_ok=True)  # refuses what is no folder
        yield folder
    except BaseException:
        for place in reversed(made):
            with suppress(OSError):  # it holds something
                place.rmdir()
        raise


def set_aside(path: str | Path, label: str) -> Path:
    """Rename a file to `NAME.label` (or `NAME.label2`, ...) so that a new one can take its place.

    Args:
        path: an existing file.
        label: why it is set aside, for instance `corrupt`.

    Returns:
        The new path.
    """
    path = Path(path)
    count = 1
    while (target := path.with_name(f"{path.name}.{label}{count if count > 1 else ''}")).exists():
        count += 1
    os.replace(path, target)
    return target
