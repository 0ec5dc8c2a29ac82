"""Weights that training starts from: a local file, or those that timm downloads."""

from __future__ import annotations

import hashlib
import http.client
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import huggingface_hub
import safetensors.torch
import timm
import torch
from safetensors import SafetensorError
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn

from binvit.files import is_of_system, is_shortage
from binvit.images import require_regular
from binvit.lab.data.sources import expanded
from binvit.nn.official_gsb import read_saved, require_plain

_HEADS = ("head", "head_dist")
_TOKENS = ("cls_token", "dist_token", "reg_token")
_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")
_REACH_SECONDS = 5
_CLIENTS = ("httpcore", "httpx", "huggingface_hub", "requests", "urllib3")


def file_hash(path: str | Path, what: str = "weights") -> str:
    """Return "sha256:" and the hexadecimal SHA-256 of a file's content.

    Args:
        path: the file.
        what: what it holds, for the errors.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no regular file.
    """
    with open(require_regular(expanded(path), f"file of {what}"), "rb") as file:
        return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"


def find_weights(expected_hash: str, folder: str | Path | None) -> str:
    """Return the file of weights in a folder that has a hash, whatever its name.

    Args:
        expected_hash: what `file_hash` returns for it.
        folder: where to look, its folders left out; None looks nowhere.

    Returns:
        Its path.

    Raises:
        FileNotFoundError: there is none.
    """
    place = expanded(folder) if folder else None
    files = sorted(place.iterdir()) if place and place.is_dir() else []
    for path in files:
        if path.suffix in _SUFFIXES and path.is_file() and file_hash(path) == expected_hash:
            return str(path)
    where = f", or put it into the folder {folder}" if folder else ""
    raise FileNotFoundError(f"The trial starts from weights with the hash {expected_hash}; give their file{where}.")


def load_weights(model: VisionTransformer, path: str | Path, expected_hash: str = "") -> None:
    """Fill a model with the weights of a file in timm's layout; position embeddings are resized to its patches.

    A head for other classes is left out, so that the model keeps its new one.

    Args:
        model: any timm vision transformer.
        path: a safetensors file, or a state that torch has saved (tensors only, also inside "model" or "state_dict").
        expected_hash: what `file_hash` has to return; "" takes any.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file cannot be read, is another one, or does not fit the model.

    References:
        Touvron et al., Training data-efficient image transformers, ICML 2021 (bicubic resizing of positions).
    """
    path = expanded(path)
    if expected_hash and file_hash(path) != expected_hash:
        raise ValueError(f"The weights {path} are not those that the trial names: their hash is not {expected_hash}.")
    state = _read(path)
    if any("_binarizer." in name for name in state):
        raise ValueError(f"The weights {path} are a binarized model's; a training starts from those of a float model.")
    try:
        state = checkpoint_filter_fn(dict(state), model, adapt_layer_scale=True)
    except Exception as error:  # tensors of any name and shape come in, and timm asserts, indexes and reshapes
        why = _other_tokens(state, model.state_dict()) or _first_line(error)
        raise ValueError(f"The weights {path} do not fit the model ({why}).") from None
    wanted = model.state_dict()
    for name in [name for name in state if name.split(".")[0] in _HEADS]:
        if name not in wanted or state[name].shape != wanted[name].shape:
            del state[name]
    for name in (*state, *wanted):
        if name not in wanted or (name not in state and name.split(".")[0] not in _HEADS):
            whose = "the model has none" if name not in wanted else "they have none"
            raise ValueError(f"The weights {path} are another model's: of the tensor {name!r} {whose}.")
        if name in state and state[name].shape != wanted[name].shape:
            shapes = f"{tuple(state[name].shape)}, expected {tuple(wanted[name].shape)}"
            raise ValueError(f"The weights {path} are another model's: {name!r} has the shape {shapes}.")
    model.load_state_dict(wanted | state)


def _other_tokens(given: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]) -> str:
    """Say which tokens beside the patches differ, and so the positions; "" if none do."""
    found, needed = (
        {name: state[name].shape[-2] for name in _TOKENS if name in state and state[name].ndim > 1}
        for state in (given, wanted)
    )
    if found == needed:
        return ""
    texts = (", ".join(f"{n} of {name}" for name, n in tokens.items()) or "none" for tokens in (found, needed))
    return "their tokens beside the patches are {}, the model's {}".format(*texts)


def create_pretrained(name: str, **options: Any) -> torch.nn.Module:
    """Build a timm model with timm's pretrained weights, from the cache of the Hugging Face Hub or by a download.

    Args:
        name: of the model.
        **options: of `timm.create_model`.

    Raises:
        FileNotFoundError: the weights are not on this machine and cannot be downloaded, which is found out at once.
        ValueError: timm has none for this model, or those in the cache are damaged.
    """
    config = timm.get_pretrained_cfg(name)
    if config is None or not config.has_weights:
        raise ValueError(f"timm has no pretrained weights for {name!r}; its names with weights end with a tag.")
    repository = config.hf_hub_id or ""
    cached = huggingface_hub.try_to_load_from_cache(repository, "model.safetensors") if repository else None
    if isinstance(cached, str):
        try:
            return timm.create_model(name, pretrained=True, pretrained_cfg_overlay={"file": cached}, **options)
        except SafetensorError as error:
            raise ValueError(f"The pretrained weights {cached} are damaged ({_first_line(error)}).") from None
    try:
        _require_network()
        return timm.create_model(name, pretrained=True, **options)
    except Exception as error:
        if is_shortage(error) or not _is_of_network(error):
            raise
        file = f"model.safetensors of the Hugging Face repository {repository}" if repository else str(config.url)
        raise FileNotFoundError(
            f"The pretrained weights of {name!r} are not on this machine and cannot be downloaded "
            f"({_first_line(error)}); give their file with --weights (the recipe's weights): {file}."
        ) from None


def _require_network() -> None:
    """Raise an OSError if the Hub does not answer; the download itself would try again for most of a minute."""
    try:
        request = urllib.request.Request(huggingface_hub.constants.ENDPOINT, method="HEAD")
        urllib.request.urlopen(request, timeout=_REACH_SECONDS).close()
    except urllib.error.HTTPError:
        return  # it answers
    except (
        urllib.error.URLError,
        http.client.HTTPException,
        ValueError,
    ) as error:  # the last for an endpoint of no URL
        raise OSError(f"no connection: {getattr(error, 'reason', error)}") from None


def _is_of_network(error: Exception) -> bool:
    """Say whether a download has failed; the Hub's library has errors of its own, and those of its HTTP client."""
    return isinstance(error, OSError) or type(error).__module__.partition(".")[0] in _CLIENTS


def _read(path: Path) -> dict[str, torch.Tensor]:
    require_regular(path, "file of weights")
    try:
        if path.suffix == ".safetensors":
            # Its own reader of files takes too many open files for a missing one.
            state: Any = safetensors.torch.load(path.read_bytes())
        else:
            state = read_saved(path)
    except Exception as error:  # zip, pickle and safetensors have errors of their own for damaged files
        if is_of_system(error):
            raise
        raise ValueError(f"{path} holds no weights: no safetensors file or PyTorch state of tensors alone.") from None
    for key in ("model", "state_dict"):
        state = state.get(key, state) if isinstance(state, Mapping) else None
    if not isinstance(state, Mapping) or not state or not all(isinstance(name, str) for name in state):
        raise ValueError(f"{path} holds no weights: expected a mapping of names to tensors.")
    for name, tensor in state.items():
        if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
            raise ValueError(f"{path} holds no weights: {name!r} is no tensor of floating-point numbers.")
    require_plain(path, cast("Mapping[str, torch.Tensor]", state))
    return {name: tensor.float() for name, tensor in state.items()}


def _first_line(error: Exception) -> str:
    return str(error).split("\n")[0].strip().rstrip(".") or type(error).__name__
