// SPDX-License-Identifier: Apache-2.0
// Reads entries that are given by the gaps between them (shira/ops/gaps.py), from a mark on: {entries
// before, first index there could be} for each BLOCK units, and for the end.
#pragma once
#include "vector.h"

#define BLOCK 2048  // as in shira/ops/gaps.py
#ifndef AT_ONCE
#define AT_ONCE 32  // entries that are found before something is done with them, or a few more
#endif

typedef struct {
    const char *unit, *end;
    int64_t next;   // the first index that the gap at `unit` could lead to
    int64_t entry;  // entries before it
} walk;

INLINE walk walk_from(const void *units, int64_t count, const int64_t *marks, int64_t first,
                      int64_t last, const int size) {
    int64_t end = last * BLOCK < count ? last * BLOCK : count;
    return (walk){(const char *)units + first * BLOCK * size, (const char *)units + end * size,
                  marks[2 * first + 1], marks[2 * first]};
}

typedef uint8_t bytes __attribute__((vector_size(16)));
typedef uint16_t eight_u16 __attribute__((vector_size(16)));
typedef uint32_t eight_u32 __attribute__((vector_size(32), aligned(4), may_alias));

INLINE eight_u16 widened(uint64_t eight) {
    const bytes none = {0};
    bytes packed = (bytes)(uint64_t __attribute__((vector_size(16)))){eight};
    return (eight_u16)__builtin_shufflevector(packed, none, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21,
                                              6, 22, 7, 23);
}

// Each lane's sum with all lanes before it.
INLINE eight_u16 running_sums(eight_u16 a) {
    const eight_u16 zero = {0};
    a += __builtin_shufflevector(a, zero, 8, 0, 1, 2, 3, 4, 5, 6);
    a += __builtin_shufflevector(a, zero, 8, 8, 0, 1, 2, 3, 4, 5);
    return a + __builtin_shufflevector(a, zero, 8, 8, 8, 8, 0, 1, 2, 3);
}

// The next entries, at the flat indices *from + at[i]; how many: up to AT_ONCE + 7, 0 at the end.
INLINE int advance(walk *w, int64_t *from, uint32_t *at, const int size) {
    const uint32_t largest = size == 1 ? 255 : 65535;
    const char *unit = w->unit, *end = w->end;
    uint32_t next = 0;
    int n = 0;
    while (n < AT_ONCE && unit < end && next < 1u << 31) {
        int here = end - unit < 8 * size ? (int)(end - unit) / size : 8;
        if (size == 1 && here == 8) {
            uint64_t eight;
            memcpy(&eight, unit, 8);
#if defined(__AVX512F__)  // those that go on are left out
            eight_u16 gaps = widened(eight);
            __mmask8 ends = _mm_cmplt_epu16_mask((__m128i)gaps, _mm_set1_epi16(255));
            eight_u16 sums = running_sums(gaps - (eight_u16)_mm_movm_epi16(ends));
            eight_u32 places = __builtin_convertvector(sums, eight_u32) + (next - 1);
            *(eight_u32 *)(at + n) = (eight_u32)_mm256_maskz_compress_epi32(ends, (__m256i)places);
            next += sums[7];
            n += __builtin_popcount(ends);
            unit += 8;
            if (n) continue;
            here = 0;
#else
            if (!((~eight - 0x0101010101010101u) & eight & 0x8080808080808080u)) {  // no 255
                eight_u16 sums = running_sums(widened(eight) + 1);
                *(eight_u32 *)(at + n) = __builtin_convertvector(sums, eight_u32) + (next - 1);
                next += sums[7];
                n += 8;
                unit += 8;
                continue;
            }
#endif
        }
        for (int i = 0; i < here; i++, unit += size) {
            uint32_t gap = size == 1 ? *(const uint8_t *)unit : *(const uint16_t *)unit;
            int ends = gap != largest;
            at[n] = next + gap;
            next += gap + ends;
            n += ends;
        }
        if (!n) {  // a wide gap: however wide it is, `next` holds it
            w->next += next;
            next = 0;
        }
    }
    *from = w->next;
    w->unit = unit;
    w->next += next;
    return n;
}
