// SPDX-License-Identifier: Apache-2.0
// Vectors of VL floats, as wide as the instruction set that the file is compiled for. GCC (12 or
// newer) and clang turn these into AVX-512, AVX2, SSE or NEON.
#pragma once
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#if defined(__AVX512F__) || defined(__F16C__)
#include <immintrin.h>
#endif
#if defined(_OPENMP)
#include <omp.h>
#else  // one thread
#define omp_get_thread_num() 0
#define omp_get_num_threads() 1
#endif

// WIDE asks for 512 bits of a CPU that has fewer, made of what it has: for tests.
#if defined(__AVX512F__) || defined(WIDE)
#define VL 16
#define LO(a, b) __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23)
#define HI(a, b) \
    __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31)
#elif defined(__AVX2__)
#define VL 8
#define LO(a, b) __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11)
#define HI(a, b) __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15)
// Both first, or both second halves.
#define FIRST_HALVES(a, b) __builtin_shufflevector(a, b, 0, 1, 2, 3, 8, 9, 10, 11)
#define SECOND_HALVES(a, b) __builtin_shufflevector(a, b, 4, 5, 6, 7, 12, 13, 14, 15)
#else
#define VL 4
#define LO(a, b) __builtin_shufflevector(a, b, 0, 4, 1, 5)
#define HI(a, b) __builtin_shufflevector(a, b, 2, 6, 3, 7)
#endif

// LO and HI within each quarter of 512 bits, half of 256 or the whole of 128: an instruction each,
// where LO and HI may take two. Likewise both first or both last halves of each such part.
#if VL == 16
#define OF_QUARTERS(a, b, i, j, k, l)                                                             \
    __builtin_shufflevector(a, b, i, j, k, l, i + 4, j + 4, k + 4, l + 4, i + 8, j + 8, k + 8,    \
                            l + 8, i + 12, j + 12, k + 12, l + 12)
#elif VL == 8
#define OF_QUARTERS(a, b, i, j, k, l) \
    __builtin_shufflevector(a, b, i, j, k, l, i + 4, j + 4, k + 4, l + 4)
#else
#define OF_QUARTERS(a, b, i, j, k, l) __builtin_shufflevector(a, b, i, j, k, l)
#endif
#define LO_OF_QUARTERS(a, b) OF_QUARTERS(a, b, 0, VL, 1, VL + 1)
#define HI_OF_QUARTERS(a, b) OF_QUARTERS(a, b, 2, VL + 2, 3, VL + 3)
#define FIRST_OF_QUARTERS(a, b) OF_QUARTERS(a, b, 0, 1, VL, VL + 1)
#define LAST_OF_QUARTERS(a, b) OF_QUARTERS(a, b, 2, 3, VL + 2, VL + 3)
#define QUARTER(a, i) __builtin_shufflevector(a, a, 4 * i, 4 * i + 1, 4 * i + 2, 4 * i + 3)

typedef float vec __attribute__((vector_size(4 * VL), aligned(4), may_alias));
typedef uint32_t vec_u32 __attribute__((vector_size(4 * VL)));
typedef uint16_t half_bits __attribute__((vector_size(2 * VL), aligned(2), may_alias));

#define UNROLL _Pragma("GCC unroll 16")
#define INLINE static inline __attribute__((always_inline))

// What the operands are made of; the products are made of floats.
enum { F32 = 0, BF16 = 1, F16 = 2 };

INLINE vec load(const float *p) { return *(const vec *)p; }
INLINE void store(float *p, vec v) { *(vec *)p = v; }

INLINE vec load_as(const void *base, ptrdiff_t at, const int kind) {
    if (kind == F32) return load((const float *)base + at);
    if (kind == BF16) {
        half_bits bits = *(const half_bits *)((const uint16_t *)base + at);
        return (vec)(__builtin_convertvector(bits, vec_u32) << 16);
    }
#if defined(__AVX512F__)
    return (vec)_mm512_cvtph_ps(_mm256_loadu_si256((const void *)((const uint16_t *)base + at)));
#elif defined(__F16C__) && VL == 8
    return (vec)_mm256_cvtph_ps(_mm_loadu_si128((const void *)((const uint16_t *)base + at)));
#else
    vec v;
    UNROLL for (int i = 0; i < VL; i++) v[i] = (float)((const _Float16 *)base)[at + i];
    return v;
#endif
}

// VL x VL in place: log2(VL) rounds of interleaving the first half of the rows with the second.
INLINE void transpose_vectors(vec *a) {
    vec b[VL];
#if VL == 8  // two tiles of 4 x 4 beside each other, twice
    UNROLL for (int i = 0; i < 4; i++) {
        b[i] = FIRST_HALVES(a[i], a[i + 4]);
        b[i + 4] = SECOND_HALVES(a[i], a[i + 4]);
    }
    UNROLL for (int i = 0; i < 8; i += 4) {
        vec c = LO_OF_QUARTERS(b[i], b[i + 2]), d = HI_OF_QUARTERS(b[i], b[i + 2]);
        vec e = LO_OF_QUARTERS(b[i + 1], b[i + 3]), f = HI_OF_QUARTERS(b[i + 1], b[i + 3]);
        a[i] = LO_OF_QUARTERS(c, e), a[i + 1] = HI_OF_QUARTERS(c, e);
        a[i + 2] = LO_OF_QUARTERS(d, f), a[i + 3] = HI_OF_QUARTERS(d, f);
    }
#else
    UNROLL for (int round = 1; round < VL; round *= 2) {
        UNROLL for (int i = 0; i < VL / 2; i++) {
            b[2 * i] = LO(a[i], a[i + VL / 2]);
            b[2 * i + 1] = HI(a[i], a[i + VL / 2]);
        }
        UNROLL for (int i = 0; i < VL; i++) a[i] = b[i];
    }
#endif
}

INLINE float of_bf16(uint16_t bits) {
    uint32_t wide = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &wide, 4);
    return value;
}

INLINE float scalar_as(const void *base, ptrdiff_t at, const int kind) {
    if (kind == F32) return ((const float *)base)[at];
    if (kind == BF16) return of_bf16(((const uint16_t *)base)[at]);
    return (float)((const _Float16 *)base)[at];
}

INLINE uint16_t to_bf16(float value) {  // to nearest, ties to even
    uint32_t bits;
    memcpy(&bits, &value, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fc0;
    return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

INLINE void store_scalar_as(void *base, ptrdiff_t at, float value, const int kind) {
    if (kind == F32) ((float *)base)[at] = value;
    else if (kind == BF16) ((uint16_t *)base)[at] = to_bf16(value);
    else ((_Float16 *)base)[at] = (_Float16)value;
}

INLINE void store_as(void *base, ptrdiff_t at, vec v, const int kind) {
    if (kind == F32) {
        store((float *)base + at, v);
    } else if (kind == BF16) {
        vec_u32 bits = (vec_u32)v, odd = (bits >> 16) & 1;
        vec_u32 rounded = (bits + 0x7fff + odd) >> 16, number = (bits & 0x7fffffff) <= 0x7f800000;
        rounded = (number & rounded) | (~number & 0x7fc0);
        *(half_bits *)((uint16_t *)base + at) = __builtin_convertvector(rounded, half_bits);
    } else {
#if defined(__AVX512F__)
        _mm256_storeu_si256((void *)((uint16_t *)base + at), _mm512_cvtps_ph((__m512)v, 0));
#elif defined(__F16C__) && VL == 8
        _mm_storeu_si128((void *)((uint16_t *)base + at), _mm256_cvtps_ph((__m256)v, 0));
#else
        UNROLL for (int i = 0; i < VL; i++) ((_Float16 *)base)[at + i] = (_Float16)v[i];
#endif
    }
}

// The share of part number `k` of `parts` of [0, n): its first index (the next part's is its end).
INLINE int64_t share(int64_t n, int k, int parts) { return n * k / parts; }

#define NAME2(name, isa) name##_##isa
#define NAME1(name, isa) NAME2(name, isa)
#define NAME(name) NAME1(name, ISA)  // each file is compiled once for each instruction set
#define PADDED(n) (((int64_t)(n) + 15) / 16 * 16)
