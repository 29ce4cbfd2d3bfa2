// What the kernels are given, and the kernels. runtime.py reads the structures from here: each line fields of one type.
#pragma once

#include <stdint.h>

// (b, e, t) or (b, n, t) where it lies: strides in elements, type as in vector.h; data null when absent.
struct View {
    void* data;
    int64_t batch, row, token, type;
};

struct Scan {
    int64_t b, e, t, n, m;  // m: rows of dt, which dt_proj projects to delta; 0: delta is given
    int64_t softplus, reverse;
    int64_t groups;        // units of work per sequence, by channels
    int64_t keep;          // write `states`
    int64_t directions;    // jobs that follow one another in memory and share each unit of work
    double scale;          // of the gated output
    View u, delta, z, B, C, out;
    View other, y;         // before the gate: the other direction's output, which is added, and the sum; or absent
    const float *A, *D;    // (e, n), (e); here and below null when absent
    const float *dt_bias, *dt_proj;  // (e), (e, m)
    float* states;         // (b, chunks - 1, e padded to 16, n): h before each but the first, in lanes
    // backward only
    View grad_out, grad_u, grad_delta, grad_z, grad_B, grad_C;
    float *grad_A, *grad_D, *grad_dt_bias, *grad_dt_proj;
    float* part;           // (b, e padded to 16, n + 2 + m): of those four before the sum over sequences, in lanes
    float* part_rows;      // (groups, b, t, 2 n + m): of B, C and dt before the sum over groups; unused by one group
    const float *lanes_A, *lanes_dt_proj;  // A times log2(e), and dt_proj, in lanes: (e padded to 16, n) and (.., m)
};

struct Conv {
    int64_t b, e, t, k;
    int64_t reverse;
    int64_t groups, directions;  // as in Scan
    int64_t add;           // to the grad_x that is there
    View x, out;
    const float *weight, *bias;  // (e, k), (e)
    // backward only
    View grad_out, grad_x;
    float *grad_weight, *grad_bias;
    float* part;           // (b, e padded to 16, k + 1): before the sum over sequences, in lanes
    const float* lanes;    // weight in the order of tokens, then bias, in lanes: (e padded to 16, k + 1)
};

// Rows of d floats, dense; a unit of work is a block of NORM_ROWS.
constexpr int64_t NORM_ROWS = 64;
struct Norm {
    int64_t rows, d;
    double eps;
    const float *x, *residual, *weight;  // weight: (d); without a residual there is no sum
    float *out, *sum, *scale;  // scale: (rows), 1 / root mean square
    // backward only
    const float *grad_out, *grad_sum;  // either may be null
    float *grad_x, *grad_weight;
    float* part;           // (blocks of rows, d padded to 16): before the sum over blocks
};

struct Match {
    int64_t b, t, c, r;
    int64_t guards;          // protected positions of each sequence
    const float* feature;    // (b, t, c), dense
    const int64_t* guarded;  // (b, guards)
    int64_t *source, *target;
    float* similarity;       // all three (b, r)
    int64_t* refused;        // set to 1 where a protected position does not exist, or r pairs cannot be found
};

// Where every token goes, and with which weight.
struct Plan {
    int64_t b, t, r;
    int64_t in_order;        // survivors as they come, not even positions before odd ones
    int64_t by_size;         // tokens weigh as much as their size, not all the same
    const int64_t *source, *target;  // (b, r)
    const float* size;       // (b, t)
    int64_t *survivors, *destination;
    float *weight, *total;   // survivors and total: (b, t - r); destination and weight: (b, t)
    int64_t* refused;        // set to 1 where source and target are no matching
};

// One or two tensors whose rows, of d numbers and dense, are fused alike; or backwards, where x is the gradient of the
// output and out that of the input.
struct Fuse {
    int64_t b, t, s;
    int64_t d[2], type[2];   // type as in vector.h
    const void* x[2];        // (b, t, d); null when absent
    void* out[2];            // (b, s, d)
    const int64_t* destination;
    const float* weight;     // both (b, t)
    int64_t* refused;        // set to 1 where a destination does not exist
};

// One unit of a job; `memory` is the thread's own scratch, aligned to 64 bytes.
typedef void Kernel(const void* job, int64_t unit, float* memory);

Kernel scan_forward, scan_backward, scan_sum_sequences, scan_sum_groups;
Kernel conv_forward, conv_backward, conv_sum_sequences;
Kernel norm_forward, norm_backward, norm_sum_blocks;
Kernel match_sequence, plan_sequence, fuse_forward, fuse_backward;

// Floats of scratch memory that one thread needs
int64_t scan_scratch(const Scan&);
int64_t conv_scratch();
int64_t match_scratch(const Match&);

// Parameters in lanes
void scan_lanes(const Scan&, float* lanes);
void conv_lanes(const Conv&, float* lanes);
