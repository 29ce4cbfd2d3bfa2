import pytest

from famba.cli import main
from famba.errors import FambaError, InputError


def refusal(action, kind: type[FambaError] = InputError) -> str:
    """What an action is refused with, in one line."""
    with pytest.raises(kind) as error:
        action()
    assert "\n" not in str(error.value)
    return str(error.value)


def refused(capsys, *arguments: str) -> str:
    """What a command is refused with, in one line."""
    assert main(list(arguments)) == 1
    printed = capsys.readouterr()
    assert (printed.out, printed.err.count("\n")) == ("", 1)
    return printed.err
