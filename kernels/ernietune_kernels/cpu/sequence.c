#include "sequence.h"

#include <math.h>

#include "numeric.h"

#define KEYS 64 /* whose scores are held at a time */
#define NUMBERS 4 /* of a value that are summed at a time, so that additions need not wait for each other */

typedef struct {
    V q[WIDEST], output[WIDEST], peak, total;
    int64_t count, last[LANES]; /* queries, and the place of the last key that each sees */
} Lanes;

INLINE int64_t place_of(const Sequence *s, int64_t query) {
    return query / s->repeat * s->stride + query % s->repeat * s->width;
}

static void load_lanes(const Sequence *s, int64_t first, Lanes *lanes) {
    int64_t left = s->rows * s->repeat - first;
    float factor = LOG2_E / sqrtf((float)s->width);
    lanes->count = left < LANES ? left : LANES;
    lanes->peak = spread(-INFINITY), lanes->total = spread(0);
    for (int64_t i = 0; i < s->width; i++) lanes->q[i] = lanes->output[i] = spread(0);
    for (int64_t lane = 0; lane < LANES; lane++) {
        int64_t query = first + (lane < lanes->count ? lane : 0); /* lanes without a query repeat the first */
        lanes->last[lane] = s->length - s->rows + query / s->repeat;
        for (int64_t i = 0; i < s->width; i++) lanes->q[i][lane] = s->q[place_of(s, query) + i] * factor;
    }
}

/* Scores, times log2 e, of `count` keys from place `begin` on; minus infinity where a query may not look. */
static void score(const Sequence *s, const Lanes *lanes, int64_t begin, int64_t count, V *scores) {
    for (int64_t k = 0; k < count; k++) {
        const float *key = s->keys + s->slots[begin + k] * s->width;
        V sums[2] = {spread(0), spread(0)};
        int64_t i = 0;
        for (; i + 2 <= s->width; i += 2) {
            sums[0] += lanes->q[i] * spread(key[i]);
            sums[1] += lanes->q[i + 1] * spread(key[i + 1]);
        }
        if (i < s->width) sums[0] += lanes->q[i] * spread(key[i]);
        scores[k] = sums[0] + sums[1];
        if (begin + k <= s->length - s->rows) continue;
        for (int64_t lane = 0; lane < LANES; lane++)
            if (begin + k > lanes->last[lane]) scores[k][lane] = -INFINITY;
    }
}

static void weigh(Lanes *lanes, int64_t count, V *scores, int64_t width) {
    V best = lanes->peak;
    for (int64_t k = 0; k < count; k++) best = larger(best, scores[k]);
    V shrink = power_of_two(lanes->peak - best), added = spread(0);
    for (int64_t k = 0; k < count; k++) added += scores[k] = power_of_two(scores[k] - best);
    lanes->total = lanes->total * shrink + added;
    lanes->peak = best;
    for (int64_t i = 0; i < width; i++) lanes->output[i] *= shrink;
}

INLINE void add_numbers(const Sequence *s, Lanes *lanes, int N, int64_t first, int64_t begin, int64_t count,
                        const V *scores) {
    V sums[NUMBERS];
    for (int n = 0; n < N; n++) sums[n] = lanes->output[first + n];
    for (int64_t k = 0; k < count; k++) {
        const float *value = s->values + s->slots[begin + k] * s->width + first;
        for (int n = 0; n < N; n++) sums[n] += scores[k] * spread(value[n]);
    }
    for (int n = 0; n < N; n++) lanes->output[first + n] = sums[n];
}

void attend_sequence(const Sequence *s, int64_t first) {
    Lanes lanes;
    V scores[KEYS];
    load_lanes(s, first, &lanes);
    int64_t end = lanes.last[lanes.count - 1] + 1; /* that of the last row, which sees most */
    for (int64_t begin = 0; begin < end; begin += KEYS) {
        int64_t count = end - begin < KEYS ? end - begin : KEYS, i = 0;
        score(s, &lanes, begin, count, scores);
        weigh(&lanes, count, scores, s->width);
        for (; i + NUMBERS <= s->width; i += NUMBERS) add_numbers(s, &lanes, NUMBERS, i, begin, count, scores);
        for (; i < s->width; i++) add_numbers(s, &lanes, 1, i, begin, count, scores);
    }
    for (int64_t lane = 0; lane < lanes.count; lane++)
        for (int64_t i = 0; i < s->width; i++)
            s->output[place_of(s, first + lane) + i] = lanes.output[i][lane] / lanes.total[lane];
}
