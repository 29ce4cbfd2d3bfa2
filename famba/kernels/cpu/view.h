// A tensor as kernels see it; mirrored field by field in runtime.py.
#pragma once

#include <stdint.h>

// (b, e, t) or (b, n, t) where it lies: strides in elements, type as in vector.h; data null when absent.
struct View {
    void* data;
    int64_t batch, row, token, type;
};
