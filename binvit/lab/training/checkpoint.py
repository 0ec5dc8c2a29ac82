"""Checkpoints of trained models: one safetensors file with everything needed to rebuild the model in its header.

The header is one entry, since safetensors would write several in an order that changes from run to run, and begins
with a checksum of itself and all tensors: equal models are equal files, and no flipped bit passes for a weight.
"""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from timm.models.vision_transformer import VisionTransformer

from binvit.config import check_type, read_json, show
from binvit.files import atomic_write
from binvit.images import require_regular
from binvit.lab.training.model import CheckpointInfo, new_model
from binvit.nn.convert import fill_buffers
from binvit.packed.files import checksum

_KEY = "binvit checkpoint"
_VERSION = 2


def save_checkpoint(path: str | Path, model: torch.nn.Module, info: CheckpointInfo) -> Path:
    """Save a model of `binvit.binarize` with what is needed to rebuild and use it.

    Args:
        path: the safetensors file.
        model: the model.
        info: its description; recipe, classes and image size must be those the model was built with.

    Returns:
        The path written.

    Raises:
        ValueError: the model is not the one that the description makes, or an argument is of another type.
    """
    check_type("path", path, str | os.PathLike, "a path")
    check_type("model", model, torch.nn.Module, "a model of binvit.binarize()")
    check_type("info", info, CheckpointInfo, "a CheckpointInfo")
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in model.state_dict().items()}
    _check_fits(model, info, tensors)
    header = {
        "version": _VERSION,
        "trial": info.trial,
        "recipe": info.recipe.to_dict(),
        "scheme": info.scheme.to_dict(),
        "classes": list(info.classes),
        "mean": list(info.mean),
        "std": list(info.std),
        "image_size": info.image_size,
    }
    text = json.dumps(header)
    return atomic_write(path, save(tensors, {_KEY: f"{_checksum(text, tensors)} {text}"}))


def _check_fits(model: torch.nn.Module, info: CheckpointInfo, tensors: Mapping[str, torch.Tensor]) -> None:
    if getattr(model, "scheme", None) != info.scheme:
        raise ValueError(f"The model's scheme is not that of info, {info.scheme.name!r}.")
    what = "The model does not fit info"
    _check_same(what, tensors, _shapes(what, info, tensors).state_dict())


def _checksum(text: str, tensors: Mapping[str, torch.Tensor]) -> str:
    return checksum({"header": text}, tensors)


def load_checkpoint(path: str | Path) -> tuple[torch.nn.Module, CheckpointInfo]:
    """Load a model saved by `save_checkpoint`.

    Args:
        path: the safetensors file.

    Returns:
        The model in evaluation mode and its description.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated or damaged, no checkpoint of binvit, or its tensors do not fit its header.
    """
    info, tensors = read_checkpoint(path)
    what = f"The checkpoint {path} does not fit its own header"
    model = _shapes(what, info, tensors)
    _check_same(what, tensors, model.state_dict())
    floats = {name: tensor.float() for name, tensor in tensors.items() if tensor.is_floating_point()}
    model.load_state_dict(tensors | floats, assign=True)
    fill_buffers(model)
    return model.eval(), info


def _check_same(what: str, tensors: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    for name in [*expected, *tensors]:
        if name not in tensors or name not in expected:
            raise ValueError(f"{what}: it has {'no' if name in expected else 'an unexpected'} tensor {name!r}.")
        if tensors[name].shape != expected[name].shape:
            shapes = f"shape {tuple(tensors[name].shape)}, expected {tuple(expected[name].shape)}"
            raise ValueError(f"{what}: {name!r} has {shapes}.")


def _shapes(what: str, info: CheckpointInfo, tensors: Mapping[str, torch.Tensor]) -> VisionTransformer:
    """Build the model that a header describes without memory for its tensors: the header may claim any size."""
    blocks = {found[1] for name in tensors if (found := re.match(r"blocks\.(\d+)\.", name))}
    if info.recipe.model is None and info.recipe.depth != len(blocks):  # every block takes time
        raise ValueError(f"{what}: depth is {info.recipe.depth}, but the tensors are those of {len(blocks)} blocks.")
    try:
        with torch.device("meta"):
            return new_model(info)
    except (ArithmeticError, AssertionError, RuntimeError, TypeError) as error:
        reason = f"{error}".partition("\n")[0] or type(error).__name__
        raise ValueError(f"{what}, which describes no model that can be built ({reason}).") from None


def read_checkpoint(path: str | Path) -> tuple[CheckpointInfo, dict[str, torch.Tensor]]:
    """Read what `load_checkpoint` makes a model of: its description and its tensors, checked against their checksum.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated or damaged, or no checkpoint of binvit.
    """
    check_type("path", path, str | os.PathLike, "a path")
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"There is no checkpoint {path}.")
    require_regular(path, "checkpoint")
    content = path.read_bytes()  # safetensors' own reader takes too many open files for a missing one
    try:
        tensors = load(content)
        whole = read_json(content[8 : 8 + int.from_bytes(content[:8], "little")], "Its header")
        metadata = whole.get("__metadata__") or {}
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"The file {path} is truncated or no safetensors file ({error}).") from None
    if metadata.get("format") == _KEY:
        found = show(metadata.get("version"))
        raise ValueError(f"The checkpoint {path} has format version {found}, this release of binvit reads {_VERSION}.")
    if _KEY not in metadata:
        raise ValueError(f"The file {path} is a safetensors file but no checkpoint of binvit.")
    found, _, text = metadata[_KEY].partition(" ")
    if found != _checksum(text, tensors):
        raise ValueError(f"The checkpoint {path} is damaged: its checksum does not fit.")
    return _info(path, text), tensors


def _info(path: Path, text: str) -> CheckpointInfo:
    try:
        header = read_json(text, "it")
        version = header.pop("version", None) if isinstance(header, dict) else None
        if type(version) is not int or version != _VERSION:
            raise ValueError(f"it has format version {show(version)}, this release of binvit reads {_VERSION}.")
        return CheckpointInfo.from_dict(header)
    except ValueError as error:
        raise ValueError(f"The checkpoint {path} has a damaged header: {error}") from None
