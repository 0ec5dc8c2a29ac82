"""Checkpoints of trained models: one safetensors file with everything needed to rebuild the model in its header."""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from binvit.files import atomic_write
from binvit.lab.training.model import CheckpointInfo, new_model
from binvit.lab.training.recipe import Recipe
from binvit.nn.schemes import Scheme

_FORMAT = "binvit checkpoint"
_VERSION = 1


def save_checkpoint(path: str | Path, model: torch.nn.Module, info: CheckpointInfo) -> Path:
    """Save a model of `binvit.binarize` with what is needed to rebuild and use it.

    Args:
        path: the safetensors file.
        model: the model.
        info: its description; recipe, classes and image size must be those the model was built with.

    Returns:
        The path written.
    """
    header = {
        "trial": info.trial,
        "recipe": info.recipe.to_dict(),
        "scheme": info.scheme.to_dict(),
        "classes": list(info.classes),
        "mean": list(info.mean),
        "std": list(info.std),
        "image_size": info.image_size,
    }
    metadata = {"format": _FORMAT, "version": str(_VERSION)} | {key: json.dumps(item) for key, item in header.items()}
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in model.state_dict().items()}
    return atomic_write(path, save(tensors, metadata))


def load_checkpoint(path: str | Path) -> tuple[torch.nn.Module, CheckpointInfo]:
    """Load a model saved by `save_checkpoint`.

    Args:
        path: the safetensors file.

    Returns:
        The model in evaluation mode and its description.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated, no checkpoint of binvit, or its tensors do not fit its header.
    """
    info, tensors = _read(Path(path))
    model = new_model(info)
    expected = model.state_dict()
    for name in expected | tensors:
        if name not in tensors or name not in expected:
            raise ValueError(
                f"The checkpoint {path} has {'no' if name in expected else 'an unexpected'} tensor {name!r}."
            )
        if tensors[name].shape != expected[name].shape:
            shapes = f"shape {tuple(tensors[name].shape)}, expected {tuple(expected[name].shape)}"
            raise ValueError(f"The checkpoint {path} does not fit its own header: {name!r} has {shapes}.")
    model.load_state_dict(tensors)
    return model.eval(), info


def is_checkpoint(path: str | Path) -> bool:
    """Say whether a file is a checkpoint of `save_checkpoint`, without reading its tensors."""
    try:
        with safe_open(path, framework="pt") as file:
            return (file.metadata() or {}).get("format") == _FORMAT
    except (OSError, SafetensorError):
        return False


def _read(path: Path) -> tuple[CheckpointInfo, dict[str, torch.Tensor]]:
    if not path.is_file():
        raise FileNotFoundError(f"There is no checkpoint {path}.")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (OSError, SafetensorError) as error:
        raise ValueError(f"The file {path} is truncated or no safetensors file ({error}).") from None
    if metadata.get("format") != _FORMAT:
        raise ValueError(f"The file {path} is a safetensors file but no checkpoint of binvit.")
    if metadata.get("version") != str(_VERSION):
        found = metadata.get("version")
        raise ValueError(f"The checkpoint {path} has format version {found}, this release of binvit reads {_VERSION}.")
    try:
        header = {key: json.loads(item) for key, item in metadata.items() if key not in ("format", "version")}
        info = CheckpointInfo(
            recipe=Recipe.from_dict(header["recipe"]),
            scheme=Scheme.from_dict(header["scheme"]),
            classes=tuple(header["classes"]),
            mean=tuple(header["mean"]),
            std=tuple(header["std"]),
            image_size=int(header["image_size"]),
            trial=header.get("trial"),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"The checkpoint {path} has a damaged header ({type(error).__name__}: {error}).") from None
    return info, tensors
