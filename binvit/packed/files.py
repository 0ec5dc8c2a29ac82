"""save() and load(): a packed model is one safetensors file with a JSON header, or the same as bytes."""

from __future__ import annotations

import copyreg
import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load as deserialize
from safetensors.torch import save as serialize
from torch import Tensor

from binvit.config import Config, Switch, check_type, read_json, show
from binvit.files import atomic_write
from binvit.packed.blueprint import Blueprint
from binvit.packed.shipped import find_model
from binvit.packed.vit import PackedViT

KEY = "binvit packed"
"""The one entry of the file's metadata; safetensors would write several in an order that changes from run to run."""
VERSION = 3
_GONE = ("rprelu", "shortcut")  # fields of the schemes of version 2; blocks have other parts now
_READABLE = (2, 3)  # version 2 has no model card and does not say how images are resized


class Header(Config):
    """What a packed file's metadata holds besides version and checksum."""

    exact: Switch
    blueprint: Mapping[str, Any]


def save(model: PackedViT, path: str | Path) -> Path:
    """Write a packed model to one safetensors file.

    Args:
        model: what `pack` or `load` returned.
        path: the file; missing folders are made, and a reader sees either the old file or all of the new one.

    Returns:
        The path.

    Raises:
        ValueError: if the model is not packed, or the path is none.
    """
    if not isinstance(model, PackedViT):
        raise ValueError(f"save() writes a PackedViT, got {type(model).__name__}; use binvit.pack() first.")
    check_type("path", path, str | os.PathLike, "a path")
    return atomic_write(path, to_bytes(model))


def to_bytes(model: PackedViT) -> bytes:
    """Return what the packed model's file holds."""
    return serialize(model.tensors, pack_header(model))


def pack_header(model: PackedViT) -> dict[str, str]:
    """Return the metadata of a packed model's file."""
    content = {"exact": model.exact, "blueprint": model.blueprint.to_dict()}
    return {KEY: json.dumps({"version": VERSION, "checksum": checksum(content, model.tensors)} | content)}


def checksum(content: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """Compute the CRC-32 of everything that a packed file says.

    Args:
        content: the header's entries but version and checksum.
        tensors: the file's tensors.

    Returns:
        Eight hexadecimal digits.
    """
    total = zlib.crc32(json.dumps(content, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        total = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), total)
        total = zlib.crc32(tensor.detach().reshape(-1).view(torch.uint8).numpy().data, total)
    return f"{total:08x}"


def load(path: str | Path, exact: bool | None = None) -> PackedViT:
    """Read a packed model that `save` has written; nothing depends on the file afterwards.

    Args:
        path: the file, or the name of a model that comes with the package, such as "gsb-digits".
        exact: take the exact path (True) or the fast one (False); by default what the model was packed with.

    Returns:
        The packed model.

    Raises:
        FileNotFoundError: if there is no such file or model.
        ValueError: if the file is truncated or damaged, no packed model, of another format version, or contradicts
            itself.
    """
    check_type("path", path, str | os.PathLike, "a path or the name of a model")
    path = find_model(path)
    with open(path, "rb"):  # a file that may not be read is not a damaged one
        pass
    try:
        with safe_open(path, framework="np") as file:  # the header alone, by one open file
            known = KEY in (file.metadata() or {})
    except SafetensorError as error:
        raise ValueError(f"The file {path} is truncated or no safetensors file ({error}).") from None
    if not known:
        raise ValueError(f"The file {path} is a safetensors file, but no packed model of binvit.")
    return from_bytes(path.read_bytes(), exact, f"{path}")


def from_bytes(data: bytes, exact: bool | None = None, name: str = "given as bytes") -> PackedViT:
    """Make a packed model of what `to_bytes` returned.

    Args:
        data: the bytes of a packed file.
        exact: as for `load`.
        name: what errors call the bytes.

    Raises:
        ValueError: as for `load`.
    """
    check_type("data", data, bytes, "the bytes of a packed file")
    try:
        tensors = deserialize(data)
        header = read_json(data[8 : 8 + int.from_bytes(data[:8], "little")], "Its header")["__metadata__"][KEY]
    except (KeyError, SafetensorError, ValueError) as error:
        raise ValueError(f"The file {name} is truncated or no packed model of binvit ({error}).") from None
    content = _read_header(name, header, tensors)
    try:
        made = Header.from_dict(content)
        blueprint = Blueprint.from_dict(_renewed(made.blueprint))
        return PackedViT(blueprint, tensors, exact=made.exact if exact is None else exact)
    except ValueError as error:
        raise ValueError(f"The packed model {name} is damaged: {error}") from None


def _renewed(blueprint: Mapping[str, Any]) -> dict[str, Any]:
    """Return a blueprint without the fields of version 2 that have gone, where they were not used."""
    scheme = blueprint.get("scheme")
    if isinstance(scheme, Mapping):
        scheme = {name: value for name, value in scheme.items() if not (name in _GONE and value is False)}
    return {**blueprint, "scheme": scheme} if scheme is not None else dict(blueprint)


def _read_header(name: str, text: str, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the header's entries but version and checksum, which must fit."""
    content = read_json(text, f"The packed model {name} has a header that")
    version = content.pop("version", None) if isinstance(content, dict) else None
    if type(version) is not int or version not in _READABLE:
        raise ValueError(
            f"The packed model {name} has format version {show(version)}, this release of binvit reads the versions "
            f"{' and '.join(map(str, _READABLE))}."
        )
    if content.pop("checksum", None) != checksum(content, tensors):
        raise ValueError(f"The file {name} is damaged: its checksum does not fit.")
    return content


def is_packed(path: str | Path) -> bool:
    """Say whether a file is a packed model, without reading its tensors."""
    with open(path, "rb"):  # a file that may not be read is not a damaged one
        pass
    try:
        with safe_open(path, framework="np") as file:
            return KEY in (file.metadata() or {})
    except SafetensorError:
        return False


# A pickle is as small as the file: without scratch, folded blocks and compiled code.
copyreg.pickle(PackedViT, lambda model: (from_bytes, (to_bytes(model),)))
