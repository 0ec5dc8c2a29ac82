"""Run by Python in every process that tests start: looking for garbage takes a third of the time of loading torch.

Modules stay as long as the process, so it is looked for when there may be much of it, and not once more at the end.
"""

import atexit
import gc

gc.set_threshold(200_000, 50, 100)
atexit.register(gc.freeze)
