import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent

# A first compilation for another CPU takes seconds per file, plain Python none: so the one runs less.
FILES = {
    "NUMBA_CPU_NAME=generic": ["gemm", "attention"],
    "NUMBA_DISABLE_JIT=1": ["packing", "gemm", "linear", "attention"],
}


@pytest.mark.parametrize("setting", FILES)
def test_other_platforms_compute_the_same_integers(setting):
    name, _, content = setting.partition("=")
    environment = os.environ | {"NUMBA_NUM_THREADS": "1", name: content}
    files = [str(TESTS / f"test_bits_{file}.py") for file in FILES[setting]]
    options = ["-q", "-p", "no:cacheprovider", "-k", "not threads", *files]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", *options], env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout
