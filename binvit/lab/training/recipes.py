"""The named recipes."""

import dataclasses
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

from binvit.config import read_yaml, show
from binvit.lab.training.recipe import Recipe, Stage


def mlp_weights_stage(epochs: int) -> Stage:
    """Return GSB's first stage: only the weights of the MLP are 1-bit, every activation is float.

    Args:
        epochs: passes over the training images; 600 in the paper.

    Returns:
        A stage for `Recipe.stages`.

    References:
        Gao et al., Group Superposition Binarization for Vision Transformer, Neural Networks 172, 2024.
    """
    return Stage(epochs, {"components": ("mlp",), "input": "float", "hidden": "float"})


# Seconds on one thread: the embedded digits, 16 patches of 2x2 pixels and the class token.
_SMOKE = Recipe(
    name="smoke",
    width=48,
    depth=3,
    heads=2,
    mlp_ratio=2.0,
    epochs=30,
    batch_size=64,
    eval_every=5,
    lr=2e-3,
    warmup=0.125,
)
# Half a minute on one thread: the same model trained out. On validation images twice the epochs gain the float model
# less than a point.
_DIGITS = dataclasses.replace(_SMOKE, name="digits", epochs=60, eval_every=10)
# Minutes on two cores: photographs of 32 to 64 pixels, 64 patches and the class token.
_CPU = Recipe(
    name="cpu",
    width=96,
    depth=4,
    heads=3,
    epochs=40,
    batch_size=64,
    eval_every=20,
    lr=2e-3,
    warmup=0.1,
    label_smoothing=0.1,
    crop=0.5,
    flip=0.5,
)
# Four minutes on one thread: a thousand photographs of 64 pixels, 16 patches and the class token. Not quite trained
# out: on validation images twice the epochs gain the float model 1.4 points, 30.3 to 31.7 % (two seeds).
_FLOWERS = dataclasses.replace(_CPU, name="flowers", patches=4, epochs=160, eval_every=40, lr=1e-3)

# Two minutes on one thread: two thousand photographs of 32 pixels, 16 patches and the class token.
_CIFAR = dataclasses.replace(_CPU, name="cifar", patches=4, epochs=60, eval_every=20, lr=1e-3)

# Ten minutes on one thread: a ViT-S/14 of DINOv2, 16 patches and the class token. Its weights are found by their hash
# beside the data, or given as `weights`.
_PRETRAINED = Recipe(
    name="pretrained",
    model="vit_small_patch14_dinov2",
    weights_hash="sha256:c9ad3db88d6554c0cda2511dfaf118db33c6a85ef9d39c10d778a1f9b28d69a3",
    image_size=56,
    epochs=25,
    batch_size=64,
    eval_every=25,
    lr=1e-4,
    warmup=0.1,
    label_smoothing=0.1,
    crop=0.4,
    flip=0.5,
)

_REGISTRY = {
    recipe.name: recipe
    for recipe in (
        _SMOKE,
        _DIGITS,
        _CPU,
        _FLOWERS,
        _CIFAR,
        _PRETRAINED,
        # As the GSB paper trains: arXiv 2305.07931 and the options of its released code.
        Recipe(
            name="paper",
            model="deit_small_distilled_patch16_224",
            distilled=True,
            image_size=224,
            epochs=300,
            batch_size=128,
            eval_batch_size=256,
            eval_every=10,
            lr=1e-3,
            lr_batch=512,
            min_lr=1e-6,
            weight_decay=0.05,
            clip_grad=0.0,
            auto_augment="rand-m9-mstd0.5-inc1",
            erasing=0.25,
            crop=0.08,
            flip=0.5,
            distillation="hard",
            alpha=0.5,
            teacher_epochs=300,
            teacher_pretrained=True,
            stages=(mlp_weights_stage(600),),
            workers=8,
            checkpoint_minutes=10.0,
        ),
    )
}


def list_recipes() -> list[str]:
    """Return the names of the registered recipes."""
    return sorted(_REGISTRY)


def recipe(name: str, /, **overrides: Any) -> Recipe:
    """Return a registered recipe, with some of its fields changed.

    Args:
        name: "smoke" (seconds), "digits" (half a minute), "flowers", "cifar" and "cpu" (minutes), "pretrained" (ten
            minutes, from the weights of a ViT-S/14) or "paper" (the size of the GSB paper).
        **overrides: fields of `Recipe`.

    Returns:
        A frozen record.

    Raises:
        ValueError: the name or a field is unknown, or a value has a wrong type or is out of range.
    """
    if name not in _REGISTRY:
        raise ValueError(f"Unknown recipe {show(name)}; valid recipes are {', '.join(list_recipes())}.")
    if "name" in overrides:
        raise ValueError(f"A recipe keeps its registered name, got name={show(overrides['name'])} for {name!r}.")
    return dataclasses.replace(_REGISTRY[name], **overrides)


def parse_options(texts: Iterable[str]) -> dict[str, Any]:
    """Read fields of a recipe from texts such as "epochs=20", "lr=3e-4" or "model=null"; lists are written as in YAML.

    Returns:
        Overrides for `recipe`, which checks them.

    Raises:
        ValueError: a text has no "=", a field is unknown or given twice, or a value is no YAML.
    """
    options: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"A setting must be NAME=VALUE, such as epochs=20, got {show(text)}.")
        if name not in Recipe.field_names():
            raise ValueError(f"Unknown recipe field {show(name)}; valid fields are {', '.join(Recipe.field_names())}.")
        if name in options:
            raise ValueError(f"The recipe's {name} is set twice.")
        options[name] = _parse(name, value)
    return options


def _parse(name: str, text: str) -> Any:
    if isinstance(getattr(_REGISTRY["smoke"], name), str):
        return text
    with suppress(ValueError):
        return float(text)  # YAML takes 3e-4 for a text; a whole number becomes one where its field is one
    return read_yaml(text, f"The value of the recipe's {name}")
