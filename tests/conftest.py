"""Shapes written in annotations are checked in every test: the hook must be in place before famba is imported."""

from jaxtyping import install_import_hook

install_import_hook("famba", "beartype.beartype")
