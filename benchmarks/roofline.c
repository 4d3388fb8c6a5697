// SPDX-License-Identifier: Apache-2.0
// How fast this machine reads: every thread sums `count` floats of its own, `repeats` times.
#include <omp.h>
#include <stddef.h>

// As wide as a register: of wider ones the compiler would keep the sums in memory.
#if defined(__AVX512F__)
#define FLOATS 16
#elif defined(__AVX2__)
#define FLOATS 8
#else
#define FLOATS 4
#endif
typedef float vec __attribute__((vector_size(4 * FLOATS), aligned(4 * FLOATS)));

float read_all(const float *memory, size_t count, int repeats, int threads) {
    float total = 0;
#pragma omp parallel num_threads(threads) reduction(+ : total)
    {
        const vec *mine = (const vec *)(memory + count * (size_t)omp_get_thread_num());
        vec s[8] = {{0}};
        for (int r = 0; r < repeats; r++) {
            for (size_t i = 0; i < count / FLOATS; i += 8)
                for (int j = 0; j < 8; j++) s[j] += mine[i + j];
            __asm__ volatile("" ::"r"(mine) : "memory");
        }
        for (int j = 1; j < 8; j++) s[0] += s[j];
        for (int j = 0; j < FLOATS; j++) total += s[0][j];
    }
    return total;
}
