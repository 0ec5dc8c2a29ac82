"""The training loop: stages and epochs from a seed to a trained model, and how a killed one goes on."""

import json
import math
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.data import Mixup
from torch import Tensor, nn

from binvit.lab.data.datasets import ImageData
from binvit.lab.data.loader import Batches
from binvit.lab.data.transforms import eval_transform, train_transform
from binvit.lab.randomness import seed_all, seed_torch
from binvit.lab.training.checkpoint import save_checkpoint
from binvit.lab.training.devices import Team
from binvit.lab.training.distillation import check_comparable, one_bit_weights, recorded, training_loss, weight_penalty
from binvit.lab.training.evaluation import LogitsNotFinite, Network, classify, on_bits
from binvit.lab.training.model import CheckpointInfo, build_model, check_memory, new_model
from binvit.lab.training.optimizer import new_optimizer, new_schedule
from binvit.lab.training.recipe import Recipe, told
from binvit.lab.training.resume import Position, read_state, write_state
from binvit.nn.convert import init_latent_weights
from binvit.nn.model import calibrate, part_of_batch
from binvit.nn.schemes import Scheme

DIVERGED = "The training loss became"  # how the sentence of a `TrainingDiverged` begins

Progress = Callable[[int, int, dict[str, Any]], None]


class TrainingDiverged(ValueError):
    """The loss, or a weight, became infinite or not a number."""


_AUGMENTATIONS = ("auto_augment", "erasing", "crop", "flip", "interpolation")


class Training:
    """One training, from its seed to a trained model.

    Args:
        recipe: how to train.
        schemes: how to binarize, one scheme per stage of the recipe and the last one's at the end.
        data: the images.
        seed: decides initial weights, order and augmentation of the images.
        teacher: the model to distil from, on the device and in evaluation mode; None if the recipe distils nothing.
        team: where to train, alone or with other processes.
        resume: file of the state from which a killed training continues; None keeps none.
        identity: what is trained; a state of something else is not continued.
        record: the trial that the checkpoints name, as JSON types.
    """

    def __init__(
        self,
        recipe: Recipe,
        schemes: Sequence[Scheme],
        data: ImageData,
        seed: int,
        *,
        teacher: nn.Module | None = None,
        team: Team | None = None,
        resume: Path | None = None,
        identity: str = "",
        record: dict[str, Any] | None = None,
    ):
        self.recipe, self.data, self.seed, self.teacher = recipe, data, seed, teacher
        self.team = team or Team("cpu")
        self.device = self.team.device
        self.resume, self.identity, self.record = resume, identity, record
        self.started = self.saved = time.monotonic()
        sizes = data.image_size, data.mean, data.std
        transform = train_transform(*sizes, **{name: getattr(recipe, name) for name in _AUGMENTATIONS})
        batch_size = min(recipe.batch_size, len(data.train))
        self.mixup = None
        if recipe.mixup or recipe.cutmix:
            batch_size -= batch_size % 2  # Mixup pairs the images of a batch
            mixing = {"label_smoothing": recipe.label_smoothing, "num_classes": len(data.classes)}
            self.mixup = Mixup(mixup_alpha=recipe.mixup, cutmix_alpha=recipe.cutmix, **mixing)
        ordered = {"seed": seed, "workers": recipe.workers}
        self.parts = self.team.slices(batch_size, recipe.accumulate)
        self.batches = Batches(data.train, transform, batch_size, shuffle=True, drop_last=True, **ordered)
        whole = eval_transform(*sizes)
        self.train_images = Batches(data.train, whole, recipe.eval_batch_size, workers=recipe.workers)
        self.test_images = Batches(data.evaluated, whole, recipe.eval_batch_size, workers=recipe.workers)
        self.stages = list(zip([*(stage.epochs for stage in recipe.stages), recipe.epochs], schemes, strict=True))
        with torch.device("meta"):  # shapes without numbers
            shapes = build_model(recipe, len(data.classes), data.image_size)
        if torch.device(self.device).type == "cpu":
            check_memory(sum(parameter.numel() for parameter in shapes.parameters()))
        # Names of the float model's tensors; what binarize() adds to them are scales and shifts.
        self.latent = set(shapes.state_dict())
        self.position = Position()
        self.classifier: Network | None = None  # of the trained model, made once for all images

    @property
    def seconds(self) -> float:
        """Return the time spent so far, earlier processes included."""
        return time.monotonic() - self.started

    def train(self, progress: Progress | None = None) -> nn.Module:
        """Train all stages, or what a killed training has left of them.

        Args:
            progress: called after every epoch with the epochs done, the epochs in all and the epoch's record.

        Returns:
            The trained model, in training mode.

        Raises:
            TrainingDiverged: the loss is no longer finite.
        """
        total = sum(epochs for epochs, _ in self.stages)
        state = read_state(self.resume, self._config(), self.team)
        self._start(state["position"]["stage"] if state else 0)
        if state:
            self.position = Position(**state["position"])
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.started -= self.position.seconds
        for stage in range(self.position.stage, len(self.stages)):
            if stage != self.position.stage:
                self._start(stage, earlier=self.model)
            for epoch in range(self.position.epoch, self.stages[stage][0]):
                record = self._epoch(epoch)
                self.position.history.append(record)
                self.position.epoch = epoch + 1
                if progress is not None:
                    progress(len(self.position.history), total, record)
                if time.monotonic() - self.saved > 60 * self.recipe.checkpoint_minutes:
                    self._write_state()
        return self.model

    def predict_train(self) -> np.ndarray:
        """Return the class that the model gives to each training image without augmentation, int64 (N,)."""
        return classify(self.classifier or on_bits(self.model), self.train_images, self.team)

    def finish(self) -> None:
        """End the workers of the images, and remove the state, once the result is safe."""
        for batches in (self.batches, self.train_images, self.test_images):
            batches.close()
        if self.resume is not None and self.team.leads:
            self.resume.unlink(missing_ok=True)

    def describe(self, scheme: Scheme | None = None) -> CheckpointInfo:
        """Return what a checkpoint of the model needs beside its tensors; without a scheme, that of the last stage."""
        data = self.data
        return CheckpointInfo(
            recipe=self.recipe,
            scheme=scheme or self.stages[-1][1],
            classes=tuple(data.classes),
            mean=data.mean,
            std=data.std,
            image_size=data.image_size,
            trial=self.record,
        )

    def _start(self, stage: int, earlier: nn.Module | None = None) -> None:
        """Build model, optimizer and schedule of a stage; latent weights come from the earlier stage's model."""
        self.position.stage, self.position.epoch = stage, 0
        epochs, scheme = self.stages[stage]
        recipe = self.recipe
        seed_all(self.seed, stage, device=self.device)
        info = self.describe(scheme)
        if earlier is None:
            # A pretrained start is overwritten when a state is resumed, but then the weights lie in timm's cache.
            self.model = new_model(info, pretrained=True)
            if not recipe.starts_from_weights:
                init_latent_weights(self.model)
        else:
            self.model = new_model(info)
            # The bias of the attention map belongs to the float blocks of an early stage, too.
            kept = (*self.latent, *(name for name in earlier.state_dict() if name.endswith("attn.bias.values")))
            weights = {name: tensor for name, tensor in earlier.state_dict().items() if name in kept}
            self.model.load_state_dict(weights, strict=False)
        self.model.to(self.device).train()
        if recipe.distillation != "none" and hasattr(self.model, "set_distilled_training"):
            self.model.set_distilled_training(True)
        if recipe.similarity and self.teacher is not None:
            check_comparable(self.model, self.teacher)
        self.optimizer = new_optimizer(self.model, recipe, self.latent)
        self.scheduler = new_schedule(self.optimizer, recipe, epochs * len(self.batches))
        self.parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.wrapped: nn.Module | None = None
        self.scheduled = [module for module in self.model.modules() if hasattr(module, "set_progress")]
        self.good: dict[str, Tensor] | None = None  # the weights of the last whole epoch

    def _epoch(self, epoch: int) -> dict[str, Any]:
        """Train for one epoch and return its record."""
        seed_all(self.seed, self.position.stage, epoch, device=self.device)
        epochs, steps = self.stages[self.position.stage][0], len(self.batches)
        if self.team.rank:  # other dropped paths than the leading process has, but the same batches
            seed_torch(torch.initial_seed() + self.team.rank, self.device)
        losses, hits, seen, rate = [], 0.0, 0, 0.0
        late = self.position.stage + 1 == len(self.stages) and epoch + 1 > 0.9 * epochs
        pulled = one_bit_weights(self.model) if self.recipe.weight_penalty and late else []
        number = len(self.position.history)  # counted over all stages, so that no order comes twice
        for step, (images, targets, _) in enumerate(self.batches.epoch(number)):
            images, targets = images.to(self.device), targets.to(self.device)
            if self.mixup is not None:
                images, targets = self.mixup(images, targets)
            update = epoch * steps + step
            for module in self.scheduled:
                module.set_progress(update / (epochs * steps))
            rate = self.optimizer.param_groups[0]["lr"]
            self.optimizer.zero_grad()
            value, right = self._backward(images, targets, pulled)
            if not np.isfinite(value):
                raise self._diverged(value, epoch, step, rate)
            if self.recipe.clip_grad:
                nn.utils.clip_grad_norm_(self.parameters, self.recipe.clip_grad)
            self.optimizer.step()
            self.scheduler.step_update(update + 1)
            losses.append(value)
            hits += right
            seen += len(targets)
        if not all(parameter.isfinite().all() for parameter in self.model.parameters()):
            raise self._diverged(math.nan, epoch, step, rate)  # the last step's, which no further loss would show
        last = epoch + 1 == epochs
        test_accuracy = None
        if last or (epoch + 1) % self.recipe.eval_every == 0:
            self.classifier = on_bits(self.model)
            try:
                predictions = classify(self.classifier, self.test_images, self.team)
            except LogitsNotFinite:  # after a last step whose loss nobody has seen
                raise self._diverged(np.nan, epoch, steps - 1, rate) from None
            test_accuracy = float(np.mean(predictions == self.data.evaluated.labels))
        self.good = self._copy()
        return {
            "stage": self.position.stage,
            "epoch": len(self.position.history) + 1,
            "train_loss": float(np.mean(losses)),
            "train_accuracy": hits / seen,
            "test_accuracy": test_accuracy,
            "lr": rate,
        }

    def _backward(self, images: Tensor, targets: Tensor, pulled: Sequence[Tensor]) -> tuple[float, float]:
        """Add the gradients of a batch, part by part; return the loss and the images classified rightly, of all parts.

        Every part counts as many times as it has images, so that the parts' number changes nothing but rounding,
        and the gradients of the scales of GSB's upper groups, whose sizes in the whole batch are estimated.
        """
        if self.wrapped is None:
            if not self.position.epoch:
                # Scales of the whole batch, which every process has, and not of the part that comes first; before
                # `recorded` listens, which would hear the model twice.
                calibrate(self.model, images, all_processes=False)
            self.wrapped = self.team.wrap(self.model)
        found, penalty = torch.zeros(2, dtype=torch.float32, device=self.device), self.recipe.weight_penalty
        for part in self.parts:
            x, y = images[part], targets[part]
            weight = len(x) * self.team.size / len(images)
            kind = torch.device(self.device).type
            half = torch.autocast(kind, torch.bfloat16, enabled=self.recipe.precision == "bfloat16")
            exchange = nullcontext() if part is self.parts[-1] else self.team.silent(self.wrapped)
            with exchange, part_of_batch(self.model, len(x) / len(images)):
                with half, recorded(self.model, self.recipe) as projections:
                    outputs = self.wrapped(x)
                    loss = training_loss(outputs, x, y, self.recipe, self.teacher, projections)
                if pulled:
                    loss = (1 - penalty) * loss + penalty * weight_penalty(pulled)
                loss = weight * loss
                loss.backward()
            with torch.no_grad():
                logits = outputs[0] + outputs[1] if isinstance(outputs, tuple) else outputs
                labels = y if y.ndim == 1 else y.argmax(1)
                found += torch.stack([loss.float(), (logits.argmax(1) == labels).sum().float()])
        value, right = self.team.total(found).tolist()
        return value / self.team.size, right

    def _copy(self) -> dict[str, Tensor]:
        return {name: tensor.detach().clone() for name, tensor in self.model.state_dict().items()}

    def _diverged(self, loss: float, epoch: int, step: int, rate: float) -> TrainingDiverged:
        kept = ""
        if self.resume is not None and self.good is not None and self.team.leads:
            self.model.load_state_dict(self.good)
            path = self.resume.with_suffix(".diverged.safetensors")
            save_checkpoint(path, self.model, self.describe(self.stages[self.position.stage][1]))
            kept = f"; the model of the last whole epoch is kept in {path}"
        stage = f"stage {self.position.stage + 1} of {len(self.stages)}, " if len(self.stages) > 1 else ""
        where = f"{stage}epoch {epoch + 1}, step {step + 1}, at learning rate {rate:.3g}"
        return TrainingDiverged(f"{DIVERGED} {loss} in {where}{kept}.")

    def _config(self) -> str:
        """Return what a state must have been trained with to be continued."""
        return json.dumps([self.identity, told(self.recipe), [told(scheme) for _, scheme in self.stages]])

    def _write_state(self) -> None:
        if self.resume is None or not self.team.leads:
            return
        self.position.seconds = self.seconds
        try:
            write_state(self.resume, self.position, self.model, self.optimizer, self._config(), self.team)
        except OSError as error:  # a full disk: the training matters more than its state
            warnings.warn(
                f"The state {self.resume} could not be written ({error}); the training goes on.", stacklevel=2
            )
        self.saved = time.monotonic()
