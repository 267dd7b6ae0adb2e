/* Attention without a matrix of queries x keys in memory.

   A block of queries stands in the lanes of the vectors, so that keys and values are read as they lie, one
   number for all lanes, and the softmax needs no sum across lanes. Exponentials are powers of two: the
   queries are scaled by log2(e) as well. No sum depends on which thread comes first. */
#include "attention.h"

#include <math.h>
#include <stdlib.h>

#include "numeric.h"
#include "linear.h"
#include "panel.h"

#define QUERIES 64 /* of one block; they are PARTS vectors */
#define PARTS (QUERIES / LANES)
#define KEYS 96 /* of one block */
#define WIDEST 256 /* width of a head at most */
#define NOTHING_YET -1e30f
#define SMALL (1 << 21) /* products that one thread has done before others are awake */
#define ALIGNED __attribute__((aligned(64)))

/* Some queries of one head; `turned` are they, scaled, [width, QUERIES], of which `lanes` are in use. */
typedef struct {
    const Attention *attention;
    const Stretch *stretch;
    int64_t head, group, count, lanes, place;
    float turned[WIDEST * QUERIES] ALIGNED;
} Block;

typedef enum { NONE, SOME, ALL } Sight;

static float *at(const Rows *rows, int64_t token, int64_t head) {
    return rows->numbers + token * rows->token + head * rows->head;
}

/* Rows [count, width] times a factor -> [width, QUERIES]; the lanes left over are zero. */
static void turn(const float *rows, int64_t step, int64_t count, int64_t width, float factor, float *turned) {
    memset(turned, 0, (size_t)(width * QUERIES) * sizeof(float));
    for (int64_t i = 0; i < count; i++)
        for (int64_t d = 0; d < width; d++) turned[d * QUERIES + i] = rows[i * step + d] * factor;
}

static void turn_back(const float *turned, int64_t count, int64_t width, float *rows, int64_t step) {
    for (int64_t i = 0; i < count; i++)
        for (int64_t d = 0; d < width; d++) rows[i * step + d] = turned[d * QUERIES + i];
}

static void begin_block(Block *block, const Attention *a, const Stretch *stretch, int64_t head) {
    block->attention = a, block->stretch = stretch;
    block->head = head, block->group = head / (a->heads / a->groups);
    block->count = stretch->end - stretch->row;
    block->lanes = (block->count + LANES - 1) / LANES * LANES;
    block->place = stretch->row + a->keys - a->queries;
    const float *rows = at(&a->q, stretch->row, head);
    turn(rows, a->q.token, block->count, a->width, a->scale * LOG2_E, block->turned);
}

/* Whether some of the keys are seen by some of the queries, or all by all. */
static Sight sight(const Block *block, int64_t key, int64_t count) {
    const int64_t *first = block->attention->first + key, *until = block->attention->until + key;
    int64_t begin = block->place, last = begin + block->count - 1;
    int seen = 0, hidden = 0;
    for (int64_t j = 0; j < count; j++) {
        seen |= (first[j] <= last) & (begin < until[j]);
        hidden |= (first[j] > begin) | (last >= until[j]);
    }
    return !seen ? NONE : hidden ? SOME : ALL;
}

/* Minus infinity where a query does not see a key. */
static void hide(const Block *block, int64_t key, int64_t count, float *scores) {
    for (int64_t j = 0; j < count; j++) {
        int32_t first = (int32_t)(block->attention->first[key + j] - block->place);
        int32_t until = (int32_t)(block->attention->until[key + j] - block->place);
        for (int32_t i = 0; i < QUERIES; i++)
            scores[j * QUERIES + i] = (i >= first) & (i < until) ? scores[j * QUERIES + i] : -INFINITY;
    }
}

/* scores [count, QUERIES] in units of log 2. */
static void score(const Block *block, int64_t key, int64_t count, Sight seen, float *scores) {
    const Attention *a = block->attention;
    Panel keys = {at(&a->k, key, block->group), a->k.token, 1};
    panel_product(keys, count, a->width, block->turned, QUERIES, block->lanes, scores, QUERIES, 0);
    if (seen == SOME) hide(block, key, count, scores);
}

/* Scores -> weights relative to the highest so far; `shrink` is what that does to all weights before. */
INLINE void soften_parts(int parts, float *scores, int64_t count, float *peaks, float *totals, float *shrink) {
    V peak[PARTS], total[PARTS];
    for (int u = 0; u < parts; u++) peak[u] = load(peaks + u * LANES);
    for (int64_t j = 0; j < count; j++)
        for (int u = 0; u < parts; u++) peak[u] = larger(peak[u], load(scores + j * QUERIES + u * LANES));
    for (int u = 0; u < parts; u++) {
        V by = power_of_two(load(peaks + u * LANES) - peak[u]);
        total[u] = load(totals + u * LANES) * by;
        store(shrink + u * LANES, by);
        store(peaks + u * LANES, peak[u]);
    }
    for (int64_t j = 0; j < count; j++)
        for (int u = 0; u < parts; u++) {
            V weight = power_of_two(load(scores + j * QUERIES + u * LANES) - peak[u]);
            store(scores + j * QUERIES + u * LANES, weight);
            total[u] += weight;
        }
    for (int u = 0; u < parts; u++) store(totals + u * LANES, total[u]);
}

static void soften(const Block *block, float *scores, int64_t count, float *peaks, float *totals, float *shrink) {
    if (block->lanes == LANES) soften_parts(1, scores, count, peaks, totals, shrink); /* a few new tokens */
    else soften_parts(PARTS, scores, count, peaks, totals, shrink);
}

static void multiply(float *turned, int64_t width, const float *by) {
    for (int64_t d = 0; d < width; d++)
        for (int u = 0; u < PARTS; u++) {
            float *p = turned + d * QUERIES + u * LANES;
            store(p, load(p) * load(by + u * LANES));
        }
}

static void attend(const Attention *a, const Stretch *stretch, int64_t head) {
    Block block;
    float output[WIDEST * QUERIES] ALIGNED, scores[KEYS * QUERIES] ALIGNED = {0};
    float peaks[QUERIES], totals[QUERIES] = {0}, by[QUERIES] = {0};
    begin_block(&block, a, stretch, head);
    for (int i = 0; i < QUERIES; i++) peaks[i] = NOTHING_YET;
    memset(output, 0, (size_t)(a->width * QUERIES) * sizeof(float));
    for (int64_t key = stretch->low; key < stretch->high; key += KEYS) {
        int64_t count = stretch->high - key < KEYS ? stretch->high - key : KEYS;
        Sight seen = sight(&block, key, count);
        if (seen == NONE) continue;
        score(&block, key, count, seen, scores);
        soften(&block, scores, count, peaks, totals, by);
        multiply(output, a->width, by);
        Panel values = {at(&a->v, key, block.group), 1, a->v.token};
        panel_product(values, a->width, count, scores, QUERIES, block.lanes, output, QUERIES, 1);
    }
    for (int i = 0; i < QUERIES; i++) by[i] = 1.0f / totals[i];
    multiply(output, a->width, by);
    turn_back(output, block.count, a->width, at(&a->output, stretch->row, head), a->output.token);
    for (int64_t i = 0; i < block.count && a->log_sums; i++)
        a->log_sums[head * a->queries + stretch->row + i] = peaks[i] + log2f(totals[i]);
}

static void attend_some(const void *context, int64_t begin, int64_t end) {
    const Attention *a = context;
    for (int64_t i = begin; i < end; i++) /* from the last on: in causal attention they see most */
        attend(a, a->blocks + (a->block_count - 1 - i / a->heads), i % a->heads);
}

/* How many of so many tasks a thread takes at a time. */
static int64_t share_of_tasks(const Attention *a, int64_t tasks) {
    int64_t products = 0;
    for (int64_t i = 0; i < a->block_count; i++)
        products += (a->blocks[i].end - a->blocks[i].row) * (a->blocks[i].high - a->blocks[i].low);
    return products * a->heads * a->width < SMALL ? tasks : 1;
}

void ernie_attention(const Attention *a) {
    int64_t tasks = a->heads * a->block_count;
    for_all(attend_some, a, tasks, share_of_tasks(a, tasks));
}

/* Weights and gradients of the scores, from scores and gradients of the weights, both overwritten. */
static void differentiate(float *scores, float *slopes, int64_t count, const float *log_sums, const float *inner,
                          float scale) {
    for (int64_t j = 0; j < count; j++)
        for (int u = 0; u < PARTS; u++) {
            float *score = scores + j * QUERIES + u * LANES, *slope = slopes + j * QUERIES + u * LANES;
            V weight = power_of_two(load(score) - load(log_sums + u * LANES));
            store(score, weight);
            store(slope, weight * (load(slope) - load(inner + u * LANES)) * scale);
        }
}

/* Sums of output times gradient by query, which are those of weights times their gradients. */
static void inner_products(const Attention *a, const Block *block, float *inner) {
    for (int64_t i = 0; i < block->count; i++)
        inner[i] = inner_product(at(&a->output, block->stretch->row + i, block->head),
                                 at(&a->gradient, block->stretch->row + i, block->head), a->width);
}

/* grad_q of one block, and what it adds to the gradients of the keys and values it sees. */
static void attend_back(const Attention *a, const Stretch *stretch, int64_t head, const Rows *grad_k, const Rows *grad_v) {
    Block block;
    float gradient[WIDEST * QUERIES] ALIGNED, grad_q[WIDEST * QUERIES] ALIGNED;
    float scores[KEYS * QUERIES] ALIGNED = {0}, slopes[KEYS * QUERIES] ALIGNED = {0};
    float inner[QUERIES] = {0}, log_sums[QUERIES] = {0};
    begin_block(&block, a, stretch, head);
    const float *q = at(&a->q, stretch->row, head), *given = at(&a->gradient, stretch->row, head);
    turn(given, a->gradient.token, block.count, a->width, 1.0f, gradient);
    inner_products(a, &block, inner);
    memcpy(log_sums, a->log_sums + head * a->queries + stretch->row, (size_t)block.count * sizeof(float));
    memset(grad_q, 0, (size_t)(a->width * QUERIES) * sizeof(float));
    for (int64_t key = stretch->low; key < stretch->high; key += KEYS) {
        int64_t count = stretch->high - key < KEYS ? stretch->high - key : KEYS;
        Sight seen = sight(&block, key, count);
        if (seen == NONE) continue;
        score(&block, key, count, seen, scores);
        Panel values = {at(&a->v, key, block.group), a->v.token, 1};
        panel_product(values, count, a->width, gradient, QUERIES, block.lanes, slopes, QUERIES, 0);
        differentiate(scores, slopes, count, log_sums, inner, a->scale);
        Panel keys = {at(&a->k, key, block.group), 1, a->k.token};
        panel_product(keys, a->width, count, slopes, QUERIES, block.lanes, grad_q, QUERIES, 1);
        Panel weights = {scores, QUERIES, 1}, changes = {slopes, QUERIES, 1};
        panel_product(weights, count, block.count, given, a->gradient.token, a->width, at(grad_v, key, block.group),
                      grad_v->token, 1);
        panel_product(changes, count, block.count, q, a->q.token, a->width, at(grad_k, key, block.group),
                      grad_k->token, 1);
    }
    turn_back(grad_q, block.count, a->width, at(&a->grad_q, stretch->row, head), a->grad_q.token);
}

/* Several threads work on the query heads that share keys, each for gradients of its own that are added up
   afterwards; the first ones' place is the result. */
typedef struct {
    const Attention *attention;
    int64_t shares, size; /* of the query heads of a group; numbers in grad_k */
    float *own; /* grad_k and grad_v of the second share, of the third, ... */
} Backward;

static Rows share_of(const Backward *b, const Rows *rows, int64_t share, int which) {
    Rows found = *rows;
    if (share) found.numbers = b->own + (2 * (share - 1) + which) * b->size;
    return found;
}

static void unit_back(const void *context, int64_t begin, int64_t end) {
    const Backward *b = context;
    const Attention *a = b->attention;
    int64_t repeat = a->heads / a->groups;
    for (int64_t i = begin; i < end; i++) {
        int64_t share = i % b->shares, group = i / b->shares % a->groups, unit = i / b->shares / a->groups;
        Rows grad_k = share_of(b, &a->grad_k, share, 0), grad_v = share_of(b, &a->grad_v, share, 1);
        for (int64_t head = group * repeat + share; head < (group + 1) * repeat; head += b->shares)
            for (int64_t block = a->units[unit]; block < a->units[unit + 1]; block++)
                attend_back(a, a->blocks + block, head, &grad_k, &grad_v);
    }
}

static void add_shares(const void *context, int64_t begin, int64_t end) {
    const Backward *b = context;
    for (int64_t share = 1; share < b->shares; share++) {
        const float *grad_k = b->own + 2 * (share - 1) * b->size, *grad_v = grad_k + b->size;
        for (int64_t i = begin; i < end; i++) b->attention->grad_k.numbers[i] += grad_k[i];
        for (int64_t i = begin; i < end; i++) b->attention->grad_v.numbers[i] += grad_v[i];
    }
}

/* grad_k and grad_v hold zeros when it begins. 0, or -1 when there is no memory. */
int ernie_attention_back(const Attention *a) {
    int64_t tasks = a->unit_count * a->groups, repeat = a->heads / a->groups;
    Backward b = {a, 1, a->keys * a->groups * a->width, NULL};
    if (thread_count() > tasks) b.shares = (thread_count() + tasks - 1) / tasks;
    if (b.shares > repeat) b.shares = repeat;
    if (b.shares > 1 && !(b.own = calloc((size_t)(2 * (b.shares - 1) * b.size), sizeof(float)))) return -1;
    for_all(unit_back, &b, tasks * b.shares, share_of_tasks(a, tasks * b.shares));
    if (b.own) for_all(add_shares, &b, b.size, 1 << 14);
    free(b.own);
    return 0;
}
