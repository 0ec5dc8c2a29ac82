import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent

# A first compilation for another CPU takes seconds per kernel, plain Python none: so the one runs less.
RUNS = {
    "NUMBA_CPU_NAME=generic": (["bits_gemm", "bits_attention"], "exact"),
    "NUMBA_DISABLE_JIT=1": (
        ["bits_packing", "bits_gemm", "bits_linear", "bits_attention", "packed_softmax"],
        "not threads",
    ),
}


@pytest.mark.parametrize("setting", RUNS)
def test_other_platforms_compute_the_same_integers(setting):
    name, _, content = setting.partition("=")
    environment = os.environ | {"NUMBA_NUM_THREADS": "1", name: content}
    files, chosen = RUNS[setting]
    paths = [str(TESTS / f"test_{file}.py") for file in files]
    options = ["-q", "-p", "no:cacheprovider", "-k", chosen, *paths]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", *options], env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout
