import pytest

import binvit
from binvit.lab.training.model import build_model
from binvit.lab.training.optimizer import new_optimizer, new_schedule
from binvit.lab.training.recipes import recipe

TINY = {"width": 16, "depth": 1, "heads": 2}


def parts(scheme, **options):
    made = recipe("smoke", **TINY | options)
    plain = build_model(made, 10, 8)
    return binvit.binarize(plain, scheme), made, set(plain.state_dict())


def test_only_matrices_of_the_float_model_decay():
    model, made, latent = parts("gsb", weight_decay=0.1)
    optimizer = new_optimizer(model, made, latent)
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    found = {name for name, parameter in model.named_parameters() if decays[id(parameter)]}
    assert {"blocks.0.attn.qkv.weight", "blocks.0.mlp.fc1.weight", "head.weight"} <= found
    assert found <= latent
    assert not any(name.endswith("bias") or "norm" in name or name in ("pos_embed", "cls_token") for name in found)
    assert len(decays) == len(list(model.parameters()))


@pytest.mark.parametrize("name", ["bnbadamw", "fusedadam"])
def test_optimizers_that_need_another_machine_are_refused_in_a_sentence(name, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ValueError, match=rf"^The optimizer '{name}' cannot be used on this machine \(.*\)\.$"):
        new_optimizer(*parts("float", optimizer=name))


@pytest.mark.parametrize(("options", "expected"), [({}, 1e-3), ({"lr_batch": 32, "batch_size": 64}, 2e-3)])
def test_the_rate_may_follow_the_batch(options, expected):
    model, made, latent = parts("gsb", lr=1e-3, **options)
    assert {group["lr"] for group in new_optimizer(model, made, latent).param_groups} == {expected}


def test_the_rate_rises_from_a_hundredth_and_falls_to_the_end():
    model, made, latent = parts("float", lr=1e-2, min_lr=1e-5, warmup=0.25)
    optimizer = new_optimizer(model, made, latent)
    schedule, rates = new_schedule(optimizer, made, 40), []
    for step in range(40):
        rates.append(optimizer.param_groups[0]["lr"])
        schedule.step_update(step + 1)
    assert rates[0] == pytest.approx(1e-4)
    assert rates[10] == max(rates) == pytest.approx(1e-2)
    assert rates[:11] == sorted(rates[:11])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-5)
