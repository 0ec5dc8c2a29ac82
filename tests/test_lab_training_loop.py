import copy
import errno
import random
from contextlib import nullcontext

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import binvit
from binvit import lab
from binvit.lab.data.datasets import load_data
from binvit.lab.training import loop
from binvit.lab.training.checkpoint import load_checkpoint, save_checkpoint
from binvit.lab.training.distillation import training_loss
from binvit.lab.training.loop import Training, TrainingDiverged
from binvit.lab.training.model import build_model
from binvit.lab.training.recipes import mlp_weights_stage, recipe
from binvit.lab.trials.train_trial import train_trial
from binvit.lab.trials.trial import Trial, teacher_trial
from binvit.nn import Binarizer

TINY = {"width": 16, "depth": 1, "heads": 2, "epochs": 2, "batch_size": 64, "eval_every": 1}


def tiny(scheme="float", seed=0, samples=10, label_noise=0.0, **options):
    options = TINY | options
    return Trial(
        "digits", scheme, seed=seed, samples_per_class=samples, label_noise=label_noise, recipe_options=options
    )


def numbers(result):
    return result.history, result.test_accuracy, result.train_accuracy


def same_weights(a, b):
    states = a.state_dict(), b.state_dict()
    return states[0].keys() == states[1].keys() and all(
        torch.equal(states[0][name], states[1][name]) for name in states[0]
    )


@pytest.mark.parametrize("options", [{}, {"mixup": 0.2, "cutmix": 0.5, "drop_path": 0.2}, {"crop": 0.5, "flip": 0.5}])
def test_same_seed_gives_the_same_bits(options):
    first, second = (train_trial(tiny("gsb", **options)) for _ in range(2))
    assert numbers(first) == numbers(second)
    assert same_weights(first.model, second.model)
    assert numbers(train_trial(tiny("gsb", seed=1, **options))) != numbers(first)


@pytest.mark.parametrize("options", [{}, {"lr": 1e30, "clip_grad": 0.0, "schedule": "constant"}])
def test_callers_random_numbers_are_left_alone(options):
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(5)
    expected = random.random(), np.random.rand(), torch.rand(1).item()  # noqa: NPY002
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(5)
    with pytest.raises(TrainingDiverged) if options else nullcontext():
        train_trial(tiny(**options))
    assert (random.random(), np.random.rand(), torch.rand(1).item()) == expected  # noqa: NPY002


def test_training_learns_and_measures():
    seen = []
    trial = tiny("gsb", samples=None, epochs=5, eval_every=2, lr=1e-2, width=32)
    result = train_trial(trial, progress=lambda done, total, record: seen.append((done, total, record["epoch"])))
    assert seen == [(i, 5, i) for i in range(1, 6)]
    assert result.test_accuracy > 0.3
    assert [entry["test_accuracy"] is None for entry in result.history] == [True, False, True, False, False]
    assert result.history[-1]["test_accuracy"] == result.test_accuracy
    assert result.history[-1]["train_loss"] < result.history[0]["train_loss"]
    rates = [entry["lr"] for entry in result.history]
    assert rates == sorted(rates, reverse=True)
    assert rates[0] <= 1e-2
    assert not result.model.training
    assert result.parameters == sum(p.numel() for p in result.model.parameters())


def test_learning_rate_warms_up_and_scales_with_the_batch():
    rates = [entry["lr"] for entry in train_trial(tiny(epochs=6, warmup=0.5, lr=1e-2)).history]
    assert rates.index(max(rates)) == 3
    result = train_trial(tiny("elastic", epochs=1, lr=1e-3, lr_batch=32, schedule="constant"))
    assert result.history[0]["lr"] == pytest.approx(2e-3)


def test_memorized_labels_are_counted(monkeypatch):
    trial = tiny(samples=5, label_noise=0.4, epochs=1)
    for asked, expected in (("labels", (1.0, 0.6, 1.0)), ("clean_labels", (0.6, 1.0, 0.0))):
        monkeypatch.setattr(loop, "classify", lambda model, images, device, asked=asked: getattr(images.dataset, asked))
        result = train_trial(trial)
        assert (result.train_accuracy, result.clean_train_accuracy, result.memorized) == pytest.approx(expected)
    clean = train_trial(tiny(epochs=1))
    assert clean.memorized is clean.clean_train_accuracy is None


def test_a_last_step_that_ruins_the_model_is_a_divergence(monkeypatch):
    def ruin(self, update):
        for parameter in self.optimizer.param_groups[0]["params"] if update == 2 else ():
            parameter.data.fill_(torch.nan)

    monkeypatch.setattr("timm.scheduler.scheduler.Scheduler.step_update", ruin)
    with pytest.raises(TrainingDiverged, match=r"The training loss became nan in epoch 2, step 1, at learning rate"):
        train_trial(tiny("gsb"))


def test_divergence_names_the_place_and_keeps_the_last_good_model(tmp_path, monkeypatch):
    steps = iter(range(100))
    loss = loop.training_loss
    monkeypatch.setattr(loop, "training_loss", lambda *args: loss(*args) * (float("nan") if next(steps) >= 4 else 1))
    trial = tiny("elastic", batch_size=32, epochs=3, schedule="constant", lr=2e-3)  # three steps an epoch
    with pytest.raises(TrainingDiverged, match=r"became nan in epoch 2, step 2, at learning rate 0.002; .*kept in "):
        train_trial(trial, resume=tmp_path / "run.state")
    (kept,) = tmp_path.iterdir()
    model, info = load_checkpoint(kept)
    assert info.scheme.name == "elastic"
    assert all(torch.isfinite(tensor).all() for tensor in model.state_dict().values())


@pytest.mark.parametrize("last", [3, 9])  # the last steps of the first and of the last epoch
def test_a_last_step_that_diverges_leaves_no_model_of_nan(tmp_path, monkeypatch, last):
    steps = iter(range(1, 100))

    def new_optimizer(model, *args):
        optimizer = given(model, *args)

        def spoil(*_):
            if next(steps) == last:
                with torch.no_grad():
                    next(model.parameters()).view(-1)[0] = float("nan")

        optimizer.register_step_post_hook(spoil)
        return optimizer

    given = loop.new_optimizer
    monkeypatch.setattr(loop, "new_optimizer", new_optimizer)
    trial = tiny("elastic", batch_size=32, epochs=3, schedule="constant", lr=2e-3)  # three steps an epoch
    with pytest.raises(TrainingDiverged, match=rf"became nan in epoch {last // 3}, step 3, at learning rate 0.002"):
        train_trial(trial, resume=tmp_path / "run.state")
    models = [load_checkpoint(path)[0] for path in tmp_path.iterdir()]
    assert len(models) == (last == 9)
    assert all(torch.isfinite(tensor).all() for model in models for tensor in model.state_dict().values())


def test_real_divergence_is_noticed():
    with pytest.raises(TrainingDiverged, match=r"became (nan|inf) in epoch \d+, step \d+, at learning rate 1e\+30"):
        train_trial(tiny(lr=1e30, clip_grad=0.0, schedule="constant"))


@pytest.mark.parametrize("size", [{"width": 2**20}, {"width": 2**10, "mlp_ratio": 1000, "depth": 64}])
def test_a_model_beyond_the_memory_is_refused_before_it_is_built(size):
    with pytest.raises(ValueError, match=r"A model of \d+ parameters takes at least .* GiB to train .* this machine"):
        train_trial(tiny(**size))


def test_damaged_state_starts_over(tmp_path):
    state = tmp_path / "run.state"
    state.write_bytes(b"damaged")
    with pytest.warns(UserWarning, match=r"run\.state is damaged; the training starts over"):
        result = train_trial(tiny(), resume=state)
    assert numbers(result) == numbers(train_trial(tiny()))
    assert not state.exists()


def test_a_full_disk_at_a_state_lets_the_training_go_on(tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(loop, "write_state", full)
    with pytest.warns(UserWarning, match=r"run\.state could not be written \(.*No space left.*the training goes on"):
        result = train_trial(tiny(checkpoint_minutes=0.0), resume=tmp_path / "run.state")
    assert numbers(result) == numbers(train_trial(tiny()))


def test_a_state_of_other_versions_is_continued_and_told(tmp_path, monkeypatch):
    trial, state = tiny(checkpoint_minutes=0.0, epochs=3), tmp_path / "run.state"

    def stop(done, total, record):
        if done == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(timm, "__version__", "0.1")
    with pytest.raises(KeyboardInterrupt):
        train_trial(trial, resume=state, progress=stop)
    monkeypatch.undo()
    with pytest.warns(UserWarning, match=r"continues from .*run\.state, which was written with timm 0\.1 \(now "):
        result = train_trial(trial, resume=state)
    assert result.versions["timm"] == f"0.1, then {timm.__version__}"
    assert result.versions["torch"] == torch.__version__
    assert numbers(result) == numbers(train_trial(trial))


def test_a_state_is_continued_with_other_workers_checkpoints_and_places_of_weights(tmp_path):
    start = train_trial(tiny(epochs=1))
    places = [tmp_path / name / "start.safetensors" for name in ("here", "there")]
    for place in places:
        place.parent.mkdir()
        save_checkpoint(place, start.model, start.info)
    state, options = tmp_path / "run.state", {"epochs": 3, "crop": 0.5}
    before = tiny(**options, checkpoint_minutes=0.0, weights=str(places[0]))
    after = tiny(**options, checkpoint_minutes=5.0, workers=1, weights=str(places[1]))

    def stop(done, total, record):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_trial(before, resume=state, progress=stop)
    seen = []
    result = train_trial(after, resume=state, progress=lambda done, *_: seen.append(done))
    assert seen == [2, 3]
    assert numbers(result) == numbers(train_trial(before))


def test_the_state_stays_until_the_result_is_kept(tmp_path):
    state = tmp_path / "run.state"

    def fail(result):
        raise OSError(errno.ENOSPC, "No space left on device")

    trial = tiny(checkpoint_minutes=0.0)
    with pytest.raises(OSError, match="No space left"):
        train_trial(trial, resume=state, keep=fail)
    seen = []
    result = train_trial(trial, resume=state, progress=lambda done, *_: seen.append(done))
    assert seen == []  # no epoch was trained again
    assert numbers(result) == numbers(train_trial(trial))
    assert not state.exists()


def test_stages_hand_weights_on():
    whole, early = binvit.scheme("gsb"), binvit.scheme("gsb", components=("mlp",), input="float", hidden="float")
    settings = TINY | {"stages": [mlp_weights_stage(2)], "epochs": 1, "lr": 1e-12}
    still = recipe("smoke", **settings)
    training = Training(still, [early, whole], load_data("digits", samples_per_class=5), seed=0)
    seen = []
    training.train(lambda *_: seen.append((training.model.scheme, copy.deepcopy(training.model.state_dict()))))
    assert [entry["stage"] for entry in training.position.history] == [0, 0, 1]
    assert [entry["epoch"] for entry in training.position.history] == [1, 2, 3]
    assert [scheme for scheme, _ in seen] == [early, early, whole]
    weights = build_model(still, 10, 8).state_dict()
    for name in weights:  # a stage of its own would start from other random weights
        torch.testing.assert_close(seen[2][1][name], seen[1][1][name])
    assert seen[2][1].keys() > weights.keys()


def test_distillation_none_soft_and_hard_differ():
    teacher = train_trial(teacher_trial(tiny(distillation="hard", epochs=3))).model
    losses = {}
    for kind in ("none", "soft", "hard"):
        for distilled in (False, True):
            trial = tiny("elastic", distillation=kind, distilled=distilled)
            losses[kind, distilled] = train_trial(trial, teacher=teacher).history[-1]["train_loss"]
    assert len(set(losses.values())) == 6
    assert all(np.isfinite(value) for value in losses.values())


def test_distillation_losses_are_their_formulas():
    torch.manual_seed(0)
    logits, distilled, taught = torch.randn(3, 4, 5)
    labels = torch.tensor([0, 1, 2, 3])
    own = -logits.log_softmax(1)[range(4), labels].mean()
    hard = -distilled.log_softmax(1)[range(4), taught.argmax(1)].mean()
    p, q = (taught / 2).softmax(1), (distilled / 2).softmax(1)
    soft = (p * (p / q).log()).sum(1).mean() * 4
    for kind, expected in (("hard", 0.3 * own + 0.7 * hard), ("soft", 0.3 * own + 0.7 * soft)):
        given = recipe("smoke", distillation=kind, alpha=0.7, temperature=2.0)
        loss = training_loss((logits, distilled), torch.empty(4), labels, given, lambda images: taught)
        torch.testing.assert_close(loss, expected)


def test_teacher_is_trained_or_loaded(tmp_path):
    trial = tiny("elastic", distillation="hard", teacher_epochs=1)
    trained = train_trial(trial)
    taught = train_trial(teacher_trial(trial))
    path = save_checkpoint(tmp_path / "teacher.safetensors", taught.model, taught.info)
    loaded = train_trial(tiny("elastic", distillation="hard", teacher=str(path)))
    assert numbers(loaded) == numbers(trained)
    with pytest.raises(ValueError, match="10 classes and images of 8 pixels, the data set digits 10 and 16"):
        train_trial(tiny("elastic", distillation="hard", teacher=str(path), image_size=16))
    with pytest.raises(FileNotFoundError, match=r"file of the teacher .*missing does not exist"):
        train_trial(tiny("elastic", distillation="hard", teacher=str(tmp_path / "missing")))


@pytest.mark.parametrize("accumulate", [1, 3])
def test_similarities_of_the_first_batch_are_heard_once(accumulate):
    # The first batch sets the scales by a pass of its own.
    result = train_trial(tiny("gsb", similarity=0.5, teacher_epochs=1, accumulate=accumulate))
    plain = train_trial(tiny("gsb", accumulate=accumulate))
    assert result.history[0]["train_loss"] > plain.history[0]["train_loss"]


def test_schedules_of_rules_are_driven(monkeypatch):
    driven = []
    monkeypatch.setattr(Binarizer, "set_progress", lambda self, progress: driven.append(progress))
    train_trial(tiny("irnet", batch_size=50))
    assert sorted(set(driven)) == [0, 0.25, 0.5, 0.75]


def test_two_steps_of_the_paper_recipe(tmp_path):
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            (tmp_path / split / name).mkdir(parents=True)
            image = rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)
            Image.fromarray(image).save(tmp_path / split / name / "0.png")
    options = {"epochs": 1, "stages": [mlp_weights_stage(1)], "batch_size": 2, "workers": 0}
    trial = Trial(f"folder:{tmp_path}", "gsb", "paper", recipe_options=options)
    teacher = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(3, 2))
    result = train_trial(trial, teacher=teacher)
    assert [entry["stage"] for entry in result.history] == [0, 1]  # one optimizer step in each stage
    assert all(np.isfinite(entry["train_loss"]) for entry in result.history)
    assert result.history[0]["lr"] == pytest.approx(1e-3 * 2 / 512)
    assert result.model.scheme == binvit.scheme("gsb")
    assert result.model.dist_token is not None
    assert sum(p.numel() for name, p in result.model.named_parameters() if "attn.bias" in name) == 2_822_688


def test_public_names_exist():
    for name in lab.__all__:
        assert getattr(lab, name) is not None
    with pytest.raises(AttributeError, match="attribute nonsense"):
        _ = lab.nonsense


def test_a_training_from_nothing_starts_from_the_latent_weights_of_its_scheme():
    still = {"lr": 0.0, "min_lr": 0.0, "weight_decay": 0.0, "epochs": 1}
    low, high = binvit.scheme("bireal").latent_init
    layers = [train_trial(tiny(name, **still)).model.blocks[0].mlp.fc1.weight for name in ("bireal", "irnet")]
    assert low <= layers[0].min() < layers[0].max() <= high
    assert layers[1].min() < low < high < layers[1].max()
