// SPDX-License-Identifier: Apache-2.0
// Values written to offsets into memory: `put` writes them, `exchange` also keeps what was there.
// One pass over the offsets, nothing else.
#include "vector.h"

// Items of 1, 2, 4 or 8 bytes, offsets of 4 or 8 bytes.
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
