import os
import subprocess
import sys

import pytest

from binvit import jit

TRAIN = """
import sys, timm, torch
import binvit, binvit.jit
binvit.jit._PATIENCE = 0
model = timm.create_model("deit_small_distilled_patch16_224", img_size=48, patch_size=8, depth=1, num_classes=3)
model = binvit.binarize(model, binvit.scheme("gsb")).train()
for _ in range(2):
    sum(logits.sum() for logits in model(torch.randn(3, 3, 48, 48))).backward()
packed = binvit.pack(model.eval())
packed(torch.randn(1, 3, 48, 48))
packed(torch.randn(5, 3, 48, 48))
binvit.save(packed, sys.argv[1])
"""
PREDICT = """
import sys, torch
import binvit, binvit.jit
binvit.jit._PATIENCE = 0
packed = binvit.load(sys.argv[1])
packed.warm_up()
print("warm", file=sys.stderr, flush=True)
for images in (1, 4):
    packed(torch.randn(images, 3, 48, 48))
"""


def run(*command):
    environment = {name: value for name, value in os.environ.items() if name != "BINVIT_QUIET"}
    done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


@pytest.mark.skipif(not jit.JIT, reason="nothing is compiled")
def test_after_a_warm_up_neither_training_nor_prediction_compiles(tmp_path):
    model = str(tmp_path / "model.safetensors")
    assert run("-m", "binvit", "warm-up")[0].startswith("ready after ")
    assert run("-c", TRAIN, model) == ("", "")
    assert run("-m", "binvit", "warm-up", model)[0].startswith("ready after ")
    assert run("-c", PREDICT, model)[1] == "warm\n"
