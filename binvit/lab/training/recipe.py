"""Recipes: everything that decides how a model is trained, except the data, the scheme and the seed."""

import dataclasses
import functools
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import timm
from timm.optim import list_optimizers

from binvit.lab.data.transforms import train_transform

Options = tuple[tuple[str, Any], ...]


def freeze(value: Any) -> Any:
    """Turn lists into tuples and mappings into sorted tuples of pairs, so that the value can be hashed."""
    if isinstance(value, Mapping):
        return tuple(sorted((str(key), freeze(item)) for key, item in value.items()))
    if isinstance(value, (list, tuple)):
        return tuple(freeze(item) for item in value)
    return value


@dataclass(frozen=True)
class Stage:
    """One training stage before the last one.

    Args:
        epochs: passes over the training images.
        scheme_options: fields of the scheme that differ during this stage, a mapping or sorted pairs.
    """

    epochs: int
    scheme_options: Options = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "scheme_options", _options(self.scheme_options, "a stage's scheme_options"))
        if not isinstance(self.epochs, int) or self.epochs < 1:
            raise ValueError(f"A stage's epochs must be a whole number of at least 1, got {self.epochs!r}.")

    def to_dict(self) -> dict[str, Any]:
        """Return the stage as JSON types."""
        options = {name: list(value) if isinstance(value, tuple) else value for name, value in self.scheme_options}
        return {"epochs": self.epochs, "scheme_options": options}


@dataclass(frozen=True)
class Recipe:
    """How a model is shaped and trained; the same for a float model and every binary scheme.

    Args:
        name: the registered recipe this one started from.
        model: a timm model name; None builds a vision transformer from the eight fields that follow.
        pretrained: start from timm's pretrained weights (downloaded by timm); only with `model`.
        width: channels of a token.
        depth: transformer blocks.
        heads: attention heads.
        mlp_ratio: width of the hidden layer over `width`.
        patch_size: pixels of a patch's side; None takes an eighth of the image's side, at least 2.
        distilled: add a distillation token and its head.
        global_pool: what the head reads, the class token ("token") or the mean of the patches ("avg").
        drop_path: probability of skipping a block's branch, at the last block.
        image_size: pixels of an image's side; None keeps the data set's own.
        epochs: passes over the training images in the last stage.
        batch_size: images of an optimizer step.
        eval_batch_size: images of an evaluation step.
        eval_every: epochs between evaluations on the test images; the last epoch is always evaluated.
        optimizer: a name known to `timm.optim.create_optimizer_v2`.
        lr: highest learning rate, of float models and, unless `lr_binary` is given, of binary ones.
        lr_binary: highest learning rate of models with any other scheme than "float"; None means `lr`.
        lr_batch: batch size at which `lr` holds; the rate grows linearly with `batch_size`. None: no scaling.
        min_lr: learning rate at the end of the schedule.
        warmup: share of a stage's steps over which the rate rises linearly from a hundredth of its highest value.
        schedule: a name known to `timm.scheduler.create_scheduler_v2`, stepped per optimizer step.
        weight_decay: decoupled weight decay, not applied to biases, norms, scales and shifts.
        clip_grad: largest norm of the gradient; 0 does not clip.
        label_smoothing: probability mass spread over all classes, 0 to 1.
        mixup: alpha of Mixup; 0 is off.
        cutmix: alpha of CutMix; 0 is off.
        auto_augment: a timm augmentation string such as "rand-m9-mstd0.5-inc1"; "" is off.
        erasing: probability of random erasing, 0 to 1.
        crop: smallest area of a random crop as a share of the image, 0 to 1; 1 does not crop.
        flip: probability of a horizontal flip, 0 to 1.
        interpolation: how crops are resized.
        distillation: "none", "soft" (divergence from the teacher's probabilities) or "hard" (the teacher's class).
        temperature: softens both distributions of soft distillation.
        alpha: weight of the distillation loss, 0 to 1; the labels' loss has the rest.
        similarity: weight of BiBERT's similarity distillation, added to the loss whatever `distillation` is; 0 is off.
        teacher: checkpoint of the teacher; "" trains a float twin of the model on the same data first.
        teacher_epochs: epochs of a teacher trained first; None takes the sum over all stages.
        teacher_pretrained: a teacher trained first starts from timm's pretrained weights.
        stages: training stages before the last one; each later stage starts from the earlier one's weights.
        workers: processes that load images when they are augmented; 0 loads them in the training process.
        checkpoint_minutes: minutes between checkpoints from which a killed trial continues.
    """

    name: str
    model: str | None = None
    pretrained: bool = False
    width: int = 64
    depth: int = 4
    heads: int = 4
    mlp_ratio: float = 4.0
    patch_size: int | None = None
    distilled: bool = False
    global_pool: Literal["token", "avg"] = "token"
    drop_path: float = 0.0
    image_size: int | None = None
    epochs: int = 40
    batch_size: int = 64
    eval_batch_size: int = 256
    eval_every: int = 1
    optimizer: str = "adamw"
    lr: float = 1e-3
    lr_binary: float | None = None
    lr_batch: int | None = None
    min_lr: float = 1e-6
    warmup: float = 0.0
    schedule: str = "cosine"
    weight_decay: float = 0.05
    clip_grad: float = 1.0
    label_smoothing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    auto_augment: str = ""
    erasing: float = 0.0
    crop: float = 1.0
    flip: float = 0.0
    interpolation: Literal["bilinear", "bicubic"] = "bicubic"
    distillation: Literal["none", "soft", "hard"] = "none"
    temperature: float = 3.0
    alpha: float = 0.5
    similarity: float = 0.0
    teacher: str = ""
    teacher_epochs: int | None = None
    teacher_pretrained: bool = False
    stages: tuple[Stage, ...] = field(default=())
    workers: int = 0
    checkpoint_minutes: float = 3.0

    def __post_init__(self) -> None:
        for item in dataclasses.fields(self):
            object.__setattr__(self, item.name, _coerce(self, item.name, item.type))
        for names, low, high in _RANGES:
            for name in names:
                value = getattr(self, name)
                if value is not None and not low <= value <= high:
                    bound = f"at least {low:g}" if math.isinf(high) else f"between {low:g} and {high:g}"
                    raise ValueError(f"The recipe's {name} must be {bound}, got {value!r}.")
        if self.model is None and self.width % self.heads:
            raise ValueError(f"The recipe's width {self.width} must be divisible by its {self.heads} heads.")
        if self.pretrained and self.model is None:
            raise ValueError("Pretrained weights need a timm model name in the recipe's field model, got None.")
        if self.distilled and self.global_pool != "token":
            raise ValueError(
                f"A distilled model reads its tokens: global_pool must be 'token', got {self.global_pool!r}."
            )
        if self.schedule not in _SCHEDULES:
            raise ValueError(f"Unknown schedule {self.schedule!r}; valid are {', '.join(_SCHEDULES)}.")
        if self.model is not None and not timm.is_model(self.model):
            raise ValueError(f"timm knows no model named {self.model!r} (the recipe's field model).")
        if self.optimizer.lower().removeprefix("lookahead_") not in list_optimizers():
            valid = ", ".join(list_optimizers())
            raise ValueError(f"Unknown optimizer {self.optimizer!r}; valid are {valid}, also after 'lookahead_'.")
        _check_augmentation(self.auto_augment)

    @property
    def augments(self) -> bool:
        """Whether an image looks different from epoch to epoch."""
        return bool(self.auto_augment) or self.erasing > 0 or self.crop < 1 or self.flip > 0

    @property
    def has_teacher(self) -> bool:
        """Whether a teacher takes part in the training."""
        return self.distillation != "none" or self.similarity > 0

    def to_dict(self) -> dict[str, Any]:
        """Return the recipe as JSON types, all fields included."""
        values = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        return values | {"stages": [stage.to_dict() for stage in self.stages]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Recipe":
        """Build a recipe from `to_dict`'s result; fields that are missing take their defaults."""
        check_known(values, "recipe")
        return cls(**values)


_RANGES = (
    (("width", "depth", "heads", "patch_size", "image_size", "epochs", "batch_size"), 1, math.inf),
    (("eval_batch_size", "eval_every", "lr_batch", "teacher_epochs"), 1, math.inf),
    (("workers", "lr", "lr_binary", "min_lr", "weight_decay", "clip_grad"), 0, math.inf),
    (("mixup", "cutmix", "mlp_ratio", "similarity", "checkpoint_minutes"), 0, math.inf),
    (("label_smoothing", "erasing", "crop", "flip", "alpha", "drop_path", "warmup"), 0, 1),
    (("temperature",), 1e-3, math.inf),
)
_SCHEDULES = ("cosine", "tanh", "poly", "wsd", "constant")


@functools.cache
def _check_augmentation(text: str) -> None:
    """Let timm parse an augmentation string; `train_transform` refuses one that it does not know."""
    train_transform(8, (0.5,) * 3, (1.0,) * 3, text)


def _coerce(owner: Recipe, name: str, kind: Any) -> Any:
    """Return a field's value in its declared type, or say what was expected."""
    value = getattr(owner, name)
    if name == "stages":
        return _stages(value)
    choices = typing.get_args(kind) if typing.get_origin(kind) is Literal else ()
    kinds = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    if choices:
        if value in choices:
            return value
        raise ValueError(f"The recipe's {name} must be one of {', '.join(map(repr, choices))}, got {value!r}.")
    if value is None and types.NoneType in kinds:
        return None
    if float in kinds and isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    if int in kinds and isinstance(value, float) and value.is_integer():
        return int(value)
    misfit = float in kinds or (isinstance(value, bool) and bool not in kinds)  # True is an int to Python
    if not misfit and isinstance(value, kinds):
        return value
    expected = " or ".join("None" if kind is types.NoneType else kind.__name__ for kind in kinds)
    raise ValueError(f"The recipe's {name} must be of type {expected}, got {value!r}.")


def _stages(value: Any) -> tuple[Stage, ...]:
    if isinstance(value, (list, tuple)):
        stages = [Stage(**item) if isinstance(item, Mapping) and _is_stage(item) else item for item in value]
        if all(isinstance(stage, Stage) for stage in stages):
            return tuple(stages)
    raise ValueError(
        "The recipe's stages must be a list of records with the fields epochs and scheme_options "
        f"(without the last stage, which has the recipe's own epochs), got {value!r}."
    )


def _is_stage(item: Mapping) -> bool:
    return {"epochs"} <= set(item) <= {"epochs", "scheme_options"}


def _options(value: Any, what: str) -> Options:
    """Sort options given as a mapping or as pairs, or say what was expected."""
    try:
        return freeze(dict(value))
    except (TypeError, ValueError):
        raise ValueError(f"Expected a mapping of names to values for {what}, got {value!r}.") from None


def check_known(names: Any, what: str) -> None:
    """Raise a ValueError unless all names are fields of a recipe."""
    valid = [item.name for item in dataclasses.fields(Recipe)]
    for name in names:
        if name not in valid:
            raise ValueError(f"Unknown {what} field {name!r}; valid fields are {', '.join(valid)}.")
