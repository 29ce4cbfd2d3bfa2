// Tiles: one vector of channels over a few tokens, as floats; where strides, types and the last channels are dealt with.
#pragma once

#include "jobs.h"
#include "vector.h"

namespace {

constexpr int64_t PAD = 16;  // channels are padded to this, the widest vector, in all that is kept in lanes

INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
INLINE int64_t padded(int64_t e) { return ceil_div(e, PAD) * PAD; }

// (token, lane) of one vector of channels; lanes beyond the last channel read as zero. Rows are far apart, which no
// processor foresees: each asks for the next vector's while it has its own.
INLINE void load_tile(float* tile, const View& x, int64_t b, int64_t e0, int lanes, int64_t t0, int tokens) {
    int64_t base = b * x.batch + e0 * x.row + t0 * x.token;
    if (x.row == 1 && lanes == W) {
        for (int i = 0; i < tokens; i++) {
            int64_t row = base + i * x.token;
            if (x.type == BFLOAT16) {
                __builtin_prefetch((const uint16_t*)x.data + row + W);
                store(tile + i * W, load_bf16((const uint16_t*)x.data + row));
            } else {
                __builtin_prefetch((const float*)x.data + row + W);
                store(tile + i * W, load((const float*)x.data + row));
            }
        }
        return;
    }
    for (int i = 0; i < tokens; i++) {
        for (int l = 0; l < lanes; l++) tile[i * W + l] = scalar_at(x.data, base + i * x.token + l * x.row, x.type);
        for (int l = lanes; l < W; l++) tile[i * W + l] = 0.0f;
    }
}

// The same for tokens from .. to - 1, of which those outside 0 .. t - 1 read as zero
INLINE void load_padded(float* tile, const View& x, int64_t b, int64_t e0, int lanes, int64_t from, int64_t to, int64_t t) {
    int64_t first = least(most(from, 0), to), last = most(least(to, t), first);
    for (int64_t i = from; i < first; i++) store(tile + (i - from) * W, vf{});
    load_tile(tile + (first - from) * W, x, b, e0, lanes, first, (int)(last - first));
    for (int64_t i = last; i < to; i++) store(tile + (i - from) * W, vf{});
}

INLINE void store_tile(const float* tile, const View& x, int64_t b, int64_t e0, int lanes, int64_t t0, int tokens) {
    int64_t base = b * x.batch + e0 * x.row + t0 * x.token;
    if (x.row == 1 && lanes == W) {
        for (int i = 0; i < tokens; i++) {
            int64_t row = base + i * x.token;
            if (x.type == BFLOAT16) {
                __builtin_prefetch((uint16_t*)x.data + row + W, 1);
                store_bf16((uint16_t*)x.data + row, load(tile + i * W));
            } else {
                __builtin_prefetch((float*)x.data + row + W, 1);
                store((float*)x.data + row, load(tile + i * W));
            }
        }
        return;
    }
    for (int i = 0; i < tokens; i++)
        for (int l = 0; l < lanes; l++) scalar_to(x.data, base + i * x.token + l * x.row, x.type, tile[i * W + l]);
}

INLINE vf load_lanes(const float* x, int64_t e0, int lanes) {
    if (lanes == W) return load(x + e0);
    vf v = {};
    for (int l = 0; l < lanes; l++) v[l] = x[e0 + l];
    return v;
}

INLINE void store_lanes(float* x, int64_t e0, int lanes, vf v) {
    if (lanes == W)
        store(x + e0, v);
    else
        for (int l = 0; l < lanes; l++) x[e0 + l] = v[l];
}

INLINE float* take(float*& memory, int64_t count) {
    float* taken = memory;
    memory += ceil_div(count, 16) * 16;
    return taken;
}

// A unit of work: one sequence and some vectors of channels
struct Group {
    int64_t b, group, first, last;
};

INLINE Group group_of(int64_t e, int64_t groups, int64_t unit) {
    int64_t vectors = ceil_div(e, W), g = unit % groups;
    return {unit / groups, g, vectors * g / groups, vectors * (g + 1) / groups};
}

}  // namespace
