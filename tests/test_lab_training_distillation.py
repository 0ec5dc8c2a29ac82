import math

import numpy as np
import pytest
import torch
from golden_methods import close, golden
from test_lab_training_loop import TINY, numbers, same_weights, tiny
from torch import nn

import binvit
from binvit.lab.training.distillation import (
    check_comparable,
    one_bit_weights,
    recorded_projections,
    similarity_loss,
    weight_penalty,
)
from binvit.lab.training.model import build_model
from binvit.lab.training.recipes import recipe
from binvit.lab.trials.train_trial import train_trial
from binvit.lab.trials.trial import Trial, teacher_trial


def projections(seed, blocks=2, images=2, tokens=3, heads=2, channels=4):
    generator = torch.Generator().manual_seed(seed)
    shape = (images, tokens, 3 * heads * channels)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(blocks)]


def normalized(x):
    """Return S = x x^T, its norm and P, by loops over two tokens."""
    n = len(x)
    s = np.array([[sum(x[i, c] * x[j, c] for c in range(x.shape[1])) for j in range(n)] for i in range(n)])
    norm = math.sqrt(sum(value**2 for value in s.flat))
    return norm, s / norm


def slow(student, teacher, heads):
    """Return the loss and its gradient to the student, one matrix at a time, from the derivative of P on paper.

    With E = (P - P') / ||P - P'|| the gradient to S is (E - <E, P> P) / ||S||, and that to x twice its product with x.
    """
    total, gradients = 0.0, []
    for own, theirs in zip(student, teacher, strict=True):
        own, theirs, gradient = own.numpy(), theirs.numpy(), np.zeros(own.shape)
        images = len(own)
        for image in range(images):
            for part in range(3):
                for head in range(heads):
                    places = [
                        slice((part * heads + head) * d, (part * heads + head + 1) * d)
                        for d in (own.shape[2] // 3 // heads, theirs.shape[2] // 3 // heads)
                    ]
                    x = own[image][:, places[0]]
                    norm, p = normalized(x)
                    _, wanted = normalized(theirs[image][:, places[1]])
                    distance = math.sqrt(((p - wanted) ** 2).sum())
                    total += distance / images / heads
                    e = (p - wanted) / distance
                    gradient[image][:, places[0]] = 2 * (e - (e * p).sum() * p) / norm @ x / images / heads
        gradients.append(gradient)
    return total, gradients


@pytest.mark.parametrize("channels", [4, 5])
def test_loss_and_gradient_are_their_formulas(channels):
    student, teacher = projections(0), projections(1, channels=channels)
    student[0][0, 1] = 0.0  # a token without any size
    total, gradients = slow(student, teacher, heads=2)
    for x in student:
        x.requires_grad_()
    loss = similarity_loss(student, teacher, heads=2)
    loss.backward()
    assert loss.item() == pytest.approx(total, rel=1e-12)
    for x, expected in zip(student, gradients, strict=True):
        np.testing.assert_allclose(x.grad.numpy(), expected, rtol=1e-9, atol=1e-12)


def test_the_same_directions_cost_nothing_and_opposite_ones_the_most():
    teacher = projections(2)
    student = [(3.0 * x).requires_grad_() for x in teacher]
    loss = similarity_loss(student, teacher, heads=2)
    loss.backward()
    assert loss.item() == pytest.approx(0.0, abs=1e-12)
    assert all(torch.isfinite(x.grad).all() for x in student)
    one, other = torch.zeros(2, 1, 2, 3, dtype=torch.float64)
    one[:, 0], other[:, 1] = 1.0, 1.0  # each matrix is zero where the other one is not
    assert similarity_loss([one], [other], heads=1).item() == pytest.approx(3 * math.sqrt(2))


def test_nothing_at_all_stays_finite():
    student = [torch.zeros_like(x).requires_grad_() for x in projections(0)]
    loss = similarity_loss(student, projections(1), heads=2)
    loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(x.grad).all() for x in student)


@pytest.mark.parametrize("scheme", ["float", "bibert", "gsb"])
def test_projections_of_every_block_are_recorded_and_no_hook_stays(scheme):
    model = binvit.binarize(build_model(recipe("smoke", **TINY | {"depth": 3}), 10, 8), scheme).train()
    images = torch.randn(2, 3, 8, 8)
    model(images)
    with recorded_projections(model) as found:
        model(images)
    assert [tuple(x.shape) for x in found] == [(2, 17, 3 * 16)] * 3
    assert found[0].requires_grad
    model(images)
    assert len(found) == 3


def test_models_that_cannot_be_compared_are_refused():
    model = build_model(recipe("smoke", **TINY), 10, 8)
    check_comparable(model, build_model(recipe("smoke", **TINY | {"width": 24}), 10, 8))
    with pytest.raises(ValueError, match="has 1 blocks of 2 heads on 17 tokens, the teacher 2 blocks of 2 heads on 17"):
        check_comparable(model, build_model(recipe("smoke", **TINY | {"depth": 2}), 10, 8))
    with pytest.raises(ValueError, match="needs a vision transformer as teacher, got Linear"):
        check_comparable(model, nn.Linear(2, 2))
    with pytest.raises(ValueError, match="has 2 blocks of 2 heads on 17 tokens, the teacher 1 blocks"):
        train_trial(tiny("elastic", similarity=1.0, depth=2), teacher=model)


@pytest.mark.parametrize("distillation", ["none", "soft", "hard"])
def test_a_trial_trains_with_it_beside_every_distillation(distillation):
    teacher = train_trial(teacher_trial(tiny(distillation="hard", epochs=3))).model
    options = {"distillation": distillation, "epochs": 3, "lr": 1e-2}
    without = train_trial(tiny("bibert", **options), teacher=teacher)
    results = [train_trial(tiny("bibert", similarity=0.5, **options), teacher=teacher) for _ in range(2)]
    assert numbers(results[0]) == numbers(results[1]) != numbers(without)
    assert not same_weights(results[0].model, without.model)
    losses = [record["train_loss"] for record in results[0].history]
    assert losses[-1] < losses[0]
    assert not any(module._forward_hooks for module in results[0].model.modules())


def test_it_trains_its_own_teacher_and_leaves_the_distillation_token_alone():
    trial = tiny("elastic", similarity=1.0, distilled=True, teacher_epochs=1)
    taught = teacher_trial(trial)
    assert taught == teacher_trial(tiny("elastic", distillation="hard", distilled=True, teacher_epochs=1))
    assert taught.get_recipe().similarity == 0
    assert numbers(train_trial(trial)) == numbers(train_trial(trial, teacher=train_trial(taught).model))


@pytest.mark.parametrize("value", [-1.0, "much", True, float("nan")])
def test_wrong_weights_are_refused(value):
    with pytest.raises(ValueError, match="recipe's similarity must be"):
        recipe("smoke", similarity=value)


def test_trials_without_it_keep_their_names():
    for scheme in ("gsb", "elastic"):
        assert Trial("digits", scheme).id == Trial("digits", scheme, recipe_options={"similarity": 0}).id
    hard = {"distillation": "hard"}
    taught, alone = (teacher_trial(Trial("digits", "elastic", recipe_options=options)) for options in (hard, {}))
    assert taught.id == alone.id


def test_the_penalty_of_bhvit_is_the_official_one():
    arrays = golden("bhvit-qd/penalty")
    weights = [arrays[name].requires_grad_() for name in ("query", "dense")]
    loss = weight_penalty(weights)
    loss.backward()
    close(loss, arrays["loss"])
    for w, name in zip(weights, ("gquery", "gdense"), strict=True):
        close(w.grad, arrays[name])


def test_the_penalty_is_on_1_bit_matrices_alone():
    model = binvit.binarize(build_model(recipe("smoke"), 10, 16), "bhvit-qd")
    square, expanding, reducing = (48, 48), (96, 48), (48, 96)
    assert [tuple(w.shape) for w in one_bit_weights(model)] == 3 * [*4 * [square], expanding, reducing]
    assert one_bit_weights(build_model(recipe("smoke"), 10, 16)) == []


def test_the_penalty_pulls_the_weights_in_the_last_tenth_of_the_epochs():
    options = {"epochs": 10, "eval_every": 10, "weight_decay": 0.0}
    plain, pulled = (train_trial(tiny("bhvit-qd", weight_penalty=share, **options)) for share in (0.0, 0.9))
    losses = [[record["train_loss"] for record in result.history] for result in (plain, pulled)]
    assert losses[0][:9] == losses[1][:9]
    assert losses[0][9] != losses[1][9]
    far, near = (weight_penalty(one_bit_weights(result.model)).item() for result in (plain, pulled))
    assert near < far
