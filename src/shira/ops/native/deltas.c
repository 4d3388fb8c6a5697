// SPDX-License-Identifier: Apache-2.0
// y += x dW^T for several groups of tokens, each with a sparse dW of its own:
//
//     y[t, row(e)] += sum over the entries e of t's dW, value(e) * x[t, col(e)]
//
// Tokens of a group go side by side, a tile of W at a time: x is transposed, so that an entry
// multiplies one vector of W numbers. A tile's dW is read once, from its gaps (walk.h), a row's
// sums stay in registers, four of them, each for every fourth entry of the row, and rows are added to y
// some at a time, rounded once. With a dW stored (in, out) the sums of a whole tile are kept in scratch.
//
// Of a token alone that comes again, as in generation, the columns are given instead of the gaps, which
// take longer to read than the products.
//
// Threads take blocks of gaps, the rows that begin in each, as they come to them: first those of the
// tokens whose x they have transposed themselves, which is in their own cache. No sum is shared, and
// its order depends on the positions alone: neither threads nor other tokens change its bits.
#define AT_ONCE 512
#include "walk.h"

#define ROWS 64     // rows whose sums are kept until they are added to y
#define PIECE 256   // columns of x that are transposed at a time

#if VL == 16
#define WIDEST 64
#elif VL == 8 || defined(__aarch64__)
#define WIDEST 16
#else
#define WIDEST 8
#endif

// Where an adapter's entries are, as shira/ops/native/__init__.py keeps it; addresses are numbers. With
// a unit size of 0 units are the columns, uint16, and marks where each row begins, int32, and the end.
typedef struct {
    int64_t units, unit_size, count, marks, nnz;
} entries;

// One adapter's share of the batch; its tokens: `order` from `first` on.
typedef struct {
    entries dw;
    int64_t values, kind, first, tokens;
} group;

typedef struct {
    const void *x;
    void *y;
    const int64_t *order;
    const entries *places;
    const int64_t *shares;  // of all groups: addresses of values, their kinds, numbers of tokens
    int64_t x_stride, y_stride, rows, cols, ins, outs;
    int kind, transposed, groups;
} job;

// A tile of tokens: what is left of its group from `at` on, W at most.
typedef struct {
    int number, width, tokens;  // number: of its group
    group of;
    int64_t at;       // its first token within the group
    int64_t blocks;   // parts that its work is shared in
} tile;

INLINE int width_of(int64_t tokens) {
    if (tokens >= WIDEST) return WIDEST;
    if (tokens <= 1) return 1;
    if (tokens <= 4) return 4;
    if (VL > 8 && tokens <= 8) return 8;
    return (int)((tokens + VL - 1) / VL * VL);
}

// The next tile after `t` (at first number = -1); 0 if there is none.
INLINE int next_tile(const job *j, tile *t) {
    if (t->number >= 0) t->at += t->tokens;
    while (t->number < 0 || t->at >= t->of.tokens || !t->of.dw.nnz) {
        int64_t first = t->number < 0 ? 0 : t->of.first + t->of.tokens;
        if (++t->number == j->groups) return 0;
        const int64_t *share = j->shares + t->number;
        t->of = (group){j->places[t->number], share[0], share[j->groups], first,
                        share[2 * j->groups]};
        t->at = 0;
    }
    int64_t left = t->of.tokens - t->at;
    t->width = width_of(left);
    t->tokens = (int)(left < t->width ? left : t->width);
    t->blocks = j->transposed ? 1 : (t->of.dw.count + BLOCK - 1) / BLOCK;
    return 1;
}

// out[c * W + i] = x[token i, c] for first <= c < last; zeros for tokens that are not there.
INLINE void gather_x(const job *j, const tile *t, int64_t first, int64_t last, float *out,
                     const int kind) {
    const int64_t *order = j->order + t->of.first + t->at;
    int W = t->width;
    for (int from = 0; from < W; from += VL) {
        int n = t->tokens - from < VL ? t->tokens - from : VL, lanes = W - from < VL ? W - from : VL;
        int64_t at[VL], c = first;
        for (int i = 0; i < n; i++) at[i] = order[from + i] * j->x_stride;
        for (; W > 1 && c + VL <= last; c += VL) {
            vec a[VL];
            UNROLL for (int i = 0; i < VL; i++)
                a[i] = i < n ? load_as(j->x, at[i] + c, kind) : (vec){0};
            transpose_vectors(a);
            float *o = out + c * W + from;
            if (lanes == VL)
                UNROLL for (int i = 0; i < VL; i++) store(o + i * W, a[i]);
            else
                UNROLL for (int i = 0; i < VL; i++) memcpy(o + i * W, &a[i], lanes == 4 ? 16 : 32);
        }
        for (; c < last; c++)
            for (int i = 0; i < lanes; i++)
                out[c * W + from + i] = i < n ? scalar_as(j->x, at[i] + c, kind) : 0;
    }
}

// y[token i, row + r] += sums[r * W + i] for 0 <= r < n; VL floats more of sums may be read.
INLINE void add_sums(const job *j, const tile *t, int64_t row, int64_t n, const float *sums,
                     const int kind) {
    const int64_t *order = j->order + t->of.first + t->at;
    int W = t->width;
    for (int from = 0; from < t->tokens; from += VL) {
        int64_t at[VL], r = 0;
        int tokens = t->tokens - from < VL ? t->tokens - from : VL;
        for (int i = 0; i < tokens; i++) at[i] = order[from + i] * j->y_stride + row;
        for (; W == 1 && r + VL <= n; r += VL)
            store_as(j->y, at[0] + r, load_as(j->y, at[0] + r, kind) + load(sums + r), kind);
        for (; W > 1 && r + VL <= n; r += VL) {
            vec a[VL];
            UNROLL for (int i = 0; i < VL; i++) a[i] = load(sums + (r + i) * W + from);
            transpose_vectors(a);
            UNROLL for (int i = 0; i < VL; i++)
                if (i < tokens)
                    store_as(j->y, at[i] + r, load_as(j->y, at[i] + r, kind) + a[i], kind);
        }
        for (; r < n; r++)
            for (int i = 0; i < tokens; i++)
                store_scalar_as(j->y, at[i] + r,
                                scalar_as(j->y, at[i] + r, kind) + sums[r * W + from + i], kind);
    }
}

// (An OpenMP region is a function of its own, into which constants do not reach.)
#define OF_KIND(CALL)                                         \
    if (j->kind == F32) { enum { kind = F32 }; CALL; }        \
    else if (j->kind == BF16) { enum { kind = BF16 }; CALL; } \
    else { enum { kind = F16 }; CALL; }

static void gather(const job *j, const tile *t, int64_t first, int64_t last, float *out) {
    OF_KIND(gather_x(j, t, first, last, out, kind))
}
static void add(const job *j, const tile *t, int64_t row, int64_t n, const float *sums) {
    OF_KIND(add_sums(j, t, row, n, sums, kind))
}

// The values of n entries from e on as floats, with 32 more that may be read.
INLINE const float *values_of(const group *g, int64_t e, int n, float *room) {
    const void *from = (const void *)g->values;
    if (g->kind == F32 && e + n + 32 <= g->dw.nnz) return (const float *)from + e;
    if (g->kind == F32) memcpy(room, (const float *)from + e, 4 * n);
    else if (g->kind == BF16) for (int i = 0; i < n; i++) room[i] = scalar_as(from, e + i, BF16);
    else for (int i = 0; i < n; i++) room[i] = scalar_as(from, e + i, F16);
    return room;
}

// How many of 32 increasing numbers are below a limit.
INLINE int below(const uint32_t *at, uint32_t limit) {
#if defined(__AVX512F__)
    __m512i l = _mm512_set1_epi32((int)limit);
    return __builtin_popcount(
        _mm512_cmplt_epu32_mask(_mm512_loadu_si512(at), l) |
        (uint32_t)_mm512_cmplt_epu32_mask(_mm512_loadu_si512(at + 16), l) << 16);
#else
    int n = 0;
    for (int p = 0; p < 32; p++) n += at[p] < limit;
    return n;
#endif
}

// A multiple of eight that most rows have fewer entries than, or 0 where rows are long. So many are
// done at once in each row, some of them zeros: a branch the less that the CPU cannot foresee.
INLINE int usual_entries(const group *g, int64_t rows) {
    float mean = (float)g->dw.nnz / rows;
    return mean < 24 ? ((int)(mean + __builtin_sqrtf(mean) / 2) + 7) / 8 * 8 : 0;
}

typedef float one __attribute__((aligned(4), may_alias));
typedef float four __attribute__((vector_size(16), aligned(4), may_alias));
#if VL > 8
typedef float eight __attribute__((vector_size(32), aligned(4), may_alias));
#endif
typedef int32_t eight_i32 __attribute__((vector_size(32)));
static const eight_i32 first_eight = {0, 1, 2, 3, 4, 5, 6, 7};

#define ENTRY(P, I, W, TYPE, N)                                                          \
    UNROLL for (int k = 0; k < N; k++)                                                   \
        sum[P][k] += v[I] * ((const TYPE *)(here + (uint64_t)at[I] * W))[k];

// Eight entries from number I on, LEFT of which are the row's; for the others x's column of zeros.
#define EIGHT(I, LEFT, W, TYPE, N)                                                       \
    {                                                                                    \
        eight_u32 wanted = (eight_u32)(first_eight < (int)(LEFT));                       \
        eight_u32 col = *(const eight_u32 *)(at + (I)) + (uint32_t)(from - begin);       \
        uint32_t byte[8];                                                                \
        float value[8];                                                                  \
        *(eight_u32 *)byte = ((wanted & col) | (~wanted & (uint32_t)cols)) * (4 * W);    \
        *(eight_u32 *)value = wanted & *(const eight_u32 *)(v + (I));                    \
        UNROLL for (int p = 0; p < 8; p++)                                               \
            UNROLL for (int k = 0; k < N; k++)                                           \
                sum[p % 4][k] +=                                                         \
                    value[p] * ((const TYPE *)((const char *)x + byte[p]))[k];           \
    }

#define CLEAR(SUM, TYPE, N)                                                              \
    UNROLL for (int k = 0; k < N; k++) SUM[0][k] = SUM[1][k] = SUM[2][k] = SUM[3][k] = (TYPE){0};

// Let entries of the row that come after COUNT others go on with the sum that is theirs.
#define TURN(TYPE, N, COUNT)                                                             \
    for (int c = (int)((COUNT) & 3); c > 0; c--)                                         \
        UNROLL for (int k = 0; k < N; k++) {                                             \
            TYPE first = sum[0][k];                                                      \
            sum[0][k] = sum[1][k], sum[1][k] = sum[2][k], sum[2][k] = sum[3][k];         \
            sum[3][k] = first;                                                           \
        }

#define KEEP_SUMS(W, TYPE, N)                                                            \
    TURN(TYPE, N, 4 - turned)                                                            \
    turned = 0;                                                                          \
    UNROLL for (int k = 0; k < N; k++)                                                   \
        ((TYPE *)(sums + (row - kept) * W))[k] =                                         \
            (sum[0][k] + sum[1][k]) + (sum[2][k] + sum[3][k]);                           \
    CLEAR(sum, TYPE, N)                                                                  \
    row++, begin += cols;

#define EACH_PIECE                                                                       \
    for (int n; (n = g->dw.unit_size == 1 ? advance(&place, &from, at, 1)                \
                                       : advance(&place, &from, at, 2)); e += n)

// The rows that begin in block b, for W tokens: N vectors of TYPE.
#define BY_ROWS(W, TYPE, N)                                                              \
    static void by_rows_##W(const job *j, const tile *t, int64_t b, const float *x,      \
                            float *sums) {                                               \
        const group *g = &t->of;                                               \
        const int64_t *marks = (const int64_t *)g->dw.marks, cols = j->cols;             \
        int64_t blocks = (g->dw.count + BLOCK - 1) / BLOCK;                              \
        int64_t row = (marks[2 * b + 1] + cols - 1) / cols, begin = row * cols;          \
        int64_t stop = b + 1 < blocks ? marks[2 * b + 3] : j->rows * cols;               \
        if (begin >= stop) return;                                                       \
        walk place = walk_from((const void *)g->dw.units, g->dw.count, marks, b, blocks, \
                               (int)g->dw.unit_size);                                    \
        uint32_t at[AT_ONCE + 40];                                                       \
        float room[AT_ONCE + 40];                                                        \
        int64_t e = place.entry, from, kept = row;                                       \
        int usual = usual_entries(g, j->rows);                                           \
        int turned = 0;  /* how far the sums are, for a row that is in several pieces */  \
        TYPE sum[4][N]; /* (cleared by memset it would not stay in registers) */         \
        CLEAR(sum, TYPE, N)                                                              \
        EACH_PIECE {                                                                     \
            const float *v = values_of(g, e, n, room);                                   \
            int i = 0;                                                                   \
            UNROLL for (int p = 0; p < 32; p++) at[n + p] = UINT32_MAX;                  \
            while (i < n && from + at[i] < begin) i++;                                   \
            while (i < n) {                                                              \
                int64_t limit = begin + cols - from; /* not above 0: a wide gap */       \
                const float *here = x + (from - begin) * W;                              \
                int start = i;                                                           \
                for (int m = 32; m == 32 && limit > 0;) {                                \
                    m = below(at + i, (uint32_t)limit);                                  \
                    int done = 0;                                                        \
                    if (W <= 8) {                                                        \
                        for (; done < usual; done += 8)                                  \
                            EIGHT(i + done, m - done, W, TYPE, N)                        \
                        for (; done < m; done += 8)                                      \
                            EIGHT(i + done, m - done, W, TYPE, N)                        \
                        i += m;                                                          \
                        continue;                                                        \
                    }                                                                    \
                    for (; done + 4 <= m; done += 4, i += 4) {                           \
                        ENTRY(0, i, W, TYPE, N) ENTRY(1, i + 1, W, TYPE, N)              \
                        ENTRY(2, i + 2, W, TYPE, N) ENTRY(3, i + 3, W, TYPE, N)          \
                    }                                                                    \
                    switch (m - done) {                                                  \
                        case 3: ENTRY(2, i + 2, W, TYPE, N) /* fall through */           \
                        case 2: ENTRY(1, i + 1, W, TYPE, N) /* fall through */           \
                        case 1: ENTRY(0, i, W, TYPE, N)                                  \
                    }                                                                    \
                    i += m - done;                                                       \
                }                                                                        \
                if (i == n) { /* the row may go on */                                    \
                    TURN(TYPE, N, i - start)                                             \
                    turned = (turned + i - start) & 3;                                   \
                    break;                                                               \
                }                                                                        \
                KEEP_SUMS(W, TYPE, N)                                                    \
                for (;;) {                                                               \
                    if (row - kept == ROWS) add(j, t, kept, ROWS, sums), kept = row;     \
                    if (begin >= stop) goto end;                                         \
                    if (from + at[i] < begin + cols) break;                              \
                    memset(sums + (row - kept) * W, 0, 4 * W); /* a row of no entries */ \
                    row++, begin += cols;                                                \
                }                                                                        \
            }                                                                            \
        }                                                                                \
        KEEP_SUMS(W, TYPE, N)                                                            \
    end:                                                                                 \
        if (row > kept) add(j, t, kept, row - kept, sums);                               \
    }

// Part b of the rows, for one token whose columns are given.
INLINE void by_columns_given(const job *j, const tile *t, int64_t b, const float *x, float *sums,
                             const int kind) {
    const uint16_t *col = (const void *)t->of.dw.units;
    const int32_t *begin = (const void *)t->of.dw.marks;
    const void *values = (const void *)t->of.values;
    int64_t row = share(j->rows, b, t->blocks), last = share(j->rows, b + 1, t->blocks);
#define PRODUCT(SUM, E) SUM += scalar_as(values, E, kind) * x[col[E]];
    for (int n; row < last; row += n) {
        n = last - row < ROWS ? (int)(last - row) : ROWS;
        for (int r = 0; r < n; r++) {
            int64_t e = begin[row + r], end = begin[row + r + 1];
            float s0 = 0, s1 = 0, s2 = 0, s3 = 0;
            for (; e + 4 <= end; e += 4) {
                PRODUCT(s0, e) PRODUCT(s1, e + 1) PRODUCT(s2, e + 2) PRODUCT(s3, e + 3)
            }
            switch (end - e) {
                case 3: PRODUCT(s2, e + 2) /* fall through */
                case 2: PRODUCT(s1, e + 1) /* fall through */
                case 1: PRODUCT(s0, e)
            }
            sums[r] = (s0 + s1) + (s2 + s3);
        }
        add(j, t, row, n, sums);
    }
}

// All of a dW that is stored (in, out), for W tokens; sums (out, W).
#define BY_COLUMNS(W, TYPE, N)                                                           \
    static void by_columns_##W(const job *j, const tile *t, const float *x, float *sums) { \
        const group *g = &t->of;                                               \
        int64_t blocks = (g->dw.count + BLOCK - 1) / BLOCK, cols = j->cols, begin = 0;   \
        walk place = walk_from((const void *)g->dw.units, g->dw.count,                   \
                               (const int64_t *)g->dw.marks, 0, blocks, (int)g->dw.unit_size);\
        uint32_t at[AT_ONCE + 40];                                                       \
        float room[AT_ONCE + 40];                                                        \
        int64_t e = 0, from;                                                             \
        memset(sums, 0, 4 * (size_t)(cols * W));                                         \
        EACH_PIECE {                                                                     \
            const float *v = values_of(g, e, n, room);                                   \
            at[n] = UINT32_MAX;                                                          \
            for (int i = 0; i < n;) {                                                    \
                while (from + at[i] >= begin + cols) begin += cols, x += W;              \
                uint32_t limit = (uint32_t)(begin + cols - from);                        \
                float *there = sums + (from - begin) * W;                                \
                TYPE left[N];                                                            \
                UNROLL for (int k = 0; k < N; k++) left[k] = ((const TYPE *)x)[k];       \
                for (; at[i] < limit; i++)                                               \
                    UNROLL for (int k = 0; k < N; k++)                                   \
                        ((TYPE *)(there + (uint64_t)at[i] * W))[k] += v[i] * left[k];    \
            }                                                                            \
        }                                                                                \
        add(j, t, 0, cols, sums);                                                        \
    }

#if VL == 16
#define EACH_WIDTH(DO)                                            \
    DO(1, one, 1) DO(4, four, 1) DO(8, eight, 1) DO(16, vec, 1)   \
    DO(32, vec, 2) DO(48, vec, 3) DO(64, vec, 4)
#elif VL == 8
#define EACH_WIDTH(DO) DO(1, one, 1) DO(4, four, 1) DO(8, vec, 1) DO(16, vec, 2)
#elif WIDEST == 16
#define EACH_WIDTH(DO) DO(1, one, 1) DO(4, vec, 1) DO(8, vec, 2) DO(12, vec, 3) DO(16, vec, 4)
#else
#define EACH_WIDTH(DO) DO(1, one, 1) DO(4, vec, 1) DO(8, vec, 2)
#endif

EACH_WIDTH(BY_ROWS)
EACH_WIDTH(BY_COLUMNS)

static void multiply(const job *j, const tile *t, int64_t b, const float *x, float *sums) {
    if (t->of.dw.unit_size == 0) {
        if (t->of.kind == F32) by_columns_given(j, t, b, x, sums, F32);
        else if (t->of.kind == BF16) by_columns_given(j, t, b, x, sums, BF16);
        else by_columns_given(j, t, b, x, sums, F16);
        return;
    }
    switch (t->width) {
#define CASE(W, TYPE, N)                                     \
    case W:                                                  \
        if (j->transposed) by_columns_##W(j, t, x, sums);    \
        else by_rows_##W(j, t, b, x, sums);                  \
        break;
        EACH_WIDTH(CASE)
    }
}

// Floats of scratch for each thread.
int64_t NAME(shira_deltas_scratch)(int64_t outs, int transposed) {
    return PADDED((transposed ? outs : ROWS) * WIDEST + VL);
}

// The first of n rows that is out of range or was named before; n if there is none.
static int64_t usable(const int64_t *order, int64_t n, int64_t tokens, uint32_t *seen) {
    memset(seen, 0, 4 * (size_t)(tokens / 32 + 1));
    for (int64_t i = 0; i < n; i++) {
        uint64_t row = (uint64_t)order[i];
        if (row >= (uint64_t)tokens || seen[row / 32] >> row % 32 & 1) return i;
        seen[row / 32] |= 1u << row % 32;
    }
    return n;
}

// x (tokens, ins) and y (tokens, outs) of `kind`, rows `*_stride` apart; dW (rows, cols), which is
// (outs, ins) or, transposed, (ins, outs). scratch: `room` floats, ins * WIDEST and tokens / 32 or
// more, then those of each thread. Returns -1, or which of the n tokens in `order` is out of range
// or there twice; then nothing was done.
int64_t NAME(shira_deltas)(const void *x, int64_t x_stride, void *y, int64_t y_stride, int kind,
                           int64_t tokens, const entries *places, const int64_t *shares, int groups,
                           const int64_t *order, int64_t n, int64_t rows, int64_t cols,
                           int transposed, float *scratch, int64_t room, int threads) {
    int64_t fits = usable(order, n, tokens, (uint32_t *)scratch);
    if (fits < n) return fits;
    int64_t ins = transposed ? rows : cols, outs = transposed ? cols : rows;
    job whole = {x, y, order, places, shares, x_stride, y_stride, rows, cols, ins, outs,
                 kind, transposed, groups};
    const job *j = &whole;
    int64_t apart = NAME(shira_deltas_scratch)(outs, transposed), taken[threads];
    int64_t pieces = (ins + PIECE - 1) / PIECE;
#pragma omp parallel num_threads(threads)
    {
        int me = omp_get_thread_num(), all = omp_get_num_threads();
        float *sums = scratch + room + apart * me;  // no more threads come than were asked for
        tile first = {.number = -1}, past;
        // As many tiles at once as there is room for.
        for (int more = next_tile(j, &first); more; first = past) {
            int64_t tiles = 0, parts = 0, used = 0;
            for (past = first; more && used + (ins + 1) * past.width <= room;) {
                tiles++, parts += past.blocks, used += (ins + 1) * past.width;
                more = next_tile(j, &past);
            }
            // Their x, transposed.
            taken[me] = 0;
            tile t = first;
            int64_t end = share(tiles * pieces, me + 1, all), at = 0, into = 0;
            for (int64_t p = share(tiles * pieces, me, all); p < end; p++) {
                for (; at + pieces <= p; at += pieces) into += (ins + 1) * t.width, next_tile(j, &t);
                int64_t from = (p - at) * PIECE, to = from + PIECE < ins ? from + PIECE : ins;
                gather(j, &t, from, to, scratch + into);
                if (to == ins) memset(scratch + into + ins * t.width, 0, 4 * t.width);
            }
#pragma omp barrier
            // Each begins where its own x is, and helps the others when that is done.
            for (int k = 0; k < all; k++) {
                int whose = (me + k) % all;
                int64_t from = share(parts, whose, all), to = share(parts, whose + 1, all), part;
                t = first, at = into = 0;
                while ((part = from + __atomic_fetch_add(taken + whose, 1, __ATOMIC_RELAXED)) < to) {
                    for (; at + t.blocks <= part; next_tile(j, &t))
                        at += t.blocks, into += (ins + 1) * t.width;
                    multiply(j, &t, part - at, scratch + into, sums);
                }
            }
#pragma omp barrier
        }
    }
    return -1;
}
