"""Shapes written in annotations are checked in every test: the hook must be in place before famba is imported."""

import pytest
from jaxtyping import install_import_hook

from famba.gpu import conv, fuse, match, norm, scan  # noqa: F401 (Triton reads their source: not to be wrapped)

install_import_hook("famba", "beartype.beartype")

from famba.errors import BackendError  # noqa: E402 (after the hook)
from famba.native import build, runtime  # noqa: E402


@pytest.fixture(params=runtime.INSTRUCTION_SETS)
def instruction_set(request):
    """Each instruction set that the native kernels have and this machine can run, in turn."""
    if build.unavailable():
        pytest.skip(build.unavailable())
    try:
        runtime.use_instruction_set(request.param)
    except BackendError as error:
        pytest.skip(str(error))
    yield request.param
    runtime.use_instruction_set("auto")
