// Depthwise causal convolution, bias and silu in one pass, and its gradient.
//
// Each channel's token sees itself and the k - 1 before it (reversed: after it). Tiles, lanes and units of work are those
// of scan.cpp. A reversed convolution is the forward one with its taps in the other order and its window on the other
// side. Nothing is kept for backward but the input: the sums before silu are cheaper to recompute than to store. Two
// directions of one input are two jobs in the same unit of work; the second adds its gradient to the first one's.

#include "tile.h"

namespace {

constexpr int TOKENS = 64;
constexpr int MOST_TAPS = 8;

struct ConvTiles {
    float x[(TOKENS + 2 * MOST_TAPS) * W], grad[(TOKENS + MOST_TAPS) * W], out[TOKENS * W];
};

// Tokens of one tile: few enough, and in chunks of about the same length
INLINE int64_t tokens_of(int64_t t) { return ceil_div(t, ceil_div(t, TOKENS)); }

// The sum before silu at the token whose window begins at x
template <int K>
INLINE vf window(const float* x, const vf* w, int k) {
    vf s = w[k];
    if constexpr (K > 0) {
#pragma GCC unroll 8
        for (int j = 0; j < K; j++) s += w[j] * load(x + j * W);
    } else {
        for (int j = 0; j < k; j++) s += w[j] * load(x + j * W);
    }
    return s;
}

// K is the number of taps where it is known when this is compiled, else 0
template <int K>
void forward(const Conv& p, int64_t unit, float* memory) {
    Group at = group_of(p.e, p.groups, unit);
    ConvTiles& s = *(ConvTiles*)take(memory, sizeof(ConvTiles) / 4);
    int k = K ? K : (int)p.k;
    int64_t before = p.reverse ? 0 : k - 1, most = tokens_of(p.t);
    for (int64_t t0 = 0; t0 < p.t; t0 += most) {
        int tokens = (int)least(most, p.t - t0);
        for (int64_t v = at.first; v < at.last; v++) {
            int64_t e0 = v * W;
            int lanes = (int)least(W, p.e - e0);
            vf w[MOST_TAPS + 1];
            for (int j = 0; j <= k; j++) w[j] = load(p.lanes + e0 * (k + 1) + j * W);
            load_padded(s.x, p.x, at.b, e0, lanes, t0 - before, t0 - before + tokens + k - 1, p.t);
            for (int i = 0; i < tokens; i++) {
                vf sum = window<K>(s.x + i * W, w, k);
                store(s.out + i * W, sum * sigmoid_(sum));
            }
            store_tile(s.out, p.out, at.b, e0, lanes, t0, tokens);
        }
    }
}

template <int K>
void backward(const Conv& p, int64_t unit, float* memory) {
    Group at = group_of(p.e, p.groups, unit);
    ConvTiles& s = *(ConvTiles*)take(memory, sizeof(ConvTiles) / 4);
    int k = K ? K : (int)p.k, around = k - 1;
    int64_t per_vector = (k + 1) * W, most = tokens_of(p.t);
    float* part = p.part + at.b * padded(p.e) * (k + 1);
    for (int64_t i = at.first * (k + 1); i < at.last * (k + 1); i++) store(part + i * W, vf{});
    for (int64_t t0 = 0; t0 < p.t; t0 += most) {
        int tokens = (int)least(most, p.t - t0);
        // outputs that see this chunk's inputs, and where this chunk's own begin among them
        int64_t first = p.reverse ? t0 - around : t0;
        int own = (int)(t0 - first);
        for (int64_t v = at.first; v < at.last; v++) {
            int64_t e0 = v * W;
            int lanes = (int)least(W, p.e - e0);
            vf w[MOST_TAPS + 1], to_w[MOST_TAPS + 1];
            for (int j = 0; j <= k; j++) {
                w[j] = load(p.lanes + e0 * (k + 1) + j * W);
                to_w[j] = load(part + v * per_vector + j * W);
            }
            load_padded(s.x, p.x, at.b, e0, lanes, t0 - around, t0 + tokens + around, p.t);
            load_padded(s.grad, p.grad_out, at.b, e0, lanes, first, first + tokens + around, p.t);
            for (int i = 0; i < tokens + around; i++) {
                vf sum = window<K>(s.x + i * W, w, k), gate = sigmoid_(sum);
                store(s.grad + i * W, load(s.grad + i * W) * gate * (1.0f + sum * (1.0f - gate)));
            }
            if (p.add) load_tile(s.out, p.grad_x, at.b, e0, lanes, t0, tokens);
            for (int i = 0; i < tokens; i++) {
                vf g = load(s.grad + (own + i) * W), to_x = p.add ? load(s.out + i * W) : vf{};
                for (int j = 0; j < k; j++) {
                    to_w[j] += g * load(s.x + (own + i + j) * W);
                    to_x += w[j] * load(s.grad + (i + around - j) * W);
                }
                to_w[k] += g;
                store(s.out + i * W, to_x);
            }
            for (int j = 0; j <= k; j++) store(part + v * per_vector + j * W, to_w[j]);
            store_tile(s.out, p.grad_x, at.b, e0, lanes, t0, tokens);
        }
    }
}

}  // namespace

int64_t conv_scratch() { return sizeof(ConvTiles) / 4 + 64; }

void conv_lanes(const Conv& p, float* lanes) {
    for (int64_t e = 0; e < padded(p.e); e++)
        for (int64_t j = 0; j <= p.k; j++) {
            float x = 0.0f;
            if (e < p.e && j < p.k) x = p.weight[e * p.k + (p.reverse ? p.k - 1 - j : j)];
            if (e < p.e && j == p.k && p.bias) x = p.bias[e];
            lanes[(e / W * (p.k + 1) + j) * W + e % W] = x;
        }
}

void conv_forward(const void* given, int64_t unit, float* memory) {
    const Conv* p = (const Conv*)given;
    for (int64_t i = 0; i < p->directions; i++) p->k == 4 ? forward<4>(p[i], unit, memory) : forward<0>(p[i], unit, memory);
}

void conv_backward(const void* given, int64_t unit, float* memory) {
    const Conv* p = (const Conv*)given;
    for (int64_t i = 0; i < p->directions; i++) p->k == 4 ? backward<4>(p[i], unit, memory) : backward<0>(p[i], unit, memory);
}

// Sums over sequences, first to last, of one vector of channels
void conv_sum_sequences(const void* given, int64_t unit, float*) {
    const Conv& p = ((const Conv*)given)[unit / ceil_div(((const Conv*)given)->e, W)];
    int64_t e0 = unit % ceil_div(p.e, W) * W, each = p.k + 1;
    int lanes = (int)least(W, p.e - e0);
    for (int64_t j = 0; j < each; j++) {
        float* to = j < p.k ? p.grad_weight + (p.reverse ? p.k - 1 - j : j) : p.grad_bias;
        if (!to) continue;
        vf sum = {};
        for (int64_t b = 0; b < p.b; b++) sum += load(p.part + (b * padded(p.e) + e0) * each + j * W);
        for (int l = 0; l < lanes; l++) to[(e0 + l) * (j < p.k ? p.k : 1)] = sum[l];
    }
}
