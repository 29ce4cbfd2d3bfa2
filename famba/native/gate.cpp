// (left + right) silu(gate) scale in one pass, and its gradient: what joins the two directions of a mixer.
//
// Tiles and units of work are those of scan.cpp.

#include "gate.h"

#include "tile.h"

namespace {

constexpr int TOKENS = 16;

struct GateTiles {
    float left[TOKENS * W], right[TOKENS * W], gate[TOKENS * W], grad[TOKENS * W];
};

template <bool BACKWARD>
INLINE void each(const Gate& p, int64_t unit, float* memory) {
    Group at = group_of(p.e, p.groups, unit);
    GateTiles& s = *(GateTiles*)take(memory, sizeof(GateTiles) / 4);
    vf scale = all((float)p.scale);
    for (int64_t t0 = 0; t0 < p.t; t0 += TOKENS) {
        int tokens = (int)least(TOKENS, p.t - t0);
        for (int64_t v = at.first; v < at.last; v++) {
            int64_t e0 = v * W;
            int lanes = (int)least(W, p.e - e0);
            load_tile(s.left, p.left, at.b, e0, lanes, t0, tokens);
            load_tile(s.right, p.right, at.b, e0, lanes, t0, tokens);
            load_tile(s.gate, p.gate, at.b, e0, lanes, t0, tokens);
            if (BACKWARD) load_tile(s.grad, p.grad_out, at.b, e0, lanes, t0, tokens);
            for (int i = 0; i < tokens * W; i += W) {
                vf sum = load(s.left + i) + load(s.right + i), z = load(s.gate + i), open = sigmoid_(z);
                if (BACKWARD) {
                    vf g = load(s.grad + i) * scale;
                    store(s.left + i, g * z * open);
                    store(s.right + i, g * sum * open * (1.0f + z * (1.0f - open)));
                } else {
                    store(s.left + i, sum * z * open * scale);
                }
            }
            store_tile(s.left, BACKWARD ? p.grad_sum : p.out, at.b, e0, lanes, t0, tokens);
            if (BACKWARD) store_tile(s.right, p.grad_gate, at.b, e0, lanes, t0, tokens);
        }
    }
}

}  // namespace

KERNEL(int64_t gate_scratch)(const Gate*) { return sizeof(GateTiles) / 4 + 64; }
KERNEL(void gate_forward)(const void* p, int64_t unit, float* memory) { each<false>(*(const Gate*)p, unit, memory); }
KERNEL(void gate_backward)(const void* p, int64_t unit, float* memory) { each<true>(*(const Gate*)p, unit, memory); }
