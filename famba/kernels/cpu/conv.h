// The arguments of the convolution's kernels, mirrored field by field in conv.py.
#pragma once

#include "view.h"

struct Conv {
    int64_t b, e, t, k;
    int64_t reverse;
    int64_t groups, directions;  // as in scan.h
    int64_t add;           // to the grad_x that is there
    View x, out;
    const float* weight;   // (e, k)
    const float* bias;     // (e), or null
    // backward only
    View grad_out, grad_x;
    float *grad_weight, *grad_bias;  // as weight and bias; where absent, null
    float* part;           // (b, e padded to 16, k + 1): before the sum over sequences, in lanes
    const float* lanes;    // weight in the order of tokens, then bias, in lanes: (e padded to 16, k + 1)
};
