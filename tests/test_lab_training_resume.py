import contextlib
import random

import numpy as np
import pytest
import torch

from binvit.lab.randomness import own_random_state, seed_all
from binvit.lab.training.devices import Team
from binvit.lab.training.resume import Position, read_state, write_state


def drawn():
    return random.random(), np.random.rand(), torch.rand(1).item()  # noqa: NPY002


def test_seeds_decide_all_generators_and_leave_no_trace():
    seed_all(7)
    expected = drawn()
    seed_all(7)
    with own_random_state("cpu"):
        seed_all(0, 1, 2)
        first = drawn()
        seed_all(0, 1, 2)
        assert drawn() == first
        seed_all(0, 1, 3)
        assert all(a != b for a, b in zip(drawn(), first, strict=True))
    assert drawn() == expected


def test_the_cpu_s_numbers_are_those_of_torch_s_own_seed():
    with own_random_state("cpu"):
        seed_all(3, 1, 4)
        found = torch.rand(100)
        torch.manual_seed(int(np.random.SeedSequence((3, 1, 4)).generate_state(1)[0]))
        assert torch.equal(torch.rand(100), found)


@pytest.mark.parametrize(
    ("device", "seeded"), [("cpu", []), ("cuda", ["cuda"]), ("cuda:1", ["cuda:1"]), ("mps", ["mps", "mps as before"])]
)
def test_generators_of_other_devices_than_the_training_s_are_left_alone(monkeypatch, device, seeded):
    calls, current = [], []

    @contextlib.contextmanager
    def on(name):
        current.append(name)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "device", on)
    monkeypatch.setattr(torch.cuda, "manual_seed", lambda seed: calls.append(current[-1]))
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: calls.append("all GPUs"))
    monkeypatch.setattr(torch.mps, "manual_seed", lambda seed: calls.append("mps"))
    monkeypatch.setattr(torch.mps, "get_rng_state", lambda: "before")
    monkeypatch.setattr(torch.mps, "set_rng_state", lambda state: calls.append(f"mps as {state}"))
    monkeypatch.setattr(torch.random, "fork_rng", lambda devices: contextlib.nullcontext())
    state = torch.get_rng_state()
    with own_random_state(device):
        seed_all(7, device=device)
    torch.set_rng_state(state)
    assert calls == seeded


def test_a_state_is_read_back_only_for_the_same_run(tmp_path):
    path, model = tmp_path / "run.state", torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    position = Position(1, 2, 3.5, [{"epoch": 1, "test_accuracy": None}])
    write_state(path, position, model, optimizer, "this run", Team("cpu"))
    assert [item.name for item in tmp_path.iterdir()] == ["run.state"]
    state = read_state(path, "this run", Team("cpu"))
    assert Position(**state["position"]) == position
    assert all(torch.equal(state["model"][name], tensor) for name, tensor in model.state_dict().items())
    assert state["optimizer"]["state"].keys() == optimizer.state_dict()["state"].keys()
    with pytest.warns(UserWarning, match="is of another recipe, scheme or data set; the training starts over"):
        assert read_state(path, "another run", Team("cpu")) is None
    whole = path.read_bytes()
    for place in (0, 40, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 8]) + whole[place + 1 :])
        with pytest.warns(UserWarning, match="is damaged; the training starts over"):
            assert read_state(path, "this run", Team("cpu")) is None


def test_an_unreadable_state_is_not_a_damaged_one(tmp_path):
    (tmp_path / "run.state").mkdir()
    with pytest.raises(OSError, match="directory"):
        read_state(tmp_path / "run.state", "this run", Team("cpu"))


def test_no_state_and_a_damaged_one_start_over(tmp_path):
    assert read_state(None, "run", Team("cpu")) is None
    assert read_state(tmp_path / "missing.state", "run", Team("cpu")) is None
    for damaged in (b"", b"damaged"):
        (tmp_path / "run.state").write_bytes(damaged)
        with pytest.warns(UserWarning, match="is damaged"):
            assert read_state(tmp_path / "run.state", "run", Team("cpu")) is None
