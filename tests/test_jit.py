"""How kernels are compiled and kept on disk, in a small package of the same layout, each run in its own process."""

import ast
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numba
import numpy as np
import pytest

from binvit import jit
from binvit.packed.fast.forward import share_image

pytestmark = pytest.mark.skipif(not jit.JIT, reason="nothing is compiled")

INNER = "from binvit.jit import kernel\n\n@kernel\ndef inner(x):\n    return x + 1\n"
OUTER = """import numpy as np
from binvit.jit import kernel
from binvit.{home}.inner import inner

@kernel
def outer(x):
    return 10 * inner(x)

@kernel(reorder=True)
def total(x):
    y = np.zeros(4)
    for i in range(4):
        y[i] = inner(x) + i
    return y.sum()
"""
MAIN = """import binvit.jit
binvit.jit._PATIENCE = 99
from binvit.packed.fast.outer import outer, total
print(outer(4), total(4))
"""


@pytest.fixture
def package(tmp_path):
    for home in ("bits", "nn/fused", "packed/fast", "lab"):
        (tmp_path / "binvit" / home).mkdir(parents=True)
    (tmp_path / "binvit" / "__init__.py").touch()
    shutil.copy(jit.__file__, tmp_path / "binvit")
    (tmp_path / "binvit" / "bits" / "inner.py").write_text(INNER)
    (tmp_path / "binvit" / "packed" / "fast" / "outer.py").write_text(OUTER.format(home="bits"))
    return tmp_path


def run(folder, main=MAIN, file_size=None, **environment):
    """Return what a process prints to stdout and stderr."""
    kept = {name: value for name, value in os.environ.items() if name not in ("BINVIT_QUIET", "NUMBA_DISABLE_JIT")}
    settings = {"PYTHONPATH": str(folder), "NUMBA_CACHE_DIR": str(folder / "cache"), "PYTHONDONTWRITEBYTECODE": "1"}

    def limit():
        if file_size is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))

    done = subprocess.run(
        [sys.executable, "-c", main],
        env=kept | settings | environment,
        cwd=folder,
        preexec_fn=limit,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def kept_code(folder):
    return {path: path.read_bytes() for path in (folder / "cache").rglob("*.nb[ci]")}


@pytest.mark.parametrize("home", ["bits", "nn/fused", "packed/fast"])
def test_an_edited_kernel_is_new_inside_those_that_call_it(package, home):
    (package / "binvit" / home / "inner.py").write_text(INNER)
    outer = package / "binvit" / "packed" / "fast" / "outer.py"
    outer.write_text(OUTER.format(home=home.replace("/", ".")))
    assert run(package) == ("50 26.0\n", "")
    (package / "binvit" / home / "inner.py").write_text(INNER.replace("x + 1", "x + 2"))
    assert run(package) == ("60 30.0\n", "")


def test_code_is_kept_from_process_to_process_and_whatever_changes_in_other_rooms(package):
    assert run(package) == ("50 26.0\n", "")
    first = kept_code(package)
    assert len(first) == 4  # index and code of the two kernels that Python calls
    (package / "binvit" / "lab" / "new.py").write_text("x = 1\n")
    assert run(package) == ("50 26.0\n", "")
    assert kept_code(package) == first


def test_without_a_folder_to_write_to_kernels_are_compiled_and_that_is_said_once(package):
    for room in ("packed/fast", "bits"):
        (package / "binvit" / room / "__pycache__").write_text("a file, where root could write into any folder")
    nowhere = {"NUMBA_CACHE_DIR": "/dev/null/none", "HOME": "/dev/null/none", "XDG_CACHE_HOME": "/dev/null/none"}
    out, err = run(package, **nowhere)
    assert out == "50 26.0\n"
    assert err.count("\n") == 1
    assert "there is no folder to write to" in err
    assert run(package, **nowhere, BINVIT_QUIET="1") == ("50 26.0\n", "")


def test_a_folder_without_space_costs_only_the_cache(package):
    for size in (0, 100, 5000):
        out, err = run(package, file_size=size)
        assert out == "50 26.0\n"
        assert err.count("\n") == 1
        assert "File too large" in err
        assert str(package / "cache") in err
        assert not list((package / "cache").rglob("*.tmp*"))
    assert run(package) == ("50 26.0\n", "")


DAMAGES = {
    "empty index": ("nbi", lambda content: b""),
    "text for index": ("nbi", lambda content: b"I am a poem.\n" * 99),
    "half the code": ("nbc", lambda content: content[: len(content) // 2]),
    "zeros for code": ("nbc", lambda content: bytes(len(content))),
    "a flipped bit": ("nbc", lambda content: content[:-900] + bytes([content[-900] ^ 1]) + content[-899:]),
}


def test_damaged_files_are_made_anew_and_that_is_said_once(package):
    run(package)
    for name, (ending, damage) in DAMAGES.items():
        files = [path for path in kept_code(package) if path.suffix == f".{ending}"]
        assert len(files) == 2, f"not made anew before: {name}"
        for path in files:
            path.write_bytes(damage(path.read_bytes()))
        out, err = run(package)
        assert out == "50 26.0\n", name
        assert err.count("\n") == 1, name
        assert "cannot read" in err, name
    assert run(package) == ("50 26.0\n", "")


def test_code_of_old_sources_behind_a_new_index_is_not_run(package):
    run(package)
    old = kept_code(package)
    (package / "binvit" / "bits" / "inner.py").write_text(INNER.replace("x + 1", "x + 2"))
    run(package)
    for path, content in old.items():
        if path.suffix == ".nbc":  # as if the disk had been full between index and code
            path.write_bytes(content)
    assert run(package)[0] == "60 30.0\n"


def test_a_second_of_compiling_is_said_once_and_not_in_notebooks(package):
    impatient = MAIN.replace("99", "0")
    out, err = run(package, impatient)
    assert out == "50 26.0\n"
    assert err == "binvit is compiling its kernels for this machine, which takes some seconds.\n"
    assert run(package, impatient) == ("50 26.0\n", "")  # loaded, not compiled
    for quiet, environment in (("import sys; sys.modules['ipykernel'] = sys\n", {}), ("", {"BINVIT_QUIET": "1"})):
        shutil.rmtree(package / "cache")
        assert run(package, quiet + impatient, **environment) == ("50 26.0\n", "")


def test_functions_of_other_programs_compile_beside_kernels():
    """A function made by exec has no module, a dispatcher of another target may have no Python function."""
    space = {}
    exec("def foreign(x):\n    return x + 1", space)
    foreign = numba.njit(space["foreign"])
    assert foreign.py_func.__module__ in (None, "builtins")
    assert foreign(2) == 3
    for dispatcher in (None, object(), foreign):
        event = numba.core.event.Event("numba:compile", numba.core.event.EventStatus.START, {"dispatcher": dispatcher})
        assert not jit._is_ours(event)


def test_a_kernel_that_makes_no_arrays_counts_no_references():
    @jit.kernel
    def counting(x, i):
        row = x[i]
        return row[0] + row[1]

    silent = jit.kernel(counting.__wrapped__, allocates=False)
    x = np.arange(6.0).reshape(3, 2)
    assert counting(x, 1) == silent(x, 1) == 5
    assert not share_image._entry.targetoptions["_nrt"]  # a twentieth of a prediction's time, a tenth on two threads
    with pytest.raises(numba.core.errors.NumbaError, match="NRT"):
        jit.kernel(lambda n: np.empty(n), allocates=False)(3)


def test_all_rooms_with_kernels_count_for_the_stamp():
    package = Path(jit.__file__).parent
    users = {path for path in package.rglob("*.py") if "import" in path.read_text() and "@kernel" in path.read_text()}
    nested = {path for path in users if not any(path.is_relative_to(package / home) for home in jit._HOMES)}
    assert {path.name for path in nested} <= {"jit.py", "products.py"}  # the exact path's kernel calls no other
    assert not [path for path in package.rglob("*.py") if "njit(" in path.read_text() and path.name != "jit.py"]


# A gradient's shape: sums over rows in a parallel loop whose body adds in another order when it is optimized again.
SUMS = """import numpy as np
from numba import prange
from binvit.jit import kernel

ZERO = np.float32(0)

@kernel(parallel=True, reorder=True)
def sums(x, shift, g, gain, slope, low, high, unsigned, out, dshift):
    rows, k = x.shape
    blocks = (rows + 31) // 32
    levels, ramps, columns = np.empty(blocks), np.empty(blocks), np.zeros((blocks, k), np.float32)
    for block in prange(blocks):
        total, ramped = 0.0, 0.0
        row = np.empty(k, np.float32)
        for r in range(block * 32, min(rows, (block + 1) * 32)):
            level, ramp = ZERO, ZERO
            if slope == 0:
                for j in range(k):
                    v = x[r, j] + shift[j]
                    up = g[r, j] * gain
                    if unsigned:
                        level += up if v > low else ZERO
                    else:
                        level += up if v >= 0 else -up
                    d = up if (v >= low) and (v <= high) else ZERO
                    ramp += v * d
                    row[j] = d
            else:
                for j in range(k):
                    row[j] = g[r, j] * gain * x[r, j]
            for j in range(k):
                columns[block, j] += row[j]
            for j in range(k):
                out[r, j] = row[j]
            total += level
            ramped += ramp
        levels[block], ramps[block] = total, ramped
    dshift[:] = 0
    for block in range(blocks):
        for j in range(k):
            dshift[j] += columns[block, j]
    return levels[0], ramps[0]
"""
GRADIENTS = """import numpy as np
from binvit.bits.sums import sums
f = np.float32
x, g = np.random.default_rng(0).standard_normal((2, 1088, 96), f)
print(*sums(x, np.zeros(96, f), g, f(0.016), 0, f(0.138), f(0.276), True, g, np.empty(96, f)))
"""


def test_compiled_code_and_code_from_disk_sum_in_the_same_order(package):
    (package / "binvit" / "bits" / "sums.py").write_text(SUMS)
    compiled = run(package, GRADIENTS, BINVIT_QUIET="1", PYTHONHASHSEED="1")
    first = kept_code(package)
    loaded = run(package, GRADIENTS, BINVIT_QUIET="1", PYTHONHASHSEED="2")
    assert kept_code(package) == first != {}
    assert compiled == loaded


def sums_and_writes(loop):
    """Names that an innermost loop sums over its turns, and whether it writes an element of an array."""
    nodes = [node for statement in loop.body for node in ast.walk(statement)]
    targets = [target for node in nodes if isinstance(node, ast.Assign) for target in node.targets]
    own = {name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)}
    added = [node.target for node in nodes if isinstance(node, ast.AugAssign)]
    turn = {name.id for name in ast.walk(loop.target) if isinstance(name, ast.Name)}
    sums = {target.id for target in added if isinstance(target, ast.Name)} - own
    for target in added:
        if isinstance(target, ast.Subscript) and not turn & {n.id for n in ast.walk(target) if isinstance(n, ast.Name)}:
            sums.add(ast.unparse(target))
    return sums, any(isinstance(target, ast.Subscript) for target in [*targets, *added])


def test_loops_that_sum_write_nothing():
    """Whether arrays lie within 256 bytes of each other would decide the order: LLVM then adds one by one.

    It compares addresses before a loop that reads and writes, and takes it apart into vectors only where no turn can
    read what an earlier one wrote; a gradient then depended on where two small arrays happened to lie.
    """
    looked = 0
    for path in Path(jit.__file__).parent.rglob("*.py"):
        for function in ast.walk(ast.parse(path.read_text())):
            if isinstance(function, ast.FunctionDef) and "reorder=True" in map_unparsed(function.decorator_list):
                for loop in ast.walk(function):
                    if isinstance(loop, ast.For) and not any(
                        isinstance(n, ast.For) for s in loop.body for n in ast.walk(s)
                    ):
                        sums, writes = sums_and_writes(loop)
                        assert not (sums and writes), f"{path.name}, line {loop.lineno}: {sums}"
                        looked += bool(sums)
    assert looked > 10


def map_unparsed(nodes):
    return " ".join(map(ast.unparse, nodes))
