import pytest

from famba.errors import InputError


def refusal(action) -> str:
    """What an action is refused with, in one line."""
    with pytest.raises(InputError) as error:
        action()
    assert "\n" not in str(error.value)
    return str(error.value)
