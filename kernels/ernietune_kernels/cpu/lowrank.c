#include "lowrank.h"

#include <stdlib.h>

#include "linear.h"
#include "panel.h"

#define CHUNK 128 /* rows of one task */
#define STRIP 64 /* columns of a factor's gradient that a task works out */
#define HIGHEST 256 /* rank at most */
#define SMALL (1 << 20) /* products that one thread has done before others are awake */
#ifdef __AVX512F__
#define DOTS 4 /* rows and factors of a tile of dot products */
#else
#define DOTS 2
#endif

typedef struct {
    const LowRank *given;
    float *b; /* [experts, rank, out] */
} Turned;

/* R rows of x times F rows of a factor, along them. */
INLINE void dots(int R, int F, const float *x, const float *factor, int64_t width, float scale, float *narrow,
                 int64_t rank) {
    V total[DOTS * DOTS];
#pragma GCC unroll 16
    for (int t = 0; t < R * F; t++) total[t] = spread(0);
    int64_t i = 0;
    for (; i + LANES <= width; i += LANES) {
        V row[DOTS];
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) row[r] = load(x + r * width + i);
#pragma GCC unroll 4
        for (int f = 0; f < F; f++) {
            V number = load(factor + f * width + i);
#pragma GCC unroll 4
            for (int r = 0; r < R; r++) total[r * F + f] += row[r] * number;
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int f = 0; f < F; f++) {
            float result = sum(total[r * F + f]);
            for (int64_t j = i; j < width; j++) result += x[r * width + j] * factor[f * width + j];
            narrow[r * rank + f] = result * scale;
        }
}

INLINE void some_dots(int R, const float *x, const float *factor, int64_t width, float scale, float *narrow,
                      int64_t rank) {
    int64_t f = 0;
    for (; f + DOTS <= rank; f += DOTS) dots(R, DOTS, x, factor + f * width, width, scale, narrow + f, rank);
    for (; f < rank; f++) dots(R, 1, x, factor + f * width, width, scale, narrow + f, rank);
}

/* narrow [rows, rank] = scale times x [rows, width] times the factor [rank, width] transposed. */
static void narrowed(const float *x, int64_t rows, const float *factor, int64_t width, float scale, float *narrow,
                     int64_t rank) {
    int64_t r = 0;
    for (; r + DOTS <= rows; r += DOTS) some_dots(DOTS, x + r * width, factor, width, scale, narrow + r * rank, rank);
    for (; r < rows; r++) some_dots(1, x + r * width, factor, width, scale, narrow + r * rank, rank);
}

/* Rows of one expert that a task works on. */
typedef struct {
    int64_t expert, row, rows;
} Piece;

static int64_t chunks_of(int64_t rows) { return (rows + CHUNK - 1) / CHUNK; }

static Piece piece(const LowRank *l, int64_t index) {
    int64_t row = 0, expert = 0;
    for (; index >= chunks_of(l->counts[expert]); expert++) {
        index -= chunks_of(l->counts[expert]);
        row += l->counts[expert];
    }
    int64_t left = l->counts[expert] - index * CHUNK;
    return (Piece){expert, row + index * CHUNK, left < CHUNK ? left : CHUNK};
}

/* How many of so many tasks a thread takes at a time. */
static int64_t share_of_tasks(const LowRank *l, int64_t tasks, int64_t usual) {
    int64_t rows = 0;
    for (int64_t e = 0; e < l->experts; e++) rows += l->counts[e];
    return rows * l->rank * (l->in + l->out) < SMALL ? tasks : usual;
}

static int64_t all_chunks(const LowRank *l) {
    int64_t count = 0;
    for (int64_t e = 0; e < l->experts; e++) count += chunks_of(l->counts[e]);
    return count;
}

static void turn_some(const void *context, int64_t begin, int64_t end) {
    const Turned *t = context;
    const LowRank *l = t->given;
    for (int64_t e = begin; e < end; e++) {
        if (!l->counts[e]) continue;
        const float *from = l->b + e * l->out * l->rank;
        float *to = t->b + e * l->out * l->rank;
        for (int64_t o = 0; o < l->out; o++)
            for (int64_t r = 0; r < l->rank; r++) to[r * l->out + o] = from[o * l->rank + r];
    }
}

/* B of all experts with rows, transposed, so that whatever is done with it goes along rows. */
static int turn(const LowRank *l, Turned *t) {
    t->given = l;
    t->b = malloc((size_t)(l->experts * l->rank * l->out) * sizeof(float));
    if (!t->b) return -1;
    for_all(turn_some, t, l->experts, share_of_tasks(l, l->experts, 1));
    return 0;
}

static void forward_some(const void *context, int64_t begin, int64_t end) {
    const Turned *t = context;
    const LowRank *l = t->given;
    for (int64_t i = begin; i < end; i++) {
        Piece p = piece(l, i);
        float *narrow = l->narrow + p.row * l->rank;
        narrowed(l->x + p.row * l->in, p.rows, l->a + p.expert * l->rank * l->in, l->in, l->scale, narrow, l->rank);
        const float *b = t->b + p.expert * l->rank * l->out;
        panel_product((Panel){narrow, l->rank, 1}, p.rows, l->rank, b, l->out, l->out, l->y + p.row * l->out, l->out, 1);
    }
}

/* 0, or -1 when there is no memory. */
int ernie_low_rank(const LowRank *l) {
    Turned t;
    if (turn(l, &t)) return -1;
    int64_t tasks = all_chunks(l);
    for_all(forward_some, &t, tasks, share_of_tasks(l, tasks, 1));
    free(t.b);
    return 0;
}

static void backward_some(const void *context, int64_t begin, int64_t end) {
    const Turned *t = context;
    const LowRank *l = t->given;
    for (int64_t i = begin; i < end; i++) {
        Piece p = piece(l, i);
        float *narrow = l->grad_narrow + p.row * l->rank;
        const float *b = t->b + p.expert * l->rank * l->out, *a = l->a + p.expert * l->rank * l->in;
        narrowed(l->gradient + p.row * l->out, p.rows, b, l->out, l->scale, narrow, l->rank);
        if (!l->grad_x) continue;
        panel_product((Panel){narrow, l->rank, 1}, p.rows, l->rank, a, l->in, l->in, l->grad_x + p.row * l->in, l->in, 1);
    }
}


static int64_t strips(int64_t width) { return (width + STRIP - 1) / STRIP; }

static int64_t first_row(const LowRank *l, int64_t expert) {
    int64_t row = 0;
    for (int64_t e = 0; e < expert; e++) row += l->counts[e];
    return row;
}

static void factor_gradients(const void *context, int64_t begin, int64_t end) {
    const LowRank *l = context;
    int64_t of_a = strips(l->in), of_b = strips(l->out), rank = l->rank;
    float turned[HIGHEST * STRIP];
    for (int64_t i = begin; i < end; i++) {
        int64_t e = i / (of_a + of_b), strip = i % (of_a + of_b), row = first_row(l, e), rows = l->counts[e];
        int is_a = strip < of_a;
        int64_t width = is_a ? l->in : l->out, column = (is_a ? strip : strip - of_a) * STRIP;
        int64_t columns = width - column < STRIP ? width - column : STRIP;
        Panel narrow = {(is_a ? l->grad_narrow : l->narrow) + row * rank, 1, rank};
        const float *wide = (is_a ? l->x : l->gradient) + row * width + column;
        float *grad = l->grad_a + e * rank * width + column;
        if (is_a) {
            panel_product(narrow, rank, rows, wide, width, columns, grad, width, 0);
            continue;
        }
        panel_product(narrow, rank, rows, wide, width, columns, turned, STRIP, 0);
        for (int64_t c = 0; c < columns; c++)
            for (int64_t r = 0; r < rank; r++)
                l->grad_b[(e * width + column + c) * rank + r] = turned[r * STRIP + c];
    }
}

/* The gradients of both factors, and what the low-rank product adds to that of x. */
int ernie_low_rank_back(const LowRank *l) {
    Turned t;
    if (turn(l, &t)) return -1;
    int64_t tasks = all_chunks(l), wide = l->experts * (strips(l->in) + strips(l->out));
    for_all(backward_some, &t, tasks, share_of_tasks(l, tasks, 1));
    free(t.b);
    for_all(factor_gradients, l, wide, share_of_tasks(l, wide, 4));
    return 0;
}
