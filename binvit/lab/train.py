"""Training: one trial from its seed to a measured model."""

import json
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.data import Mixup
from torch import Tensor, nn
from torch.nn import functional as F

from binvit.lab.batches import Batches
from binvit.lab.checkpoint import CheckpointInfo, load_checkpoint, new_model, save_checkpoint
from binvit.lab.data import ImageData, load_data
from binvit.lab.evaluation import Classifier, classify, on_bits
from binvit.lab.models import build_model
from binvit.lab.optimizers import new_optimizer, new_schedule
from binvit.lab.recipes import Recipe
from binvit.lab.similarity import check_comparable, recorded_projections, similarity_loss
from binvit.lab.states import Position, own_random_state, read_state, seed_all, write_state
from binvit.lab.transforms import eval_transform, train_transform
from binvit.lab.trials import Trial, TrialResult, teacher_trial, versions
from binvit.nn.schemes import Scheme

Progress = Callable[[int, int, dict[str, Any]], None]


class TrainingDiverged(ValueError):
    """The loss became infinite or not a number."""


def train_trial(
    trial: Trial,
    *,
    teacher: nn.Module | None = None,
    progress: Progress | None = None,
    device: str | None = None,
    resume: str | Path | None = None,
) -> TrialResult:
    """Train and measure one trial; the same seed and number of threads give the same bits on a CPU.

    Args:
        trial: the configuration.
        teacher: a trained float model to distil from; None loads or trains the one the recipe names, if it distils.
        progress: called after every epoch with the epochs done, the epochs in all and the epoch's record.
        device: "cpu" or "cuda"; None takes the GPU if there is one.
        resume: file of the state from which a killed trial continues; written every few minutes, removed at the end. A
            training that diverges leaves its last good model beside it, with the suffix `.diverged.safetensors`.

    Returns:
        The result, with the trained model in evaluation mode.

    Raises:
        TrainingDiverged: the loss is no longer finite.
        ValueError: data, recipe and scheme do not fit together.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    recipe = trial.get_recipe()
    data = load_data(
        trial.dataset,
        samples_per_class=trial.samples_per_class,
        label_noise=trial.label_noise,
        seed=trial.seed,
        root=trial.root,
        image_size=recipe.image_size,
        noise=trial.noise,
    )
    started = time.perf_counter()
    with own_random_state(device):
        if not recipe.has_teacher:
            teacher = None
        else:
            teacher = teacher if teacher is not None else _teacher(trial, recipe, data, device)
            teacher = teacher.to(device).eval()
        run = _Run(trial, recipe, data, teacher, device, Path(resume) if resume else None, started)
        run.train(progress)
    return run.measure()


def _teacher(trial: Trial, recipe: Recipe, data: ImageData, device: str) -> nn.Module:
    if not recipe.teacher:
        return train_trial(teacher_trial(trial), device=device).model
    model, info = load_checkpoint(recipe.teacher)
    if len(info.classes) != len(data.classes) or info.image_size != data.image_size:
        has = f"{len(info.classes)} classes and images of {info.image_size} pixels"
        needs = f"{len(data.classes)} and {data.image_size}"
        raise ValueError(f"The teacher {recipe.teacher} has {has}, the data set {trial.dataset} {needs}.")
    return model


_AUGMENTATIONS = ("auto_augment", "erasing", "crop", "flip", "interpolation")


class _Run:
    """The state of one training."""

    def __init__(
        self,
        trial: Trial,
        recipe: Recipe,
        data: ImageData,
        teacher: nn.Module | None,
        device: str,
        resume: Path | None,
        started: float,
    ):
        self.trial, self.recipe, self.data, self.teacher, self.device = trial, recipe, data, teacher, device
        self.resume, self.started = resume, started
        sizes = data.image_size, data.mean, data.std
        transform = train_transform(*sizes, **{name: getattr(recipe, name) for name in _AUGMENTATIONS})
        batch_size = min(recipe.batch_size, len(data.train))
        self.mixup = None
        if recipe.mixup or recipe.cutmix:
            batch_size -= batch_size % 2  # Mixup pairs the images of a batch
            mixing = {"label_smoothing": recipe.label_smoothing, "num_classes": len(data.classes)}
            self.mixup = Mixup(mixup_alpha=recipe.mixup, cutmix_alpha=recipe.cutmix, **mixing)
        ordered = {"seed": trial.seed, "workers": recipe.workers}
        self.batches = Batches(data.train, transform, batch_size, shuffle=True, drop_last=True, **ordered)
        whole = eval_transform(*sizes)
        self.train_images = Batches(data.train, whole, recipe.eval_batch_size, workers=recipe.workers)
        self.test_images = Batches(data.test, whole, recipe.eval_batch_size, workers=recipe.workers)
        self.stages = [(stage.epochs, trial.get_scheme(**dict(stage.scheme_options))) for stage in recipe.stages]
        self.stages.append((recipe.epochs, trial.get_scheme()))
        # Names of the float model's tensors; what binarize() adds to them are scales and shifts.
        self.latent = set(build_model(recipe, len(data.classes), data.image_size).state_dict())
        self.position = Position()
        self.classifier: Classifier | None = None  # of the trained model, made once for all images
        self.saved = time.monotonic()

    def train(self, progress: Progress | None) -> None:
        total = sum(epochs for epochs, _ in self.stages)
        state = read_state(self.resume, self._config(), self.device)
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

    def measure(self) -> TrialResult:
        """Evaluate the trained model and remove the state that is no longer needed."""
        train = self.data.train
        predictions = classify(self.classifier or on_bits(self.model), self.train_images, self.device)
        wrong = train.labels != train.clean_labels
        noisy = self.trial.label_noise > 0
        result = TrialResult(
            trial=self.trial,
            test_accuracy=self.position.history[-1]["test_accuracy"],
            train_accuracy=float(np.mean(predictions == train.labels)),
            clean_train_accuracy=float(np.mean(predictions == train.clean_labels)) if noisy else None,
            memorized=float(np.mean((predictions == train.labels)[wrong])) if wrong.any() else None,
            seconds=time.perf_counter() - self.started,
            parameters=sum(parameter.numel() for parameter in self.model.parameters()),
            history=self.position.history,
            recipe=self.recipe.to_dict(),
            scheme=json.loads(json.dumps(self.trial.get_scheme().to_dict())),
            versions=versions(),
            threads=torch.get_num_threads(),
            device=self.device,
            model=self.model.eval(),
            info=self._info(),
        )
        if self.resume is not None:
            self.resume.unlink(missing_ok=True)
        return result

    def _start(self, stage: int, earlier: nn.Module | None = None) -> None:
        """Build model, optimizer and schedule of a stage; latent weights come from the earlier stage's model."""
        self.position.stage, self.position.epoch = stage, 0
        epochs, scheme = self.stages[stage]
        recipe = self.recipe
        seed_all(self.trial.seed, stage)
        info = self._info(scheme)
        if earlier is None:
            # A pretrained start is overwritten when a state is resumed, but then the weights lie in timm's cache.
            self.model = new_model(info, pretrained=recipe.pretrained)
        else:
            self.model = new_model(info)
            weights = {name: tensor for name, tensor in earlier.state_dict().items() if name in self.latent}
            self.model.load_state_dict(weights, strict=False)
        self.model.to(self.device).train()
        if recipe.distillation != "none" and hasattr(self.model, "set_distilled_training"):
            self.model.set_distilled_training(True)
        if recipe.similarity:
            check_comparable(self.model, self.teacher)
        self.optimizer = new_optimizer(self.model, recipe, scheme.name != "float", self.latent)
        self.scheduler = new_schedule(self.optimizer, recipe, epochs * len(self.batches))
        self.parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.scheduled = [module for module in self.model.modules() if hasattr(module, "set_progress")]
        self.good = None

    def _epoch(self, epoch: int) -> dict[str, Any]:
        """Train for one epoch and return its record."""
        seed_all(self.trial.seed, self.position.stage, epoch)
        epochs, steps = self.stages[self.position.stage][0], len(self.batches)
        losses, hits, seen, rate = [], 0, 0, 0.0
        number = len(self.position.history)  # counted over all stages, so that no order comes twice
        for step, (images, targets, _) in enumerate(self.batches.epoch(number)):
            images, targets = images.to(self.device), targets.to(self.device)
            if self.mixup is not None:
                images, targets = self.mixup(images, targets)
            update = epoch * steps + step
            for module in self.scheduled:
                module.set_progress(update / (epochs * steps))
            rate = self.optimizer.param_groups[0]["lr"]
            with self._recorded(self.model) as projections:
                outputs = self.model(images)
            loss = self._loss(outputs, images, targets, projections)
            value = loss.item()
            if not np.isfinite(value):
                raise self._diverged(value, epoch, step, rate)
            self.optimizer.zero_grad()
            loss.backward()
            if self.recipe.clip_grad:
                nn.utils.clip_grad_norm_(self.parameters, self.recipe.clip_grad)
            self.optimizer.step()
            self.scheduler.step_update(update + 1)
            losses.append(value)
            with torch.no_grad():
                logits = sum(outputs) if isinstance(outputs, tuple) else outputs
                labels = targets if targets.ndim == 1 else targets.argmax(1)
                hits += int((logits.argmax(1) == labels).sum())
                seen += len(labels)
        self.good = self._copy()
        last = epoch + 1 == epochs
        test_accuracy = None
        if last or (epoch + 1) % self.recipe.eval_every == 0:
            self.classifier = on_bits(self.model)
            predictions = classify(self.classifier, self.test_images, self.device)
            test_accuracy = float(np.mean(predictions == self.data.test.labels))
        return {
            "stage": self.position.stage,
            "epoch": len(self.position.history) + 1,
            "train_loss": float(np.mean(losses)),
            "train_accuracy": hits / seen,
            "test_accuracy": test_accuracy,
            "lr": rate,
        }

    def _recorded(self, model: nn.Module) -> AbstractContextManager[Sequence[Tensor]]:
        return recorded_projections(model) if self.recipe.similarity else nullcontext(())

    def _loss(
        self,
        outputs: Tensor | tuple[Tensor, Tensor],
        images: Tensor,
        targets: Tensor,
        projections: Sequence[Tensor] = (),
    ) -> Tensor:
        recipe = self.recipe
        logits, distilled = outputs if isinstance(outputs, tuple) else (outputs, outputs)
        smoothing = recipe.label_smoothing if targets.ndim == 1 else 0.0  # Mixup has smoothed its targets itself
        loss = F.cross_entropy(logits, targets, label_smoothing=smoothing)
        if self.teacher is None:
            return loss
        with torch.no_grad(), self._recorded(self.teacher) as taught_projections:
            taught = self.teacher(images)
        if recipe.distillation == "hard":
            distance = F.cross_entropy(distilled, taught.argmax(1))
            loss = (1 - recipe.alpha) * loss + recipe.alpha * distance
        elif recipe.distillation == "soft":
            warm = [F.log_softmax(item / recipe.temperature, dim=1) for item in (distilled, taught)]
            distance = F.kl_div(*warm, reduction="batchmean", log_target=True) * recipe.temperature**2
            loss = (1 - recipe.alpha) * loss + recipe.alpha * distance
        if recipe.similarity:
            heads = self.model.blocks[0].attn.num_heads
            loss = loss + recipe.similarity * similarity_loss(projections, taught_projections, heads)
        return loss

    def _info(self, scheme: Scheme | None = None) -> CheckpointInfo:
        data = self.data
        return CheckpointInfo(
            recipe=self.recipe,
            scheme=scheme or self.trial.get_scheme(),
            classes=tuple(data.classes),
            mean=data.mean,
            std=data.std,
            image_size=data.image_size,
            trial=self.trial.to_dict(),
        )

    def _copy(self) -> dict[str, Tensor]:
        return {name: tensor.detach().clone() for name, tensor in self.model.state_dict().items()}

    def _diverged(self, loss: float, epoch: int, step: int, rate: float) -> TrainingDiverged:
        kept = ""
        if self.resume is not None and self.good is not None:
            self.model.load_state_dict(self.good)
            path = self.resume.with_suffix(".diverged.safetensors")
            save_checkpoint(path, self.model, self._info(self.stages[self.position.stage][1]))
            kept = f"; the model of the last whole epoch is kept in {path}"
        stage = f"stage {self.position.stage + 1} of {len(self.stages)}, " if len(self.stages) > 1 else ""
        where = f"{stage}epoch {epoch + 1}, step {step + 1}, at learning rate {rate:.3g}"
        return TrainingDiverged(f"The training loss became {loss} in {where}{kept}.")

    def _config(self) -> str:
        """Return what a state must have been trained with to be continued."""
        schemes = [scheme.to_dict() for _, scheme in self.stages]
        return json.dumps([self.trial.id, self.recipe.to_dict(), schemes, versions()])

    def _write_state(self) -> None:
        if self.resume is None:
            return
        self.position.seconds = time.perf_counter() - self.started
        write_state(self.resume, self.position, self.model, self.optimizer, self._config())
        self.saved = time.monotonic()
