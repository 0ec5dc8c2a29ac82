"""Recipes: everything that decides how a model is trained, except the data, the scheme and the seed."""

import dataclasses
import functools
from typing import Annotated, Any, Literal

import timm
from pydantic import Field, field_validator
from timm.optim import get_optimizer_info, list_optimizers

from binvit.config import Config, Number, Options, OptionsField, Switch, Text, Whole, show
from binvit.lab.data.transforms import train_transform

Count = Annotated[Whole, Field(ge=1, le=2**20)]
Blocks = Annotated[Whole, Field(ge=1, le=2**10)]  # every block takes time and memory, however narrow it is
Share = Annotated[Number, Field(ge=0, le=1)]
Amount = Annotated[Number, Field(ge=0, le=1e38)]  # what float32 holds


class Stage(Config):
    """One training stage before the last one."""

    epochs: Count
    """Passes over the training images."""
    scheme_options: OptionsField = Options()
    """Fields of the scheme that differ during this stage."""


class Recipe(Config):
    """How a model is shaped and trained; the same for a float model and every binary scheme."""

    name: Text
    """The registered recipe this one started from."""
    model: Text | None = None
    """A timm model name; None builds a vision transformer from the fields from `width` to `drop_path`."""
    pretrained: Switch = False
    """Start from timm's pretrained weights (downloaded by timm); only with `model`."""
    weights: Text = dataclasses.field(default="", compare=False)
    """File of weights in timm's layout to start from (safetensors, or a state saved by torch); "" starts anew."""
    weights_hash: Annotated[Text, Field(pattern=r"^(sha256:[0-9a-f]{64})?$")] = ""
    """SHA-256 of that file, which a trial finds out by itself: the content is what counts, not where it lies."""
    width: Count = 64
    """Channels of a token."""
    depth: Blocks = 4
    """Transformer blocks."""
    heads: Count = 4
    """Attention heads."""
    mlp_ratio: Annotated[Number, Field(gt=0, le=2**10)] = 4.0
    """Width of the hidden layer over `width`."""
    patch_size: Count | None = None
    """Pixels of a patch's side; None takes the divisor of the image's side nearest to its part of `patches`, at least
    2."""
    patches: Count = 8
    """Patches along a side that an unnamed `patch_size` aims at."""
    distilled: Switch = False
    """Add a distillation token and its head."""
    global_pool: Literal["token", "avg"] = "token"
    """What the head reads, the class token ("token") or the mean of the patches ("avg")."""
    drop_path: Share = 0.0
    """Probability of skipping a block's branch, at the last block."""
    image_size: Count | None = None
    """Pixels of an image's side; None keeps the data set's own."""
    epochs: Count = 40
    """Passes over the training images in the last stage."""
    batch_size: Count = 64
    """Images of an optimizer step, over all processes and accumulated parts."""
    accumulate: Count = 1
    """Parts of a batch that follow one another on a device, so that less memory suffices."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of the products in training; with "bfloat16", weights, optimizer and 1-bit products stay in float32."""
    eval_batch_size: Count = 256
    """Images of an evaluation step."""
    eval_every: Count = 1
    """Epochs between evaluations on the test images; the last epoch is always evaluated."""
    optimizer: Text = "adamw"
    """A name known to `timm.optim.create_optimizer_v2`."""
    lr: Amount = 1e-3
    """Highest learning rate. A trial that names none takes the one that validation images have chosen for its data
    set, recipe, scheme and bias (`binvit.lab.training.rates`), and this one if nobody has asked them."""
    lr_batch: Count | None = None
    """Batch size at which `lr` holds; the rate grows linearly with `batch_size`. None: no scaling."""
    min_lr: Amount = 1e-6
    """Learning rate at the end of the schedule."""
    warmup: Share = 0.0
    """Share of a stage's steps over which the rate rises linearly from a hundredth of its highest value."""
    schedule: Literal["cosine", "tanh", "poly", "wsd", "constant"] = "cosine"
    """A name known to `timm.scheduler.create_scheduler_v2`, stepped per optimizer step."""
    weight_decay: Amount = 0.05
    """Decoupled weight decay, not applied to biases, norms, scales and shifts."""
    clip_grad: Amount = 1.0
    """Largest norm of the gradient; 0 does not clip."""
    label_smoothing: Share = 0.0
    """Probability mass spread over all classes, 0 to 1."""
    mixup: Amount = 0.0
    """Alpha of Mixup; 0 is off."""
    cutmix: Amount = 0.0
    """Alpha of CutMix; 0 is off."""
    auto_augment: Text = ""
    """A timm augmentation string such as "rand-m9-mstd0.5-inc1"; "" is off."""
    erasing: Share = 0.0
    """Probability of random erasing, 0 to 1."""
    crop: Share = 1.0
    """Smallest area of a random crop as a share of the image, 0 to 1; 1 does not crop."""
    flip: Share = 0.0
    """Probability of a horizontal flip, 0 to 1."""
    interpolation: Literal["bilinear", "bicubic"] = "bicubic"
    """How crops are resized."""
    distillation: Literal["none", "soft", "hard"] = "none"
    """"none", "soft" (divergence from the teacher's probabilities) or "hard" (the teacher's class)."""
    temperature: Annotated[Number, Field(ge=1e-3, le=1e38)] = 3.0
    """Softens both distributions of soft distillation."""
    alpha: Share = 0.5
    """Weight of the distillation loss, 0 to 1; the labels' loss has the rest."""
    similarity: Amount = 0.0
    """Weight of BiBERT's similarity distillation, added to the loss whatever `distillation` is; 0 is off."""
    weight_penalty: Share = 0.0
    """Share of BHViT's penalty, which pulls 1-bit weights to -1 and +1, in the loss of the last tenth of epochs of the
    last stage, 0 to 1; 0 is off, 0.1 in the paper."""
    teacher: Text = dataclasses.field(default="", compare=False)
    """Checkpoint of the teacher; "" trains a float twin of the model on the same data first."""
    teacher_hash: Annotated[Text, Field(pattern=r"^(sha256:[0-9a-f]{64})?$")] = ""
    """SHA-256 of that file, as with `weights_hash`."""
    teacher_epochs: Count | None = None
    """Epochs of a teacher trained first; None takes the sum over all stages."""
    teacher_pretrained: Switch = False
    """A teacher trained first starts from timm's pretrained weights."""
    stages: tuple[Stage, ...] = ()
    """Training stages before the last one; each later stage starts from the earlier one's weights."""
    workers: Annotated[Whole, Field(ge=0, le=2**12)] = 0
    """Processes that load images when they are augmented; 0 loads them in the training process."""
    checkpoint_minutes: Amount = 3.0
    """Minutes between checkpoints from which a killed trial continues."""

    @field_validator("model")
    @classmethod
    def _known_model(cls, name: str | None) -> str | None:
        if name is not None and not timm.is_model(name):
            raise ValueError(f"timm knows no model named {show(name)} (the recipe's field model).")
        return name

    @field_validator("optimizer")
    @classmethod
    def _known_optimizer(cls, name: str) -> str:
        plain = name.lower().removeprefix("lookahead_")
        if plain in list_optimizers() and get_optimizer_info(plain).second_order:
            raise ValueError(f"The optimizer {show(name)} needs second derivatives, which signs do not have.")
        if plain not in list_optimizers():
            valid = ", ".join(map(str, list_optimizers()))
            raise ValueError(f"Unknown optimizer {show(name)}; valid are {valid}, also after 'lookahead_'.")
        return name

    @field_validator("auto_augment")
    @classmethod
    def _known_augmentation(cls, text: str) -> str:
        _check_augmentation(text)
        return text

    def __post_init__(self) -> None:
        if self.model is None and self.width % self.heads:
            raise ValueError(f"The recipe's width {self.width} must be divisible by its {self.heads} heads.")
        if self.pretrained and self.weights:
            raise ValueError("A training starts from timm's pretrained weights or a file's, got both.")
        if self.pretrained and self.model is None:
            raise ValueError("Pretrained weights need a timm model name in the recipe's field model, got None.")
        if self.distilled and self.global_pool != "token":
            raise ValueError(
                f"A distilled model reads its tokens: global_pool must be 'token', got {self.global_pool!r}."
            )

    @property
    def starts_from_weights(self) -> bool:
        """Whether the model is trained already when the training begins."""
        return self.pretrained or bool(self.weights or self.weights_hash)

    @property
    def has_teacher(self) -> bool:
        """Whether a teacher takes part in the training."""
        return self.distillation != "none" or self.similarity > 0

    @property
    def trains_teacher(self) -> bool:
        """Whether the teacher is a trial of its own, which is trained first."""
        return self.has_teacher and not (self.teacher or self.teacher_hash)


# Fields of a recipe that change how long a training takes, and no number.
_IDLE = ("workers", "checkpoint_minutes")


def decisive(record: Any) -> list[str]:
    """Return the fields of a recipe, a scheme or a trial that decide numbers: no texts for readers, places or times."""
    return [item.name for item in dataclasses.fields(record) if item.compare and item.name not in _IDLE]


def told(record: Any) -> dict[str, Any]:
    """Return as JSON types the decisive fields that differ from their defaults.

    A field added later thus changes neither an older identity nor what an older state was trained with.
    """
    values, counts = record.to_dict(), decisive(record)
    return {
        item.name: values[item.name]
        for item in dataclasses.fields(record)
        if item.name in counts and getattr(record, item.name) != item.default
    }


@functools.cache
def _check_augmentation(text: str) -> None:
    """Let timm parse an augmentation string; `train_transform` refuses one that it does not know."""
    train_transform(8, (0.5,) * 3, (1.0,) * 3, text)
