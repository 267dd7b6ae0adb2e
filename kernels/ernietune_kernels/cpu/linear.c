#include "linear.h"

#include <stdatomic.h>
#include <stdlib.h>

#include "digits.h"
#include "tiles.h"
#include "vector.h"

/* So few rows of x meet each row of weights as it is read; more go through tiles, where there are some. */
#define FEW_ROWS_BF16 2
#define FEW_ROWS_CODES 8

/* The OpenMP runtime that the process has already: a second one's threads would fight with its own. */
typedef void (*Parallel)(void (*body)(void *), void *data, unsigned threads, unsigned flags);
static Parallel parallel;
static int threads = 1, tiles_exist;

void ernie_threads(void *gomp_parallel, int count) {
    parallel = (Parallel)gomp_parallel;
    threads = parallel ? count : 1;
    tiles_exist = tiles_ready();
}

/* Whether products of many rows are in good hands here. */
int ernie_tiles(void) { return tiles_exist; }

int thread_count(void) { return threads; }

typedef struct {
    Task task;
    const void *context;
    int64_t count, chunk;
    atomic_llong next;
} Team;

static void work(void *data) {
    Team *team = data;
    for (;;) {
        int64_t begin = atomic_fetch_add(&team->next, team->chunk);
        if (begin >= team->count) return;
        int64_t end = begin + team->chunk;
        team->task(team->context, begin, end < team->count ? end : team->count);
    }
}

void for_all(Task task, const void *context, int64_t count, int64_t chunk) {
    if (threads == 1 || count <= chunk) {
        if (count) task(context, 0, count);
        return;
    }
    Team team = {task, context, count, chunk, 0};
    parallel(work, &team, (unsigned)threads, 0);
}

INLINE V weights16(int bits, const void *row, int64_t i) {
    if (bits == 32) return load((const float *)row + i);
    if (bits == 16) return load_bf16((const uint16_t *)row + i);
    return load_int8((const int8_t *)row + i);
}

INLINE float weight1(int bits, const void *row, int64_t i) {
    if (bits == 32) return ((const float *)row)[i];
    if (bits == 16) return from_bf16(((const uint16_t *)row)[i]);
    return ((const int8_t *)row)[i];
}

INLINE void fetch_ahead(const char *p, int bytes) {
    for (int b = 0; b < bytes; b += 64) __builtin_prefetch(p + AHEAD + b, 0, 3);
}

/* One row of weights times R rows of x; U sums per row of x, so that additions need not wait for each other. */
INLINE void dot(int bits, int R, int U, const void *row, const float *x, int64_t width, float *result) {
    V total[8];
#pragma GCC unroll 8
    for (int k = 0; k < R * U; k++) total[k] = spread(0);
    int64_t i = 0;
    for (; i + LANES * U <= width; i += LANES * U) {
        fetch_ahead((const char *)row + i * bits / 8, LANES * U * bits / 8);
#pragma GCC unroll 8
        for (int u = 0; u < U; u++) {
            V w = weights16(bits, row, i + LANES * u);
#pragma GCC unroll 8
            for (int r = 0; r < R; r++) total[r * U + u] += w * load(x + r * width + i + LANES * u);
        }
    }
    for (; i + LANES <= width; i += LANES) {
        V w = weights16(bits, row, i);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) total[r * U] += w * load(x + r * width + i);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
        for (int u = 1; u < U; u++) total[r * U] += total[r * U + u];
        result[r] = sum(total[r * U]);
        for (int64_t j = i; j < width; j++) result[r] += weight1(bits, row, j) * x[r * width + j];
    }
}

/* The same for int4; of every 32 columns of x the even ones come first (see `split_columns`). */
INLINE void dot4(int R, const uint8_t *row, const float *scale, int64_t group, const float *x, int64_t width,
                 float *result) {
    V total[4];
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) total[r] = spread(0);
    for (int64_t g = 0; g * group < width; g++) {
        V even[4], odd[4];
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) even[r] = odd[r] = spread(0);
        fetch_ahead((const char *)row + g * group / 2, 64);
        for (int64_t i = g * group; i < (g + 1) * group; i += 2 * LANES) {
            V low, high;
            load_int4(row + i / 2, &low, &high);
#pragma GCC unroll 4
            for (int r = 0; r < R; r++) {
                even[r] += low * load(x + r * width + i);
                odd[r] += high * load(x + r * width + i + LANES);
            }
        }
        V factor = spread(scale[g]);
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) total[r] += (even[r] + odd[r]) * factor;
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) result[r] = sum(total[r]);
}

static const char *row_of(const Matrix *m, int64_t row) {
    return (const char *)m->codes + row * m->in * m->bits / 8;
}

INLINE void some_rows(const Matrix *m, int R, int64_t row, const float *x, float *result) {
    const void *codes = row_of(m, row);
    int64_t width = m->in;
    int U = R == 1 ? 4 : R == 2 ? 2 : 1;
    switch (m->bits) {
    case 32: dot(32, R, U, codes, x, width, result); break;
    case 16: dot(16, R, U, codes, x, width, result); break;
    case 8:
        dot(8, R, U, codes, x, width, result);
        for (int r = 0; r < R; r++) result[r] *= m->scale[row];
        break;
    default: dot4(R, codes, m->scale + row * (width / m->group), m->group, x, width, result);
    }
}

/* A job whose x is in the form that the matrix wants: tiles, digits, or else job.x. */
typedef struct {
    Job job;
    const char *tiles;
    const Digits *digits;
} Prepared;

static int is_tiled(const Job *job) {
    int bits = job->matrix.bits;
    return tiles_exist && bits <= 16 && job->rows > (bits == 16 ? FEW_ROWS_BF16 : FEW_ROWS_CODES);
}

/* 0, or -1 when there is no memory for tiles. */
static int job_rows(const Prepared *prepared, int64_t begin, int64_t end) {
    const Job *job = &prepared->job;
    const Matrix *m = &job->matrix;
    if (prepared->tiles) return tiled_columns(m, begin, end, prepared->tiles, job->rows, job->y);
    float result[4];
    for (int64_t o = begin; o < end; o++) {
        if (prepared->digits) {
            dot_digits(m, o, prepared->digits, job->rows, job->y + o, m->out);
            continue;
        }
        int64_t done = 0;
        while (done < job->rows) {
            const float *x = job->x + done * m->in;
            int64_t left = job->rows - done, taken = left >= 4 ? 4 : left >= 2 ? 2 : 1;
            if (taken == 4) some_rows(m, 4, o, x, result);
            else if (taken == 2) some_rows(m, 2, o, x, result);
            else some_rows(m, 1, o, x, result);
            for (int64_t r = 0; r < taken; r++) job->y[(done + r) * m->out + o] = result[r];
            done += taken;
        }
    }
    return 0;
}

typedef struct {
    Prepared *list;
    atomic_int failed;
} Jobs;

static void jobs_rows(const void *context, int64_t begin, int64_t end) {
    Jobs *jobs = (Jobs *)context;
    const Prepared *prepared = jobs->list;
    for (int64_t first = 0; first < end; first += prepared->job.matrix.out, prepared++) {
        int64_t out = prepared->job.matrix.out;
        int64_t low = begin > first ? begin - first : 0, high = end - first < out ? end - first : out;
        if (low < high && job_rows(prepared, low, high)) jobs->failed = 1;
    }
}

static void split_columns(const float *x, int64_t count, float *result) {
    for (int64_t i = 0; i < count; i += 32)
        for (int64_t j = 0; j < 16; j++) {
            result[i + j] = x[i + 2 * j];
            result[i + 16 + j] = x[i + 2 * j + 1];
        }
}

/* Bytes that the prepared x of a job takes, a multiple of 64. */
static int64_t room_of(const Job *job) {
    const Matrix *m = &job->matrix;
    if (is_tiled(job)) return tiles_bytes(job->rows, m->in);
    if (m->bits <= BYTE_PRODUCTS) return job->rows * blocks_of(m->in) * (int64_t)sizeof(Digits);
    return m->bits == 4 ? (job->rows * m->in * (int64_t)sizeof(float) + 63) / 64 * 64 : 0;
}

static Prepared prepared_in(char *room, const Job *job) {
    const Matrix *m = &job->matrix;
    Prepared result = {*job, NULL, NULL};
    if (is_tiled(job)) {
        to_tiles(job->x, job->rows, m->in, room);
        result.tiles = room;
    } else if (m->bits <= BYTE_PRODUCTS) {
        to_digits(job->x, job->rows, m->in, m->bits, (Digits *)room);
        result.digits = (const Digits *)room;
    } else if (m->bits == 4) {
        split_columns(job->x, job->rows * m->in, (float *)room);
        result.job.x = (const float *)room;
    }
    return result;
}

/* Neighbours with the same x and kind of codes share one prepared x. */
static void prepare(const Job *jobs, int64_t count, Prepared *prepared, char *room) {
    for (int64_t i = 0; i < count; i++) {
        if (i && jobs[i].x == jobs[i - 1].x && jobs[i].matrix.bits == jobs[i - 1].matrix.bits) {
            prepared[i] = prepared[i - 1];
            prepared[i].job.matrix = jobs[i].matrix;
            prepared[i].job.y = jobs[i].y;
            continue;
        }
        prepared[i] = prepared_in(room, &jobs[i]);
        room += room_of(&jobs[i]);
    }
}

/* How many rows of weights a thread takes at a time: few enough for all to end together, and otherwise as many as can
   be, since a thread's look-ahead starts anew with each piece (64 KiB instead of 4 MiB cost a fifth of the speed). */
static int64_t chunk_of(int64_t rows, int64_t bytes, int tiled) {
    if (tiled) { /* whole panels; each piece reads all tiles of x again */
        int64_t even = (rows / (4 * threads) + 63) / 64 * 64;
        return even < 128 ? 128 : even < COLUMNS ? even : COLUMNS;
    }
    int64_t chunk = (4 << 20) / (bytes / (rows ? rows : 1) + 1), even = rows / (4 * threads) + 1;
    return chunk < 8 ? 8 : chunk < even ? chunk : even;
}

int run_jobs(const Job *jobs, int64_t count) {
    int64_t total = 0, bytes = 0, room = 0;
    int tiled = 0;
    for (int64_t i = 0; i < count; i++) {
        const Matrix *m = &jobs[i].matrix;
        total += m->out;
        bytes += m->out * m->in * m->bits / 8;
        room += room_of(&jobs[i]);
        tiled |= is_tiled(&jobs[i]);
    }
    int64_t list = (count * (int64_t)sizeof(Prepared) + 63) / 64 * 64;
    char *own = aligned_alloc(64, (size_t)(room + list));
    if (!own) return count ? -1 : 0;
    Jobs prepared = {(Prepared *)(own + room), 0};
    prepare(jobs, count, prepared.list, own);
    for_all(jobs_rows, &prepared, total, chunk_of(total, bytes, tiled));
    free(own);
    return -prepared.failed;
}

Matrix expert_of(const Matrix *stack, int64_t index) {
    Matrix m = *stack;
    m.codes = (const char *)stack->codes + index * m.out * m.in * m.bits / 8;
    if (m.scale) m.scale += index * m.out * (m.bits == 4 ? m.in / m.group : 1);
    return m;
}

int ernie_product(const Matrix *matrix, const float *x, float *y, int64_t rows) {
    Job job = {*matrix, x, y, rows};
    return run_jobs(&job, 1);
}

/* Rows sorted by expert, counts[e] of them for expert e. */
int ernie_grouped(const Matrix *stack, int64_t experts, const int64_t *counts, const float *x, float *y) {
    Job *jobs = malloc((size_t)experts * sizeof(Job));
    if (!jobs) return -1;
    int64_t used = 0;
    for (int64_t e = 0; e < experts; e++) {
        if (!counts[e]) continue;
        jobs[used++] = (Job){expert_of(stack, e), x, y, counts[e]};
        x += counts[e] * stack->in;
        y += counts[e] * stack->out;
    }
    int failed = run_jobs(jobs, used);
    free(jobs);
    return failed;
}
