"""Python runs this first in every process that the tests start, since conftest.py puts this folder on PYTHONPATH.

Importing torch and pandas makes a million objects that stay: the garbage collector looks through them again and again,
for a fifth of the time of a process that does little else. Here it waits for far more new objects.
"""

import gc

gc.set_threshold(100_000, 50, 100)
