"""Models trained on digits: the packed forms against the trained model on 1,000 images, here and on other platforms."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from packed_models import SIMPLE

import binvit
from binvit.lab.data.datasets import load_data
from binvit.lab.data.loader import Batches
from binvit.lab.data.transforms import eval_transform
from binvit.lab.trials.train_trial import train_trial
from binvit.lab.trials.trial import Trial
from binvit.packed import load, save

SCHEMES = ("gsb", "bivit", "reactnet")
PROGRAM = """
import sys
import numpy as np
from binvit.packed import load
folder, images = sys.argv[1], np.load(sys.argv[1] + "/images.npy")
for name in sys.argv[2:]:
    packed = load(f"{folder}/{name}.safetensors")
    assert not packed.reason
    np.save(f"{folder}/{name}.npy", packed(images))
"""


@pytest.fixture(scope="module")
def images():
    data = load_data("digits")
    transform = eval_transform(data.image_size, data.mean, data.std)
    parts = [batch for part in (data.test, data.train) for batch, _, _ in Batches(part, transform, 256)]
    return torch.cat(parts)[:1000]


@pytest.fixture(scope="module")
def models():
    options = {"epochs": 5, "eval_every": 5}
    changed = {"gsb": {"attention_bias": "relative"}, "reactnet": SIMPLE}
    trials = [Trial("digits", name, scheme_options=changed.get(name, ()), recipe_options=options) for name in SCHEMES]
    return {trial.scheme: train_trial(trial).model for trial in trials}


@torch.inference_mode()
def logits_of(model, images):
    return torch.cat([model(batch) for batch in images.split(256)])


@pytest.mark.parametrize("name", SCHEMES)
def test_a_thousand_images_get_the_same_predictions(models, images, name):
    expected = logits_of(models[name], images)
    assert len(expected) == 1000
    assert len(expected.argmax(1).unique()) >= 8  # it has learned something to lose
    assert torch.equal(binvit.pack(models[name], exact=True)(images), expected)
    fast = binvit.pack(models[name])
    assert not fast.reason
    logits = fast(images)
    assert (logits.argmax(1) == expected.argmax(1)).float().mean() >= 0.999
    if torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512"):  # where sums are rounded as torch rounds them
        assert torch.equal(logits, expected)


@pytest.mark.parametrize(
    "setting",
    [{"NUMBA_CPU_NAME": "generic"}, {"OMP_NUM_THREADS": "2", "NUMBA_NUM_THREADS": "2"}],
    ids=["generic", "two threads"],
)
def test_files_give_the_same_logits_on_other_platforms(models, images, setting, tmp_path):
    np.save(tmp_path / "images.npy", images.numpy())
    for name in SCHEMES:
        save(binvit.pack(models[name]), tmp_path / f"{name}.safetensors")
    environment = os.environ | {"NUMBA_NUM_THREADS": "1"} | setting
    command = [sys.executable, "-W", "error", "-c", PROGRAM, str(tmp_path), *SCHEMES]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    for name in SCHEMES:
        here = load(tmp_path / f"{name}.safetensors")(images).numpy()
        np.testing.assert_array_equal(np.load(tmp_path / f"{name}.npy"), here)
