import os
import subprocess
import sys

import pytest

PROGRAM = """
import numpy as np
from binvit import bits

rng = np.random.default_rng(0)
for rows, length, columns in [(1, 1, 1), (5, 33, 66), (13, 100, 130), (7, 300, 3)]:
    a, w = rng.integers(0, 2, (rows, length)) * 2 - 1, rng.integers(0, 2, (columns, length)) * 2 - 1
    mask = rng.integers(0, 2, w.shape)
    packed = bits.pack_signs(a.astype(np.float32)), bits.pack_signs(w.astype(np.float32))
    assert (bits.unpack_signs(packed[0], length) == a).all()
    assert (bits.binary_matmul(*packed, length) == a @ w.T).all()
    assert (bits.binary_matmul(*packed, length, unsigned=True) == (a > 0) @ w.T).all()
    planes, levels = bits.pack_planes(w * mask, 0, 0), a > 0
    ternary = bits.binary_matmul(packed[0], planes[0], length, unsigned=True, mask=planes[1])
    assert (ternary == levels @ (w * mask).T).all()
print("equal")
"""


@pytest.mark.parametrize("setting", [{"NUMBA_CPU_NAME": "generic"}, {"NUMBA_DISABLE_JIT": "1"}], ids=str)
def test_other_platforms_compute_the_same_integers(setting):
    environment = os.environ | {"NUMBA_NUM_THREADS": "1"} | setting
    run = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout == "equal\n"
