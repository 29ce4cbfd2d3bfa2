"""What goes wrong in ways a user can mend.

Every one of these carries a message of one line. The command line prints that line and exits with status 1;
anything else that is raised is a defect and keeps its traceback.
"""


class FambaError(Exception):
    """Base of the errors whose message is meant for the user."""


class InputError(FambaError, ValueError):
    """Bad input: the message names the key or file, the value, and what is allowed."""


class BackendError(FambaError, RuntimeError):
    """A backend was asked for by name and cannot run here: the message says why and what to install."""


class TrainingError(FambaError, RuntimeError):
    """A run that cannot go on: a loss that is not finite, or tokens that were not fused as promised."""
