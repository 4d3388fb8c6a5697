// SPDX-License-Identifier: Apache-2.0
// Entries of a weight overwritten and put back: one pass over the support each, nothing else.
//
// `enter` keeps the originals and writes round(original + delta); `put` writes values; `exchange`
// writes values and keeps what was there. Nothing is summed across entries, so any number of
// threads gives the same bits.
#include "vector.h"

INLINE float of_bf16(uint16_t bits) {
    uint32_t wide = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &wide, 4);
    return value;
}

INLINE uint16_t to_bf16(float value) {  // to nearest, ties to even
    uint32_t bits;
    memcpy(&bits, &value, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fc0;
    return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// Asks for what is to be overwritten two rows further on: a frozen weight lies in memory, not in a
// cache. (When the originals go back, the product has just read it.)
#define ASK(ITEM)                                                                        \
    if (row + 2 < last)                                                                  \
        for (int64_t e = crow[row + 2]; e < crow[row + 3]; e++)                          \
            __builtin_prefetch((const ITEM *)weight + (row + 2) * stride + col[e], 1);

// One pass over the rows of a compressed row pattern; each row's entries begin at crow[row].
// `weight` has rows of memory `stride` items apart. BEFORE comes before each row.
#define ROWS(BEFORE, BODY)                                                               \
    _Pragma("omp parallel num_threads(threads)") {                                       \
        int me = omp_get_thread_num(), all = omp_get_num_threads();                      \
        int64_t last = share(rows, me + 1, all);                                         \
        for (int64_t row = share(rows, me, all); row < last; row++) {                    \
            BEFORE                                                                       \
            for (int64_t e = crow[row]; e < crow[row + 1]; e++) {                        \
                int64_t at = row * stride + col[e];                                      \
                BODY                                                                     \
            }                                                                            \
        }                                                                                \
    }

void NAME(shira_enter)(void *weight, int64_t stride, int64_t rows, const int32_t *crow,
                 const int32_t *col, const float *delta, void *originals, int kind, int threads) {
    if (kind == F32) {
        float *w = weight, *kept = originals;
        ROWS(ASK(float), kept[e] = w[at]; w[at] = kept[e] + delta[e];)
    } else if (kind == BF16) {
        uint16_t *w = weight, *kept = originals;
        ROWS(ASK(uint16_t), kept[e] = w[at]; w[at] = to_bf16(of_bf16(kept[e]) + delta[e]);)
    } else {
        _Float16 *w = weight, *kept = originals;
        ROWS(ASK(_Float16), kept[e] = w[at]; w[at] = (_Float16)((float)kept[e] + delta[e]);)
    }
}

void NAME(shira_leave)(void *weight, int64_t stride, int64_t rows, const int32_t *crow,
                 const int32_t *col, const void *originals, int kind, int threads) {
    if (kind == F32) {
        uint32_t *w = weight;
        const uint32_t *kept = originals;
        ROWS(, w[at] = kept[e];)
    } else {
        uint16_t *w = weight;
        const uint16_t *kept = originals;
        ROWS(, w[at] = kept[e];)
    }
}

// The same at offsets into memory, of items of 1, 2, 4 or 8 bytes, with offsets of 4 or 8 bytes.
#define EACH(BODY)                                                                       \
    _Pragma("omp parallel for schedule(static) num_threads(threads)")                    \
    for (int64_t i = 0; i < count; i++) { BODY }

#define OF_SIZES(MACRO)                                                                  \
    if (offset_size == 4) {                                                              \
        const int32_t *at = offsets;                                                     \
        OF_ITEM(MACRO)                                                                   \
    } else {                                                                             \
        const int64_t *at = offsets;                                                     \
        OF_ITEM(MACRO)                                                                   \
    }
#define OF_ITEM(MACRO)                                                                   \
    if (item == 1) MACRO(uint8_t)                                                        \
    else if (item == 2) MACRO(uint16_t)                                                  \
    else if (item == 4) MACRO(uint32_t)                                                  \
    else MACRO(uint64_t)

#define PUT(TYPE)                                                                        \
    {                                                                                    \
        TYPE *m = memory;                                                                \
        const TYPE *v = values;                                                          \
        EACH(m[at[i]] = v[i];)                                                           \
    }
#define EXCHANGE(TYPE)                                                                   \
    {                                                                                    \
        TYPE *m = memory, *k = kept;                                                     \
        const TYPE *v = values;                                                          \
        EACH(TYPE old = m[at[i]]; m[at[i]] = v[i]; k[i] = old;)                          \
    }

void NAME(shira_put)(void *memory, int item, const void *offsets, int offset_size, const void *values,
               int64_t count, int threads) {
    OF_SIZES(PUT)
}

void NAME(shira_exchange)(void *memory, int item, const void *offsets, int offset_size,
                    const void *values, void *kept, int64_t count, int threads) {
    OF_SIZES(EXCHANGE)
}
