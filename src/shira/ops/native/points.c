// SPDX-License-Identifier: Apache-2.0
// The keyed permutation of shira.masks.random at `count` points, and its images in order.
//
// `permute` computes the same integers as the numpy code, some points at a time so that the rounds
// run over arrays in the first-level cache. `ascending` sorts distinct points of [0, numel) by
// marking them in a bitmap and reading the marks off: no comparison, one pass over numel / 64 words.
#include "vector.h"

#define AT_ONCE 1024
#define MULTIPLIER 0x9E3779B97F4A7C15ull
#define FINISHER 0xD1342543DE82EF95ull

// half = (half + F(other, key)) mod size; see _add_hash in random.py
INLINE void add_hash(uint64_t *half, const uint64_t *other, uint64_t key, uint64_t size, int count) {
    for (int i = 0; i < count; i++) {
        uint64_t mixed = (other[i] + key) * MULTIPLIER;
        mixed = (mixed ^ (mixed >> 32)) * FINISHER;
        mixed = ((mixed >> 32) * size) >> 32;
        uint64_t sum = half[i] + mixed, wrapped = sum - size;
        half[i] = wrapped < sum ? wrapped : sum;
    }
}

static void shuffle(uint64_t *left, uint64_t *right, uint64_t a, uint64_t b, const uint64_t *keys,
                    int rounds, int count) {
    for (int r = 0; r < rounds; r++) {
        if (r % 2 == 0) add_hash(left, right, keys[r], a, count);
        else add_hash(right, left, keys[r], b, count);
    }
}

// out[i] = image of start + i: int32, or int64 if `wide`.
void NAME(shira_permute)(int64_t start, int64_t count, int64_t numel, int64_t rows, int64_t cols,
                         const uint64_t *keys, int rounds, void *out, int wide, int threads) {
    uint64_t a = (uint64_t)rows, b = (uint64_t)cols, limit = (uint64_t)numel;
    int64_t chunks = (count + AT_ONCE - 1) / AT_ONCE;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t chunk = 0; chunk < chunks; chunk++) {
        uint64_t left[AT_ONCE], right[AT_ONCE];
        int64_t first = chunk * AT_ONCE;
        int here = count - first < AT_ONCE ? (int)(count - first) : AT_ONCE;
        uint64_t point = (uint64_t)(start + first), l = point / b, r = point % b;
        for (int i = 0; i < here; i++) {
            left[i] = l;
            right[i] = r;
            if (++r == b) r = 0, l++;
        }
        shuffle(left, right, a, b, keys, rounds, here);
        for (int i = 0; i < here; i++) {
            uint64_t image = left[i] * b + right[i];
            while (image >= limit) {  // outside: once more
                uint64_t x = image / b, y = image % b;
                shuffle(&x, &y, a, b, keys, rounds, 1);
                image = x * b + y;
            }
            if (wide) ((int64_t *)out)[first + i] = (int64_t)image;
            else ((int32_t *)out)[first + i] = (int32_t)image;
        }
    }
}

// Sorts distinct int32 points in [0, 64 * words); `marks` (words) is zero before and afterwards.
void NAME(shira_ascending)(int32_t *points, int64_t count, uint64_t *marks, int64_t words) {
    for (int64_t i = 0; i < count; i++) marks[points[i] >> 6] |= 1ull << (points[i] & 63);
    int64_t done = 0, w = 0;
    // Four places are written whatever a word holds, and those beyond its marks written again: no
    // branch on the marks, which nothing could foresee.
    for (; w < words && done + 4 <= count; w++) {
        uint64_t left = marks[w];
        int held = __builtin_popcountll(left);
        marks[w] = 0;
        for (int i = 0; i < 4; i++, left &= left - 1)
            points[done + i] = (int32_t)(w * 64 + (left ? __builtin_ctzll(left) : 0));
        for (int64_t next = done + 4; left && next < count; left &= left - 1)
            points[next++] = (int32_t)(w * 64 + __builtin_ctzll(left));
        done += held;
    }
    for (; w < words; w++) {
        uint64_t left = marks[w];
        marks[w] = 0;
        for (; left; left &= left - 1) points[done++] = (int32_t)(w * 64 + __builtin_ctzll(left));
    }
}
