// Add -> RMSNorm in one pass, and its gradient (Zhang and Sennrich 2019, arXiv:1910.07467).
//
// Vectors run along a row. A unit of work is a block of rows, so the sum over rows that is the weight's gradient has one
// order at any thread count.

#include "tile.h"

#define FOR_VECTORS(from, lanes)                                                                \
    for (int64_t from = 0, lanes##_; from < p.d; from += W)                                     \
        if (lanes##_ = least(W, p.d - from); const int lanes = (int)lanes##_)

void norm_forward(const void* given, int64_t unit, float*) {
    const Norm& p = *(const Norm*)given;
    for (int64_t row = unit * NORM_ROWS; row < least((unit + 1) * NORM_ROWS, p.rows); row++) {
        const float* x = p.x + row * p.d;
        vf squares = {};
        FOR_VECTORS(i, lanes) {
            vf v = load_lanes(x, i, lanes);
            if (p.residual) {
                v += load_lanes(p.residual + row * p.d, i, lanes);
                store_lanes(p.sum + row * p.d, i, lanes, v);
            }
            squares += v * v;
        }
        float scale = 1.0f / __builtin_sqrtf(sum_lanes(squares) / (float)p.d + (float)p.eps);
        p.scale[row] = scale;
        const float* sum = p.residual ? p.sum + row * p.d : x;
        FOR_VECTORS(i, lanes)
        store_lanes(p.out + row * p.d, i, lanes, load_lanes(sum, i, lanes) * scale * load_lanes(p.weight, i, lanes));
    }
}

void norm_backward(const void* given, int64_t unit, float*) {
    const Norm& p = *(const Norm*)given;
    float* part = p.part + unit * padded(p.d);
    for (int64_t i = 0; i < padded(p.d); i += W) store(part + i, vf{});
    for (int64_t row = unit * NORM_ROWS; row < least((unit + 1) * NORM_ROWS, p.rows); row++) {
        const float *x = p.x + row * p.d, *g = p.grad_out ? p.grad_out + row * p.d : nullptr;
        float scale = p.scale[row];
        vf dot = {};
        if (g) FOR_VECTORS(i, lanes) {
                vf v = load_lanes(x, i, lanes) * scale, to = load_lanes(g, i, lanes);
                dot += v * to * load_lanes(p.weight, i, lanes);
                store(part + i, load(part + i) + v * to);
            }
        float mean = sum_lanes(dot) / (float)p.d;
        FOR_VECTORS(i, lanes) {
            vf to_x = p.grad_sum ? load_lanes(p.grad_sum + row * p.d, i, lanes) : vf{};
            if (g) {
                vf v = load_lanes(x, i, lanes) * scale;
                to_x += (load_lanes(g, i, lanes) * load_lanes(p.weight, i, lanes) - v * mean) * scale;
            }
            store_lanes(p.grad_x + row * p.d, i, lanes, to_x);
        }
    }
}

// Sum over blocks of rows, first to last, of one vector of the weight's gradient
void norm_sum_blocks(const void* given, int64_t v, float*) {
    const Norm& p = *(const Norm*)given;
    vf sum = {};
    for (int64_t block = 0; block < ceil_div(p.rows, NORM_ROWS); block++) sum += load(p.part + block * padded(p.d) + v * W);
    store_lanes(p.grad_weight, v * W, (int)least(W, p.d - v * W), sum);
}
