// SPDX-License-Identifier: Apache-2.0
// How fast this machine reads: every thread sums `count` floats of its own, `repeats` times.
#include <omp.h>
#include <stddef.h>

typedef float vec __attribute__((vector_size(64), aligned(64)));

float read_all(const float *memory, size_t count, int repeats, int threads) {
    float total = 0;
#pragma omp parallel num_threads(threads) reduction(+ : total)
    {
        const vec *mine = (const vec *)(memory + count * (size_t)omp_get_thread_num());
        vec s[8] = {{0}};
        for (int r = 0; r < repeats; r++) {
            for (size_t i = 0; i < count / 16; i += 8)
                for (int j = 0; j < 8; j++) s[j] += mine[i + j];
            __asm__ volatile("" ::"r"(mine) : "memory");
        }
        for (int j = 1; j < 8; j++) s[0] += s[j];
        for (int j = 0; j < 16; j++) total += s[0][j];
    }
    return total;
}
