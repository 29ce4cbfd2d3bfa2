"""Shapes written in annotations are checked in every test: the hook must be in place before famba is imported."""

from pathlib import Path

from jaxtyping import install_import_hook

install_import_hook("famba", "beartype.beartype")

GOLDEN = Path(__file__).parent / "golden"
