"""Run by Python in every process that tests start, so that it loads its libraries faster."""

import atexit
import gc
import sys

# Looking for garbage takes a third of the time of loading torch. Modules stay as long as the process, so it is looked
# for when there may be much of it, and not once more at the end.
gc.set_threshold(200_000, 50, 100)
atexit.register(gc.freeze)

# Whatever imports nbformat would build the grammar of international web addresses in 1.7 s; jsonschema does without.
sys.modules["rfc3987_syntax"] = None
