// The selective scan and its gradient on a CPU (Gu and Dao 2023, arXiv:2312.00752).
//
// A vector holds one state of WIDTH neighbouring channels; tokens go in chunks of CHUNK. A unit of work is one sequence
// and one group of channels: chunk after chunk, and in each chunk vector after vector, so that B and C of a chunk, and
// the sums of their gradients over channels, stay in the first-level cache. Every vector's inputs are first brought into
// a small float tile of (token, lane), which is where strides, types and channels beyond the last are dealt with.
//
// Forward keeps the state before every chunk. Backward goes through the chunks the other way; in each it recomputes
// decays and states from the kept one, eight states at a time, then runs the adjoint recurrence over them.
//
// "In lanes" means [vector of channels][state][lane]. Nothing depends on how units fall on threads, and sums over
// sequences and groups run in one fixed order, so results are the same bit for bit at any thread count.

#include "scan.h"

#include "tile.h"

namespace {

constexpr int CHUNK = 16;
constexpr float LOG2E = 0x1.715476p+0f, LN2 = 0x1.62e430p-1f;

// (token, state) of one sequence's B or C
INLINE void load_states(float* tile, const View& x, int64_t b, int64_t n, int64_t t0, int tokens) {
    int64_t base = b * x.batch + t0 * x.token;
    for (int i = 0; i < tokens; i++)
        for (int64_t k = 0; k < n; k++) tile[i * n + k] = scalar_at(x.data, base + i * x.token + k * x.row, x.type);
}

struct Tiles {
    float u[CHUNK * W], step[CHUNK * W], slope[CHUNK * W], entry[CHUNK * W], y[CHUNK * W], z[CHUNK * W];
    float grad[CHUNK * W], grad_y[CHUNK * W], grad_entry[CHUNK * W], grad_step[CHUNK * W];
};

// u, the finished step, its slope by delta, and step times u
INLINE void prepare(Tiles& s, const Scan& p, int64_t b, int64_t e0, int lanes, int64_t t0, int tokens) {
    load_tile(s.u, p.u, b, e0, lanes, t0, tokens);
    load_tile(s.step, p.delta, b, e0, lanes, t0, tokens);
    vf bias = p.bias ? load_lanes(p.bias, e0, lanes) : vf{};
    for (int i = 0; i < tokens; i++) {
        vf slope = all(1.0f), step = load(s.step + i * W) + bias;
        if (p.softplus) step = softplus_(step, &slope);
        store(s.step + i * W, step);
        store(s.slope + i * W, slope);
        store(s.entry + i * W, step * load(s.u + i * W));
        store(s.y + i * W, vf{});
    }
}

// N states through one chunk: y gains what they give. A, B, C begin at the first of them; B and C have n per token.
template <int N>
void forward_states(Tiles& s, const float* A, const float* B, const float* C, int64_t n, int tokens, bool reverse,
                    const float* before, float* after) {
    vf h[N];
#pragma GCC unroll 16
    for (int k = 0; k < N; k++) h[k] = load(before + k * W);
    for (int j = 0; j < tokens; j++) {
        int i = reverse ? tokens - 1 - j : j;
        vf step = load(s.step + i * W), entry = load(s.entry + i * W);
        vf y0 = load(s.y + i * W), y1 = {};
        const float *Bi = B + i * n, *Ci = C + i * n;
#pragma GCC unroll 16
        for (int k = 0; k < N; k++) {
            h[k] = exp2_(step * load(A + k * W)) * h[k] + entry * Bi[k];
            (k % 2 ? y1 : y0) += h[k] * Ci[k];
        }
        store(s.y + i * W, y0 + y1);
    }
#pragma GCC unroll 16
    for (int k = 0; k < N; k++) store(after + k * W, h[k]);
}

// Decays and states of a chunk, as many as are recomputed at a time
constexpr int BLOCK = 8;
struct Recomputed {
    float decay[CHUNK * BLOCK * W], state[CHUNK * BLOCK * W];
};

// N states back through one chunk. `carry` is the gradient that reaches the chunk's last state from later tokens,
// replaced by the one that reaches the state before the chunk. sum_B, sum_C: (token, state, lane).
template <int N>
void backward_states(Tiles& s, Recomputed& r, const float* A, const float* B, const float* C, int64_t n, int tokens,
                     bool reverse, const float* before, float* carry, float* grad_A, float* sum_B, float* sum_C) {
    vf h[N];
#pragma GCC unroll 8
    for (int k = 0; k < N; k++) h[k] = load(before + k * W);
    for (int j = 0; j < tokens; j++) {
        int i = reverse ? tokens - 1 - j : j;
        vf step = load(s.step + i * W), entry = load(s.entry + i * W);
        vf y0 = load(s.y + i * W), y1 = {};
        const float *Bi = B + i * n, *Ci = C + i * n;
        float *decay = r.decay + j * N * W, *state = r.state + j * N * W;
#pragma GCC unroll 8
        for (int k = 0; k < N; k++) {
            vf a = exp2_(step * load(A + k * W));
            h[k] = a * h[k] + entry * Bi[k];
            (k % 2 ? y1 : y0) += h[k] * Ci[k];
            store(decay + k * W, a);
            store(state + k * W, h[k]);
        }
        store(s.y + i * W, y0 + y1);
    }
    vf g[N], dA[N];
#pragma GCC unroll 8
    for (int k = 0; k < N; k++) g[k] = load(carry + k * W), dA[k] = load(grad_A + k * W);
    for (int j = tokens - 1; j >= 0; j--) {
        int i = reverse ? tokens - 1 - j : j;
        vf step = load(s.step + i * W), entry = load(s.entry + i * W), grad_y = load(s.grad_y + i * W);
        vf to_entry = load(s.grad_entry + i * W), to_step = load(s.grad_step + i * W);
        const float *Bi = B + i * n, *Ci = C + i * n;
        const float *decay = r.decay + j * N * W, *state = r.state + j * N * W;
        const float* previous = j ? state - N * W : before;
        float *toB = sum_B + i * n * W, *toC = sum_C + i * n * W;
#pragma GCC unroll 8
        for (int k = 0; k < N; k++) {
            g[k] += grad_y * Ci[k];
            store(toC + k * W, load(toC + k * W) + load(state + k * W) * grad_y);
            store(toB + k * W, load(toB + k * W) + g[k] * entry);
            to_entry += g[k] * Bi[k];
            g[k] *= load(decay + k * W);
            vf exponent = g[k] * load(previous + k * W);
            to_step += exponent * load(A + k * W);
            dA[k] += exponent * step;
        }
        store(s.grad_entry + i * W, to_entry);
        store(s.grad_step + i * W, to_step);
    }
#pragma GCC unroll 8
    for (int k = 0; k < N; k++) store(carry + k * W, g[k]), store(grad_A + k * W, dA[k]);
}

}  // namespace

KERNEL(const char* scan_compiled_for)() {
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__) && defined(__FMA__)
    return "avx512";
#elif defined(__AVX2__) && defined(__FMA__)
    return "avx2";
#elif defined(__ARM_NEON)
    return "neon";
#else
    return "baseline";
#endif
}

KERNEL(int64_t scan_width)() { return W; }

// Floats of scratch memory that one thread needs
KERNEL(int64_t scan_scratch)(const Scan* p) {
    int64_t vectors = ceil_div(p->e, W);
    return (sizeof(Tiles) + sizeof(Recomputed)) / 4 + 2 * vectors * p->n * W + 2 * CHUNK * p->n + 2 * CHUNK * p->n * W + 256;
}

// A times log2(e), in lanes
KERNEL(void scan_lanes)(const Scan* p, float* lanes) {
    int64_t lanes_all = padded(p->e);
    for (int64_t e = 0; e < lanes_all; e++)
        for (int64_t k = 0; k < p->n; k++)
            lanes[(e / W * p->n + k) * W + e % W] = e < p->e ? p->A[e * p->n + k] * LOG2E : 0.0f;
}

KERNEL(void scan_forward)(const void* given, int64_t unit, float* memory) {
    const Scan& p = *(const Scan*)given;
    Group at = group_of(p.e, p.groups, unit);
    int64_t n = p.n, chunks = ceil_div(p.t, CHUNK), lanes_all = padded(p.e);
    Tiles& s = *(Tiles*)take(memory, sizeof(Tiles) / 4);
    float *B = take(memory, CHUNK * n), *C = take(memory, CHUNK * n);
    float* state = take(memory, (at.last - at.first) * n * W);
    for (int64_t i = 0; i < (at.last - at.first) * n; i++) store(state + i * W, vf{});

    for (int64_t c = 0; c < chunks; c++) {
        int64_t chunk = p.reverse ? chunks - 1 - c : c, t0 = chunk * CHUNK;
        int tokens = (int)least(CHUNK, p.t - t0);
        load_states(B, p.B, at.b, n, t0, tokens);
        load_states(C, p.C, at.b, n, t0, tokens);
        for (int64_t v = at.first; v < at.last; v++) {
            int64_t e0 = v * W;
            int lanes = (int)least(W, p.e - e0);
            float* h = state + (v - at.first) * n * W;
            if (p.keep) {
                float* kept = p.states + (at.b * chunks + chunk) * lanes_all * n + e0 * n;
                for (int64_t k = 0; k < n; k++) store(kept + k * W, load(h + k * W));
            }
            prepare(s, p, at.b, e0, lanes, t0, tokens);
            const float* A = p.lanes_A + e0 * n;
            int64_t k = 0;
            for (; k + 16 <= n; k += 16)
                forward_states<16>(s, A + k * W, B + k, C + k, n, tokens, p.reverse, h + k * W, h + k * W);
            for (; k + 4 <= n; k += 4)
                forward_states<4>(s, A + k * W, B + k, C + k, n, tokens, p.reverse, h + k * W, h + k * W);
            for (; k < n; k++)
                forward_states<1>(s, A + k * W, B + k, C + k, n, tokens, p.reverse, h + k * W, h + k * W);
            vf D = p.D ? load_lanes(p.D, e0, lanes) : vf{};
            if (p.D)
                for (int i = 0; i < tokens; i++) store(s.y + i * W, load(s.y + i * W) + D * load(s.u + i * W));
            if (p.z.data) {
                load_tile(s.z, p.z, at.b, e0, lanes, t0, tokens);
                for (int i = 0; i < tokens; i++) {
                    vf z = load(s.z + i * W);
                    store(s.y + i * W, load(s.y + i * W) * z * sigmoid_(z));
                }
            }
            store_tile(s.y, p.out, at.b, e0, lanes, t0, tokens);
        }
    }
}

KERNEL(void scan_backward)(const void* given, int64_t unit, float* memory) {
    const Scan& p = *(const Scan*)given;
    Group at = group_of(p.e, p.groups, unit);
    int64_t n = p.n, chunks = ceil_div(p.t, CHUNK), lanes_all = padded(p.e);
    Tiles& s = *(Tiles*)take(memory, sizeof(Tiles) / 4);
    Recomputed& r = *(Recomputed*)take(memory, sizeof(Recomputed) / 4);
    float *B = take(memory, CHUNK * n), *C = take(memory, CHUNK * n);
    float *sum_B = take(memory, CHUNK * n * W), *sum_C = take(memory, CHUNK * n * W);
    float* carries = take(memory, (at.last - at.first) * n * W);
    for (int64_t i = 0; i < (at.last - at.first) * n; i++) store(carries + i * W, vf{});
    for (int64_t i = at.first * n; i < at.last * n; i++) store(p.part_A + at.b * lanes_all * n + i * W, vf{});
    for (int64_t v = at.first; v < at.last; v++) {
        if (p.part_D) store(p.part_D + at.b * lanes_all + v * W, vf{});
        if (p.part_bias) store(p.part_bias + at.b * lanes_all + v * W, vf{});
    }

    for (int64_t c = 0; c < chunks; c++) {
        int64_t chunk = p.reverse ? c : chunks - 1 - c, t0 = chunk * CHUNK;
        int tokens = (int)least(CHUNK, p.t - t0);
        load_states(B, p.B, at.b, n, t0, tokens);
        load_states(C, p.C, at.b, n, t0, tokens);
        for (int64_t i = 0; i < tokens * n; i++) store(sum_B + i * W, vf{}), store(sum_C + i * W, vf{});
        for (int64_t v = at.first; v < at.last; v++) {
            int64_t e0 = v * W;
            int lanes = (int)least(W, p.e - e0);
            const float* before = p.states + (at.b * chunks + chunk) * lanes_all * n + e0 * n;
            float* carry = carries + (v - at.first) * n * W;
            float* grad_A = p.part_A + at.b * lanes_all * n + e0 * n;
            prepare(s, p, at.b, e0, lanes, t0, tokens);
            load_tile(s.grad, p.grad_out, at.b, e0, lanes, t0, tokens);
            if (p.z.data) load_tile(s.z, p.z, at.b, e0, lanes, t0, tokens);
            for (int i = 0; i < tokens; i++) {
                vf z = load(s.z + i * W);
                store(s.grad_y + i * W, load(s.grad + i * W) * (p.z.data ? z * sigmoid_(z) : all(1.0f)));
                store(s.grad_entry + i * W, vf{});
                store(s.grad_step + i * W, vf{});
            }
            const float* A = p.lanes_A + e0 * n;
            int64_t k = 0;
            for (; k + 8 <= n; k += 8)
                backward_states<8>(s, r, A + k * W, B + k, C + k, n, tokens, p.reverse, before + k * W, carry + k * W,
                                   grad_A + k * W, sum_B + k * W, sum_C + k * W);
            for (; k < n; k++)
                backward_states<1>(s, r, A + k * W, B + k, C + k, n, tokens, p.reverse, before + k * W, carry + k * W,
                                   grad_A + k * W, sum_B + k * W, sum_C + k * W);

            vf D = p.D ? load_lanes(p.D, e0, lanes) : vf{}, to_D = {}, to_bias = {};
            for (int i = 0; i < tokens; i++) {
                vf u = load(s.u + i * W), grad_y = load(s.grad_y + i * W), to_entry = load(s.grad_entry + i * W);
                if (p.z.data) {
                    vf z = load(s.z + i * W), gate = sigmoid_(z), y = load(s.y + i * W) + D * u;
                    store(s.z + i * W, load(s.grad + i * W) * y * gate * (1.0f + z * (1.0f - gate)));
                }
                vf step = (to_entry * u + load(s.grad_step + i * W) * LN2) * load(s.slope + i * W);
                store(s.grad_step + i * W, step);
                store(s.grad_entry + i * W, to_entry * load(s.step + i * W) + grad_y * D);
                to_D += grad_y * u;
                to_bias += step;
            }
            store_tile(s.grad_entry, p.grad_u, at.b, e0, lanes, t0, tokens);
            store_tile(s.grad_step, p.grad_delta, at.b, e0, lanes, t0, tokens);
            if (p.z.data) store_tile(s.z, p.grad_z, at.b, e0, lanes, t0, tokens);
            float *D_part = p.part_D + at.b * lanes_all + e0, *bias_part = p.part_bias + at.b * lanes_all + e0;
            if (p.part_D) store(D_part, load(D_part) + to_D);
            if (p.part_bias) store(bias_part, load(bias_part) + to_bias);
        }
        for (int i = 0; i < tokens; i++)
            for (int64_t k = 0; k < n; k++) {
                float to_B = sum_lanes(load(sum_B + (i * n + k) * W)), to_C = sum_lanes(load(sum_C + (i * n + k) * W));
                if (p.groups > 1) {
                    int64_t place = ((at.group * p.b + at.b) * p.t + t0 + i) * n + k;
                    p.part_B[place] = to_B;
                    p.part_C[place] = to_C;
                } else {
                    int64_t place = at.b * p.grad_B.batch + (t0 + i) * p.grad_B.token + k * p.grad_B.row;
                    scalar_to(p.grad_B.data, place, p.grad_B.type, to_B);
                    place = at.b * p.grad_C.batch + (t0 + i) * p.grad_C.token + k * p.grad_C.row;
                    scalar_to(p.grad_C.data, place, p.grad_C.type, to_C);
                }
            }
    }
}

// Sums over sequences, first to last: grad_A, grad_D and grad_bias of one vector of channels
KERNEL(void scan_sum_sequences)(const void* given, int64_t v, float*) {
    const Scan& p = *(const Scan*)given;
    int64_t n = p.n, lanes_all = padded(p.e), e0 = v * W;
    int lanes = (int)least(W, p.e - e0);
    for (int64_t k = 0; k < n; k++) {
        vf sum = {};
        for (int64_t b = 0; b < p.b; b++) sum += load(p.part_A + b * lanes_all * n + e0 * n + k * W);
        for (int l = 0; l < lanes; l++) p.grad_A[(e0 + l) * n + k] = sum[l];
    }
    for (int which = 0; which < 2; which++) {
        const float* part = which ? p.part_bias : p.part_D;
        float* to = which ? p.grad_bias : p.grad_D;
        if (!part) continue;
        vf sum = {};
        for (int64_t b = 0; b < p.b; b++) sum += load(part + b * lanes_all + e0);
        for (int l = 0; l < lanes; l++) to[e0 + l] = sum[l];
    }
}

// Sums over groups of channels, first to last: grad_B and grad_C of one sequence
KERNEL(void scan_sum_groups)(const void* given, int64_t b, float*) {
    const Scan& p = *(const Scan*)given;
    for (int64_t t = 0; t < p.t; t++)
        for (int64_t k = 0; k < p.n; k++) {
            float to_B = 0.0f, to_C = 0.0f;
            for (int64_t g = 0; g < p.groups; g++) {
                int64_t place = ((g * p.b + b) * p.t + t) * p.n + k;
                to_B += p.part_B[place];
                to_C += p.part_C[place];
            }
            scalar_to(p.grad_B.data, b * p.grad_B.batch + t * p.grad_B.token + k * p.grad_B.row, p.grad_B.type, to_B);
            scalar_to(p.grad_C.data, b * p.grad_C.batch + t * p.grad_C.token + k * p.grad_C.row, p.grad_C.type, to_C);
        }
}
