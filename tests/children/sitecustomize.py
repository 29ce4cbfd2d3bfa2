"""Python runs this first in every process that the tests start, since conftest.py puts this folder on PYTHONPATH.

Importing torch, pandas and more makes 600,000 objects that stay. The garbage collector looks through them repeatedly,
for a fifth of the time of a process that does little else. Here it waits for far more new objects.
"""

import gc

gc.set_threshold(100_000, 50, 100)
