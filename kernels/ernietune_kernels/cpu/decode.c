#include "decode.h"

#include <math.h>
#include <stdlib.h>

#include "pointwise.h"
#include "sequence.h"
#include "vector.h"

#define KEYS 128 /* keys whose scores are held at a time */
#define GROUP 16 /* query heads that read a key together at most */

/* e^x to about 1e-7 relative, for x <= 0 or small; written so that the compiler makes vectors of it. */
INLINE float exponential(float x) {
    x = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
    float n = rintf(x * 1.44269504f);
    float r = x - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    int32_t power = ((int32_t)n + 127) << 23;
    float scale;
    memcpy(&scale, &power, sizeof scale);
    return p * scale;
}

static float dot_product(const float *a, const float *b, int64_t width) {
    V total = spread(0);
    int64_t i = 0;
    for (; i + LANES <= width; i += LANES) total += load(a + i) * load(b + i);
    float result = sum(total);
    for (; i < width; i++) result += a[i] * b[i];
    return result;
}

static void add(float *x, const float *y, int64_t count) {
    for (int64_t i = 0; i < count; i++) x[i] += y[i];
}

static void rms_norm(const float *x, const float *weight, float epsilon, int64_t rows, int64_t width, float *y) {
    for (int64_t r = 0; r < rows; r++, x += width, y += width) {
        float scale = 1.0f / sqrtf(dot_product(x, x, width) / (float)width + epsilon);
        for (int64_t i = 0; i < width; i++) y[i] = x[i] * scale * weight[i];
    }
}

static void swiglu(float *gate, const float *up, int64_t count) {
    Swiglu in_place = {.gate = gate, .up = up, .y = gate, .count = count};
    ernie_swiglu(&in_place);
}

static void rotate(float *x, int64_t heads, int64_t width, const float *cos, const float *sin) {
    for (int64_t h = 0; h < heads; h++, x += width)
        for (int64_t j = 0; j < width / 2; j++) {
            float even = x[2 * j], odd = x[2 * j + 1];
            x[2 * j] = even * cos[j] - odd * sin[j];
            x[2 * j + 1] = odd * cos[j] + even * sin[j];
        }
}

typedef struct {
    const Decoder *decoder;
    const Layer *layer;
    const Step *step;
    const float *q;
    float *output;
    int64_t first, rows; /* of the step: those of this call */
    int64_t parts, part; /* of the query heads that share keys: how many parts, how large */
} Attention;

/* Query heads [first, first + heads) of one row, all with the same keys; softmax piece by piece. */
static void attend(const Attention *a, int64_t row, int64_t first, int64_t heads) {
    const Decoder *d = a->decoder;
    int64_t width = d->head_dim, kv = first / (d->heads / d->kv_heads);
    const float *keys = a->layer->keys + kv * d->slots * width, *values = a->layer->values + kv * d->slots * width;
    const float *q = a->q + (row * d->heads + first) * width;
    float *output = a->output + (row * d->heads + first) * width;
    float scale = 1.0f / sqrtf((float)width);
    float scores[GROUP][KEYS], peak[GROUP], total[GROUP];
    for (int64_t h = 0; h < heads; h++) peak[h] = -INFINITY, total[h] = 0;
    memset(output, 0, (size_t)(heads * width) * sizeof(float));
    for (int64_t begin = a->step->starts[row]; begin < a->step->starts[row + 1]; begin += KEYS) {
        int64_t left = a->step->starts[row + 1] - begin, count = left < KEYS ? left : KEYS;
        const int64_t *slots = a->step->seen + begin;
        for (int64_t s = 0; s < count; s++)
            for (int64_t h = 0; h < heads; h++)
                scores[h][s] = dot_product(q + h * width, keys + slots[s] * width, width) * scale;
        for (int64_t h = 0; h < heads; h++) {
            float best = peak[h];
            for (int64_t s = 0; s < count; s++) best = scores[h][s] > best ? scores[h][s] : best;
            float shrink = exponential(peak[h] - best), added = 0;
            for (int64_t s = 0; s < count; s++) scores[h][s] = exponential(scores[h][s] - best);
            for (int64_t s = 0; s < count; s++) added += scores[h][s];
            total[h] = total[h] * shrink + added;
            peak[h] = best;
            for (int64_t i = 0; i < width; i++) output[h * width + i] *= shrink;
        }
        for (int64_t s = 0; s < count; s++) {
            const float *value = values + slots[s] * width;
            for (int64_t h = 0; h < heads; h++)
                for (int64_t i = 0; i < width; i++) output[h * width + i] += scores[h][s] * value[i];
        }
    }
    for (int64_t h = 0; h < heads; h++)
        for (int64_t i = 0; i < width; i++) output[h * width + i] /= total[h];
}

static void attend_some(const void *context, int64_t begin, int64_t end) {
    const Attention *a = context;
    const Decoder *d = a->decoder;
    int64_t repeat = d->heads / d->kv_heads, per_row = d->kv_heads * a->parts;
    for (int64_t i = begin; i < end; i++) {
        int64_t row = a->first + i / per_row, group = i % per_row / a->parts, low = i % a->parts * a->part;
        int64_t heads = repeat - low < a->part ? repeat - low : a->part;
        if (heads > 0) attend(a, row, group * repeat + low, heads);
    }
}

/* Rows with a sequence each, from `first` on. */
static void attend_rows(Attention a, int64_t first, int64_t rows) {
    const Decoder *d = a.decoder;
    int64_t repeat = d->heads / d->kv_heads, tasks = rows * d->kv_heads;
    int64_t parts = (thread_count() + tasks - 1) / tasks;
    if (parts < (repeat + GROUP - 1) / GROUP) parts = (repeat + GROUP - 1) / GROUP;
    if (parts > repeat) parts = repeat;
    a.first = first, a.parts = parts, a.part = (repeat + parts - 1) / parts;
    for_all(attend_some, &a, tasks * parts, 1);
}

static Sequence sequence_of(const Attention *a, int64_t group) {
    const Decoder *d = a->decoder;
    const Step *step = a->step;
    int64_t repeat = d->heads / d->kv_heads, last = a->first + a->rows - 1, stride = d->heads * d->head_dim;
    int64_t at = group * d->slots * d->head_dim, place = a->first * stride + group * repeat * d->head_dim;
    const int64_t *slots = step->seen + step->starts[last];
    return (Sequence){a->q + place, a->layer->keys + at, a->layer->values + at, a->output + place, slots,
                      step->starts[last + 1] - step->starts[last], a->rows, repeat, d->head_dim, stride};
}

static void attend_lanes(const void *context, int64_t begin, int64_t end) {
    const Attention *a = context;
    for (int64_t i = begin; i < end; i++) {
        Sequence sequence = sequence_of(a, i / a->parts);
        attend_sequence(&sequence, i % a->parts * LANES);
    }
}

/* How many rows from `row` on are neighbours in one sequence: each sees the last key of the one before, which no other
   sequence has, and one more. */
static int64_t neighbours(const Step *step, int64_t row) {
    const int64_t *starts = step->starts;
    int64_t last = row;
    for (; last + 1 < step->rows; last++) {
        int64_t length = starts[last + 1] - starts[last];
        if (starts[last + 2] - starts[last + 1] != length + 1) break;
        if (step->seen[starts[last + 1] + length - 1] != step->seen[starts[last + 1] - 1]) break;
    }
    return last - row + 1;
}

static void attention(const Decoder *d, const Layer *layer, const Step *step, const float *q, float *output) {
    Attention a = {.decoder = d, .layer = layer, .step = step, .q = q, .output = output};
    int64_t repeat = d->heads / d->kv_heads, alone = 0; /* rows before this one that wait to be attended together */
    for (int64_t row = 0; row < step->rows; row += a.rows) {
        a.rows = neighbours(step, row);
        if (a.rows == 1 || a.rows * repeat < LANES / 2) {
            alone += a.rows;
            continue;
        }
        if (alone) attend_rows(a, row - alone, alone);
        alone = 0;
        a.first = row, a.parts = (a.rows * repeat + LANES - 1) / LANES;
        for_all(attend_lanes, &a, d->kv_heads * a.parts, 1);
    }
    if (alone) attend_rows(a, step->rows - alone, alone);
}

static void keep(const Decoder *d, const Layer *layer, const Step *step, const float *k, const float *v) {
    size_t size = (size_t)d->head_dim * sizeof(float);
    for (int64_t r = 0; r < step->rows; r++)
        for (int64_t h = 0; h < d->kv_heads; h++) {
            int64_t at = (h * d->slots + step->seen[step->starts[r + 1] - 1]) * d->head_dim;
            memcpy(layer->keys + at, k + (r * d->kv_heads + h) * d->head_dim, size);
            memcpy(layer->values + at, v + (r * d->kv_heads + h) * d->head_dim, size);
        }
}

/* Adds the attention's output to x; `room` holds q, k, v and what the heads saw. */
static int attention_block(const Decoder *d, const Layer *layer, const Step *step, const float *normed,
                           float *room, float *result) {
    int64_t rows = step->rows, query = d->heads * d->head_dim, key = d->kv_heads * d->head_dim;
    float *q = room, *k = q + rows * query, *v = k + rows * key, *seen = v + rows * key;
    Job jobs[3] = {{layer->q, normed, q, rows}, {layer->k, normed, k, rows}, {layer->v, normed, v, rows}};
    if (run_jobs(jobs, 3)) return -1;
    for (int64_t r = 0; r < rows; r++) {
        const float *cos = step->cos + r * d->head_dim / 2, *sin = step->sin + r * d->head_dim / 2;
        rotate(q + r * query, d->heads, d->head_dim, cos, sin);
        rotate(k + r * key, d->kv_heads, d->head_dim, cos, sin);
    }
    keep(d, layer, step, k, v);
    attention(d, layer, step, q, seen);
    Job last = {layer->o, seen, result, rows};
    if (run_jobs(&last, 1)) return -1;
    add(step->x, result, rows * d->hidden);
    return 0;
}

typedef struct {
    int64_t row, expert;
    float weight;
} Pair;

static void softmax(float *x, int64_t count) {
    float best = x[0], total = 0;
    for (int64_t i = 1; i < count; i++) best = x[i] > best ? x[i] : best;
    for (int64_t i = 0; i < count; i++) x[i] = exponential(x[i] - best);
    for (int64_t i = 0; i < count; i++) total += x[i];
    for (int64_t i = 0; i < count; i++) x[i] /= total;
}

/* The row's chosen experts with weights that sum to one; the bias selects only. `scores` is overwritten. */
static void route(const Layer *layer, float *scores, int64_t row, char *taken, Pair *pairs) {
    float total = 0;
    softmax(scores, layer->experts);
    memset(taken, 0, (size_t)layer->experts);
    for (int64_t c = 0; c < layer->chosen; c++) {
        int64_t best = -1;
        for (int64_t e = 0; e < layer->experts; e++)
            if (!taken[e] && (best < 0 || scores[e] + layer->bias[e] > scores[best] + layer->bias[best])) best = e;
        taken[best] = 1;
        pairs[c] = (Pair){row, best, scores[best]};
        total += scores[best];
    }
    for (int64_t c = 0; c < layer->chosen; c++) pairs[c].weight /= total > 1e-12f ? total : 1e-12f;
}

static int by_expert(const void *a, const void *b) {
    const Pair *one = a, *other = b;
    int64_t order = one->expert != other->expert ? one->expert - other->expert : one->row - other->row;
    return order < 0 ? -1 : order > 0;
}

typedef struct {
    float *x, *inner, *up, *y, *scores;
    Pair *pairs;
    Job *jobs;
    char *taken;
} Routed;

/* One job for each stretch of pairs with the same expert. */
static int64_t expert_jobs(const Matrix *stack, const Pair *pairs, int64_t count, const float *x, float *y, Job *jobs) {
    int64_t used = 0;
    for (int64_t i = 0, same; i < count; i += same) {
        for (same = 1; i + same < count && pairs[i + same].expert == pairs[i].expert;) same++;
        jobs[used++] = (Job){expert_of(stack, pairs[i].expert), x + i * stack->in, y + i * stack->out, same};
    }
    return used;
}

/* Adds the routed experts' output to `result`. */
static int routed_experts(const Decoder *d, const Layer *layer, const Step *step, const float *normed,
                          const Routed *room, float *result) {
    int64_t count = step->rows * layer->chosen, hidden = d->hidden, inner = layer->expert_gate.out;
    Matrix router = {layer->router, NULL, layer->experts, hidden, 32, (int32_t)hidden};
    Job scoring = {router, normed, room->scores, step->rows};
    if (run_jobs(&scoring, 1)) return -1;
    for (int64_t r = 0; r < step->rows; r++)
        route(layer, room->scores + r * layer->experts, r, room->taken, room->pairs + r * layer->chosen);
    qsort(room->pairs, (size_t)count, sizeof(Pair), by_expert);
    for (int64_t i = 0; i < count; i++)
        memcpy(room->x + i * hidden, normed + room->pairs[i].row * hidden, (size_t)hidden * sizeof(float));
    int64_t used = expert_jobs(&layer->expert_gate, room->pairs, count, room->x, room->inner, room->jobs);
    used += expert_jobs(&layer->expert_up, room->pairs, count, room->x, room->up, room->jobs + used);
    if (run_jobs(room->jobs, used)) return -1;
    swiglu(room->inner, room->up, count * inner);
    used = expert_jobs(&layer->expert_down, room->pairs, count, room->inner, room->y, room->jobs);
    if (run_jobs(room->jobs, used)) return -1;
    for (int64_t i = 0; i < count; i++) {
        float *y = result + room->pairs[i].row * hidden, weight = room->pairs[i].weight;
        for (int64_t j = 0; j < hidden; j++) y[j] += weight * room->y[i * hidden + j];
    }
    return 0;
}

/* The dense MLP, or that of the shared experts, into `result`. */
static int mlp(const Layer *layer, const float *normed, int64_t rows, float *room, float *result) {
    float *gate = room, *up = gate + rows * layer->gate.out;
    Job jobs[2] = {{layer->gate, normed, gate, rows}, {layer->up, normed, up, rows}};
    if (run_jobs(jobs, 2)) return -1;
    swiglu(gate, up, rows * layer->gate.out);
    Job last = {layer->down, gate, result, rows};
    return run_jobs(&last, 1);
}

static int mlp_block(const Decoder *d, const Layer *layer, const Step *step, const float *normed, float *room,
                     const Routed *routed, float *result) {
    memset(result, 0, (size_t)(step->rows * d->hidden) * sizeof(float));
    if (layer->gate.out && mlp(layer, normed, step->rows, room, result)) return -1;
    if (layer->experts && routed_experts(d, layer, step, normed, routed, result)) return -1;
    add(step->x, result, step->rows * d->hidden);
    return 0;
}

static int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

/* Memory for the widest layer; the caller frees `x`, `pairs` and `jobs`. */
static int take_routed(const Decoder *d, int64_t rows, Routed *room) {
    int64_t pairs = 0, inner = 0, experts = 0;
    for (int64_t i = 0; i < d->count; i++) {
        const Layer *layer = d->layers + i;
        pairs = larger(pairs, layer->chosen * rows);
        inner = larger(inner, layer->experts ? layer->expert_gate.out : 0);
        experts = larger(experts, layer->experts);
    }
    memset(room, 0, sizeof *room);
    if (!experts) return 0;
    size_t floats = (size_t)(pairs * (2 * d->hidden + 2 * inner) + rows * experts);
    room->x = malloc(floats * sizeof(float) + (size_t)experts);
    room->pairs = malloc((size_t)pairs * sizeof(Pair));
    room->jobs = malloc((size_t)(2 * pairs) * sizeof(Job));
    if (!room->x || !room->pairs || !room->jobs) return -1;
    room->y = room->x + pairs * d->hidden;
    room->inner = room->y + pairs * d->hidden;
    room->up = room->inner + pairs * inner;
    room->scores = room->up + pairs * inner;
    room->taken = (char *)(room->scores + rows * experts);
    return 0;
}

/* Behind the last attention a row needs no other: only the wanted ones go on. */
static void keep_wanted(Step *step, int64_t hidden) {
    if (!step->wanted) return;
    for (int64_t i = 0; i < step->wanted_rows; i++)
        memmove(step->x + i * hidden, step->x + step->wanted[i] * hidden, (size_t)hidden * sizeof(float));
    step->rows = step->wanted_rows;
}

/* Run the layers; 0, or -1 when there is no memory. */
int ernie_decode(const Decoder *d, const Step *given) {
    Step step = *given;
    int64_t wide = 2 * (d->heads + d->kv_heads) * d->head_dim, hidden = d->hidden;
    for (int64_t i = 0; i < d->count; i++) wide = larger(wide, 2 * d->layers[i].gate.out);
    float *room = malloc((size_t)(step.rows * (wide + 2 * hidden)) * sizeof(float));
    float *normed = room + step.rows * wide, *result = normed + step.rows * hidden;
    Routed routed;
    int failed = take_routed(d, step.rows, &routed) || !room;
    for (int64_t i = 0; i < d->count && !failed; i++) {
        const Layer *layer = d->layers + i;
        rms_norm(step.x, layer->input_norm, d->epsilon, step.rows, hidden, normed);
        failed = attention_block(d, layer, &step, normed, room, result);
        if (failed) break;
        if (i + 1 == d->count) keep_wanted(&step, hidden);
        rms_norm(step.x, layer->middle_norm, d->epsilon, step.rows, hidden, normed);
        failed = mlp_block(d, layer, &step, normed, room, &routed, result);
    }
    if (!failed) {
        rms_norm(step.x, d->norm, d->epsilon, step.rows, hidden, normed);
        memcpy(step.x, normed, (size_t)(step.rows * hidden) * sizeof(float));
    }
    free(routed.x), free(routed.pairs), free(routed.jobs), free(room);
    return failed ? -1 : 0;
}

static void read_some(const void *context, int64_t begin, int64_t end) {
    const float *p = context;
    V total[4] = {spread(0), spread(0), spread(0), spread(0)};
    for (int64_t i = begin; i + 4 * LANES <= end; i += 4 * LANES)
        for (int u = 0; u < 4; u++) total[u] += load(p + i + u * LANES);
    volatile float kept = sum(total[0] + total[1] + total[2] + total[3]);
    (void)kept;
}

/* Reads so many floats on all threads and does nothing with them: the memory rate that products can reach. */
void ernie_read(const float *numbers, int64_t count) { for_all(read_some, numbers, count, 1 << 18); }
