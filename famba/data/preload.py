"""Imported once by the process that loader workers are forked from: importing timm takes seconds.

Without timm, the code that needs it raises.
"""

import contextlib

from famba.data import loader  # noqa: F401

with contextlib.suppress(Exception):
    import timm.data  # noqa: F401
