"""The model that a recipe describes, and what a checkpoint says of it."""

from typing import Annotated, Any

import psutil
import timm
import torch
from pydantic import Field
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer

import binvit
from binvit.config import Config, Number, Text
from binvit.lab.training.recipe import Count, Recipe
from binvit.lab.training.weights import create_pretrained, load_weights
from binvit.nn.schemes import Scheme


def build_model(recipe: Recipe, num_classes: int, image_size: int, pretrained: bool = False) -> VisionTransformer:
    """Build the float model of a recipe.

    Args:
        recipe: the model's shape.
        num_classes: outputs of each head.
        image_size: pixels of an image's side; images are square.
        pretrained: load the weights that the recipe starts from, timm's own or a file's.

    Returns:
        A timm vision transformer, images (B, 3, H, W) -> logits (B, num_classes).

    Raises:
        ValueError: the image is not divisible into patches, timm cannot build the model, or weights do not fit it.
        FileNotFoundError: weights are missing.
    """
    model = _new(recipe, num_classes, image_size, pretrained and recipe.pretrained)
    if pretrained and recipe.weights_hash and not recipe.weights:
        raise FileNotFoundError(f"The trial starts from weights with the hash {recipe.weights_hash}; give their file.")
    if pretrained and recipe.weights:
        load_weights(model, recipe.weights, recipe.weights_hash)
    return model


def check_memory(parameters: int) -> None:
    """Refuse a model that this machine's memory cannot train: the system would end the process without a word.

    Args:
        parameters: how many numbers the model learns.

    Raises:
        ValueError: weights, gradients and the optimizer's two moments, 16 bytes each, are more than the memory.
    """
    needed, memory = 16 * parameters, psutil.virtual_memory().total
    if needed > memory:
        raise ValueError(
            f"A model of {parameters} parameters takes at least {needed / 2**30:.1f} GiB to train (weights, gradients "
            f"and the optimizer's moments), more than the {memory / 2**30:.1f} GiB of this machine."
        )


def _new(recipe: Recipe, num_classes: int, image_size: int, pretrained: bool) -> VisionTransformer:
    if recipe.model is not None:
        options: dict[str, Any] = {"num_classes": num_classes, "img_size": image_size}
        options |= {"drop_path_rate": recipe.drop_path, "dtype": torch.float32}  # whatever torch's default is
        try:
            create = create_pretrained if pretrained else timm.create_model
            model = create(recipe.model, **options)
        except (
            AssertionError,
            RuntimeError,
            TypeError,
            ValueError,
        ) as error:  # whatever the model's constructor raises
            why = str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__
            raise ValueError(f"timm cannot build {recipe.model!r} for images of {image_size} pixels: {why}.") from None
        if not isinstance(model, VisionTransformer):
            raise ValueError(f"The recipe's model must be a vision transformer, got {recipe.model!r}.")
        if image_size % model.patch_embed.patch_size[0]:
            raise ValueError(_indivisible(image_size, model.patch_embed.patch_size[0]))
        return model
    patch_size = recipe.patch_size or default_patch_size(image_size, recipe.patches)
    if image_size % patch_size:
        raise ValueError(_indivisible(image_size, patch_size))
    cls = VisionTransformerDistilled if recipe.distilled else VisionTransformer
    return cls(
        img_size=image_size,
        patch_size=patch_size,
        num_classes=num_classes,
        embed_dim=recipe.width,
        depth=recipe.depth,
        num_heads=recipe.heads,
        mlp_ratio=recipe.mlp_ratio,
        global_pool=recipe.global_pool,
        class_token=recipe.global_pool == "token",
        drop_path_rate=recipe.drop_path,
        norm_layer=torch.nn.LayerNorm,
        dtype=torch.float32,
    )


def default_patch_size(image_size: int, patches: int = 8) -> int:
    """Return the divisor of an image's side that is nearest to an even part of it, at least 2.

    Args:
        image_size: pixels of the side.
        patches: how many parts the side should have.

    Raises:
        ValueError: no divisor gives 2 to 32 patches a side.
    """
    parts = range(min(32, image_size // 2), 1, -1)  # few, however large the image
    useful = [image_size // count for count in parts if image_size % count == 0]
    if not useful:
        raise ValueError(
            f"Images of {image_size} pixels cannot be divided into patches of equal size; "
            f"give another side with --image-size (the recipe's image_size), such as {_multiple(image_size, 8)}."
        )
    return min(useful, key=lambda size: abs(size - image_size / patches))


def _indivisible(image_size: int, patch_size: int) -> str:
    return (
        f"The image size {image_size} is not divisible by the patch size {patch_size}; "
        f"give another side with --image-size (the recipe's image_size), such as {_multiple(image_size, patch_size)}."
    )


def _multiple(size: int, factor: int) -> int:
    return factor * max(1, round(size / factor))


Deviation = Annotated[Number, Field(gt=0)]


class CheckpointInfo(Config):
    """What a checkpoint says about its model."""

    _owner = "Its "

    recipe: Recipe
    """How the model is shaped and was trained."""
    scheme: Scheme
    """How it is binarized."""
    classes: tuple[Text, ...]
    """One name per class."""
    mean: tuple[Number, Number, Number]
    """Three channel means, for images from 0 to 1."""
    std: tuple[Deviation, Deviation, Deviation]
    """Three channel standard deviations."""
    image_size: Count
    """Pixels of an image's side."""
    trial: dict[str, Any] | None = None
    """The trial as JSON types, None for a model trained elsewhere."""


def new_model(info: CheckpointInfo, pretrained: bool = False) -> VisionTransformer:
    """Build the binarized, untrained model that a checkpoint's header describes.

    Args:
        info: the header.
        pretrained: start from the weights that the recipe starts from.

    Returns:
        A binarized timm vision transformer.
    """
    model = build_model(info.recipe, len(info.classes), info.image_size, pretrained)
    return binvit.binarize(model, info.scheme)
