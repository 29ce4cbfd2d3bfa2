"""Native CPU kernels, one file per kernel: the C++ source, and the torch operators over it."""
