"""Files that other processes may read: written under a temporary name, then renamed."""

import os
import secrets
from pathlib import Path


def atomic_write(path: str | Path, content: str | bytes) -> Path:
    """Write a file so that a reader sees either the old content or all of the new one.

    Args:
        path: the file; missing parent folders are made.
        content: text (stored as UTF-8) or bytes.

    Returns:
        The path written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())  # a rename that survives a power cut must not point at an empty file
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


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
