"""Packed models without JIT, with narrower vectors in torch, and with more threads."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import torch
from packed_models import SIMPLE, images, logits_of, trained

import binvit

SETTINGS = {"gsb": {"attention_bias": "relative"}, "reactnet": SIMPLE, "xnor": {"norm": "none"}, "binaryvit": {}}
for scheme, options in SETTINGS.items():
    model = trained(binvit.scheme(scheme, **options), depth=1, steps=1)
    x = images(COUNT)
    fast, exact = binvit.pack(model), binvit.pack(model, exact=True)
    assert bool(fast.reason) == (scheme == "binaryvit")
    assert torch.equal(exact(x), logits_of(model, x)), scheme
    assert torch.equal(fast(x), logits_of(model, x)), scheme
"""
SETTINGS = [
    {"NUMBA_DISABLE_JIT": "1"},
    {"ATEN_CPU_CAPABILITY": "avx2", "OMP_NUM_THREADS": "3", "NUMBA_NUM_THREADS": "3"},
]


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: "-".join(f"{k}={v}" for k, v in setting.items()))
def test_other_platforms_compute_the_same_logits(setting):
    count = "1" if "NUMBA_DISABLE_JIT" in setting else "7"
    path = os.pathsep.join([str(Path(__file__).parent), os.environ["PYTHONPATH"]])
    environment = os.environ | {"NUMBA_NUM_THREADS": "1", "PYTHONPATH": path} | setting
    command = [sys.executable, "-W", "error", "-c", PROGRAM.replace("COUNT", count)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
