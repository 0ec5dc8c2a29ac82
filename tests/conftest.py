"""Settings of all tests; nothing here is a fixture that hides what a test does."""

import os

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
    packed_export lab_trials_pool nn_model packed_exact packed_digits nn_convert packed_files jit packed_audit
    packed_warm_up packed_vit lab_training_devices readme packed_fast lab_benchmark_models bits_platforms
    lab_training_loop lab_notebooks_plan lab_notebooks_grid packed_platforms main
    lab_notebooks_published
"""


def pytest_collection_modifyitems(items):
    """Start with the notebooks and slow files: processes take file after file, and all should end together."""
    places = {f"test_{name}": place for place, name in enumerate(SLOW.split())}
    items.sort(key=lambda item: -1 if item.path.suffix == ".ipynb" else places.get(item.path.stem, len(places)))
