"""The class of a binarized model: when its scales are set, what its heads and its input size may become."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed
from timm.layers import to_2tuple
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from binvit.nn.block_parts import Branches
from binvit.nn.layer_parts import Binarizer
from binvit.nn.linear import BinaryLinear, BinaryPatchConv
from binvit.nn.schemes import Scheme

MOST_GATHERED = 512
"""Images of all processes together from which scales are set, unless one process alone has more in its batch."""


class Binarized:
    """What `binvit.binarize` adds to the class of a vision transformer.

    All scales are set at once, by a pass without gradients over the first batch seen in training mode, before the pass
    that trains. So checkpointed blocks are computed twice alike, and under `DistributedDataParallel` every process sets
    the same scales, from the images of all. A batch without images, or with numbers that are not finite, sets nothing.
    """

    scheme: Scheme
    patch_embed: Any
    grad_checkpointing: bool
    training: bool
    _prepared = False  # all scales are known to be set

    def forward_features(self, x: Tensor, *arguments: Any, **options: Any) -> Tensor:
        """Compute the tokens (B, N, D) of images (B, C, H, W); the arguments are those of timm's model.

        All tokens of an image with a pixel that is not finite are NaN.
        """
        if self.training and not self._prepared:
            _prepare(self, x)
        return poison(super().forward_features(x, *arguments, **options), x)  # type: ignore[misc]

    def forward_intermediates(self, x: Tensor, *arguments: Any, **options: Any) -> Any:
        """Compute the tokens of several blocks, NaN as in `forward_features`; the arguments are timm's."""
        if self.training and not self._prepared:
            _prepare(self, x)
        return poison(super().forward_intermediates(x, *arguments, **options), x)  # type: ignore[misc]

    def forward(self, x: Tensor, *arguments: Any, **options: Any) -> Any:
        """Compute the logits of images (B, C, H, W), NaN for an image with a pixel that is not finite."""
        return poison(super().forward(x, *arguments, **options), x)  # type: ignore[misc]

    def no_weight_decay(self) -> set[str]:
        """Return the names of parameters on which no weight decays: timm's and all scales, offsets, shifts, biases."""
        added = (name for name, _ in self.named_parameters() if _is_added(name))  # type: ignore[attr-defined]
        return {*super().no_weight_decay(), *added}  # type: ignore[misc]

    def reset_classifier(self, num_classes: int, *arguments: Any, **options: Any) -> None:
        """Replace the heads by new ones of another number of classes, binarized as the scheme says."""
        super().reset_classifier(num_classes, *arguments, **options)  # type: ignore[misc]
        binarize_heads(self)
        self._prepared = False

    def set_input_size(
        self, img_size: tuple[int, int] | None = None, patch_size: tuple[int, int] | None = None
    ) -> None:
        """Take images of another size; branches that mix neighbouring patches follow.

        Raises:
            ValueError: if a binarized patch embedding would get other patches, or images that are not whole patches, or
                a learned attention bias, which has its values by pairs of tokens, other tokens.
        """
        embed = self.patch_embed
        size = embed.img_size if img_size is None else to_2tuple(img_size)
        patch = embed.patch_size if patch_size is None else to_2tuple(patch_size)
        binary = isinstance(embed.proj, BinaryPatchConv)
        if binary and patch != embed.patch_size:
            raise ValueError(
                f"The binarized patch embedding keeps its patch size {embed.patch_size}, got {patch}; "
                "binarize the model after the change."
            )
        if binary and size is not None and (size[0] % patch[0] or size[1] % patch[1]):
            raise ValueError(f"Images of size {size} cannot be cut into patches of size {patch}.")
        grid = None if size is None else (size[0] // patch[0], size[1] // patch[1])
        if self.scheme.attention_bias != "none" and grid != embed.grid_size:
            raise ValueError(
                f"The learned attention bias is for images of size {embed.img_size} in patches of size "
                f"{embed.patch_size}, got {size} in {patch}; binarize the model after the change."
            )
        super().set_input_size(size, patch)  # type: ignore[misc]
        for module in self.modules():  # type: ignore[attr-defined]
            if isinstance(module, Branches):
                module.grid = embed.grid_size

    def _load_from_state_dict(self, *arguments: Any, **options: Any) -> None:
        self._prepared = False  # what is loaded may be a model that has seen no batch
        super()._load_from_state_dict(*arguments, **options)  # type: ignore[misc]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _empty, (type(self).__mro__[2],), self.__dict__


@functools.cache
def binarized_class(kind: type) -> type:
    """Return the subclass of a class of vision transformers that binarized models of that class have."""
    return type(f"Binarized{kind.__name__}", (Binarized, kind), {"__module__": __name__, "__doc__": kind.__doc__})


def _empty(kind: type) -> Any:
    made: Any = binarized_class(kind)
    return made.__new__(made)


def _is_added(name: str) -> bool:
    return "_binarizer." in name or name.endswith(("shift", "attn.bias.values"))


def poison(output: Any, images: Tensor) -> Any:
    """Return an output (B, ...), or several in a container, with NaN for images with numbers that are not finite.

    Signs of NaN are finite, so that they would not come out of 1-bit layers by themselves.
    """
    if isinstance(output, dict):
        return {name: poison(part, images) for name, part in output.items()}
    if isinstance(output, tuple | list):
        return type(output)(poison(part, images) for part in output)
    finite = images.isfinite().flatten(1).all(1)
    return torch.where(finite.view(-1, *[1] * (output.dim() - 1)), output, torch.nan)


def binarize_heads(model: VisionTransformer) -> None:
    """Replace float heads by those of the model's scheme."""
    scheme = model.scheme
    if not scheme.binarizes("head"):
        return
    for name in ("head", "head_dist"):
        head = getattr(model, name, None)
        if isinstance(head, nn.Linear):
            binary = BinaryLinear(head, scheme.rule("head_weight"), scheme.rule("head_input"), shift=scheme.shift)
            setattr(model, name, like(binary, head).train(model.training))


def like(module: nn.Module, layer: nn.Linear | nn.Conv2d) -> nn.Module:
    """Bring what the new module has added to the device and type of the layer it replaces."""
    return module.to(layer.weight.device, layer.weight.dtype)


@torch.compiler.disable
def _prepare(model: Any, images: Tensor) -> None:
    """Set the scales before the first pass in training mode, or keep them from being set by an unusable batch."""
    binarizers = _binarizers(model)
    if all(binarizer.is_set for binarizer in binarizers):
        model._prepared = True
        return
    images = _gather(images, _group_of_wrapper())
    if is_usable(images):
        set_scales(model, images)
        return
    for binarizer in binarizers:
        binarizer.sets_itself = False


def is_usable(images: Tensor) -> bool:
    """Tell whether scales can be set from images: there are some, and all numbers are finite."""
    return images.numel() > 0 and bool(images.isfinite().all())


def _binarizers(model: nn.Module) -> list[Binarizer]:
    return [module for module in model.modules() if isinstance(module, Binarizer)]


@torch.no_grad()
def set_scales(model: Any, images: Tensor) -> None:
    """Set those scales that have no value yet from one batch, in training mode.

    Args:
        model: a binarized model; all its parts stay in their modes.
        images: a batch, normalized like training images, finite.
    """
    for binarizer in _binarizers(model):
        binarizer.sets_itself = True
    modes, checkpointing = [(module, module.training) for module in model.modules()], model.grad_checkpointing
    devices = [images.device] if images.device.type == "cuda" else []
    model.train()
    model.grad_checkpointing, model._prepared = False, True
    try:
        with torch.random.fork_rng(devices):  # dropout here draws nothing from the training's numbers
            model(images)
    finally:
        model.grad_checkpointing = checkpointing
        for module, training in modes:  # parts that stand still while others train keep doing so
            module.training = training
        model._prepared = all(binarizer.is_set for binarizer in _binarizers(model))


def _group_of_wrapper() -> Any:
    """Return the process group of the `DistributedDataParallel` whose forward pass is running, None without processes.

    Raises:
        ValueError: if there are several processes and no such wrapper, so that every one would set its own scales.
    """
    if not several_processes():
        return None
    wrapper = getattr(DistributedDataParallel, "_active_ddp_module", None)
    if wrapper is None:
        raise ValueError(
            "The scales of the binarized model have no value yet, and each process would set its own: call "
            "binvit.calibrate(model, images) in every process before training without DistributedDataParallel."
        )
    return wrapper.process_group


def several_processes() -> bool:
    """Tell whether this process is one of several of a torch.distributed job."""
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def _gather(images: Tensor, group: Any) -> Tensor:
    """Return the first images of every process of a group, in the order of the processes."""
    if group is None:
        return images
    distributed = torch.distributed
    world = distributed.get_world_size(group)
    count = torch.tensor(len(images), device=images.device)
    counts = [torch.empty_like(count) for _ in range(world)]
    distributed.all_gather(counts, count, group=group)
    sizes = [int(size) for size in counts]
    most = max(1, max(MOST_GATHERED, *sizes) // world)
    padded = images.new_zeros(min(most, max(sizes)), *images.shape[1:])
    padded[: min(most, len(images))] = images[:most].detach()
    parts = [torch.empty_like(padded) for _ in range(world)]
    distributed.all_gather(parts, padded, group=group)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


@contextmanager
def part_of_batch(model: nn.Module, share: float) -> Iterator[None]:
    """Let the gradients of activation scales that a part of a batch adds be its part of the whole batch's gradients.

    They are divided by the root of how many numbers the part has, or has in a group, where the batch has 1 / share
    times as many; for a group, whose size depends on the images, that is an estimate.

    Args:
        model: the model whose forward and backward pass follow.
        share: images of the part, divided by those of the whole batch.
    """
    parameters: list[nn.Parameter] = []
    for name, module in model.named_modules() if share != 1 else ():
        if isinstance(module, Binarizer) and module.rule.by_root and "weight_binarizer" not in name:
            parameters += [parameter for parameter in module.parameters() if parameter.requires_grad]
    hooks = [parameter.register_hook(lambda gradient: gradient * share**0.5) for parameter in parameters]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _forgotten(model: VisionTransformer) -> Iterator[None]:
    """Forget all scales, and take them back if what follows raises an error."""
    kept = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    for binarizer in _binarizers(model):
        binarizer.forget()
    try:
        yield
    except BaseException:
        model.load_state_dict(kept)
        raise


@torch.no_grad()
def calibrate(model: VisionTransformer, images: Tensor, all_processes: bool = True) -> VisionTransformer:
    """Set all scales of a binarized model from one batch, whatever they were, and return the model.

    Args:
        model: a binarized model; it ends in the mode (training or evaluation) it came in.
        images: a batch (B, 3, H, W) of the type of the model's weights, normalized like training images.
        all_processes: in a torch.distributed job the first images of all processes count, so that scales are the same
            in all of them: every process must call. False sets this process's scales alone.

    Raises:
        ValueError: if the model is not binarized, there are no images, they have another size or type than the
            model's, or pixels or the scales that follow from them are not finite.
    """
    if not isinstance(model, Binarized):
        raise ValueError(f"calibrate() takes a model made by binvit.binarize(), got {type(model).__name__}.")
    if not isinstance(images, Tensor) or images.dim() != 4 or not images.is_floating_point():
        what = f"{images.dtype} of shape {tuple(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
        raise ValueError(f"Images must be a float tensor of shape (B, C, H, W), got {what}.")
    embed = model.patch_embed
    types = {images.dtype, embed.proj.weight.dtype}
    mixed = torch.is_autocast_enabled(images.device.type) and torch.float64 not in types
    if len(types) > 1 and not mixed:
        raise ValueError(f"The model's weights are {embed.proj.weight.dtype}, got images of {images.dtype}.")
    size = embed.proj.weight.shape[1], *(embed.img_size if embed.strict_img_size else images.shape[2:])
    if images.shape[1:] != size:
        raise ValueError(f"The model takes images of shape {size}, got a batch of shape {tuple(images.shape)}.")
    if all_processes and several_processes():
        images = _gather(images, torch.distributed.group.WORLD)
    if not is_usable(images):
        raise ValueError(f"calibrate() needs images with finite pixels, got a batch of shape {tuple(images.shape)}.")
    with _forgotten(model):
        set_scales(model, images)
        if not model._prepared:
            raise ValueError("calibrate() found no finite scales: the model's weights are not finite.")
    return model
