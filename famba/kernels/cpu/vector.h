// Vectors of floats in whatever width the instruction set has, and the few functions on them.
#pragma once

#include <stddef.h>
#include <stdint.h>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))

#if defined(__AVX512F__)
#define WIDTH 16
#elif defined(__AVX__)
#define WIDTH 8
#else
#define WIDTH 4
#endif

namespace {

constexpr int W = WIDTH;

typedef float vf __attribute__((vector_size(4 * WIDTH)));
typedef int32_t vi __attribute__((vector_size(4 * WIDTH)));
typedef uint32_t vu __attribute__((vector_size(4 * WIDTH)));
typedef uint16_t vh __attribute__((vector_size(2 * WIDTH)));
typedef float vf_any __attribute__((vector_size(4 * WIDTH), aligned(4), may_alias));
typedef uint16_t vh_any __attribute__((vector_size(2 * WIDTH), aligned(2), may_alias));

enum Type : int64_t { FLOAT32 = 0, BFLOAT16 = 1 };

INLINE vf load(const float* p) { return *(const vf_any*)p; }
INLINE void store(float* p, vf x) { *(vf_any*)p = x; }
INLINE vf all(float x) { return x - vf{}; }

INLINE vf load_bf16(const uint16_t* p) {
    vh half = *(const vh_any*)p;
    return (vf)(__builtin_convertvector(half, vu) << 16);
}

// to nearest, ties to even; a NaN stays one
INLINE void store_bf16(uint16_t* p, vf x) {
    vu bits = (vu)x;
    vu rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    vu quiet = (bits >> 16) | 0x40u;
    vu chosen = x == x ? rounded : quiet;
    *(vh_any*)p = __builtin_convertvector(chosen, vh);
}

INLINE float as_float(uint32_t bits) {
    float x;
    __builtin_memcpy(&x, &bits, 4);
    return x;
}

INLINE uint32_t as_bits(float x) {
    uint32_t bits;
    __builtin_memcpy(&bits, &x, 4);
    return bits;
}

INLINE float scalar_at(const void* p, int64_t i, int64_t type) {
    return type == BFLOAT16 ? as_float((uint32_t)((const uint16_t*)p)[i] << 16) : ((const float*)p)[i];
}

INLINE void scalar_to(void* p, int64_t i, int64_t type, float x) {
    if (type == BFLOAT16) {
        uint32_t bits = as_bits(x);
        ((uint16_t*)p)[i] = (uint16_t)(x == x ? (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16 : (bits >> 16) | 0x40u);
    } else {
        ((float*)p)[i] = x;
    }
}

INLINE float sum_lanes(vf x) {
#if WIDTH == 16
    return _mm512_reduce_add_ps((__m512)x);
#else
    float s[W];
    store(s, x);
    for (int half = W / 2; half > 0; half /= 2)
        for (int i = 0; i < half; i++) s[i] += s[i + half];
    return s[0];
#endif
}

// sum_lanes of each of `count` consecutive vectors
INLINE void sum_lanes_of(const float* vectors, int64_t count, float* sums) {
    int64_t i = 0;
#if WIDTH == 16
    // Sixteen at a time: in four rounds two vectors become one, each half of whose lanes has the sums of one of them.
    const vi lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    for (; i + W <= count; i += W) {
        __m512 x[W];
#pragma GCC unroll 16
        for (int j = 0; j < W; j++) x[j] = (__m512)load(vectors + (i + j) * W);
#pragma GCC unroll 4
        for (int half = W / 2; half > 0; half /= 2) {
            const __m512i crossed = (__m512i)((lane ^ half) + (lane & half) * (W / half));
            const __mmask16 other = half == 8 ? 0xff00 : half == 4 ? 0xf0f0 : half == 2 ? 0xcccc : 0xaaaa;
#pragma GCC unroll 8
            for (int j = 0; j < half; j++)
                x[j] = _mm512_mask_blend_ps(other, x[j], x[j + half]) + _mm512_permutex2var_ps(x[j], crossed, x[j + half]);
        }
        store(sums + i, (vf)x[0]);
    }
#endif
    for (; i < count; i++) sums[i] = sum_lanes(load(vectors + i * W));
}

// 2^r for |r| <= 1/2, relative error below 1e-7 and none at 0: minimax fit with the constant term held at 1
INLINE vf exp2_fraction(vf r) {
    vf p = all(0x1.5bba14p-10f);
    p = p * r + 0x1.3cea88p-7f;
    p = p * r + 0x1.c6b752p-5f;
    p = p * r + 0x1.ebf9bcp-3f;
    p = p * r + 0x1.62e42ap-1f;
    return p * r + 1.0f;
}

#if WIDTH == 16
INLINE vf nearest(vf x) { return (vf)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
INLINE vf scale(vf p, vf n) { return (vf)_mm512_scalef_ps((__m512)p, (__m512)n); }
INLINE vf in_range(vf x) { return x; }
// to where e^x is zero or infinite: beyond, what is left of x less n ln 2 is no fraction, and its polynomial may
// overflow. A NaN, as the second operand, stays one.
INLINE vf bounded(vf x) {
    return (vf)_mm512_min_ps(_mm512_set1_ps(89.0f), _mm512_max_ps(_mm512_set1_ps(-104.0f), (__m512)x));
}
#else
// adding 1.5 * 2^23 leaves the nearest integer in the low bits
INLINE vf nearest(vf x) { return (x + 12582912.0f) - 12582912.0f; }
// n in [-127, 128]: 2^-127 is written as zero, 2^128 as infinity
INLINE vf scale(vf p, vf n) {
    vi exponent = __builtin_convertvector(n, vi) + 127;
    return p * (vf)(exponent << 23);
}
INLINE vf in_range(vf x) {
    x = x < -127.0f ? all(-127.0f) : x;
    return x > 128.0f ? all(128.0f) : x;
}
INLINE vf bounded(vf x) { return x; }  // exp_ does it by the exponent
#endif

// 2^x: zero below 2^-126, infinity above 2^128
INLINE vf exp2_(vf x) {
    x = in_range(x);
    vf n = nearest(x);
    return scale(exp2_fraction(x - n), n);
}

// e^x. ln 2 in two parts keeps the error below 2e-7 for large x, where x times log2(e) would have lost digits.
INLINE vf exp_(vf x) {
    x = bounded(x);
    vf n = nearest(in_range(x * 0x1.715476p+0f));
    vf r = (x - n * 0x1.62e4p-1f) - n * 0x1.7f7d1cp-20f;
#if WIDTH != 16
    r = n <= -127.0f ? vf{} : r;
    r = n >= 128.0f ? vf{} : r;
#endif
    return scale(exp2_fraction(r * 0x1.715476p+0f), n);
}

// log x for normal x >= 1: exponent apart, log(1+f) = f - f^2/2 + f^3 P(f) on [sqrt(1/2), sqrt(2))
INLINE vf log_(vf x) {
    vi bits = (vi)x;
    vi exponent = (bits - 0x3f3504f3) >> 23;
    vf e = __builtin_convertvector(exponent, vf);
    vf f = (vf)(bits - (exponent << 23)) - 1.0f;
    vf p = all(0.06746644f);
    p = p * f - 0.11675656f;
    p = p * f + 0.11888163f;
    p = p * f - 0.124055885f;
    p = p * f + 0.14219552f;
    p = p * f - 0.16667996f;
    p = p * f + 0.20002119f;
    p = p * f - 0.2500001f;
    p = p * f + 0.33333313f;
    vf square = f * f;
    vf y = square * f * p + e * 0x1.7f7d1cp-20f - 0.5f * square;
    return f + y + e * 0x1.62e4p-1f;
}

INLINE vf sigmoid_(vf x) { return 1.0f / (1.0f + exp_(-x)); }

// softplus and its derivative. Above 20 it is x to the last bit; far below, log(1+w) is kept exact by the part of w
// that 1+w rounds away.
INLINE vf softplus_(vf x, vf* derivative) {
    vf w = exp_(x > 20.0f ? all(20.0f) : x);
    vf u = 1.0f + w;
    vf inverse = 1.0f / u;
    vf y = log_(u) + (w - (u - 1.0f)) * inverse;
    *derivative = x > 20.0f ? all(1.0f) : w * inverse;
    return x > 20.0f ? x : y;
}

}  // namespace
