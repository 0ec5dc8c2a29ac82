"""Settings of all tests; nothing here is a fixture that hides what a test does."""

import os

os.environ.setdefault("MPLBACKEND", "Agg")  # no test opens a window
os.environ.setdefault("BINVIT_QUIET", "1")  # what is said on stderr does not depend on what was compiled before

from hypothesis import settings

# No deadline: a machine with other work on it is slow now and then, and compiles on the first example.
settings.register_profile("binvit", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("binvit")
