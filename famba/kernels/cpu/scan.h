// The arguments of the scan's kernels, mirrored field by field in scan.py.
#pragma once

#include "view.h"

struct Scan {
    int64_t b, e, t, n, m;  // m: rows of dt, which dt_proj projects to delta; 0: delta is given
    int64_t softplus, reverse;
    int64_t groups;       // units of work per sequence, by channels
    int64_t keep;         // write `states`
    int64_t directions;   // jobs that follow one another in memory and share each unit of work
    double scale;         // of the gated output
    View u, delta, z, B, C, out;
    View other, y;        // before the gate: the other direction's output, which is added, and the sum; or absent
    const float* A;       // (e, n)
    const float* D;       // (e), or null
    const float* dt_bias; // (e), or null
    const float* dt_proj; // (e, m)
    float* states;        // (b, chunks, e padded to 16, n): h before each chunk, in lanes
    // backward only
    View grad_out, grad_u, grad_delta, grad_z, grad_B, grad_C;
    float *grad_A, *grad_D, *grad_dt_bias, *grad_dt_proj;  // as A, D, dt_bias, dt_proj; where absent, null
    float* part;          // (b, e padded to 16, n + 2 + m): of those four before the sum over sequences, in lanes
    float* part_rows;     // (groups, b, t, 2 n + m): of B, C and dt before the sum over groups; null when groups is 1
    const float *lanes_A, *lanes_dt_proj;  // A times log2(e), and dt_proj, in lanes: (e padded to 16, n) and (.., m)
};
