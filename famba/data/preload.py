"""Imported by the process that workers are forked from (`loader`), so that they need not import it themselves.

timm takes seconds to import. Where it cannot be, those who need it say so.
"""

import contextlib

from famba.data import loader  # noqa: F401

with contextlib.suppress(Exception):
    import timm.data  # noqa: F401
