// The arguments of fusion's kernels, mirrored field by field in fuse.py.
#pragma once

#include <stdint.h>

// Where every token goes, and with which weight.
struct Plan {
    int64_t b, t, r;
    int64_t in_order;                // survivors as they come, not even positions before odd ones
    int64_t by_size;                 // tokens weigh as much as their size, not all the same
    const int64_t *source, *target;  // (b, r)
    const float* size;               // (b, t)
    int64_t *survivors, *destination;
    float *weight, *total;  // survivors and total: (b, t - r); destination and weight: (b, t)
    int64_t* refused;       // set to 1 where source and target are no matching
};

// One or two tensors whose rows, of d numbers and dense, are fused alike; or backwards, where x is the gradient of the
// output and out that of the input.
struct Fuse {
    int64_t b, t, s;
    int64_t d[2], type[2];  // type as in vector.h
    const void* x[2];       // (b, t, d); null when absent
    void* out[2];           // (b, s, d)
    const int64_t* destination;
    const float* weight;  // both (b, t)
    int64_t* refused;     // set to 1 where a destination does not exist
};
