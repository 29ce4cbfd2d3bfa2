// (left + right) silu(gate) scale in one pass, and its gradient: what joins the two directions of a mixer.
//
// Units of work are those of scan.cpp. Tiles are one token high: with nothing to carry from token to token, memory is
// best read along its rows.

#include "gate.h"

#include "tile.h"

namespace {

struct GateTiles {
    float left[W], right[W], gate[W], grad[W];
};

template <bool BACKWARD>
INLINE void each(const Gate& p, int64_t unit, float* memory) {
    Group at = group_of(p.e, p.groups, unit);
    GateTiles& s = *(GateTiles*)take(memory, sizeof(GateTiles) / 4);
    vf scale = all((float)p.scale);
    for (int64_t t = 0; t < p.t; t++)
        for (int64_t v = at.first; v < at.last; v++) {
            int64_t e0 = v * W;
            int lanes = (int)least(W, p.e - e0);
            load_tile(s.left, p.left, at.b, e0, lanes, t, 1);
            load_tile(s.right, p.right, at.b, e0, lanes, t, 1);
            load_tile(s.gate, p.gate, at.b, e0, lanes, t, 1);
            if (BACKWARD) load_tile(s.grad, p.grad_out, at.b, e0, lanes, t, 1);
            vf sum = load(s.left) + load(s.right), z = load(s.gate), open = sigmoid_(z);
            if (BACKWARD) {
                vf g = load(s.grad) * scale;
                store(s.left, g * z * open);
                store(s.right, g * sum * open * (1.0f + z * (1.0f - open)));
            } else {
                store(s.left, sum * z * open * scale);
            }
            store_tile(s.left, BACKWARD ? p.grad_sum : p.out, at.b, e0, lanes, t, 1);
            if (BACKWARD) store_tile(s.right, p.grad_gate, at.b, e0, lanes, t, 1);
        }
}

}  // namespace

KERNEL(int64_t gate_scratch)(const Gate*) { return sizeof(GateTiles) / 4 + 64; }
KERNEL(void gate_forward)(const void* p, int64_t unit, float* memory) { each<false>(*(const Gate*)p, unit, memory); }
KERNEL(void gate_backward)(const void* p, int64_t unit, float* memory) { each<true>(*(const Gate*)p, unit, memory); }
