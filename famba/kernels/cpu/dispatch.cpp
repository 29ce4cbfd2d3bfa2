// Compiled once, for the baseline instruction set: the choice of instruction set, threads, and the C interface.

#include "dispatch.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <new>
#include <thread>
#include <vector>

#include "conv.h"
#include "fuse.h"
#include "match.h"
#include "norm.h"
#include "scan.h"
#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace {

constexpr const char* NAMES[] = {"avx512", "avx2", "baseline"};

bool runs_here(int set) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (set == 0)
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma");
    if (set == 1) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    return true;
#else
    return set == 2;
#endif
}

int best_set() {
    int set = 0;
    while (!runs_here(set)) set++;
    return set;
}

std::atomic<int> chosen{-1};

// Decaying states end in numbers too small for the normal format, which are slow: both kinds are read and written as 0.
struct FlushDenormals {
#if defined(__x86_64__)
    unsigned before = _mm_getcsr();
    FlushDenormals() { _mm_setcsr(before | 0x8040); }
    ~FlushDenormals() { _mm_setcsr(before); }
#elif defined(__aarch64__)
    uint64_t before;
    FlushDenormals() {
        __asm__ volatile("mrs %0, fpcr" : "=r"(before));
        __asm__ volatile("msr fpcr, %0" : : "r"(before | (1ull << 24)));
    }
    ~FlushDenormals() { __asm__ volatile("msr fpcr, %0" : : "r"(before)); }
#endif
};

// Kept from call to call, as large as was ever needed
struct Scratch {
    float* memory = nullptr;
    int64_t floats = 0;
    ~Scratch() { std::free(memory); }
    float* at_least(int64_t wanted) {
        if (wanted > floats) {
            std::free(memory);
            memory = static_cast<float*>(std::aligned_alloc(64, (wanted * 4 + 63) / 64 * 64));
            floats = memory ? wanted : 0;
        }
        return memory;
    }
};
thread_local Scratch scratch;

struct Work {
    Body body;
    const void* job;
    int64_t units, floats;
    std::atomic<int64_t> next{0};
    std::atomic<bool> failed{false};
};

void work_on(void* data) {
    Work& work = *static_cast<Work*>(data);
    FlushDenormals flush;
    float* memory = scratch.at_least(work.floats);
    if (!memory) {
        work.failed = true;
        return;
    }
    for (int64_t unit; (unit = work.next.fetch_add(1)) < work.units;) work.body(work.job, unit, memory);
}

struct Aligned {
    float* memory;
    explicit Aligned(int64_t floats)
        : memory(static_cast<float*>(std::aligned_alloc(64, (floats * 4 + 63) / 64 * 64 + 64))) {}
    ~Aligned() { std::free(memory); }
};

}  // namespace

int instruction_set() {
    int set = chosen;
    if (set < 0) chosen = set = best_set();
    return set;
}

bool share_out(Body body, const void* job, int64_t units, int64_t scratch_floats, int64_t threads, Parallel parallel) {
    Work work{body, job, units, scratch_floats, {}, {}};
    if (threads > units) threads = units;
    if (threads <= 1) {
        work_on(&work);
    } else if (parallel) {
        parallel(work_on, &work, static_cast<unsigned>(threads), 0);
    } else {
        std::vector<std::thread> others;
        for (int64_t i = 1; i < threads; i++) others.emplace_back(work_on, &work);
        work_on(&work);
        for (auto& other : others) other.join();
    }
    return !work.failed;
}

#define DECLARE_SCAN(set)                                                   \
    extern "C" const char* scan_compiled_for_##set();                       \
    extern "C" int64_t scan_width_##set();                                  \
    extern "C" int64_t scan_scratch_##set(const Scan*);                     \
    extern "C" void scan_lanes_##set(const Scan*, float*);                  \
    extern "C" void scan_forward_##set(const void*, int64_t, float*);       \
    extern "C" void scan_backward_##set(const void*, int64_t, float*);      \
    extern "C" void scan_sum_sequences_##set(const void*, int64_t, float*); \
    extern "C" void scan_sum_groups_##set(const void*, int64_t, float*);
#define DECLARE_CONV(set)                                              \
    extern "C" int64_t conv_scratch_##set(const Conv*);                \
    extern "C" void conv_lanes_##set(const Conv*, float*);             \
    extern "C" void conv_forward_##set(const void*, int64_t, float*);  \
    extern "C" void conv_backward_##set(const void*, int64_t, float*); \
    extern "C" void conv_sum_sequences_##set(const void*, int64_t, float*);
#define DECLARE_NORM(set)                                             \
    extern "C" void norm_forward_##set(const void*, int64_t, float*);  \
    extern "C" void norm_backward_##set(const void*, int64_t, float*); \
    extern "C" void norm_sum_blocks_##set(const void*, int64_t, float*);
#define DECLARE_MATCH(set)                              \
    extern "C" int64_t match_scratch_##set(const Match*); \
    extern "C" void match_sequence_##set(const void*, int64_t, float*);
#define DECLARE_FUSE(set)                                             \
    extern "C" int64_t fuse_scratch_##set(const Fuse*);               \
    extern "C" void plan_sequence_##set(const void*, int64_t, float*); \
    extern "C" void fuse_forward_##set(const void*, int64_t, float*); \
    extern "C" void fuse_backward_##set(const void*, int64_t, float*);
DECLARE_SCAN(avx512)
DECLARE_SCAN(avx2)
DECLARE_SCAN(baseline)
DECLARE_CONV(avx512)
DECLARE_CONV(avx2)
DECLARE_CONV(baseline)
DECLARE_NORM(avx512)
DECLARE_NORM(avx2)
DECLARE_NORM(baseline)
DECLARE_MATCH(avx512)
DECLARE_MATCH(avx2)
DECLARE_MATCH(baseline)
DECLARE_FUSE(avx512)
DECLARE_FUSE(avx2)
DECLARE_FUSE(baseline)

#define POINTER(name, set) name##_##set
#define TABLE(name) {FOR_EACH_VARIANT(POINTER, name)}

namespace {
const char* (*const compiled_for[])() = TABLE(scan_compiled_for);
int64_t (*const scan_width[])() = TABLE(scan_width);
int64_t (*const scan_scratch[])(const Scan*) = TABLE(scan_scratch);
void (*const scan_lanes[])(const Scan*, float*) = TABLE(scan_lanes);
const Body scan_forward[] = TABLE(scan_forward);
const Body scan_backward[] = TABLE(scan_backward);
const Body scan_sum_sequences[] = TABLE(scan_sum_sequences);
const Body scan_sum_groups[] = TABLE(scan_sum_groups);
int64_t (*const conv_scratch[])(const Conv*) = TABLE(conv_scratch);
void (*const conv_lanes[])(const Conv*, float*) = TABLE(conv_lanes);
const Body conv_forward[] = TABLE(conv_forward);
const Body conv_backward[] = TABLE(conv_backward);
const Body conv_sum_sequences[] = TABLE(conv_sum_sequences);
const Body norm_forward[] = TABLE(norm_forward);
const Body norm_backward[] = TABLE(norm_backward);
const Body norm_sum_blocks[] = TABLE(norm_sum_blocks);
int64_t (*const match_scratch[])(const Match*) = TABLE(match_scratch);
const Body match_sequence[] = TABLE(match_sequence);
int64_t (*const fuse_scratch[])(const Fuse*) = TABLE(fuse_scratch);
const Body plan_sequence[] = TABLE(plan_sequence);
const Body fuse_forward[] = TABLE(fuse_forward);
const Body fuse_backward[] = TABLE(fuse_backward);

int64_t padded(int64_t e) { return (e + 15) / 16 * 16; }
int64_t vectors(int64_t e) { return (e + scan_width[instruction_set()]() - 1) / scan_width[instruction_set()](); }

// As many units as keep many cores busy, but at least two vectors of channels in each. A matter of shapes alone: the
// sums over groups must not depend on the number of threads.
int64_t groups(int64_t b, int64_t e) {
    int64_t wanted = (32 + b - 1) / b, most = (vectors(e) + 1) / 2;
    return wanted < most ? wanted : most;
}

// Parameters in lanes, into memory of as many floats as they are, padded; and the groups that channels go in
void scan_in_lanes(Scan* p, float* memory) {
    for (int64_t i = 0; i < p->directions; i++) {
        p[i].lanes_A = memory + i * padded(p->e) * (p->n + p->m);
        p[i].lanes_dt_proj = p[i].lanes_A + padded(p->e) * p->n;
        p[i].groups = groups(p->b, p->e);
        scan_lanes[instruction_set()](p + i, memory + i * padded(p->e) * (p->n + p->m));
    }
}

void conv_in_lanes(Conv* p, float* memory) {
    for (int64_t i = 0; i < p->directions; i++) {
        float* lanes = memory + i * padded(p->e) * (p->k + 1);
        conv_lanes[instruction_set()](p + i, lanes);
        p[i].lanes = lanes;
        p[i].groups = groups(p->b, p->e);
    }
}
}  // namespace

// The target of the kernels in use, as their compiler defined it
extern "C" const char* famba_instruction_set() { return compiled_for[instruction_set()](); }

// Floats per vector of the kernels in use
extern "C" int64_t famba_width() { return scan_width[instruction_set()](); }

// "auto" or one of NAMES; 0 when this machine lacks it
extern "C" int famba_use_instruction_set(const char* name) {
    if (!std::strcmp(name, "auto")) {
        chosen = best_set();
        return 1;
    }
    for (int set = 0; set < 3; set++)
        if (!std::strcmp(name, NAMES[set]) && runs_here(set)) {
            chosen = set;
            return 1;
        }
    return 0;
}

// All of these return 0 when there was no memory.
extern "C" int famba_scan_forward(Scan* p, int64_t threads, Parallel parallel) {
    int set = instruction_set();
    Aligned lanes(p->directions * padded(p->e) * (p->n + p->m));
    if (!lanes.memory) return 0;
    scan_in_lanes(p, lanes.memory);
    return share_out(scan_forward[set], p, p->b * p->groups, scan_scratch[set](p), threads, parallel);
}

extern "C" int famba_scan_backward(Scan* p, int64_t threads, Parallel parallel) {
    int set = instruction_set();
    int64_t part_each = p->b * padded(p->e) * (p->n + 2 + p->m), groups_all = groups(p->b, p->e);
    int64_t rows_each = groups_all > 1 ? groups_all * p->b * p->t * (2 * p->n + p->m) : 0;
    Aligned lanes(p->directions * padded(p->e) * (p->n + p->m));
    Aligned part(p->directions * part_each), rows(p->directions * rows_each);
    if (!lanes.memory || !part.memory || !rows.memory) return 0;
    scan_in_lanes(p, lanes.memory);
    for (int64_t i = 0; i < p->directions; i++) {
        p[i].part = part.memory + i * part_each;
        p[i].part_rows = rows.memory + i * rows_each;
    }
    return share_out(scan_backward[set], p, p->b * p->groups, scan_scratch[set](p), threads, parallel) &&
           share_out(scan_sum_sequences[set], p, p->directions * vectors(p->e), 16, threads, parallel) &&
           (p->groups == 1 || share_out(scan_sum_groups[set], p, p->directions * p->b, 16, threads, parallel));
}

extern "C" int famba_conv_forward(Conv* p, int64_t threads, Parallel parallel) {
    int set = instruction_set();
    Aligned lanes(p->directions * padded(p->e) * (p->k + 1));
    if (!lanes.memory) return 0;
    conv_in_lanes(p, lanes.memory);
    return share_out(conv_forward[set], p, p->b * p->groups, conv_scratch[set](p), threads, parallel);
}

extern "C" int famba_conv_backward(Conv* p, int64_t threads, Parallel parallel) {
    int set = instruction_set();
    int64_t each = padded(p->e) * (p->k + 1);
    Aligned lanes(p->directions * each), part(p->directions * p->b * each);
    if (!lanes.memory || !part.memory) return 0;
    conv_in_lanes(p, lanes.memory);
    for (int64_t i = 0; i < p->directions; i++) p[i].part = part.memory + i * p->b * each;
    return share_out(conv_backward[set], p, p->b * p->groups, conv_scratch[set](p), threads, parallel) &&
           share_out(conv_sum_sequences[set], p, p->directions * vectors(p->e), 16, threads, parallel);
}

extern "C" int famba_norm_forward(Norm* p, int64_t threads, Parallel parallel) {
    return share_out(norm_forward[instruction_set()], p, (p->rows + 63) / 64, 16, threads, parallel);
}

extern "C" int famba_norm_backward(Norm* p, int64_t threads, Parallel parallel) {
    int set = instruction_set();
    int64_t blocks = (p->rows + 63) / 64;
    Aligned part(blocks * padded(p->d));
    if (!part.memory) return 0;
    p->part = part.memory;
    return share_out(norm_backward[set], p, blocks, 16, threads, parallel) &&
           share_out(norm_sum_blocks[set], p, vectors(p->d), 16, threads, parallel);
}

extern "C" int famba_match(Match* p, int64_t threads, Parallel parallel) {
    int set = instruction_set();
    return share_out(match_sequence[set], p, p->b, match_scratch[set](p), threads, parallel);
}

extern "C" int famba_plan(Plan* p, int64_t threads, Parallel parallel) {
    return share_out(plan_sequence[instruction_set()], p, p->b, p->t, threads, parallel);
}

extern "C" int famba_fuse_forward(Fuse* p, int64_t threads, Parallel parallel) {
    int set = instruction_set();
    return share_out(fuse_forward[set], p, 2 * p->b, fuse_scratch[set](p), threads, parallel);
}

extern "C" int famba_fuse_backward(Fuse* p, int64_t threads, Parallel parallel) {
    return share_out(fuse_backward[instruction_set()], p, 2 * p->b, 16, threads, parallel);
}
