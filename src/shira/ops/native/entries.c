// SPDX-License-Identifier: Apache-2.0
// (left^T right)[S] for a support S without structure: one dot product for each entry.
//
//     out[e] = sum over tokens t of left[t, row(e)] * right[t, col(e)]
//
// Both operands are (tokens, features), so the tokens of one feature lie far apart. A chunk of T
// tokens of `right` is transposed into scratch memory that stays in the second-level cache, and of
// `left` some rows at a time. Then each entry is T/VL products of vectors, the left one of them in
// registers for a whole row; the sums over lanes are made for four entries at once.
//
// Threads share the tokens first (each has its own scratch, no waiting), then the rows. Each entry
// is summed in an order that depends on the shapes and the number of threads alone.
#include "vector.h"

int64_t shira_second_level_cache(void);  // cpu.c

INLINE void transpose_tile(const void *in, ptrdiff_t at, ptrdiff_t stride, float *out, ptrdiff_t T,
                           const int kind) {
    vec a[VL];
    UNROLL for (int i = 0; i < VL; i++) a[i] = load_as(in, at + i * stride, kind);
    transpose_vectors(a);
    UNROLL for (int i = 0; i < VL; i++) store(out + i * T, a[i]);
}

// out[(c - from) * T + t] = in[t, c] for from <= c < to; beyond `tokens` zeros, up to T.
INLINE void transpose(const void *in, ptrdiff_t at, ptrdiff_t stride, int tokens, int from, int to,
                      float *out, const int T, const int kind) {
    int t = 0, whole = from + (to - from) / VL * VL;
    for (; t + VL <= tokens; t += VL)  // the tokens' rows are read along their memory
        for (int c = from; c < whole; c += VL)
            transpose_tile(in, at + t * stride + c, stride, out + (ptrdiff_t)(c - from) * T + t, T,
                           kind);
    for (int c = from; c < to; c++) {
        float *o = out + (ptrdiff_t)(c - from) * T;
        for (int u = c < whole ? t : 0; u < tokens; u++)
            o[u] = scalar_as(in, at + u * stride + c, kind);
        for (int u = tokens; u < T; u++) o[u] = 0;
    }
}

typedef float four __attribute__((vector_size(16), aligned(4), may_alias));
typedef uint32_t four_u32 __attribute__((vector_size(16)));

// The sums of the lanes of four vectors: interleaved and added within quarters, then the quarters.
INLINE four sums_of_lanes(vec a, vec b, vec c, vec d) {
    vec p = LO_OF_QUARTERS(a, b) + HI_OF_QUARTERS(a, b);
    vec q = LO_OF_QUARTERS(c, d) + HI_OF_QUARTERS(c, d);
    vec r = FIRST_OF_QUARTERS(p, q) + LAST_OF_QUARTERS(p, q);
#if VL == 16
    return (QUARTER(r, 0) + QUARTER(r, 1)) + (QUARTER(r, 2) + QUARTER(r, 3));
#elif VL == 8
    return QUARTER(r, 0) + QUARTER(r, 1);
#else
    return r;
#endif
}

// x . y over T tokens, lane by lane.
INLINE vec product(const vec *x, const float *right, uint32_t col, const int T) {
    const float *y = (const float *)((const char *)right + col * (uint64_t)(4 * T));
    vec sum = x[0] * load(y);
    UNROLL for (int t = 1; t < T / VL; t++) sum += x[t] * load(y + t * VL);
    return sum;
}

// Entries of the rows [first, last): out[e] += dot(left row, right column), both of T tokens. Four
// at a time; where a row has fewer left, its last one stands in, and what is not wanted is zeroed.
INLINE void products(const float *left, const float *right, const int32_t *crow, const int32_t *col,
                     float *out, int first, int last, const int T) {
    static const four_u32 wanted[4] = {{0}, {~0u}, {~0u, ~0u}, {~0u, ~0u, ~0u}};
    const uint32_t *c = (const uint32_t *)col;
    for (int row = first; row < last; row++, left += T) {
        vec x[128 / VL];
        UNROLL for (int t = 0; t < T / VL; t++) x[t] = load(left + t * VL);
        int e = crow[row], end = crow[row + 1];
        for (; e + 4 <= end; e += 4)
            *(four *)(out + e) += sums_of_lanes(
                product(x, right, c[e], T), product(x, right, c[e + 1], T),
                product(x, right, c[e + 2], T), product(x, right, c[e + 3], T));
        if (e == end) continue;
        four sums = sums_of_lanes(product(x, right, c[e], T),
                                  product(x, right, c[e + 1 < end ? e + 1 : e], T),
                                  product(x, right, c[end - 1], T), (vec){0});
        if (e + 4 <= crow[last])  // the next rows' entries are ours too, and get a zero
            *(four *)(out + e) += (four)((four_u32)sums & wanted[end - e]);
        else
            for (int i = 0; i < end - e; i++) out[e + i] += sums[i];
    }
}

typedef struct {
    int chunk;          // tokens at a time (T)
    int rows;           // rows of `left` at a time
    int token_groups;   // groups of threads that share the tokens between them
    int row_groups;     // threads in each of them, which share the rows
    int64_t group_size; // floats of scratch for a group: `right` transposed, and its sums
} layout;

// T is the largest at which `right`, transposed, takes half of the second-level cache or, with
// shorter vectors, a quarter (as measured with 2 MiB and with 512 KiB).
static layout lay_out(int64_t tokens, int64_t cols, int64_t nnz, int threads) {
    layout l;
    int64_t cache = shira_second_level_cache();
#if VL == 16
    l.chunk = cols * 128 * 4 <= cache / 2 ? 128 : 64;
#else
    l.chunk = cols * 64 * 4 <= cache / 4 ? 64 : 32;
#endif
    l.rows = l.chunk == 32 ? 512 : 256;
    int64_t chunks = (tokens + l.chunk - 1) / l.chunk;
    l.token_groups = chunks < threads ? (int)chunks : threads;
    l.row_groups = threads / l.token_groups;
    l.group_size = PADDED(cols * l.chunk) + PADDED(nnz);
    return l;
}

// Bytes of scratch that `entries` takes; aligned to 64 it must be.
int64_t NAME(shira_entries_scratch)(int64_t tokens, int64_t cols, int64_t nnz, int threads) {
    layout l = lay_out(tokens, cols, nnz, threads);
    int64_t apart = (int64_t)l.token_groups * l.row_groups * l.rows * l.chunk;
    return 4 * (l.token_groups * l.group_size + apart);
}

// The two inner loops for each kind of operand and each T, as constants (OpenMP's regions are
// functions of their own, into which constants do not reach).
#if VL == 16
#define OTHER_T 128
#else
#define OTHER_T 32
#endif

static void transpose_chunk(const void *in, ptrdiff_t at, ptrdiff_t stride, int tokens, int from,
                            int to, float *out, int T, int kind) {
#define TRANSPOSE(KIND)                                                                    \
    if (T == 64) transpose(in, at, stride, tokens, from, to, out, 64, KIND);               \
    else transpose(in, at, stride, tokens, from, to, out, OTHER_T, KIND)
    if (kind == F32) { TRANSPOSE(F32); }
    else if (kind == BF16) { TRANSPOSE(BF16); }
    else { TRANSPOSE(F16); }
}

static void products_of_rows(const float *left, const float *right, const int32_t *crow,
                             const int32_t *col, float *out, int first, int last, int T) {
    if (T == 64) products(left, right, crow, col, out, first, last, 64);
    else products(left, right, crow, col, out, first, last, OTHER_T);
}

// out (nnz) = (left^T right) at the entries of a compressed row pattern.
// left (tokens, rows) and right (tokens, cols) of `kind`, rows of memory `*_stride` apart.
void NAME(shira_entries)(const void *left, int64_t left_stride, const void *right,
                         int64_t right_stride, int64_t tokens, int64_t rows, int64_t cols,
                         const int32_t *crow, const int32_t *col, float *out, float *scratch,
                         int kind, int threads) {
    layout l = lay_out(tokens, cols, crow[rows], threads);
    int64_t nnz = crow[rows], chunks = (tokens + l.chunk - 1) / l.chunk;
    int64_t steps = (chunks + l.token_groups - 1) / l.token_groups;
    int64_t sums_at = PADDED(cols * l.chunk), left_at = l.token_groups * l.group_size;
    int parts = l.token_groups * l.row_groups;
#pragma omp parallel num_threads(threads)
    {
        // OpenMP may give fewer threads than were asked for: each then does several parts. The
        // barriers stand outside the loops over parts, so that all threads meet at each.
        int thread = omp_get_thread_num(), present = omp_get_num_threads();
        int wait = l.row_groups > 1 || present < parts;
        for (int64_t step = 0; step < steps; step++) {
            for (int part = thread; part < parts; part += present) {
                int group = part / l.row_groups, member = part % l.row_groups;
                int64_t chunk = share(chunks, group, l.token_groups) + step;
                if (chunk >= share(chunks, group + 1, l.token_groups)) continue;
                int64_t t = chunk * l.chunk;
                int here = tokens - t < l.chunk ? (int)(tokens - t) : l.chunk;
                int from = (int)share(cols, member, l.row_groups);
                int to = (int)share(cols, member + 1, l.row_groups);
                transpose_chunk(right, t * right_stride, right_stride, here, from, to,
                                scratch + group * l.group_size + (int64_t)from * l.chunk, l.chunk, kind);
            }
            if (wait) {
#pragma omp barrier
            }
            for (int part = thread; part < parts; part += present) {
                int group = part / l.row_groups, member = part % l.row_groups;
                const float *across = scratch + group * l.group_size;
                float *sums = scratch + group * l.group_size + sums_at;
                float *down = scratch + left_at + (int64_t)part * l.rows * l.chunk;
                int64_t row = share(rows, member, l.row_groups);
                int64_t end = share(rows, member + 1, l.row_groups);
                if (!step) memset(sums + crow[row], 0, 4 * (size_t)(crow[end] - crow[row]));
                int64_t chunk = share(chunks, group, l.token_groups) + step;
                if (chunk >= share(chunks, group + 1, l.token_groups)) continue;
                int64_t t = chunk * l.chunk;
                int here = tokens - t < l.chunk ? (int)(tokens - t) : l.chunk;
                for (; row < end; row += l.rows) {
                    int first = (int)row, last = (int)(row + l.rows < end ? row + l.rows : end);
                    if (crow[first] == crow[last]) continue;
                    transpose_chunk(left, t * left_stride, left_stride, here, first, last, down,
                                    l.chunk, kind);
                    products_of_rows(down, across, crow, col, sums, first, last, l.chunk);
                }
            }
            if (wait) {
#pragma omp barrier
            }
        }
#pragma omp barrier
        const float *sums = scratch + sums_at;
        int64_t end = share(nnz, thread + 1, present);
        for (int64_t e = share(nnz, thread, present); e < end; e++) {
            float sum = sums[e];
            for (int g = 1; g < l.token_groups; g++) sum += sums[g * l.group_size + e];
            out[e] = sum;
        }
    }
}
