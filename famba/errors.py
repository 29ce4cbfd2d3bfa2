"""What goes wrong in ways a user can mend.

Every one of these carries a message of one line. The command line prints that line and exits with status 1;
anything else that is raised is a defect and keeps its traceback.
"""

import re


class FambaError(Exception):
    """Base of the errors whose message is meant for the user; control characters, of a file's name say, are escaped."""

    def __init__(self, message: str) -> None:
        super().__init__(re.sub(r"[\x00-\x1f\x7f]", lambda found: repr(found[0])[1:-1], message))


class InputError(FambaError, ValueError):
    """Bad input: the message names the key or file, the value, and what is allowed."""


class BackendError(FambaError, RuntimeError):
    """A backend was asked for by name and cannot run here: the message says why and what to install."""


class TrainingError(FambaError, RuntimeError):
    """A run that cannot go on: a loss that is not finite, or tokens that were not fused as promised."""
