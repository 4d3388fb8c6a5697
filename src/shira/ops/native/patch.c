// SPDX-License-Identifier: Apache-2.0
// From one patch to another in one walk over a weight's memory.
//
// A patch is sorted offsets with what the base holds there and what the adapter puts there. The
// walk takes a block of entries of the outgoing patch, puts the base back, and writes those of the
// incoming patch that lie between the same addresses while their cache lines are still near: each
// line comes from memory once. (Merging the two lists entry by entry instead visits shared entries
// once too, but waits for one entry before it can choose the next: measured twice as slow.)
//
// Each entry is compared with what it must hold before it is overwritten. The first that differs
// ends the walk, and what was written until then is put back.
#include "vector.h"

#define BLOCK 512

// Entries [i, i_end) of the outgoing patch and [j, j_end) of the incoming one, for one thread.
typedef struct {
    int64_t i, i_end, j, j_end, i_start, j_start, wrong;
} part;

#define MAKE(T, O, N)                                                                             \
    static void put_##N(T *memory, const O *at, const T *values, int64_t from, int64_t end) {     \
        for (; from < end; from++) memory[at[from]] = values[from];                               \
    }                                                                                             \
                                                                                                  \
    static int64_t replace_##N(T *memory, const O *at, const T *held, const T *values,            \
                               int64_t from, int64_t end) {                                       \
        for (; from < end; from++) {                                                              \
            T *entry = memory + at[from];                                                         \
            if (*entry != held[from]) break;                                                      \
            *entry = values[from];                                                                \
        }                                                                                         \
        return from;                                                                              \
    }                                                                                             \
                                                                                                  \
    static int64_t first_##N(const O *at, int64_t low, int64_t high, O wanted) {                  \
        while (low < high) {                                                                      \
            int64_t middle = low + (high - low) / 2;                                              \
            if (at[middle] < wanted) low = middle + 1;                                            \
            else high = middle;                                                                   \
        }                                                                                         \
        return low;                                                                               \
    }                                                                                             \
                                                                                                  \
    static void walk_##N(T *memory, const O *a, const T *a_base, const T *a_held, const O *b,     \
                         const T *b_base, const T *b_held, part *p, int check) {                  \
        while (p->i < p->i_end || p->j < p->j_end) {                                              \
            int64_t i = p->i, j = p->j;                                                           \
            int64_t i_next = p->i_end - i > BLOCK ? i + BLOCK : p->i_end;                         \
            int64_t j_next = i_next < p->i_end ? first_##N(b, j, p->j_end, a[i_next]) : p->j_end; \
            if (check) {                                                                          \
                i = replace_##N(memory, a, a_held, a_base, i, i_next);                            \
                if (i == i_next) j = replace_##N(memory, b, b_base, b_held, j, j_next);           \
                if (i < i_next || j < j_next) {                                                   \
                    p->wrong = i < i_next ? a[i] : b[j];                                          \
                    put_##N(memory, b, b_base, p->j, j);                                          \
                    put_##N(memory, a, a_held, p->i, i);                                          \
                    return;                                                                       \
                }                                                                                 \
            } else {                                                                              \
                put_##N(memory, a, a_base, i, i_next);                                            \
                put_##N(memory, b, b_held, j, j_next);                                            \
            }                                                                                     \
            p->i = i_next;                                                                        \
            p->j = j_next;                                                                        \
        }                                                                                         \
    }                                                                                             \
                                                                                                  \
    static int64_t swap_##N(T *memory, const O *a, const T *a_base, const T *a_held, int64_t na,  \
                            const O *b, const T *b_base, const T *b_held, int64_t nb, int check,  \
                            int threads) {                                                        \
        part parts[threads];                                                                      \
        const O *longer = na > nb ? a : b;                                                        \
        int64_t n = na > nb ? na : nb, wrong = -1;                                                \
        for (int k = 0; k < threads; k++) {                                                       \
            O key = longer[share(n, k, threads)];                                                 \
            int64_t i = k ? first_##N(a, 0, na, key) : 0, j = k ? first_##N(b, 0, nb, key) : 0;   \
            parts[k] = (part){i, na, j, nb, i, j, -1};                                            \
            if (k) parts[k - 1].i_end = i, parts[k - 1].j_end = j;                                \
        }                                                                                         \
        _Pragma("omp parallel for schedule(static, 1) num_threads(threads)")                      \
        for (int k = 0; k < threads; k++)                                                         \
            walk_##N(memory, a, a_base, a_held, b, b_base, b_held, parts + k, check);             \
        for (int k = threads - 1; k >= 0; k--)                                                    \
            if (parts[k].wrong >= 0) wrong = parts[k].wrong;                                      \
        for (int k = 0; wrong >= 0 && k < threads; k++) {                                         \
            put_##N(memory, b, b_base, parts[k].j_start, parts[k].j);                             \
            put_##N(memory, a, a_held, parts[k].i_start, parts[k].i);                             \
        }                                                                                         \
        return wrong;                                                                             \
    }

MAKE(uint16_t, int32_t, 2_4)
MAKE(uint32_t, int32_t, 4_4)
MAKE(uint64_t, int32_t, 8_4)
MAKE(uint16_t, int64_t, 2_8)
MAKE(uint32_t, int64_t, 4_8)
MAKE(uint64_t, int64_t, 8_8)

// Takes patch a out of a memory of items of 2, 4 or 8 bytes and puts b in; offsets of 4 or 8 bytes.
// The offset of an entry that does not hold what it should, in which case nothing was changed; or
// -1, and `done` is set, for a caller that may be interrupted before it can look at the result. Not
// both patches may be empty.
int64_t NAME(shira_swap)(void *memory, int item, int offset_size, const void *a,
                         const void *a_base, const void *a_held, int64_t na, const void *b,
                         const void *b_base, const void *b_held, int64_t nb, int check,
                         int *done, int threads) {
    int64_t wrong;
#define SWAP(N) wrong = swap_##N(memory, a, a_base, a_held, na, b, b_base, b_held, nb, check, threads)
    if (offset_size == 4) {
        if (item == 2) SWAP(2_4);
        else if (item == 4) SWAP(4_4);
        else SWAP(8_4);
    } else {
        if (item == 2) SWAP(2_8);
        else if (item == 4) SWAP(4_8);
        else SWAP(8_8);
    }
    *done = wrong < 0;
    return wrong;
}

// The least that a walk over these 64-byte lines can do: reads and writes one word of each, and
// reads a stream of `words` words besides. For benchmarks; returns something made of all it read.
uint64_t NAME(shira_touch)(uint64_t *memory, const int32_t *lines, int64_t count,
                           const uint64_t *stream, int64_t words, int threads) {
    uint64_t sum = 0;
    _Pragma("omp parallel for schedule(static) num_threads(threads)")
    for (int64_t i = 0; i < count; i++) {
        volatile uint64_t *word = memory + (int64_t)lines[i] * 8;
        *word = *word;
    }
    _Pragma("omp parallel for schedule(static) num_threads(threads) reduction(+ : sum)")
    for (int64_t i = 0; i < words; i++) sum += stream[i];
    return sum;
}
