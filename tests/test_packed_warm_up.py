import forks
import pytest

from binvit import jit

WARM_UP = """
import sys
from binvit.__main__ import cli
cli.main(args=sys.argv[1:], standalone_mode=False)
"""
TRAIN = """
import sys, timm, torch
import binvit
options = {"img_size": 48, "patch_size": 8, "depth": 1, "num_classes": 3}
small, tiny = (timm.create_model(f"deit_{size}_distilled_patch16_224", **options) for size in ("small", "tiny"))
for name in sorted(binvit.list_schemes(), key="gsb".__eq__):  # gsb as the last one
    for bias in ("none", "full", "relative"):
        float_model = small if name == "gsb" or bias == "full" else tiny
        model = binvit.binarize(float_model, binvit.scheme(name, attention_bias=bias)).train()
        for images in (3, 3, 1, 33) if name == "gsb" else (3, 33):  # the first sets scales
            sum(logits.sum() for logits in model(torch.randn(images, 3, 48, 48))).backward()
packed = binvit.pack(model.eval())
packed(torch.randn(1, 3, 48, 48))
packed(torch.randn(5, 3, 48, 48))
binvit.save(packed, sys.argv[1])
"""
PREDICT = """
import sys, torch
import binvit
packed = binvit.load(sys.argv[1])
for images in (1, 4):
    packed(torch.randn(images, 3, 48, 48))
"""
KERNELS = """
import gc
from binvit import jit
for kernel in gc.get_objects():
    if isinstance(kernel, jit._Kernel):
        for types in kernel._entry.signatures:
            print("kernel", kernel.__module__, kernel.__qualname__, types)
"""


def kernels(program, *arguments):
    """What a program had compiled, or loaded, when it ended: a line per kernel and types of arguments."""
    done = forks.run(program + KERNELS, *arguments)
    assert done.returncode == 0, done.stderr
    return {line for line in done.stdout.splitlines() if line.startswith("kernel ")}


@pytest.mark.skipif(not jit.JIT, reason="nothing is compiled")
def test_after_a_warm_up_neither_training_nor_prediction_compiles(tmp_path):
    model = str(tmp_path / "model.safetensors")
    ready = kernels(WARM_UP, "warm-up")
    used = kernels(TRAIN, model)
    assert used
    assert used <= ready
    ready = kernels(WARM_UP, "warm-up", model)
    used = kernels(PREDICT, model)
    assert used
    assert used <= ready
