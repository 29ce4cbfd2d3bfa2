// The arguments of the matching's kernel, mirrored field by field in match.py.
#pragma once

#include <stdint.h>

struct Match {
    int64_t b, t, c, r;
    int64_t guards;          // protected positions of each sequence
    const float* feature;    // (b, t, c), dense
    const int64_t* guarded;  // (b, guards)
    int64_t *source, *target;
    float* similarity;  // all three (b, r)
    int64_t* refused;   // set to 1 where a protected position does not exist, or r pairs cannot be found
};
