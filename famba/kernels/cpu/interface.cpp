// The C interface: each job's units of work shared out over threads. Only what is EXPORTED is seen outside.

#include <atomic>
#include <cstdlib>
#include <thread>
#include <vector>

#include "tile.h"
#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

#define EXPORTED extern "C" __attribute__((visibility("default")))

// As OpenMP runtimes export it (GOMP_parallel): calls work(data) in each of `threads` threads and waits for all.
typedef void (*Parallel)(void (*work)(void*), void* data, unsigned threads, unsigned flags);

namespace {

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

struct Buffer {
    float* memory = nullptr;
    int64_t floats = 0;
    ~Buffer() { std::free(memory); }
    float* at_least(int64_t wanted) {
        if (!memory || wanted > floats) {
            std::free(memory);
            memory = static_cast<float*>(std::aligned_alloc(64, ceil_div(wanted, 16) * 64 + 64));
            floats = memory ? wanted : 0;
        }
        return memory;
    }
};
thread_local Buffer scratch;  // kept from call to call, as large as was ever needed

struct Work {
    Kernel* kernel;
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
    for (int64_t unit; (unit = work.next.fetch_add(1)) < work.units;) work.kernel(work.job, unit, memory);
}

// Runs units 0 .. units-1 in any order. False when there was no memory for scratch.
bool share_out(Kernel* kernel, const void* job, int64_t units, int64_t floats, int64_t threads, Parallel parallel) {
    Work work{kernel, job, units, floats, {}, {}};
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

// For a sum over so many floats: below a megabyte one thread ends before a second has woken up.
int64_t threads_for(int64_t floats, int64_t threads) { return floats < 1 << 18 ? 1 : threads; }

int64_t vectors(int64_t e) { return ceil_div(e, W); }

// As many units as keep many cores busy, but at least two vectors of channels in each. A matter of shapes alone: the
// sums over groups must not depend on the number of threads.
int64_t groups(int64_t b, int64_t e) { return least(ceil_div(32, b), ceil_div(vectors(e), 2)); }

bool prepare(Scan* p, Buffer& buffer) {
    int64_t each = padded(p->e) * (p->n + p->m);
    float* lanes = buffer.at_least(p->directions * each);
    for (int64_t i = 0; lanes && i < p->directions; i++, lanes += each) {
        p[i].lanes_A = lanes;
        p[i].lanes_dt_proj = lanes + padded(p->e) * p->n;
        p[i].groups = groups(p->b, p->e);
        scan_lanes(p[i], lanes);
    }
    return lanes;
}

bool prepare(Conv* p, Buffer& buffer) {
    int64_t each = padded(p->e) * (p->k + 1);
    float* lanes = buffer.at_least(p->directions * each);
    for (int64_t i = 0; lanes && i < p->directions; i++, lanes += each) {
        p[i].lanes = lanes;
        p[i].groups = groups(p->b, p->e);
        conv_lanes(p[i], lanes);
    }
    return lanes;
}

}  // namespace

// The instruction set that the compiler was told of
EXPORTED const char* famba_instruction_set() {
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

// All of these return 0 when there was no memory.
EXPORTED int famba_scan_forward(Scan* p, int64_t threads, Parallel parallel) {
    Buffer lanes;
    return prepare(p, lanes) && share_out(scan_forward, p, p->b * p->groups, scan_scratch(*p), threads, parallel);
}

EXPORTED int famba_scan_backward(Scan* p, int64_t threads, Parallel parallel) {
    Buffer lanes, parts, rows;
    if (!prepare(p, lanes)) return 0;
    int64_t part_each = p->b * padded(p->e) * (p->n + 2 + p->m);
    int64_t rows_each = p->groups > 1 ? p->groups * p->b * p->t * (2 * p->n + p->m) : 0;
    if (!parts.at_least(p->directions * part_each) || !rows.at_least(p->directions * rows_each)) return 0;
    for (int64_t i = 0; i < p->directions; i++) {
        p[i].part = parts.memory + i * part_each;
        p[i].part_rows = rows.memory + i * rows_each;
    }
    return share_out(scan_backward, p, p->b * p->groups, scan_scratch(*p), threads, parallel) &&
           share_out(scan_sum_sequences, p, p->directions * vectors(p->e), 16,
                     threads_for(p->directions * part_each, threads), parallel) &&
           (p->groups == 1 || share_out(scan_sum_groups, p, p->directions * p->b, 16,
                                        threads_for(p->directions * rows_each, threads), parallel));
}

EXPORTED int famba_conv_forward(Conv* p, int64_t threads, Parallel parallel) {
    Buffer lanes;
    return prepare(p, lanes) && share_out(conv_forward, p, p->b * p->groups, conv_scratch(), threads, parallel);
}

EXPORTED int famba_conv_backward(Conv* p, int64_t threads, Parallel parallel) {
    Buffer lanes, parts;
    int64_t each = p->b * padded(p->e) * (p->k + 1);
    if (!prepare(p, lanes) || !parts.at_least(p->directions * each)) return 0;
    for (int64_t i = 0; i < p->directions; i++) p[i].part = parts.memory + i * each;
    return share_out(conv_backward, p, p->b * p->groups, conv_scratch(), threads, parallel) &&
           share_out(conv_sum_sequences, p, p->directions * vectors(p->e), 16,
                     threads_for(p->directions * each, threads), parallel);
}

EXPORTED int famba_norm_forward(Norm* p, int64_t threads, Parallel parallel) {
    return share_out(norm_forward, p, ceil_div(p->rows, NORM_ROWS), 16, threads, parallel);
}

EXPORTED int famba_norm_backward(Norm* p, int64_t threads, Parallel parallel) {
    Buffer parts;
    int64_t blocks = ceil_div(p->rows, NORM_ROWS);
    p->part = parts.at_least(blocks * padded(p->d));
    return p->part && share_out(norm_backward, p, blocks, 16, threads, parallel) &&
           share_out(norm_sum_blocks, p, vectors(p->d), 16, threads_for(blocks * padded(p->d), threads), parallel);
}

EXPORTED int famba_match(Match* p, int64_t threads, Parallel parallel) {
    return share_out(match_sequence, p, p->b, match_scratch(*p), threads, parallel);
}

EXPORTED int famba_plan(Plan* p, int64_t threads, Parallel parallel) {
    return share_out(plan_sequence, p, p->b, p->t, threads, parallel);
}

EXPORTED int famba_fuse_forward(Fuse* p, int64_t threads, Parallel parallel) {
    return share_out(fuse_forward, p, 2 * p->b, p->s + p->t + 64, threads, parallel);
}

EXPORTED int famba_fuse_backward(Fuse* p, int64_t threads, Parallel parallel) {
    return share_out(fuse_backward, p, 2 * p->b, 16, threads, parallel);
}
