"""Reader of official GSB checkpoints (PyTorch files with the key "model", as the authors' code writes them)."""

from __future__ import annotations

import math
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from timm.models.deit import VisionTransformerDistilled
from torch import Tensor

from binvit.files import is_of_system
from binvit.nn.catalogue import scheme
from binvit.nn.convert import binarize, fill_buffers

_ATTENTION = {
    "clip_query": "query_binarizer.scale",
    "clip_key": "key_binarizer.scale",
    "clip_value": "value_binarizer.scale",
    "clip_value2": "value_binarizer.scale2",
    "clip_value3": "value_binarizer.scale3",
    "clip_attn": "attention_binarizer.scale",
    "clip_attn2": "attention_binarizer.scale2",
    "clip_attn3": "attention_binarizer.scale3",
    "move_q.bias": "query_shift",
    "move_k.bias": "key_shift",
    "move_v.bias": "value_shift",
    "move_att.bias": "bias.values",
}
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_SUFFIXES = {
    "move.bias": "shift",
    "input_clip_val": "input_binarizer.scale",
    "weight_clip_val": "weight_binarizer.scale",
}


def _names(depth: int) -> dict[str, str]:
    """Map every key of an official checkpoint to its name in a binarized timm model."""
    names = {key: key for key in ("cls_token", "dist_token", "pos_embed", "norm.weight", "norm.bias")}
    names |= {f"patch_embed.proj.{key}": f"patch_embed.proj.{key}" for key in ("weight", "bias")}
    names["patch_embed.proj.alpha"] = "patch_embed.proj.weight_binarizer.scale"
    names["patch_embed.proj.init_state"] = ""
    for head in ("head", "head_dist"):
        names |= {f"{head}.{key}": f"{head}.{key}" for key in ("weight", "bias")}
        names |= {f"{head}.{theirs}": f"{head}.{ours}" for theirs, ours in _SUFFIXES.items()}
    for i in range(depth):
        block = f"blocks.{i}"
        names |= {
            f"{block}.{key}": f"{block}.{key}" for n in ("norm1", "norm2") for key in (f"{n}.weight", f"{n}.bias")
        }
        names |= {f"{block}.attn.{theirs}": f"{block}.attn.{ours}" for theirs, ours in _ATTENTION.items()}
        for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"):
            names |= {f"{block}.{layer}.{key}": f"{block}.{layer}.{key}" for key in ("weight", "bias")}
            for theirs in ("move.bias", "input_clip_val"):
                names[f"{block}.{layer}.{theirs}"] = f"{block}.{layer}.{_SUFFIXES[theirs]}"
    return names


def official_names(depth: int) -> dict[str, str]:
    """Return the trained parameters of an official checkpoint of that depth: their key -> our parameter name."""
    return {theirs: ours for theirs, ours in _names(depth).items() if ours}


def load_official_gsb(path: str | Path, reduce: str = "batch") -> VisionTransformerDistilled:
    """Load an official GSB checkpoint as a binarized timm model in evaluation mode.

    Width, depth, classes, patch, image size and heads follow from the shapes.

    Args:
        path: a file that `torch.load(..., weights_only=True)` reads, with the key "model".
        reduce: the set over which the group maxima run; "batch" is what the released code does.

    Returns:
        A `VisionTransformerDistilled` with the scheme "gsb"; its forward gives the mean of both heads' logits.

    Raises:
        FileNotFoundError: if there is no such file.
        OSError: if it cannot be read, which does not mean that it is damaged.
        ValueError: if the file is truncated or no such checkpoint; names the first missing or unexpected key.
    """
    state = _read(Path(path))
    # Counted, since a block's number may claim anything.
    depth = max(1, len({m[1] for key in state if (m := re.match(r"blocks\.(\d+)\.", key))}))
    names = _names(depth)
    for key in names:
        if key not in state and key != "patch_embed.proj.init_state":
            raise ValueError(f"{path} is no official GSB checkpoint: the key {key!r} is missing.")
    for key in state:
        if key not in names:
            raise ValueError(f"{path} is no official GSB checkpoint: the key {key!r} is unexpected.")
    model = _build(state, depth, reduce, path)
    target = model.state_dict()
    for theirs, ours in names.items():
        if not ours:
            continue
        value = state[theirs]
        want, got = tuple(target[ours].shape), tuple(value.shape)
        if [d for d in want if d != 1] != [d for d in got if d != 1]:  # scalars may come as (1,), rows as (n,)
            raise ValueError(f"{path}: the shape of {theirs!r} is {got}, expected {want}.")
        target[ours] = value.float().reshape(target[ours].shape).clone()
    for name in target:
        if name.endswith(".initialized"):
            target[name] = torch.tensor(1.0, dtype=torch.float32, device="cpu")
    model.load_state_dict(target, assign=True)
    fill_buffers(model)
    return model.eval()


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"There is no checkpoint {path}.")
    try:
        content = read_saved(path)
    except Exception as error:  # torch raises many types for damaged and foreign files
        if is_of_system(error):
            raise
        raise ValueError(
            f"{path} is truncated or no PyTorch checkpoint of plain tensors ({type(error).__name__})."
        ) from error
    state = content.get("model") if isinstance(content, dict) else None
    if not isinstance(state, dict) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in state.items()
    ):
        raise ValueError(
            f"{path} is no official GSB checkpoint: the key 'model' with a dictionary of tensors is missing."
        )
    require_plain(path, state)
    return state


def read_saved(path: Path) -> Any:
    """Read what `torch.save` has written, tensors and plain containers alone; damaged files raise almost anything."""
    _check_archive(path)
    return torch.load(path, map_location="cpu", weights_only=True)


def require_plain(path: Path, state: Mapping[str, Tensor]) -> None:
    """Check that tensors of a file are what their shapes say, before anything is computed with them.

    Raises:
        ValueError: if one is sparse, nested, quantized, elsewhere, of another type than 16, 32 and 64 bits or not
            finite in float32, or if they claim more bytes than the file has.
    """
    for key, value in state.items():
        dense = value.layout is torch.strided and not (value.is_nested or value.is_quantized)
        if not dense or value.device.type != "cpu" or (value.is_floating_point() and value.dtype not in _FLOATS):
            raise ValueError(f"{path} cannot be read: the tensor {key!r} is no plain one.")
    size = sum(value.numel() * value.element_size() for value in state.values())
    if size > path.stat().st_size:  # strides of 0, and views of one storage, claim more than is there
        raise ValueError(f"{path} is damaged: its tensors claim {size} bytes, more than the file has.")
    for key, value in state.items():
        if value.is_floating_point() and not value.float().isfinite().all():
            raise ValueError(f"{path} is damaged: the tensor {key!r} holds numbers that are not finite in float32.")


def _check_archive(path: Path) -> None:
    """Refuse an archive that unpacks to more than its size; torch stores its tensors as they are."""
    with open(path, "rb") as file:  # by its name alone, a file that cannot be opened is no archive
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                if sum(entry.file_size for entry in archive.infolist()) > path.stat().st_size:
                    raise ValueError("a compressed archive")


def _build(state: dict[str, Tensor], depth: int, reduce: str, path: str | Path) -> VisionTransformerDistilled:
    try:
        width, channels, patch, _ = state["patch_embed.proj.weight"].shape
        patches = state["pos_embed"].shape[1] - 2
        hidden = state["blocks.0.mlp.fc1.weight"].shape[0]
        heads = state["blocks.0.attn.move_q.bias"].shape[0]
        classes = state["head.weight"].shape[0]
    except (ValueError, IndexError) as error:
        raise ValueError(
            f"{path} is no official GSB checkpoint: a tensor has the wrong number of dimensions."
        ) from error
    for key, value in state.items():
        if value.numel() == 0:
            raise ValueError(f"{path} is no official GSB checkpoint: the tensor {key!r} is empty.")
    if width % heads:
        raise ValueError(f"{path} is no official GSB checkpoint: {heads} heads do not divide the width {width}.")
    side = math.isqrt(max(patches, 0))
    if patches < 1 or side * side != patches:
        raise ValueError(f"{path}: pos_embed covers {patches} patches, which is no square number.")
    model = VisionTransformerDistilled(
        img_size=side * patch,
        patch_size=patch,
        in_chans=channels,
        num_classes=classes,
        embed_dim=width,
        depth=depth,
        num_heads=heads,
        mlp_ratio=hidden / width,
        dtype=torch.float32,
        device="meta",  # shapes alone, until they are known to fit
    )
    for module in model.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = 1e-12  # as the official model has it
    return binarize(model, scheme("gsb", reduce=reduce, init="official"))
