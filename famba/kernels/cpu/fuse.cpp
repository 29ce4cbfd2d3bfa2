// Fusing matched tokens: where each goes, the weighted mean of those that meet, and its gradient.
//
// A unit of work is one sequence of one tensor. Memory is what this costs, so each row is read once and written once;
// a token that nothing joins is copied bit for bit.

#include "tile.h"

namespace {

INLINE void refuse(int64_t* flag) { __atomic_store_n(flag, 1, __ATOMIC_RELAXED); }

INLINE vf load_lanes(const uint16_t* x, int64_t from, int lanes) {
    if (lanes == W) return load_bf16(x + from);
    vf v = {};
    for (int l = 0; l < lanes; l++) v[l] = scalar_at(x, from + l, BFLOAT16);
    return v;
}
INLINE void store_lanes(uint16_t* x, int64_t from, int lanes, vf v) {
    if (lanes == W) return store_bf16(x + from, v);
    for (int l = 0; l < lanes; l++) scalar_to(x, from + l, BFLOAT16, v[l]);
}

// Tokens by the place they go to: first[place], then next[token], ascending; -1 is the end. False if a place does not
// exist.
INLINE bool groups_of(const int64_t* destination, int64_t t, int64_t s, int32_t* first, int32_t* next) {
    for (int64_t place = 0; place < s; place++) first[place] = -1;
    for (int64_t i = t - 1; i >= 0; i--) {
        int64_t place = destination[i];
        if (place < 0 || place >= s) return false;
        next[i] = first[place];
        first[place] = (int32_t)i;
    }
    return true;
}

template <class T>
void forward(const Fuse& p, int64_t n, int64_t b, float* memory) {
    const int64_t d = p.d[n];
    const T* x = (const T*)p.x[n] + b * p.t * d;
    T* out = (T*)p.out[n] + b * p.s * d;
    int32_t *first = (int32_t*)take(memory, p.s), *next = (int32_t*)take(memory, p.t);
    const float* weight = p.weight + b * p.t;
    if (!groups_of(p.destination + b * p.t, p.t, p.s, first, next)) return refuse(p.refused);
    for (int64_t place = 0; place < p.s; place++, out += d) {
        int64_t one = first[place];
        if (one >= 0 && next[one] < 0 && weight[one] == 1.0f) {
            __builtin_memcpy(out, x + one * d, d * sizeof(T));
            continue;
        }
        for (int64_t k = 0; k < d; k += W) {
            int lanes = (int)least(W, d - k);
            vf sum = {};
            for (int64_t i = one; i >= 0; i = next[i]) sum += load_lanes(x + i * d, k, lanes) * weight[i];
            store_lanes(out, k, lanes, sum);
        }
    }
}

template <class T>
void backward(const Fuse& p, int64_t n, int64_t b) {
    const int64_t d = p.d[n];
    const T* grad = (const T*)p.x[n] + b * p.s * d;
    T* out = (T*)p.out[n] + b * p.t * d;
    const int64_t* destination = p.destination + b * p.t;
    const float* weight = p.weight + b * p.t;
    for (int64_t i = 0; i < p.t; i++, out += d) {
        if (destination[i] < 0 || destination[i] >= p.s) return refuse(p.refused);
        const T* row = grad + destination[i] * d;
        if (weight[i] == 1.0f) {
            __builtin_memcpy(out, row, d * sizeof(T));
            continue;
        }
        for (int64_t k = 0; k < d; k += W) {
            int lanes = (int)least(W, d - k);
            store_lanes(out, k, lanes, load_lanes(row, k, lanes) * weight[i]);
        }
    }
}

// Position to place, for tokens that stay; -1 for those that go. False if this is no matching.
INLINE bool places_of(const Plan& p, const int64_t* source, const int64_t* target, int64_t* place) {
    for (int64_t i = 0; i < p.t; i++) place[i] = 0;
    for (int64_t k = 0; k < p.r; k++) {
        if (source[k] < 0 || source[k] >= p.t || place[source[k]] < 0) return false;
        place[source[k]] = -1;
    }
    for (int64_t k = 0; k < p.r; k++)
        if (target[k] < 0 || target[k] >= p.t || place[target[k]] < 0) return false;
    int64_t next = 0;
    for (int64_t first = 0; first < (p.in_order ? 1 : 2); first++)
        for (int64_t i = first; i < p.t; i += p.in_order ? 1 : 2)
            if (place[i] == 0) place[i] = next++;
    return true;
}

}  // namespace

void plan_sequence(const void* given, int64_t b, float* memory) {
    const Plan& p = *(const Plan*)given;
    const int64_t s = p.t - p.r, *source = p.source + b * p.r, *target = p.target + b * p.r;
    const float* size = p.size + b * p.t;
    int64_t *survivors = p.survivors + b * s, *destination = p.destination + b * p.t;
    float *weight = p.weight + b * p.t, *total = p.total + b * s, *whole = take(memory, s);
    if (!places_of(p, source, target, destination)) return refuse(p.refused);
    for (int64_t i = 0; i < p.t; i++) {
        if (destination[i] < 0) continue;
        survivors[destination[i]] = i;
        total[destination[i]] = size[i];
        whole[destination[i]] = p.by_size ? size[i] : 1.0f;
    }
    for (int64_t k = 0; k < p.r; k++) {
        int64_t place = destination[source[k]] = destination[target[k]];
        total[place] += size[source[k]];
        whole[place] += p.by_size ? size[source[k]] : 1.0f;
    }
    for (int64_t i = 0; i < p.t; i++) weight[i] = (p.by_size ? size[i] : 1.0f) / whole[destination[i]];
}

void fuse_forward(const void* given, int64_t unit, float* memory) {
    const Fuse& p = *(const Fuse*)given;
    int64_t n = unit % 2, b = unit / 2;
    if (p.x[n]) (p.type[n] == BFLOAT16 ? forward<uint16_t> : forward<float>)(p, n, b, memory);
}

void fuse_backward(const void* given, int64_t unit, float*) {
    const Fuse& p = *(const Fuse*)given;
    int64_t n = unit % 2, b = unit / 2;
    if (p.x[n]) (p.type[n] == BFLOAT16 ? backward<uint16_t> : backward<float>)(p, n, b);
}
