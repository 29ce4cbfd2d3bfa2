// The arguments of the normalisation's kernels, mirrored field by field in norm.py.
#pragma once

#include <stdint.h>

// Rows of d floats, dense.
struct Norm {
    int64_t rows, d;
    double eps;
    const float *x, *residual;  // residual: or null, and then there is no sum
    const float* weight;        // (d)
    float *out, *sum, *scale;   // scale: (rows), 1 / root mean square
    // backward only
    const float *grad_out, *grad_sum;  // either may be null
    float *grad_x, *grad_weight;
    float* part;                       // (blocks of rows, d padded to 16): before the sum over blocks
};
