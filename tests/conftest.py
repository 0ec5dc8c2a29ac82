"""Settings of all tests; nothing here is a fixture that hides what a test does."""

import gc
import os
from pathlib import Path

# Of every process that a test starts, notebooks' kernels among them.
os.environ["PYTHONPATH"] = os.pathsep.join(
    filter(None, [f"{Path(__file__).parent}/startup", os.environ.get("PYTHONPATH")])
)
os.environ.setdefault("MPLBACKEND", "Agg")  # no test opens a window
os.environ.setdefault("BINVIT_QUIET", "1")  # what is said on stderr does not depend on what was compiled before

from hypothesis import HealthCheck, settings

# No limits of time: a machine with other work on it is slow now and then, one that is emulated always, and the first
# example compiles.
SLOW_IS_FINE = [HealthCheck.too_slow]
settings.register_profile("binvit", deadline=None, suppress_health_check=SLOW_IS_FINE, derandomize="CI" in os.environ)
settings.load_profile("binvit")

# What takes more than some ten seconds of a core, the longest first.
SLOW = """
    lab_trials_pool packed_export nn_model lab_notebooks_published packed_exact jit packed_files nn_convert
    lab_notebooks_grid packed_warm_up lab_benchmark_models packed_vit packed_digits lab_training_devices readme
    packed_fast nn_fused_edges main lab_training_loop lab_notebooks_plan bits_platforms nn_fused packed_fast_threads
    nn_fused_float_products packed_audit
"""


def pytest_collection_modifyitems(items):
    """Start with the notebooks and slow files: processes take file after file, and all should end together."""
    places = {f"test_{name}": place for place, name in enumerate(SLOW.split())}
    items.sort(key=lambda item: -1 if item.path.suffix == ".ipynb" else places.get(item.path.stem, len(places)))


def pytest_collection_finish():
    """Look no more for garbage among modules and tests, which stay: a search would take a second now and then."""
    gc.freeze()
