// What the scan's kernels are given; mirrored field by field in scan.py.
#pragma once

#include "view.h"

struct Scan {
    int64_t b, e, t, n, m;  // m: rows of delta that weight projects to channels; 0 where delta has them all
    int64_t softplus, reverse;
    int64_t groups;       // channels are shared out over this many units of work per sequence
    int64_t keep;         // write `states`
    int64_t directions;   // jobs that lie one after another here, and are run by the same unit of work
    double scale;         // of what the gate lets through
    View u, delta, z, B, C, out;
    View other, sum;      // with a gate: what is added to the output before it, and the sum of both; either may be absent
    const float* A;       // (e, n)
    const float* D;       // (e), or null
    const float* bias;    // (e), or null
    const float* weight;  // (e, m)
    float* states;        // (b, chunks, e padded to 16, n): the state before each chunk, in lanes
    // backward only
    View grad_out, grad_u, grad_delta, grad_z, grad_B, grad_C;
    float *grad_A, *grad_D, *grad_bias, *grad_weight;  // as A, D, bias, weight; where absent, null
    float* part;          // (b, e padded to 16, n + 2 + m): of those four before the sum over sequences, in lanes
    float* part_rows;     // (groups, b, t, 2 n + m): of B, C and dt before the sum over groups; null when groups is 1
    const float *lanes_A, *lanes_weight;  // A times log2(e), and weight, in lanes: (e padded to 16, n) and (.., m)
};
