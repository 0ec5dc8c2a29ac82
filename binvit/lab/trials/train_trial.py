"""One trial from its data to its files: trained, measured, kept."""

import dataclasses
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from torch import nn

from binvit.lab.data.datasets import ImageData, load_data
from binvit.lab.data.images import check_image_memory
from binvit.lab.data.sources import expanded
from binvit.lab.randomness import own_random_state
from binvit.lab.training.checkpoint import load_checkpoint, save_checkpoint
from binvit.lab.training.devices import Team
from binvit.lab.training.loop import Progress, Training, TrainingDiverged
from binvit.lab.training.recipe import Recipe
from binvit.lab.training.resume import cpu_kind, cpu_vectors
from binvit.lab.training.weights import file_hash, find_weights
from binvit.lab.trials.store import TrialResult, finished_result, load_model, model_path, write_result
from binvit.lab.trials.trial import Trial, teacher_trial
from binvit.nn.fused.float_products import library, multiply_by

Report = Callable[[int, int, dict[str, Any]], None]


# Other errors of the operating system, such as a full disk, are no fault of the input.
_WRONG_INPUT = (ValueError, FileNotFoundError, FileExistsError, NotADirectoryError, PermissionError)


def is_wrong_input(error: Exception) -> bool:
    """Say whether an error of a trial comes from its input, not from its work."""
    return isinstance(error, _WRONG_INPUT) and not isinstance(error, TrainingDiverged)


def run_trial(
    trial: Trial,
    results_dir: str | Path,
    keep_model: bool = False,
    report: Report | None = None,
    wait: bool = True,
    device: str | None = None,
) -> bool:
    """Run one trial, unless its result exists, and write its files.

    All processes that torchrun has started train it together, and the first one writes.

    Args:
        trial: the configuration.
        results_dir: folder of the results.
        keep_model: also write the checkpoint.
        report: called after every epoch, as in `train_trial`.
        wait: wait for another process that runs this trial.
        device: where to train, as in `train_trial`.

    Returns:
        Whether the result exists now; False if another process runs the trial and `wait` is False.
    """
    team = Team(device)
    results_dir = Path(results_dir)
    identity = trial.id
    running = results_dir / ".running"  # locks, and states from which killed trials continue
    running.mkdir(parents=True, exist_ok=True)
    lock = FileLock(running / f"{identity}.lock")
    if not _acquire(lock, team, wait):
        return False
    try:
        state = running / f"{identity}.state"
        if team.share(team.leads and finished_result(trial, results_dir, keep_model) is not None):
            state.unlink(missing_ok=True)  # left by a process that was killed after it had written the result
            return True
        teacher = None
        recipe = trial.get_recipe()
        if recipe.trains_teacher:
            taught = teacher_trial(trial)
            run_trial(taught, results_dir, keep_model=True, report=report, device=device)
            teacher = load_model(taught, results_dir)

        def keep(result: TrialResult) -> None:
            if result.id != identity:
                raise ValueError(_changed(trial))
            if team.leads and result.model is not None and result.info is not None:
                if keep_model:
                    save_checkpoint(model_path(trial, results_dir), result.model, result.info)
                write_result(result, results_dir)  # last, since it says that the trial is finished

        train_trial(trial, teacher=teacher, progress=report, device=device, resume=state, keep=keep)
        return team.share(True)  # when the files are there
    except Exception as error:
        if is_wrong_input(error):  # which leaves no trace
            with suppress(OSError):
                Path(lock.lock_file).unlink(missing_ok=True)
        raise
    finally:
        lock.release()


def _changed(trial: Trial) -> str:
    return f"The images of {trial.dataset} have changed while a model was trained on them; run the trial again."


def _acquire(lock: FileLock, team: Team, wait: bool) -> bool:
    """Let the leading process take a lock for all; the others hear of it every minute, so that none gives up."""
    while True:
        if team.leads:
            with suppress(Timeout):
                lock.acquire(timeout=60 if wait else 0)
        taken = bool(team.share(lock.is_locked))
        if taken or not wait:
            return taken


ALL_KERNELS = ("gsb", "bhvit-qd", "bivit-head")
"""Schemes whose trainings together run every kernel of training."""


def compile_kernels() -> float:
    """Compile the kernels of training and of packed models, or load them from disk, by trainings of one epoch.

    Returns:
        The seconds it took: half a minute at the first time on a machine, then about two.
    """
    start = time.perf_counter()
    with multiply_by("oneDNN"):  # whose tiles an archived trial may have been trained with
        for name in ALL_KERNELS:
            train_trial(Trial("digits", name, "smoke", samples_per_class=7, recipe_options={"epochs": 1}), device="cpu")
    return time.perf_counter() - start


def train_trial(
    trial: Trial,
    *,
    teacher: nn.Module | None = None,
    progress: Progress | None = None,
    device: str | None = None,
    resume: str | Path | None = None,
    keep: Callable[[TrialResult], object] | None = None,
) -> TrialResult:
    """Train and measure one trial; the same seed and number of threads give the same bits on a CPU.

    Args:
        trial: the configuration.
        teacher: a trained float model to distil from; None loads or trains the one the recipe names, if it distils.
        progress: called after every epoch with the epochs done, the epochs in all and the epoch's record.
        device: "cpu", "cuda", "mps" or one GPU, such as "cuda:1"; None takes a GPU if there is one.
        resume: file of the state from which a killed trial continues; written every few minutes, removed at the end. A
            training that diverges leaves its last good model beside it, with the suffix `.diverged.safetensors`.
        keep: called with the result before the state is removed, so that a kill while files are written loses nothing.

    Returns:
        The result, with the trained model in evaluation mode.

    Raises:
        TrainingDiverged: the loss is no longer finite.
        ValueError: data, recipe and scheme do not fit together, or the images changed while they were trained on.
        FileNotFoundError: data, weights or a teacher are missing.
    """
    team = Team(device)
    with own_random_state(team.device):  # around the data, too: what reads them may draw when it is imported
        fingerprint = trial.fingerprint  # before a single image is read
        training = _training(trial, trial.identity(fingerprint), teacher, team, resume)
        training.train(progress if team.leads else None)
        result = _measure(trial, training, fingerprint)
        if trial.fingerprint != fingerprint:
            training.finish()  # the state belongs to no images, so nobody may go on from it
            raise ValueError(_changed(trial))
    if keep is not None:
        keep(result)
    training.finish()
    return result


def _training(
    trial: Trial, identity: str, teacher: nn.Module | None, team: Team, resume: str | Path | None
) -> Training:
    recipe = trial.get_recipe()
    if recipe.weights_hash and not recipe.weights:
        recipe = dataclasses.replace(recipe, weights=find_weights(recipe.weights_hash, trial.root))
    data = load_data(
        trial.dataset,
        samples_per_class=trial.samples_per_class,
        label_noise=trial.label_noise,
        seed=trial.seed,
        root=trial.root,
        image_size=recipe.image_size,
        noise=trial.noise,
        evaluate_on=trial.evaluate_on,
    )
    step = recipe.batch_size // (recipe.accumulate * team.size)
    check_image_memory(min(max(step, 1), len(data.train)), data.image_size, 4)
    check_image_memory(min(recipe.eval_batch_size, max(len(data.train), len(data.evaluated))), data.image_size, 4)
    if not recipe.has_teacher:
        teacher = None
    else:
        teacher = teacher if teacher is not None else _teacher(trial, recipe, data, team.device)
        teacher = teacher.to(team.device).eval()
    schemes = [trial.get_scheme(**dict(stage.scheme_options)) for stage in recipe.stages]
    return Training(
        recipe,
        [*schemes, trial.get_scheme()],
        data,
        trial.seed,
        teacher=teacher,
        team=team,
        resume=Path(resume) if resume else None,
        identity=identity,
        record={"id": identity} | trial.to_dict(),
    )


def _measure(trial: Trial, training: Training, fingerprint: str) -> TrialResult:
    """Evaluate a trained model on its training images."""
    train, history = training.data.train, training.position.history
    predictions = training.predict_train()
    wrong = train.labels != train.clean_labels
    return TrialResult(
        trial=trial,
        test_accuracy=history[-1]["test_accuracy"],
        train_accuracy=float(np.mean(predictions == train.labels)),
        clean_train_accuracy=float(np.mean(predictions == train.clean_labels)) if trial.label_noise > 0 else None,
        memorized=float(np.mean((predictions == train.labels)[wrong])) if wrong.any() else None,
        seconds=training.seconds,
        parameters=sum(parameter.numel() for parameter in training.model.parameters()),
        history=tuple(history),  # type: ignore[arg-type]
        recipe=training.recipe,
        scheme=trial.get_scheme(),
        versions=training.position.versions,
        threads=torch.get_num_threads(),
        device=training.team.description,
        fingerprint=fingerprint,
        cpu=cpu_kind(),
        vectors=cpu_vectors(),
        products=library(),
        id=trial.identity(fingerprint),
        model=training.model.eval(),
        info=training.describe(),
    )


def _teacher(trial: Trial, recipe: Recipe, data: ImageData, device: str) -> nn.Module:
    if recipe.trains_teacher:
        result = train_trial(teacher_trial(trial), device=device)
        assert result.model is not None  # it was just trained
        return result.model
    if not recipe.teacher:
        raise FileNotFoundError(f"The trial learns from a teacher with the hash {recipe.teacher_hash}; give its file.")
    if file_hash(recipe.teacher, "the teacher") != recipe.teacher_hash:
        raise ValueError(
            f"The teacher {recipe.teacher} is not the one that the trial names: its hash is not {recipe.teacher_hash}."
        )
    model, info = load_checkpoint(expanded(recipe.teacher))
    if len(info.classes) != len(data.classes) or info.image_size != data.image_size:
        has = f"{len(info.classes)} classes and images of {info.image_size} pixels"
        needs = f"{len(data.classes)} and {data.image_size}"
        raise ValueError(f"The teacher {recipe.teacher} has {has}, the data set {trial.dataset} {needs}.")
    return model
