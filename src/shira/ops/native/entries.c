// SPDX-License-Identifier: Apache-2.0
// (left^T right)[S] for a support S without structure: one dot product for each entry.
//
//     out[e] = sum over tokens t of left[t, row(e)] * right[t, col(e)]
//
// Both operands are (tokens, features), so the tokens of one feature lie far apart. A chunk of T
// tokens of `right` is transposed into scratch memory that stays in the second-level cache, and of
// `left` some rows at a time. Then each entry is T/VL products of vectors, the left one of them in
// registers for a whole row; the sums over lanes are made for VL entries at once.
//
// Threads share the tokens first (each has its own scratch, no waiting), then the rows. Each entry
// is summed in an order that depends on the shapes and the number of threads alone.
#include "vector.h"

int64_t shira_second_level_cache(void);  // cpu.c

// VL x VL tile: log2(VL) rounds of interleaving the first half of the rows with the second.
INLINE void transpose_tile(const void *in, ptrdiff_t at, ptrdiff_t stride, float *out, ptrdiff_t T,
                           const int kind) {
    vec a[VL], b[VL];
    UNROLL for (int i = 0; i < VL; i++) a[i] = load_as(in, at + i * stride, kind);
#if VL == 8  // two tiles of 4 x 4 beside each other, twice
    UNROLL for (int i = 0; i < 4; i++) {
        b[i] = FIRST_HALVES(a[i], a[i + 4]);
        b[i + 4] = SECOND_HALVES(a[i], a[i + 4]);
    }
    UNROLL for (int i = 0; i < 8; i += 4) {
        vec c = LO_OF_HALVES(b[i], b[i + 2]), d = HI_OF_HALVES(b[i], b[i + 2]);
        vec e = LO_OF_HALVES(b[i + 1], b[i + 3]), f = HI_OF_HALVES(b[i + 1], b[i + 3]);
        a[i] = LO_OF_HALVES(c, e), a[i + 1] = HI_OF_HALVES(c, e);
        a[i + 2] = LO_OF_HALVES(d, f), a[i + 3] = HI_OF_HALVES(d, f);
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
#if VL == 8
    vec a[4], b[2];
    UNROLL for (int i = 0; i < 4; i++) {
        int at = i / 2 * 4 + i % 2;
        a[i] = LO_OF_HALVES(s[at], s[at + 2]) + HI_OF_HALVES(s[at], s[at + 2]);
    }
    UNROLL for (int i = 0; i < 2; i++)
        b[i] = LO_OF_HALVES(a[2 * i], a[2 * i + 1]) + HI_OF_HALVES(a[2 * i], a[2 * i + 1]);
    return FIRST_HALVES(b[0], b[1]) + SECOND_HALVES(b[0], b[1]);
#else
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
#endif
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
#define OTHER_T(KIND) KIND##_128
#else
MAKE(32)
#define OTHER_T(KIND) KIND##_32
#endif

// out (nnz) = (left^T right) at the entries of a compressed row pattern.
// left (tokens, rows) and right (tokens, cols) of `kind`, rows of memory `*_stride` apart.
void NAME(shira_entries)(const void *left, int64_t left_stride, const void *right,
                         int64_t right_stride, int64_t tokens, int64_t rows, int64_t cols,
                         const int32_t *crow, const int32_t *col, float *out, float *scratch,
                         int kind, int threads) {
    layout l = lay_out(tokens, cols, crow[rows], threads);
    transpose_fn *transpose_chunk = l.chunk == 64 ? transposes_64[kind] : OTHER_T(transposes)[kind];
    products_fn *products_of_rows = l.chunk == 64 ? products_64 : OTHER_T(products);
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
