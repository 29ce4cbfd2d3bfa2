// Bipartite soft matching (Token Merging, arXiv:2210.09461, section 3): each sequence's r most similar pairs.
//
// A unit of work is a sequence. Its tokens are brought to unit length in scratch memory, the even ones before the odd
// ones; the scores of a few even tokens at a time stay in the nearest cache until the best of each is known. Every
// score is one sum in one order, whichever block it falls in, so equal tokens have equal scores.

#include "tile.h"

namespace {

constexpr int EVENS = WIDTH == 16 ? 4 : 2, ODDS = 4;  // tokens compared at once: their sums fill the registers
constexpr float SHORTEST = 1e-12f;                    // a shorter token is taken to be this long: it is like no other
constexpr float LEAST = -__builtin_inff();            // the score of a token that is protected or not there

struct Sizes {
    int64_t evens, odds, even_rows, odd_rows, c;  // rows are padded to whole blocks, c to whole vectors
};

INLINE Sizes sizes_of(const Match& p) {
    int64_t evens = p.t - p.t / 2, odds = p.t / 2;
    return {evens, odds, ceil_div(evens, EVENS) * EVENS, ceil_div(odds, ODDS) * ODDS, padded(p.c)};
}

INLINE void to_unit_length(const float* x, int64_t c, float* unit) {
    vf squares = {};
    for (int64_t i = 0; i < c; i += W) {
        vf v = load_lanes(x, i, (int)least(W, c - i));
        squares += v * v;
    }
    float length = __builtin_sqrtf(sum_lanes(squares)), scale = 1.0f / (length < SHORTEST ? SHORTEST : length);
    for (int64_t i = 0; i < padded(c); i += W)
        store(unit + i, load_lanes(x, i, (int)most(0, least(W, c - i))) * scale);
}

// Every other token from `first` on, and rows of zeros to fill the last block
INLINE void to_units(const float* x, int64_t first, const Match& p, int64_t rows, float* units) {
    int64_t c = padded(p.c), count = (p.t - first + 1) / 2;
    for (int64_t i = 0; i < count; i++) to_unit_length(x + (first + 2 * i) * p.c, p.c, units + i * c);
    for (int64_t i = count * c; i < rows * c; i += W) store(units + i, vf{});
}

typedef float four __attribute__((vector_size(16)));

// The sum of each of four vectors' lanes
INLINE four sums_of(const vf* x) {
    four part[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        four quarter[W / 4];
        __builtin_memcpy(quarter, x + i, sizeof(vf));
        for (int stride = W / 8; stride > 0; stride /= 2)
            for (int q = 0; q < stride; q++) quarter[q] += quarter[q + stride];
        part[i] = quarter[0];
    }
    four left = {part[0][0] + part[0][2], part[0][1] + part[0][3], part[1][0] + part[1][2], part[1][1] + part[1][3]};
    four right = {part[2][0] + part[2][2], part[2][1] + part[2][3], part[3][0] + part[3][2], part[3][1] + part[3][3]};
    return four{left[0], left[2], right[0], right[2]} + four{left[1], left[3], right[1], right[3]};
}

// Scores of EVENS even tokens with all odd ones
INLINE void score(const float* even, const float* odd, const Sizes& n, float* scores) {
    for (int64_t j = 0; j < n.odd_rows; j += ODDS) {
        vf sums[EVENS][ODDS] = {};
        for (int64_t k = 0; k < n.c; k += W)
#pragma GCC unroll 8
            for (int a = 0; a < EVENS; a++)
#pragma GCC unroll 4
                for (int b = 0; b < ODDS; b++) sums[a][b] += load(even + a * n.c + k) * load(odd + (j + b) * n.c + k);
#pragma GCC unroll 8
        for (int a = 0; a < EVENS; a++) {
            four found = sums_of(sums[a]);
            __builtin_memcpy(scores + a * padded(n.odds) + j, &found, sizeof found);
        }
    }
}

// NaN sorts above all numbers, as in torch.
INLINE bool exceeds(float a, float b) { return a > b || (a != a && b == b); }

INLINE int64_t first_of_largest(const float* x, int64_t count) {
    vf largest = all(LEAST);
    vi none = {};
    for (int64_t i = 0; i < count; i += W) {
        vf v = load(x + i);
        none |= v != v;
        largest = v > largest ? v : largest;
    }
    float top = LEAST;
    int32_t nan = 0;
    for (int l = 0; l < W; l++) {
        top = largest[l] > top ? largest[l] : top;
        nan |= none[l];
    }
    int64_t i = 0;
    while (nan ? x[i] == x[i] : x[i] != top) i++;
    return i;
}

INLINE bool is_among(const int64_t* positions, int64_t count, int64_t position) {
    bool found = false;
    for (int64_t i = 0; i < count; i++) found |= positions[i] == position;
    return found;
}

INLINE void refuse(const Match& p) { __atomic_store_n(p.refused, 1, __ATOMIC_RELAXED); }

}  // namespace

int64_t match_scratch(const Match& p) {
    Sizes n = sizes_of(p);
    return (n.even_rows + n.odd_rows) * n.c + EVENS * padded(n.odds) + 64;
}

void match_sequence(const void* given, int64_t b, float* memory) {
    const Match& p = *(const Match*)given;
    const Sizes n = sizes_of(p);
    float *even = take(memory, n.even_rows * n.c), *odd = take(memory, n.odd_rows * n.c);
    float* scores = take(memory, EVENS * padded(n.odds));
    const float* x = p.feature + b * p.t * p.c;
    const int64_t* guard = p.guarded + b * p.guards;
    int64_t *source = p.source + b * p.r, *target = p.target + b * p.r, pairs = 0;
    float* similarity = p.similarity + b * p.r;
    for (int64_t g = 0; g < p.guards; g++)
        if (guard[g] < 0 || guard[g] >= p.t) return refuse(p);
    to_units(x, 0, p, n.even_rows, even);
    to_units(x, 1, p, n.odd_rows, odd);
    for (int64_t from = 0; from < n.evens; from += EVENS) {
        score(even + from * n.c, odd, n, scores);
        for (int64_t i = from; i < least(from + EVENS, n.evens); i++) {
            if (is_among(guard, p.guards, 2 * i)) continue;
            float* row = scores + (i - from) * padded(n.odds);
            for (int64_t g = 0; g < p.guards; g++)
                if (guard[g] % 2 == 1) row[guard[g] / 2] = LEAST;
            for (int64_t j = n.odds; j < padded(n.odds); j++) row[j] = LEAST;
            int64_t j = first_of_largest(row, padded(n.odds));
            // into the r best so far, in order: behind those as good, which come earlier in the sequence
            int64_t place = pairs;
            while (place > 0 && exceeds(row[j], similarity[place - 1])) place--;
            if (place == p.r || row[j] == LEAST) continue;
            pairs += pairs < p.r;
            for (int64_t k = pairs - 1; k > place; k--) {
                source[k] = source[k - 1];
                target[k] = target[k - 1];
                similarity[k] = similarity[k - 1];
            }
            source[place] = 2 * i;
            target[place] = 2 * j + 1;
            similarity[place] = row[j];
        }
    }
    if (pairs < p.r) refuse(p);
}
