"""Kernels for a GPU written in Triton, one file per kernel, and the torch operators over them."""
