import math
import platform
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import two_processes
from forks import Program

import binvit
from binvit.lab import Trial
from binvit.lab.data.datasets import load_data
from binvit.lab.training import devices
from binvit.lab.training.devices import Team, choose_device, give_back_memory, keep_freed_memory, spread
from binvit.lab.training.loop import Training
from binvit.lab.training.recipes import recipe
from binvit.lab.trials.store import read_results
from binvit.lab.trials.train_trial import train_trial


def several(count, *arguments):
    """Run the program of two_processes in several processes, as torchrun does."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(count)}
    code = Path(two_processes.__file__).read_text(encoding="utf-8")
    ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]
    running = [Program(code, *arguments, environment=shared | rank) for rank in ranks]
    said = [process.communicate(timeout=300) for process in running]
    assert [process.poll() for process in running] == [0] * count, said


def assert_alike(found, expected):
    for (losses, tensors, answers), (own_losses, own_tensors, own_answers) in zip(found, expected, strict=True):
        assert losses == pytest.approx(own_losses, abs=1e-5)
        assert answers == own_answers
        for name, tensor in own_tensors.items():
            torch.testing.assert_close(tensors[name], tensor, atol=1e-5, rtol=0)


def test_two_processes_train_what_one_trains_with_the_doubled_batch(tmp_path):
    several(2, tmp_path / "two.pt", 1, tmp_path / "results")
    found = torch.load(tmp_path / "two.pt", weights_only=True)
    trained, read = found.pop("seconds")
    assert trained == read
    (result,), _ = read_results(tmp_path / "results")
    assert (result.seconds, result.device) == (trained, "2 x cpu")
    assert_alike(found.values(), [two_processes.trained(name) for name in found])


def test_accumulated_parts_train_what_the_whole_batch_trains():
    for scheme, parts in (("float", 5), ("gsb", 3)):  # five parts have 2 or 3 images
        assert_alike([two_processes.trained(scheme, parts)], [two_processes.trained(scheme)])
    with pytest.raises(ValueError, match="A batch of 12 images cannot be shared by 1 processes with 13 accumulated"):
        two_processes.trained("float", accumulate=13)


def first_gradients(scheme, accumulate):
    shape = {"width": 16, "depth": 1, "heads": 2, "patch_size": 4}
    rate = {"optimizer": "sgd", "lr": 0.05, "clip_grad": 0.0}
    made = recipe("smoke", epochs=1, batch_size=40, accumulate=accumulate, **shape, **rate)
    training = Training(made, [binvit.scheme(scheme)], load_data("digits", samples_per_class=4), seed=0)
    assert len(training.batches) == 1
    return {name: parameter.grad for name, parameter in training.train().named_parameters()}


@pytest.mark.parametrize("scheme", ["elastic", "gsb", "bit", "bivit-head", "bhvit-qd", "xnor++"])
def test_the_number_of_parts_changes_no_gradient(scheme):
    whole, parts = first_gradients(scheme, 1), first_gradients(scheme, 4)
    for name, gradient in whole.items():
        size = gradient.norm().item()
        if name.endswith(("scale2", "scale3")):  # the sizes of these groups depend on the images
            assert parts[name].item() == pytest.approx(gradient.item(), rel=0.3, abs=1e-6)
        else:
            torch.testing.assert_close(parts[name], gradient, rtol=0, atol=1e-3 * size + 1e-8)


def test_bfloat16_is_near_float32_and_not_it():
    exact, rounded = (two_processes.trained("float", precision=kind)[0] for kind in ("float32", "bfloat16"))
    assert all(map(math.isfinite, two_processes.trained("gsb", precision="bfloat16")[0]))
    assert exact != rounded
    assert rounded == pytest.approx(exact, rel=0.1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_training_does_not_depend_on_the_default_type(dtype):
    trial = Trial("digits", "irnet", samples_per_class=3, recipe_options={"epochs": 1})
    expected = train_trial(trial, device="cpu")
    torch.set_default_dtype(dtype)
    try:
        found = train_trial(trial, device="cpu")
    finally:
        torch.set_default_dtype(torch.float32)
    assert (found.history, found.test_accuracy) == (expected.history, expected.test_accuracy)
    assert torch.equal(found.model.head.weight, expected.model.head.weight)


@pytest.mark.parametrize(("size", "parts"), [(1, 1), (1, 3), (2, 1), (3, 2)])
def test_slices_are_the_batch(monkeypatch, size, parts):
    found = []
    for rank in range(size):
        monkeypatch.setenv("WORLD_SIZE", str(size))
        monkeypatch.setenv("RANK", str(rank))
        found += [list(range(13))[part] for part in Team("cpu").slices(13, parts)]
    assert [index for part in found for index in part] == list(range(13))
    assert max(map(len, found)) - min(map(len, found)) <= 1


def test_jobs_are_spread_over_all_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert spread(None, 3) == spread("cuda", 3) == ["cuda:0", "cuda:1", "cuda:0"]
    assert spread("cuda:1", 2) == ["cuda:1"] * 2
    assert spread("cpu", 2) == ["cpu"] * 2
    assert choose_device() == "cuda"
    with pytest.raises(ValueError, match="There is no device 'cuda:2': torch sees 2 GPUs here"):
        choose_device("cuda:2")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert (Team().device, Team().description, Team("cpu").description) == ("cuda:1", "2 x cuda", "2 x cpu")
    monkeypatch.undo()
    assert devices.choose_device("cpu") == "cpu"


def test_several_processes_without_accelerate_get_one_sentence(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(ModuleNotFoundError, match=r"need accelerate: pip install 'binvit\[cluster\]'"):
        Team("cpu").share(1)


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:x", "cpu:0", "cuda:12345", ""])
def test_what_is_no_device_gets_one_sentence(name):
    with pytest.raises(ValueError, match="A device is cpu, cuda, mps or one GPU such as cuda:1"):
        choose_device(name)


STEPS = """
import resource, sys, numpy as np
from binvit.lab.training.devices import keep_freed_memory
if sys.argv[1] == "kept":
    keep_freed_memory()
for _ in range(30):
    blocks = [np.ones(1 << 20) for _ in range(16)]  # 8 MiB each, all given back before the next step
    blocks.clear()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="options of glibc's malloc")
def test_freed_memory_is_used_again_by_the_next_step():
    given, kept = (
        int(subprocess.run([sys.executable, "-c", STEPS, how], capture_output=True, check=True, text=True).stdout)
        for how in ("given back", "kept")
    )
    assert kept < given / 2


BETWEEN = """
import numpy as np
from binvit.lab.training.devices import give_back_memory, keep_freed_memory
def resident():
    return int(open("/proc/self/statm").read().split()[1])
keep_freed_memory()
before = resident()
blocks = [np.ones(1 << 20) for _ in range(16)]
used = resident()
blocks.clear()
kept = resident()
give_back_memory()
print(used - before, kept - before, resident() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's own count of pages")
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="options of glibc's malloc")
def test_kept_memory_is_given_back_between_two_trainings():
    printed = subprocess.run([sys.executable, "-c", BETWEEN], capture_output=True, check=True, text=True).stdout
    used, kept, given = map(int, printed.split())
    assert kept > 0.9 * used
    assert given < 0.1 * used


def test_without_such_a_malloc_nothing_happens(monkeypatch):
    monkeypatch.setattr(devices.platform, "libc_ver", lambda: ("", ""))
    monkeypatch.setattr(devices.ctypes, "CDLL", None)  # would fail if it were called
    keep_freed_memory()
    give_back_memory()
