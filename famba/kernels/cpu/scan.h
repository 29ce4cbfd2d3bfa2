// What the scan's kernels are given; mirrored field by field in scan.py.
#pragma once

#include "view.h"

struct Scan {
    int64_t b, e, t, n;
    int64_t softplus, reverse;
    int64_t groups;       // channels are shared out over this many units of work per sequence
    int64_t keep;         // write `states`
    View u, delta, z, B, C, out;
    const float* A;       // (e, n)
    const float* D;       // (e), or null
    const float* bias;    // (e), or null
    float* states;        // (b, chunks, e padded to 16, n): the state before each chunk, in lanes
    // backward only
    View grad_out, grad_u, grad_delta, grad_z, grad_B, grad_C;
    float *grad_A, *grad_D, *grad_bias;      // as A, D, bias
    float *part_A, *part_D, *part_bias;      // (b, e padded to 16, n or 1): before the sum over sequences, in lanes
    float *part_B, *part_C;                  // (groups, b, t, n): before the sum over groups; null when groups is 1
    const float* lanes_A;                    // A times log2(e) in lanes: (e padded to 16, n)
};
