// (left + right) silu(gate) scale in one pass, and its gradient: what joins the two directions of a mixer.
//
// Units of work are those of scan.cpp. Tiles are one token high: with nothing to carry from token to token, memory is
// best read along its rows.

#include "gate.h"

#include "tile.h"

namespace {

struct GateTiles {
    float one[W], other[W], gate[W];
};

}  // namespace

KERNEL(int64_t gate_scratch)(const Gate*) { return sizeof(GateTiles) / 4 + 64; }

KERNEL(void gate_forward)(const void* given, int64_t unit, float* memory) {
    const Gate& p = *(const Gate*)given;
    Group at = group_of(p.e, p.groups, unit);
    GateTiles& s = *(GateTiles*)take(memory, sizeof(GateTiles) / 4);
    vf scale = all((float)p.scale);
    for (int64_t t = 0; t < p.t; t++)
        for (int64_t v = at.first; v < at.last; v++) {
            int64_t e0 = v * W;
            int lanes = (int)least(W, p.e - e0);
            load_tile(s.one, p.left, at.b, e0, lanes, t, 1);
            load_tile(s.other, p.right, at.b, e0, lanes, t, 1);
            load_tile(s.gate, p.gate, at.b, e0, lanes, t, 1);
            vf sum = load(s.one) + load(s.other), z = load(s.gate);
            store(s.one, sum);
            store(s.other, sum * z * sigmoid_(z) * scale);
            if (p.sum.data) store_tile(s.one, p.sum, at.b, e0, lanes, t, 1);
            store_tile(s.other, p.out, at.b, e0, lanes, t, 1);
        }
}

KERNEL(void gate_backward)(const void* given, int64_t unit, float* memory) {
    const Gate& p = *(const Gate*)given;
    Group at = group_of(p.e, p.groups, unit);
    GateTiles& s = *(GateTiles*)take(memory, sizeof(GateTiles) / 4);
    vf scale = all((float)p.scale);
    for (int64_t t = 0; t < p.t; t++)
        for (int64_t v = at.first; v < at.last; v++) {
            int64_t e0 = v * W;
            int lanes = (int)least(W, p.e - e0);
            load_tile(s.one, p.grad_out, at.b, e0, lanes, t, 1);
            load_tile(s.other, p.sum, at.b, e0, lanes, t, 1);
            load_tile(s.gate, p.gate, at.b, e0, lanes, t, 1);
            vf grad = load(s.one) * scale, z = load(s.gate), open = sigmoid_(z);
            store(s.one, grad * z * open);
            store(s.other, grad * load(s.other) * open * (1.0f + z * (1.0f - open)));
            store_tile(s.one, p.grad_sum, at.b, e0, lanes, t, 1);
            store_tile(s.other, p.grad_gate, at.b, e0, lanes, t, 1);
        }
}
