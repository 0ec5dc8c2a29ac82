"""Settings of all tests; nothing here is a fixture that hides what a test does."""

import os

os.environ.setdefault("MPLBACKEND", "Agg")  # no test opens a window

from hypothesis import settings

# No deadline: a machine with other work on it is slow now and then, and compiles on the first example.
settings.register_profile("binvit", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("binvit")
