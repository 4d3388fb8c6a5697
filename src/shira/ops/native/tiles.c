// SPDX-License-Identifier: Apache-2.0
// (left^T right)[S] for a support S that fills square tiles: a small matrix product for each tile.
//
// T tokens of the tile's rows of `left` and columns of `right` are packed side by side, so that the
// product runs in the first-level cache; MR rows and NV vectors of columns are held in registers.
// All tiles take their part of some tokens before the next are looked at: a tile alone touches
// one or two lines of each token's page, so it is the pages that must not be left and come back to.
// The tiles' products are then written where the support has entries, so a tile that the support
// fills in part (the last one, those at the edge) needs no case of its own.
//
// Threads share the tiles; each tile is summed in one order, whatever the number of threads.
#include "vector.h"

#define AHEAD 16
#define NV 2
#define NC (NV * VL)
#if VL == 16
#define MR 8
#define T 128
#define T_NARROW 32  // of tiles no wider than a vector: fewer pages at a time, 0.9 of the time
#else
#define MR 4
#define T 64  // 128 took 1.07 times as long with a first-level cache of 32 KiB
#define T_NARROW T
#endif
#define ACROSS(size) ((size) <= VL ? VL : UP(size, NC))  // columns of a tile, with padding
#define UP(n, step) (((n) + (step)-1) / (step) * (step))
#define EXTENT(all, from) ((all) - (from) < size ? (int)((all) - (from)) : size)  // of a tile

// out[t * width + j] = in[t, from + j]; zeros beyond `count`. Each token's part is a few lines of a
// page of its own, which the processor would not foresee: it is asked for AHEAD tokens before.
INLINE void pack(const void *in, ptrdiff_t stride, int64_t t0, int tokens, int64_t from, int count,
                 float *out, int width, const int kind) {
    for (int t = 0; t < tokens; t++, out += width) {
        ptrdiff_t at = (t0 + t) * stride + from;
        const int size = kind == F32 ? 4 : 2;
        for (int j = 0; j < count; j += 64 / size)
            __builtin_prefetch((const char *)in + (at + AHEAD * stride + j) * size);
        int j = 0;
        for (; j + VL <= count; j += VL) store(out + j, load_as(in, at + j, kind));
        for (; j < count; j++) out[j] = scalar_as(in, at + j, kind);
        for (; j < width; j++) out[j] = 0;
    }
}

// sums (MR rows, `wide` apart) += a (tokens, MR of `high`)^T b (tokens, `vectors` of `wide`)
INLINE void register_tile(const float *a, int high, const float *b, int wide, int tokens,
                          float *sums, const int vectors) {
    vec s[MR][NV];
    UNROLL for (int i = 0; i < MR; i++)
        UNROLL for (int j = 0; j < vectors; j++) s[i][j] = load(sums + i * wide + j * VL);
    for (int t = 0; t < tokens; t++, a += high, b += wide) {
        vec y[NV];
        UNROLL for (int j = 0; j < vectors; j++) y[j] = load(b + j * VL);
        UNROLL for (int i = 0; i < MR; i++) {
            vec x = a[i] - (vec){0};
            UNROLL for (int j = 0; j < vectors; j++) s[i][j] += x * y[j];
        }
    }
    UNROLL for (int i = 0; i < MR; i++)
        UNROLL for (int j = 0; j < vectors; j++) store(sums + i * wide + j * VL, s[i][j]);
}

static void product(const float *a, int high, const float *b, int wide, int tokens, float *sums) {
    for (int i = 0; i < high; i += MR) {
        if (wide == VL) {
            register_tile(a + i, high, b, VL, tokens, sums + (ptrdiff_t)i * VL, 1);
            continue;
        }
        for (int j = 0; j < wide; j += NC)
            register_tile(a + i, high, b + j, wide, tokens, sums + (ptrdiff_t)i * wide + j, NV);
    }
}

static void pack_chunk(const void *in, ptrdiff_t stride, int64_t t0, int tokens, int64_t from,
                       int count, float *out, int width, int kind) {
    if (kind == F32) pack(in, stride, t0, tokens, from, count, out, width, F32);
    else if (kind == BF16) pack(in, stride, t0, tokens, from, count, out, width, BF16);
    else pack(in, stride, t0, tokens, from, count, out, width, F16);
}

// The first entry of a row at or after a column.
INLINE int first_at(const int32_t *col, int low, int high, int64_t wanted) {
    while (low < high) {
        int middle = low + (high - low) / 2;
        if (col[middle] < wanted) low = middle + 1;
        else high = middle;
    }
    return low;
}

// Floats of scratch: the products of all tiles, and what each thread packs.
static int64_t of_tile(int size) { return PADDED((int64_t)UP(size, MR) * ACROSS(size)); }
static int64_t of_thread(int size) { return PADDED(T * UP(size, MR)) + PADDED(T * ACROSS(size)); }

// Bytes of scratch that `tiles` takes; aligned to 64 it must be.
int64_t NAME(shira_tiles_scratch)(int64_t count, int size, int threads) {
    return 4 * (count * of_tile(size) + threads * of_thread(size));
}

// out (nnz) = (left^T right) at the entries of a compressed row pattern, all of which lie in tiles.
// left (tokens, rows) and right (tokens, cols) of `kind`, rows of memory `*_stride` apart.
// Tile i covers `size` rows and columns from block_row[i] * size and block_col[i] * size on.
void NAME(shira_tiles)(const void *left, int64_t left_stride, const void *right,
                       int64_t right_stride, int64_t tokens, int64_t rows, int64_t cols,
                       const int32_t *crow, const int32_t *col, const int64_t *block_row,
                       const int64_t *block_col, int64_t count, int size, float *out,
                       float *scratch, int kind, int threads) {
    int high = UP(size, MR), wide = ACROSS(size), chunk = size <= VL ? T_NARROW : T;
#pragma omp parallel num_threads(threads)
    {
        int me = omp_get_thread_num(), all = omp_get_num_threads();
        int64_t first = share(count, me, all), last = share(count, me + 1, all);
        float *sums = scratch + first * of_tile(size);
        float *a = scratch + count * of_tile(size) + me * of_thread(size);
        float *b = a + PADDED(T * high);
        memset(sums, 0, 4 * (size_t)((last - first) * of_tile(size)));
        for (int64_t t = 0; t < tokens; t += chunk) {
            int here = tokens - t < chunk ? (int)(tokens - t) : chunk;
            for (int64_t tile = first; tile < last; tile++) {
                int64_t row = block_row[tile] * size;
                int64_t column = block_col[tile] * size;
                if (tile == first || block_row[tile] != block_row[tile - 1])
                    pack_chunk(left, left_stride, t, here, row, EXTENT(rows, row), a, high,
                               kind);
                pack_chunk(right, right_stride, t, here, column, EXTENT(cols, column), b, wide,
                           kind);
                product(a, high, b, wide, here, sums + (tile - first) * of_tile(size));
            }
        }
        for (int64_t tile = first; tile < last; tile++, sums += of_tile(size)) {
            int64_t row = block_row[tile] * size;
            int64_t column = block_col[tile] * size;
            int down = EXTENT(rows, row), across = EXTENT(cols, column);
            for (int i = 0; i < down; i++) {
                int end = crow[row + i + 1];
                int e = first_at(col, crow[row + i], end, column);
                for (; e < end && col[e] < column + across; e++)
                    out[e] = sums[(ptrdiff_t)i * wide + (col[e] - column)];
            }
        }
    }
}
