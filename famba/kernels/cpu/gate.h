// What the gate's kernels are given; mirrored field by field in gate.py.
#pragma once

#include "view.h"

struct Gate {
    int64_t b, e, t;
    int64_t groups;  // as in scan.h
    double scale;
    View left, right;                    // forward only
    View gate, out;
    View sum;                            // left + right, kept for backward; absent where there is none
    View grad_out, grad_sum, grad_gate;  // backward only
};
