// Units of work shared out over threads.
#pragma once

#include <stdint.h>

// One unit of a job; `memory` is the thread's own scratch, aligned to 64 bytes.
typedef void (*Body)(const void* job, int64_t unit, float* memory);

// As OpenMP runtimes export it (GOMP_parallel): calls work(data) in each of `threads` threads and waits for all.
typedef void (*Parallel)(void (*work)(void*), void* data, unsigned threads, unsigned flags);

// Runs units 0 .. units-1 in any order. False when there was no memory for scratch.
bool share_out(Body body, const void* job, int64_t units, int64_t scratch_floats, int64_t threads, Parallel parallel);

// Index of the instruction set in use: 0 avx512, 1 avx2, 2 the compiler's baseline (SSE2 on x86-64, NEON on ARM)
int instruction_set();

#if defined(__x86_64__)
#define FOR_EACH_VARIANT(X, name) X(name, avx512), X(name, avx2), X(name, baseline)
#else
#define FOR_EACH_VARIANT(X, name) nullptr, nullptr, X(name, baseline)
#endif
