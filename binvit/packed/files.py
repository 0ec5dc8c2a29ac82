"""save() and load(): a packed model is one safetensors file with a JSON header, read through a memory map."""

from __future__ import annotations

import json
import os
import secrets
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from binvit.packed.blueprint import Blueprint
from binvit.packed.vit import PackedViT

KEY = "binvit packed"
"""The one entry of the file's metadata; safetensors would write several in an order that changes from run to run."""
VERSION = 1


def save(model: PackedViT, path: str | Path) -> Path:
    """Write a packed model to one safetensors file.

    Args:
        model: What `pack` or `load` returned.
        path: The file; missing folders are made, and a reader sees either the old file or all of the new one.

    Returns:
        The path.

    Raises:
        ValueError: If the model is not packed.
    """
    if not isinstance(model, PackedViT):
        raise ValueError(f"save() writes a PackedViT, got {type(model).__name__}; use binvit.pack() first.")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        save_file(model.tensors, temporary, pack_header(model))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def pack_header(model: PackedViT) -> dict[str, str]:
    """Return the metadata of a packed model's file."""
    return {KEY: json.dumps({"version": VERSION, "exact": model.exact, "blueprint": model.blueprint.to_dict()})}


def load(path: str | Path, exact: bool | None = None) -> PackedViT:
    """Read a packed model that `save` has written; the file's tensors are mapped into memory, not copied.

    Args:
        path: The file.
        exact: Take the exact path (True) or the fast one (False); by default what the model was packed with.

    Returns:
        The packed model.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is truncated, no packed model, of a later format version, or contradicts itself.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no packed model {path}.")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (OSError, SafetensorError) as error:
        raise ValueError(f"The file {path} is truncated or no safetensors file ({error}).") from None
    if KEY not in metadata:
        raise ValueError(f"The file {path} is a safetensors file, but no packed model of binvit.")
    try:
        header = json.loads(metadata[KEY])
        version = header["version"]
        if version == VERSION:
            blueprint = Blueprint.from_dict(header["blueprint"])
            return PackedViT(blueprint, tensors, exact=header["exact"] if exact is None else exact)
    except (KeyError, TypeError, ValueError, AttributeError, AssertionError) as error:
        raise ValueError(f"The packed model {path} is damaged ({type(error).__name__}: {error}).") from None
    raise ValueError(
        f"The packed model {path} has format version {version}, this release of binvit reads version {VERSION}."
    )


def is_packed(path: str | Path) -> bool:
    """Say whether a file is a packed model, without reading its tensors."""
    try:
        with safe_open(path, framework="pt") as file:
            return KEY in (file.metadata() or {})
    except (OSError, SafetensorError):
        return False
