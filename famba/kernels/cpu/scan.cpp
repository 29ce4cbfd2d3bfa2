// The selective scan and its gradient on a CPU (Gu and Dao 2023, arXiv:2312.00752).
//
// A vector holds one state of WIDTH neighbouring channels; tokens go in chunks of CHUNK. A unit of work is one sequence
// and one group of channels: chunk after chunk, and in each chunk vector after vector, so that B and C of a chunk, and
// the sums of their gradients over channels, stay in the first-level cache. Every vector's inputs are first brought into
// a small float tile of (token, lane), which handles strides, types and channels beyond the last.
//
// Forward keeps the state before every chunk but the first, which begins with zeros. Backward goes through the chunks
// the other way; in each it recomputes decays and states from that one, eight states at a time, then runs the adjoint
// recurrence over them.
//
// A job may project delta from dt, m numbers per token. Two jobs may share a unit of work: the second direction adds
// the first one's output to its own before the gate.
//
// "In lanes" means [vector of channels][state][lane]. Nothing depends on how units fall on threads, and sums over
// sequences and groups run in one fixed order, so results are the same bit for bit at any thread count.

#include "tile.h"

namespace {

constexpr int CHUNK = 16;
constexpr float LOG2E = 0x1.715476p+0f, LN2 = 0x1.62e430p-1f;

// (token, row) of one sequence's dt, B or C
INLINE void load_rows(float* tile, const View& x, int64_t b, int64_t n, int64_t t0, int tokens) {
    int64_t base = b * x.batch + t0 * x.token;
    for (int i = 0; i < tokens; i++)
        for (int64_t k = 0; k < n; k++) tile[i * n + k] = scalar_at(x.data, base + i * x.token + k * x.row, x.type);
}

INLINE void store_rows(const float* tile, const View& x, int64_t b, int64_t n, int64_t t0, int tokens) {
    int64_t base = b * x.batch + t0 * x.token;
    for (int i = 0; i < tokens; i++)
        for (int64_t k = 0; k < n; k++) scalar_to(x.data, base + i * x.token + k * x.row, x.type, tile[i * n + k]);
}

struct Tiles {
    float u[CHUNK * W], delta[CHUNK * W], slope[CHUNK * W], delta_u[CHUNK * W], y[CHUNK * W], z[CHUNK * W];
    float grad[CHUNK * W], grad_y[CHUNK * W], grad_delta_u[CHUNK * W], grad_delta[CHUNK * W];
};

// u, delta after bias and softplus, the slope of softplus, and delta times u
INLINE void prepare(Tiles& s, const Scan& p, const float* dt, int64_t b, int64_t e0, int lanes, int64_t t0, int tokens) {
    load_tile(s.u, p.u, b, e0, lanes, t0, tokens);
    if (!p.m) load_tile(s.delta, p.delta, b, e0, lanes, t0, tokens);
    vf bias = p.dt_bias ? load_lanes(p.dt_bias, e0, lanes) : vf{};
    const float* weight = p.lanes_dt_proj + e0 * p.m;
    for (int i = 0; i < tokens; i++) {
        vf slope = all(1.0f), delta = p.m ? bias : load(s.delta + i * W) + bias;
        for (int64_t j = 0; j < p.m; j++) delta += load(weight + j * W) * dt[i * p.m + j];
        if (p.softplus) delta = softplus_(delta, &slope);
        store(s.delta + i * W, delta);
        store(s.slope + i * W, slope);
        store(s.delta_u + i * W, delta * load(s.u + i * W));
        store(s.y + i * W, vf{});
    }
}

// N states through one chunk, added to y. A, B, C begin at the first of them; B and C have n per token.
template <int N>
void forward_states(Tiles& s, const float* A, const float* B, const float* C, int64_t n, int tokens, bool reverse,
                    const float* before, float* after) {
    vf h[N];
#pragma GCC unroll 16
    for (int k = 0; k < N; k++) h[k] = load(before + k * W);
    for (int j = 0; j < tokens; j++) {
        int i = reverse ? tokens - 1 - j : j;
        vf delta = load(s.delta + i * W), delta_u = load(s.delta_u + i * W);
        vf y0 = load(s.y + i * W), y1 = {};
        const float *Bi = B + i * n, *Ci = C + i * n;
#pragma GCC unroll 16
        for (int k = 0; k < N; k++) {
            h[k] = exp2_(delta * load(A + k * W)) * h[k] + delta_u * Bi[k];
            (k % 2 ? y1 : y0) += h[k] * Ci[k];
        }
        store(s.y + i * W, y0 + y1);
    }
#pragma GCC unroll 16
    for (int k = 0; k < N; k++) store(after + k * W, h[k]);
}

// Decays and states of a chunk, of the BLOCK states that are recomputed together
constexpr int BLOCK = 8;
struct Recomputed {
    float decay[CHUNK * BLOCK * W], state[CHUNK * BLOCK * W];
};

// N states back through one chunk. `grad_h` is the gradient that reaches the chunk's last state h from later tokens,
// replaced by the gradient of the state before the chunk. sum_B, sum_C: (token, state, lane).
template <int N>
void backward_states(Tiles& s, Recomputed& r, const float* A, const float* B, const float* C, int64_t n, int tokens,
                     bool reverse, const float* before, float* grad_h, float* grad_A, float* sum_B, float* sum_C) {
    vf h[N];
#pragma GCC unroll 8
    for (int k = 0; k < N; k++) h[k] = load(before + k * W);
    for (int j = 0; j < tokens; j++) {
        int i = reverse ? tokens - 1 - j : j;
        vf delta = load(s.delta + i * W), delta_u = load(s.delta_u + i * W);
        vf y0 = load(s.y + i * W), y1 = {};
        const float *Bi = B + i * n, *Ci = C + i * n;
        float *decay = r.decay + j * N * W, *state = r.state + j * N * W;
#pragma GCC unroll 8
        for (int k = 0; k < N; k++) {
            vf a = exp2_(delta * load(A + k * W));
            h[k] = a * h[k] + delta_u * Bi[k];
            (k % 2 ? y1 : y0) += h[k] * Ci[k];
            store(decay + k * W, a);
            store(state + k * W, h[k]);
        }
        store(s.y + i * W, y0 + y1);
    }
    vf g[N], dA[N];
#pragma GCC unroll 8
    for (int k = 0; k < N; k++) g[k] = load(grad_h + k * W), dA[k] = load(grad_A + k * W);
    for (int j = tokens - 1; j >= 0; j--) {
        int i = reverse ? tokens - 1 - j : j;
        vf delta = load(s.delta + i * W), delta_u = load(s.delta_u + i * W), grad_y = load(s.grad_y + i * W);
        vf grad_du = load(s.grad_delta_u + i * W), grad_d = load(s.grad_delta + i * W);
        const float *Bi = B + i * n, *Ci = C + i * n;
        const float *decay = r.decay + j * N * W, *state = r.state + j * N * W;
        const float* previous = j ? state - N * W : before;
        float *grad_B = sum_B + i * n * W, *grad_C = sum_C + i * n * W;
#pragma GCC unroll 8
        for (int k = 0; k < N; k++) {
            g[k] += grad_y * Ci[k];
            store(grad_C + k * W, load(grad_C + k * W) + load(state + k * W) * grad_y);
            store(grad_B + k * W, load(grad_B + k * W) + g[k] * delta_u);
            grad_du += g[k] * Bi[k];
            g[k] *= load(decay + k * W);
            vf exponent = g[k] * load(previous + k * W);
            grad_d += exponent * load(A + k * W);
            dA[k] += exponent * delta;
        }
        store(s.grad_delta_u + i * W, grad_du);
        store(s.grad_delta + i * W, grad_d);
    }
#pragma GCC unroll 8
    for (int k = 0; k < N; k++) store(grad_h + k * W, g[k]), store(grad_A + k * W, dA[k]);
}

// Where the state before a chunk is, of the channels from e0 on; the first chunk of a scan has none
INLINE float* kept_state(const Scan& p, int64_t b, int64_t chunk, int64_t e0) {
    int64_t kept = ceil_div(p.t, CHUNK) - 1;
    return p.states + ((b * kept + chunk - !p.reverse) * padded(p.e) + e0) * p.n;
}

void forward(const Scan& p, int64_t unit, float* memory) {
    Group at = group_of(p.e, p.groups, unit);
    int64_t n = p.n, chunks = ceil_div(p.t, CHUNK);
    Tiles& s = *(Tiles*)take(memory, sizeof(Tiles) / 4);
    float *B = take(memory, CHUNK * n), *C = take(memory, CHUNK * n), *dt = take(memory, CHUNK * p.m);
    float* state = take(memory, (at.last - at.first) * n * W);
    vf scale = all((float)p.scale);
    for (int64_t i = 0; i < (at.last - at.first) * n; i++) store(state + i * W, vf{});

    for (int64_t c = 0; c < chunks; c++) {
        int64_t chunk = p.reverse ? chunks - 1 - c : c, t0 = chunk * CHUNK;
        int tokens = (int)least(CHUNK, p.t - t0);
        load_rows(B, p.B, at.b, n, t0, tokens);
        load_rows(C, p.C, at.b, n, t0, tokens);
        load_rows(dt, p.delta, at.b, p.m, t0, tokens);
        for (int64_t v = at.first; v < at.last; v++) {
            int64_t e0 = v * W;
            int lanes = (int)least(W, p.e - e0);
            float* h = state + (v - at.first) * n * W;
            if (p.keep && c) {
                float* kept = kept_state(p, at.b, chunk, e0);
                for (int64_t k = 0; k < n; k++) store(kept + k * W, load(h + k * W));
            }
            prepare(s, p, dt, at.b, e0, lanes, t0, tokens);
            const float* A = p.lanes_A + e0 * n;
            int64_t k = 0;
            for (; k + 16 <= n; k += 16)
                forward_states<16>(s, A + k * W, B + k, C + k, n, tokens, p.reverse, h + k * W, h + k * W);
            for (; k + 8 <= n; k += 8)
                forward_states<8>(s, A + k * W, B + k, C + k, n, tokens, p.reverse, h + k * W, h + k * W);
            for (; k < n; k++)
                forward_states<1>(s, A + k * W, B + k, C + k, n, tokens, p.reverse, h + k * W, h + k * W);
            vf D = p.D ? load_lanes(p.D, e0, lanes) : vf{};
            if (p.D)
                for (int i = 0; i < tokens; i++) store(s.y + i * W, load(s.y + i * W) + D * load(s.u + i * W));
            if (p.other.data) {
                load_tile(s.grad, p.other, at.b, e0, lanes, t0, tokens);
                for (int i = 0; i < tokens; i++) store(s.y + i * W, load(s.y + i * W) + load(s.grad + i * W));
            }
            if (p.y.data) store_tile(s.y, p.y, at.b, e0, lanes, t0, tokens);
            if (p.z.data) {
                load_tile(s.z, p.z, at.b, e0, lanes, t0, tokens);
                for (int i = 0; i < tokens; i++) {
                    vf z = load(s.z + i * W);
                    store(s.y + i * W, load(s.y + i * W) * z * sigmoid_(z) * scale);
                }
            }
            store_tile(s.y, p.out, at.b, e0, lanes, t0, tokens);
        }
    }
}

void backward(const Scan& p, int64_t unit, float* memory) {
    Group at = group_of(p.e, p.groups, unit);
    int64_t n = p.n, m = p.m, chunks = ceil_div(p.t, CHUNK), lanes_all = padded(p.e), rows = n + 2 + m, sums = 2 * n + m;
    Tiles& s = *(Tiles*)take(memory, sizeof(Tiles) / 4);
    Recomputed& r = *(Recomputed*)take(memory, sizeof(Recomputed) / 4);
    float *B = take(memory, CHUNK * n), *C = take(memory, CHUNK * n), *dt = take(memory, CHUNK * m);
    // over lanes, of the gradients of B, C and dt of a chunk, one after another; first by lane
    float *sum = take(memory, CHUNK * sums), *by_lane = take(memory, CHUNK * sums * W);
    float *grads_h = take(memory, (at.last - at.first) * n * W), *zeros = take(memory, n * W);
    float* part = p.part + at.b * lanes_all * rows;
    vf scale = all((float)p.scale);
    for (int64_t i = 0; i < (at.last - at.first) * n; i++) store(grads_h + i * W, vf{});
    for (int64_t k = 0; k < n; k++) store(zeros + k * W, vf{});
    for (int64_t i = at.first * rows; i < at.last * rows; i++) store(part + i * W, vf{});

    for (int64_t c = 0; c < chunks; c++) {
        int64_t chunk = p.reverse ? c : chunks - 1 - c, t0 = chunk * CHUNK;
        int tokens = (int)least(CHUNK, p.t - t0);
        load_rows(B, p.B, at.b, n, t0, tokens);
        load_rows(C, p.C, at.b, n, t0, tokens);
        load_rows(dt, p.delta, at.b, m, t0, tokens);
        float *sum_B = by_lane, *sum_C = sum_B + tokens * n * W, *sum_dt = sum_C + tokens * n * W;
        for (int64_t i = 0; i < tokens * sums; i++) store(by_lane + i * W, vf{});
        for (int64_t v = at.first; v < at.last; v++) {
            int64_t e0 = v * W;
            int lanes = (int)least(W, p.e - e0);
            const float* before = c < chunks - 1 ? kept_state(p, at.b, chunk, e0) : zeros;
            float *grad_h = grads_h + (v - at.first) * n * W, *grad_A = part + e0 * rows, *others = grad_A + n * W;
            prepare(s, p, dt, at.b, e0, lanes, t0, tokens);
            load_tile(s.grad, p.grad_out, at.b, e0, lanes, t0, tokens);
            if (p.z.data) load_tile(s.z, p.z, at.b, e0, lanes, t0, tokens);
            for (int i = 0; i < tokens; i++) {
                vf grad = load(s.grad + i * W), z = load(s.z + i * W);
                if (p.z.data) {
                    vf gate = sigmoid_(z);
                    grad *= scale;
                    store(s.z + i * W, grad * gate * (1.0f + z * (1.0f - gate)));
                    grad *= z * gate;
                }
                store(s.grad_y + i * W, grad);
                store(s.grad_delta_u + i * W, vf{});
                store(s.grad_delta + i * W, vf{});
            }
            const float* A = p.lanes_A + e0 * n;
            int64_t k = 0;
            for (; k + 8 <= n; k += 8)
                backward_states<8>(s, r, A + k * W, B + k, C + k, n, tokens, p.reverse, before + k * W, grad_h + k * W,
                                   grad_A + k * W, sum_B + k * W, sum_C + k * W);
            for (; k < n; k++)
                backward_states<1>(s, r, A + k * W, B + k, C + k, n, tokens, p.reverse, before + k * W, grad_h + k * W,
                                   grad_A + k * W, sum_B + k * W, sum_C + k * W);

            vf D = p.D ? load_lanes(p.D, e0, lanes) : vf{}, grad_D = load(others), grad_bias = load(others + W);
            if (p.grad_z.data) {
                if (p.y.data) load_tile(s.y, p.y, at.b, e0, lanes, t0, tokens);
                for (int i = 0; i < tokens; i++) {
                    vf y = load(s.y + i * W);
                    if (!p.y.data) y += D * load(s.u + i * W);
                    store(s.z + i * W, load(s.z + i * W) * y);
                }
                store_tile(s.z, p.grad_z, at.b, e0, lanes, t0, tokens);
            }
            for (int i = 0; i < tokens; i++) {
                vf u = load(s.u + i * W), grad_y = load(s.grad_y + i * W), grad_du = load(s.grad_delta_u + i * W);
                vf grad_delta = (grad_du * u + load(s.grad_delta + i * W) * LN2) * load(s.slope + i * W);
                store(s.grad_delta + i * W, grad_delta);
                store(s.grad_delta_u + i * W, grad_du * load(s.delta + i * W) + grad_y * D);
                grad_D += grad_y * u;
                grad_bias += grad_delta;
            }
            store(others, grad_D);
            store(others + W, grad_bias);
            for (int64_t j = 0; j < m; j++) {
                vf weight = load(p.lanes_dt_proj + (e0 * m + j * W)), grad_weight = load(others + (2 + j) * W);
                for (int i = 0; i < tokens; i++) {
                    vf grad_delta = load(s.grad_delta + i * W);
                    float* grad_dt = sum_dt + (i * m + j) * W;
                    grad_weight += grad_delta * dt[i * m + j];
                    store(grad_dt, load(grad_dt) + grad_delta * weight);
                }
                store(others + (2 + j) * W, grad_weight);
            }
            store_tile(s.grad_delta_u, p.grad_u, at.b, e0, lanes, t0, tokens);
            if (!m) store_tile(s.grad_delta, p.grad_delta, at.b, e0, lanes, t0, tokens);
        }
        sum_lanes_of(by_lane, tokens * sums, sum);
        if (p.groups > 1) {
            float* to = p.part_rows + ((at.group * p.b + at.b) * p.t + t0) * sums;
            for (int64_t i = 0; i < tokens * sums; i++) to[i] = sum[i];
        } else {
            store_rows(sum, p.grad_B, at.b, n, t0, tokens);
            store_rows(sum + tokens * n, p.grad_C, at.b, n, t0, tokens);
            store_rows(sum + 2 * tokens * n, p.grad_delta, at.b, m, t0, tokens);
        }
    }
}

}  // namespace

int64_t scan_scratch(const Scan& p) {
    int64_t vectors = ceil_div(p.e, W), rows = 2 * p.n + p.m;
    return (sizeof(Tiles) + sizeof(Recomputed)) / 4 + (vectors + 1) * p.n * W + CHUNK * rows * (W + 2) + 512;
}

// A times log2(e), then the projection's weight
void scan_lanes(const Scan& p, float* lanes) {
    float* weight = lanes + padded(p.e) * p.n;
    for (int64_t e = 0; e < padded(p.e); e++) {
        for (int64_t k = 0; k < p.n; k++)
            lanes[(e / W * p.n + k) * W + e % W] = e < p.e ? p.A[e * p.n + k] * LOG2E : 0.0f;
        for (int64_t j = 0; j < p.m; j++)
            weight[(e / W * p.m + j) * W + e % W] = e < p.e ? p.dt_proj[e * p.m + j] : 0.0f;
    }
}

void scan_forward(const void* given, int64_t unit, float* memory) {
    const Scan* p = (const Scan*)given;
    for (int64_t i = 0; i < p->directions; i++) forward(p[i], unit, memory);
}

void scan_backward(const void* given, int64_t unit, float* memory) {
    const Scan* p = (const Scan*)given;
    for (int64_t i = 0; i < p->directions; i++) backward(p[i], unit, memory);
}

// Sums over sequences, first to last: grad_A, grad_D, grad_bias and grad_weight of one vector of channels
void scan_sum_sequences(const void* given, int64_t unit, float*) {
    const Scan& p = ((const Scan*)given)[unit / ceil_div(((const Scan*)given)->e, W)];
    int64_t n = p.n, rows = n + 2 + p.m, e0 = unit % ceil_div(p.e, W) * W;
    int lanes = (int)least(W, p.e - e0);
    for (int64_t row = 0; row < rows; row++) {
        float* to = row < n ? p.grad_A + row : row == n ? p.grad_D : p.grad_dt_bias;
        if (row > n + 1) to = p.grad_dt_proj + row - n - 2;
        if (!to) continue;
        int64_t each = row < n ? n : row < n + 2 ? 1 : p.m;
        vf sum = {};
        for (int64_t b = 0; b < p.b; b++) sum += load(p.part + (b * padded(p.e) + e0) * rows + row * W);
        for (int l = 0; l < lanes; l++) to[(e0 + l) * each] = sum[l];
    }
}

// Sums over groups of channels, first to last: grad_B, grad_C and that of dt, of one sequence
void scan_sum_groups(const void* given, int64_t unit, float*) {
    const Scan& p = ((const Scan*)given)[unit / ((const Scan*)given)->b];
    int64_t b = unit % p.b, n = p.n, sums = 2 * n + p.m;
    for (int64_t t0 = 0; t0 < p.t; t0 += CHUNK) {
        int64_t tokens = least(CHUNK, p.t - t0), length = tokens * sums;
        float* first = p.part_rows + (b * p.t + t0) * sums;
        for (int64_t g = 1; g < p.groups; g++)
            for (int64_t i = 0; i < length; i++) first[i] += first[g * p.b * p.t * sums + i];
        store_rows(first, p.grad_B, b, n, t0, (int)tokens);
        store_rows(first + tokens * n, p.grad_C, b, n, t0, (int)tokens);
        store_rows(first + 2 * tokens * n, p.grad_delta, b, p.m, t0, (int)tokens);
    }
}
