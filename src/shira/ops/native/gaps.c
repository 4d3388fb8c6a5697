// SPDX-License-Identifier: Apache-2.0
// Entries of a weight that are given by the gaps between them (shira/ops/gaps.py): `enter` keeps the
// originals and writes round(original + delta), `leave` puts the originals back, `coordinates`
// says where the entries are. One pass over the support each.
//
// Threads begin at marks: {entries before, first index there could be} for each BLOCK units, and
// for the end. Nothing is summed across entries, so any number of threads gives the same bits.
#include "walk.h"

// Asks for what is to be overwritten next: a frozen weight lies in memory, not in a cache. (When
// the originals go back, the product has just read it.)
#define ASK(w) for (int i = 0; i < n; i++) __builtin_prefetch(w + from + at[i], 1);

// BODY for each entry `e` at flat index `here`; BEFORE for the n of them at from + at[i], some time
// earlier.
#define EACH(SIZE, BEFORE, BODY)                                                         \
    _Pragma("omp parallel num_threads(threads)") {                                       \
        int me = omp_get_thread_num(), all = omp_get_num_threads(), n;                   \
        int64_t blocks = (count + BLOCK - 1) / BLOCK;                                    \
        walk place = walk_from(units, count, marks, share(blocks, me, all),              \
                               share(blocks, me + 1, all), SIZE);                        \
        int64_t e = place.entry, from, from_held = 0;                                    \
        uint32_t ring[2][AT_ONCE + 8], *at = ring[0], *held = ring[1];                   \
        int count_held = 0;                                                              \
        do {                                                                             \
            n = advance(&place, &from, at, SIZE);                                        \
            BEFORE                                                                       \
            for (int i = 0; i < count_held; i++, e++) {                                  \
                int64_t here = from_held + held[i];                                      \
                BODY                                                                     \
            }                                                                            \
            uint32_t *other = held;                                                      \
            held = at, at = other, from_held = from, count_held = n;                     \
        } while (n);                                                                     \
    }
#define EACH_OF_SIZE(BEFORE, BODY)                                                       \
    if (size == 1) EACH(1, BEFORE, BODY)                                                 \
    else EACH(2, BEFORE, BODY)

// Units of `size` bytes; `weight` in one piece, seen as one row. `inside` says whether the weight
// holds the new values, for a caller that may be interrupted before it can note that itself: `leave`
// does nothing if it does not.
void NAME(shira_enter)(void *weight, const void *units, int size, int64_t count,
                       const int64_t *marks, const float *delta, void *originals, int *inside,
                       int kind, int threads) {
    if (kind == F32) {
        float *w = weight, *kept = originals;
        EACH_OF_SIZE(ASK(w), kept[e] = w[here]; w[here] = kept[e] + delta[e];)
    } else if (kind == BF16) {
        uint16_t *w = weight, *kept = originals;
        EACH_OF_SIZE(ASK(w), kept[e] = w[here]; w[here] = to_bf16(of_bf16(kept[e]) + delta[e]);)
    } else {
        _Float16 *w = weight, *kept = originals;
        EACH_OF_SIZE(ASK(w), kept[e] = w[here]; w[here] = (_Float16)((float)kept[e] + delta[e]);)
    }
    *inside = 1;
}

void NAME(shira_leave)(void *weight, const void *units, int size, int64_t count,
                       const int64_t *marks, const void *originals, int *inside, int kind,
                       int threads) {
    if (!*inside) return;
    if (kind == F32) {
        uint32_t *w = weight;
        const uint32_t *kept = originals;
        EACH_OF_SIZE(, w[here] = kept[e];)
    } else {
        uint16_t *w = weight;
        const uint16_t *kept = originals;
        EACH_OF_SIZE(, w[here] = kept[e];)
    }
    *inside = 0;
}

// Row and column of each entry of a matrix, and where each row's entries begin: crow (rows + 1).
// `row` may be null. A thread sees to the rows that begin after the first index its units could
// hold, up to the next thread's.
#define LIST(SIZE)                                                                       \
    _Pragma("omp parallel num_threads(threads)") {                                       \
        int me = omp_get_thread_num(), all = omp_get_num_threads();                      \
        int64_t blocks = (count + BLOCK - 1) / BLOCK;                                    \
        int64_t first = share(blocks, me, all), last = share(blocks, me + 1, all), from; \
        walk place = walk_from(units, count, marks, first, last, SIZE);                  \
        int64_t e = place.entry, r = me ? place.next / cols : 0, begin = r * cols;       \
        int64_t end = me + 1 < all ? marks[2 * last + 1] : rows * cols;                  \
        uint32_t at[AT_ONCE + 8];                                                        \
        if (!me) crow[0] = 0;                                                            \
        for (int n; (n = advance(&place, &from, at, SIZE));)                             \
            for (int i = 0; i < n; i++, e++) {                                           \
                int64_t here = from + at[i] - begin;                                     \
                while (here >= cols) crow[++r] = (int32_t)e, begin += cols, here -= cols; \
                if (row) row[e] = (int32_t)r;                                            \
                col[e] = (int32_t)here;                                                  \
            }                                                                            \
        while (begin + cols <= end && r < rows) crow[++r] = (int32_t)e, begin += cols;   \
    }

void NAME(shira_coordinates)(const void *units, int size, int64_t count, const int64_t *marks,
                      int64_t rows, int64_t cols, int32_t *crow, int32_t *row, int32_t *col,
                      int threads) {
    if (size == 1) LIST(1)
    else LIST(2)
}

// The coder: gaps of increasing indices, and indices of gaps, as shira/ops/gaps.py says. Chunks whose
// gaps all fit in a unit of one byte go without a branch an entry.
#define CHUNK 16
#define LONG_CHUNK 128
#define GAP(i) ((uint64_t)from[i] - ((i) ? (uint64_t)from[(i) - 1] + 1 : 0))

#define COUNT(TYPE, UNSIGNED)                                                            \
    do {                                                                                 \
        const TYPE *from = indices;                                                      \
        for (int64_t i = 0, here; i < count; i += here) {                                \
            UNSIGNED any = 0, escapes = 0;                                               \
            here = i && count - i >= LONG_CHUNK ? LONG_CHUNK : 1;                        \
            if (here == 1) any = (UNSIGNED)GAP(i), escapes = any / 255;                  \
            else                                                                         \
                for (int j = 0; j < LONG_CHUNK; j++) {                                   \
                    UNSIGNED gap = (UNSIGNED)(from[i + j] - from[i + j - 1] - 1);        \
                    any |= gap;                                                          \
                    escapes += gap / 255;                                                \
                }                                                                        \
            found[0] += (int64_t)escapes;                                                \
            for (int64_t j = i; any >= 65535 && j < i + here; j++) {                     \
                found[1] += (int64_t)(GAP(j) / 65535);                                   \
                found[2] += (int64_t)(GAP(j) / 0xffffffff);                              \
            }                                                                            \
        }                                                                                \
    } while (0)

// found: how many units of one, two and four bytes the gaps take.
void NAME(shira_count_gaps)(const void *indices, int size, int64_t count, int64_t *found) {
    found[0] = found[1] = found[2] = count;
    if (size == 4) COUNT(int32_t, uint32_t);
    else COUNT(int64_t, uint64_t);
}

#define ENCODE(TYPE, UNSIGNED, UNIT)                                                     \
    do {                                                                                 \
        const TYPE *from = indices;                                                      \
        const uint64_t largest = (UNIT)-1;                                               \
        UNIT *to = units;                                                                \
        int64_t i = 0;                                                                   \
        for (int64_t e = count ? 1 : 0; i < count; i = e, e += CHUNK) {                  \
            UNSIGNED wide = 0;                                                           \
            if (e > count) e = count;                                                    \
            if (i && e - i == CHUNK) {                                                   \
                for (int j = 0; j < CHUNK; j++) {                                        \
                    UNSIGNED gap = (UNSIGNED)(from[i + j] - from[i + j - 1] - 1);        \
                    to[j] = (UNIT)gap;                                                   \
                    wide |= gap >= (UNSIGNED)largest;                                    \
                }                                                                        \
                if (!wide) {                                                             \
                    to += CHUNK;                                                         \
                    continue;                                                            \
                }                                                                        \
            }                                                                            \
            for (int64_t j = i; j < e; j++) {                                            \
                uint64_t gap = GAP(j), escape = gap >= largest;                          \
                *to = (UNIT)largest; /* mostly written over: no branch to foresee */     \
                to += escape, gap -= escape ? largest : 0;                               \
                for (; gap >= largest; gap -= largest) *to++ = (UNIT)largest;            \
                *to++ = (UNIT)gap;                                                       \
            }                                                                            \
        }                                                                                \
    } while (0)

// units: room for as many as `count_gaps` has found of this size.
void NAME(shira_encode_gaps)(const void *indices, int size, int64_t count, void *units,
                             int unit_size) {
    if (size == 4) {
        if (unit_size == 1) ENCODE(int32_t, uint32_t, uint8_t);
        else if (unit_size == 2) ENCODE(int32_t, uint32_t, uint16_t);
        else ENCODE(int32_t, uint32_t, uint32_t);
    } else {
        if (unit_size == 1) ENCODE(int64_t, uint64_t, uint8_t);
        else if (unit_size == 2) ENCODE(int64_t, uint64_t, uint16_t);
        else ENCODE(int64_t, uint64_t, uint32_t);
    }
}

#define DECODE(TYPE, SIZE)                                                               \
    do {                                                                                 \
        TYPE *to = indices;                                                              \
        walk place = {units, (const char *)units + count * SIZE, 0, 0};                  \
        uint32_t at[AT_ONCE + 8];                                                        \
        int64_t from;                                                                    \
        for (int n; (n = advance(&place, &from, at, SIZE)); done += n) {                 \
            if (n > k - done) return 0;                                                  \
            for (int i = 0; i < n; i++) to[done + i] = (TYPE)(from + at[i]);             \
        }                                                                                \
        next = place.next;                                                               \
    } while (0)

// Writes k indices below `numel`; whether the units, of one or two bytes, are those of exactly
// such. They are increasing in any case.
int NAME(shira_decode_gaps)(const void *units, int unit_size, int64_t count, int64_t numel,
                            void *indices, int size, int64_t k) {
    int64_t done = 0, next = 0;
    if (size == 4 && unit_size == 1) DECODE(int32_t, 1);
    else if (size == 4) DECODE(int32_t, 2);
    else if (unit_size == 1) DECODE(int64_t, 1);
    else DECODE(int64_t, 2);
    if (count && (unit_size == 1 ? ((const uint8_t *)units)[count - 1] == 255
                                 : ((const uint16_t *)units)[count - 1] == 65535)) return 0;
    return done == k && next <= numel;
}
