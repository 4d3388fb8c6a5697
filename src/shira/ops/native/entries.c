// SPDX-License-Identifier: Apache-2.0
// (left^T right)[S] for a support S without structure: one dot product for each entry.
//
//     out[e] = sum over tokens t of left[t, row(e)] * right[t, col(e)]
//
// Both operands are (tokens, features), so the tokens of one feature lie far apart. A chunk of T
// tokens of `right` is transposed into scratch memory that stays in the second-level cache, and of
// `left` RB rows at a time. Then each entry is T/VL products of vectors, the left one of them in
// registers for a whole row; the sums over lanes are made for VL entries at once.
//
// Threads share the tokens first (each has its own scratch, no waiting), then the rows. Each entry
// is summed in an order that depends on the shapes and the number of threads alone.
#include "vector.h"

#define RB 256                   // rows of `left` at a time
#define CACHE (1024 * 1024)      // bytes of `right`, transposed, that are to stay in the cache

// VL x VL tile: log2(VL) rounds of interleaving the first half of the rows with the second.
INLINE void transpose_tile(const void *in, ptrdiff_t at, ptrdiff_t stride, float *out, ptrdiff_t T,
                           const int kind) {
    vec a[VL], b[VL];
    UNROLL for (int i = 0; i < VL; i++) a[i] = load_as(in, at + i * stride, kind);
    UNROLL for (int round = 1; round < VL; round *= 2) {
        UNROLL for (int i = 0; i < VL / 2; i++) {
            b[2 * i] = LO(a[i], a[i + VL / 2]);
            b[2 * i + 1] = HI(a[i], a[i + VL / 2]);
        }
        UNROLL for (int i = 0; i < VL; i++) a[i] = b[i];
    }
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

// Lane i of the result is the sum of the lanes of s[i]: a tree of additions of interleaved halves.
INLINE vec sums_of_lanes(const vec *s) {
    vec a[VL];
    UNROLL for (int i = 0; i < VL; i++) {
        int reversed = 0;
        UNROLL for (int bit = 1; bit < VL; bit *= 2) reversed = reversed * 2 + ((i & bit) != 0);
        a[i] = s[reversed];
    }
    UNROLL for (int n = VL / 2; n; n /= 2)
        UNROLL for (int i = 0; i < n; i++)
            a[i] = LO(a[2 * i], a[2 * i + 1]) + HI(a[2 * i], a[2 * i + 1]);
    return a[0];
}

// Entries of the rows [first, last): out[e] += dot(left row, right column), both of T tokens.
INLINE void products(const float *left, const float *right, const int32_t *crow, const int32_t *col,
                     float *out, int first, int last, const int T) {
    vec s[VL];
    int waiting = 0;
    int64_t done = crow[first];
    for (int row = first; row < last; row++, left += T) {
        vec x[128 / VL];
        UNROLL for (int t = 0; t < T / VL; t++) x[t] = load(left + t * VL);
        for (int e = crow[row]; e < crow[row + 1]; e++) {
            const float *y = right + (ptrdiff_t)col[e] * T;
            vec even = x[0] * load(y), odd = x[1] * load(y + VL);
            UNROLL for (int t = 2; t < T / VL; t += 2) {
                even += x[t] * load(y + t * VL);
                odd += x[t + 1] * load(y + t * VL + VL);
            }
            s[waiting++] = even + odd;
            if (waiting == VL) {
                store(out + done, load(out + done) + sums_of_lanes(s));
                done += VL;
                waiting = 0;
            }
        }
    }
    if (!waiting) return;
    for (int i = waiting; i < VL; i++) s[i] = (vec){0};
    vec sum = sums_of_lanes(s);
    for (int i = 0; i < waiting; i++) out[done + i] += sum[i];
}

typedef struct {
    int chunk;          // tokens at a time (T)
    int token_groups;   // groups of threads that share the tokens between them
    int row_groups;     // threads in each of them, which share the rows
    int64_t group_size; // floats of scratch for a group: `right` transposed, and its sums
} layout;

static layout lay_out(int64_t tokens, int64_t cols, int64_t nnz, int threads) {
    layout l;
#if VL == 16
    l.chunk = cols * 128 * 4 <= CACHE ? 128 : 64;
#else
    l.chunk = 64;
#endif
    int64_t chunks = (tokens + l.chunk - 1) / l.chunk;
    l.token_groups = chunks < threads ? (int)chunks : threads;
    l.row_groups = threads / l.token_groups;
    l.group_size = PADDED(cols * l.chunk) + PADDED(nnz);
    return l;
}

// Bytes of scratch that `entries` takes; aligned to 64 it must be.
int64_t NAME(shira_entries_scratch)(int64_t tokens, int64_t cols, int64_t nnz, int threads) {
    layout l = lay_out(tokens, cols, nnz, threads);
    int64_t apart = (int64_t)l.token_groups * l.row_groups * RB * l.chunk;
    return 4 * (l.token_groups * l.group_size + apart);
}

// The two inner loops, made for each kind of operand and each T (OpenMP's regions are functions of
// their own, into which constants do not reach).
typedef void transpose_fn(const void *, ptrdiff_t, ptrdiff_t, int, int, int, float *);
typedef void products_fn(const float *, const float *, const int32_t *, const int32_t *, float *,
                         int, int);
#define MAKE_TRANSPOSE(KIND, T)                                                                    \
    static void transpose_##KIND##_##T(const void *in, ptrdiff_t at, ptrdiff_t stride, int tokens, \
                                       int from, int to, float *out) {                             \
        transpose(in, at, stride, tokens, from, to, out, T, KIND);                                 \
    }
#define MAKE(T)                                                                                    \
    MAKE_TRANSPOSE(F32, T)                                                                         \
    MAKE_TRANSPOSE(BF16, T)                                                                        \
    MAKE_TRANSPOSE(F16, T)                                                                         \
    static void products_##T(const float *left, const float *right, const int32_t *crow,           \
                             const int32_t *col, float *out, int first, int last) {                \
        products(left, right, crow, col, out, first, last, T);                                     \
    }                                                                                              \
    static transpose_fn *const transposes_##T[] = {transpose_F32_##T, transpose_BF16_##T,          \
                                                   transpose_F16_##T};
MAKE(64)
#if VL == 16
MAKE(128)
#endif

// out (nnz) = (left^T right) at the entries of a compressed row pattern.
// left (tokens, rows) and right (tokens, cols) of `kind`, rows of memory `*_stride` apart.
void NAME(shira_entries)(const void *left, int64_t left_stride, const void *right,
                         int64_t right_stride, int64_t tokens, int64_t rows, int64_t cols,
                         const int32_t *crow, const int32_t *col, float *out, float *scratch,
                         int kind, int threads) {
    layout l = lay_out(tokens, cols, crow[rows], threads);
    transpose_fn *transpose_chunk = transposes_64[kind];
    products_fn *products_of_rows = products_64;
#if VL == 16
    if (l.chunk == 128) {
        transpose_chunk = transposes_128[kind];
        products_of_rows = products_128;
    }
#endif
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
                                scratch + group * l.group_size + (int64_t)from * l.chunk);
            }
            if (wait) {
#pragma omp barrier
            }
            for (int part = thread; part < parts; part += present) {
                int group = part / l.row_groups, member = part % l.row_groups;
                const float *across = scratch + group * l.group_size;
                float *sums = scratch + group * l.group_size + sums_at;
                float *down = scratch + left_at + (int64_t)part * RB * l.chunk;
                int64_t row = share(rows, member, l.row_groups);
                int64_t end = share(rows, member + 1, l.row_groups);
                if (!step) memset(sums + crow[row], 0, 4 * (size_t)(crow[end] - crow[row]));
                int64_t chunk = share(chunks, group, l.token_groups) + step;
                if (chunk >= share(chunks, group + 1, l.token_groups)) continue;
                int64_t t = chunk * l.chunk;
                int here = tokens - t < l.chunk ? (int)(tokens - t) : l.chunk;
                for (; row < end; row += RB) {
                    int first = (int)row, last = (int)(row + RB < end ? row + RB : end);
                    if (crow[first] == crow[last]) continue;
                    transpose_chunk(left, t * left_stride, left_stride, here, first, last, down);
                    products_of_rows(down, across, crow, col, sums, first, last);
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
