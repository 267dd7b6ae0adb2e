#include "convert.h"

#include <math.h>

#include "vector.h"

/* Round to nearest, ties to even: the upper halves of the result are bf16. */
INLINE U32V rounded(V x) {
    U32V bits = (U32V)x;
    return bits + 0x7fff + ((bits >> 16) & 1);
}

static void widen_int8(const int8_t *codes, int64_t width, uint16_t *result) {
    int64_t i = 0;
    for (; i + LANES <= width; i += LANES) {
        U16V upper = __builtin_convertvector((U32V)load_int8(codes + i) >> 16, U16V);
        memcpy(result + i, &upper, sizeof upper);
    }
    for (; i < width; i++) result[i] = to_bf16((float)codes[i]);
}

static void widen_int4(const uint8_t *codes, const float *scale, int64_t group, int64_t width, uint16_t *result) {
    for (int64_t i = 0; i < width; i += 2 * LANES) {
        V even, odd;
        load_int4(codes + i / 2, &even, &odd);
        U32V pairs = (rounded(even * scale[i / group]) >> 16) | (rounded(odd * scale[i / group]) & 0xffff0000);
        memcpy(result + i, &pairs, sizeof pairs);
    }
}

void widen_to_bf16(const Matrix *m, int64_t row, int64_t column, int64_t width, uint16_t *result) {
    int64_t first = row * m->in + column;
    if (m->bits == 16) memcpy(result, (const uint16_t *)m->codes + first, (size_t)width * sizeof *result);
    else if (m->bits == 8) widen_int8((const int8_t *)m->codes + first, width, result);
    else widen_int4((const uint8_t *)m->codes + first / 2, m->scale + first / m->group, m->group, width, result);
}

static void widen_to_floats(const Matrix *m, int64_t row, float *wide) {
    int64_t first = row * m->in;
    if (m->bits == 16) {
        for (int64_t i = 0; i < m->in; i++) wide[i] = from_bf16(((const uint16_t *)m->codes)[first + i]);
    } else if (m->bits == 8) {
        for (int64_t i = 0; i < m->in; i++) wide[i] = (float)((const int8_t *)m->codes)[first + i] * m->scale[row];
    } else {
        for (int64_t i = 0; i < m->in; i += 2) {
            int codes = ((const uint8_t *)m->codes)[(first + i) / 2];
            float scale = m->scale[(first + i) / m->group];
            wide[i] = (float)((codes & 15) - 8) * scale, wide[i + 1] = (float)((codes >> 4) - 8) * scale;
        }
    }
}

typedef struct {
    const Matrix *matrix;
    void *panel;
    int bits;
} Widening;

static void widen_rows(const void *context, int64_t begin, int64_t end) {
    const Widening *w = context;
    const Matrix *m = w->matrix;
    for (int64_t row = begin; row < end; row++)
        if (w->bits == 16) widen_to_bf16(m, row, 0, m->in, (uint16_t *)w->panel + row * m->in);
        else widen_to_floats(m, row, (float *)w->panel + row * m->in);
}

/* A bf16, int8 or int4 matrix as fp32 (bits 32), or as bf16 (bits 16), int8 then without its scales. */
void ernie_widen(const Matrix *matrix, void *panel, int bits) {
    Widening widening = {matrix, panel, bits};
    for_all(widen_rows, &widening, matrix->out, 16);
}

typedef struct {
    const float *x, *scale, *both;
    uint16_t *high, *low;
    float *y;
    int64_t rows, width;
} Halves;

static void split_rows(const void *context, int64_t begin, int64_t end) {
    const Halves *h = context;
    for (int64_t i = begin * h->width; i < end * h->width; i++) {
        h->high[i] = to_bf16(h->x[i]);
        h->low[i] = to_bf16(h->x[i] - from_bf16(h->high[i]));
    }
}

/* x as the sum of two bf16 numbers: the error is 2^-17 of it. */
void ernie_split(const float *x, uint16_t *high, uint16_t *low, int64_t rows, int64_t width) {
    Halves halves = {.x = x, .high = high, .low = low, .width = width};
    for_all(split_rows, &halves, rows, 8);
}

static void join_rows(const void *context, int64_t begin, int64_t end) {
    const Halves *h = context;
    for (int64_t row = begin; row < end; row++) {
        const float *high = h->x + row * h->width, *low = h->both + row * h->width;
        float *y = h->y + row * h->width;
        for (int64_t i = 0; i < h->width; i++) y[i] = high[i] + low[i];
        if (h->scale)
            for (int64_t i = 0; i < h->width; i++) y[i] *= h->scale[i];
    }
}

/* y = (high + low) * scale by column; without scale where it is NULL. */
void ernie_join(const float *high, const float *low, const float *scale, float *y, int64_t rows, int64_t width) {
    Halves halves = {.x = high, .both = low, .scale = scale, .y = y, .width = width};
    for_all(join_rows, &halves, rows, 8);
}

typedef struct {
    const void *source;
    int source_bits;
    Matrix matrix;
} Quantizing;

static float source_at(const Quantizing *q, int64_t i) {
    return q->source_bits == 16 ? from_bf16(((const uint16_t *)q->source)[i]) : ((const float *)q->source)[i];
}

static float clamped(float x, float low, float high) { return x < low ? low : x > high ? high : x; }

static void quantize8(const Quantizing *q, int64_t row) {
    int64_t width = q->matrix.in, first = row * width;
    int8_t *codes = (int8_t *)q->matrix.codes + first;
    float largest = 0;
    for (int64_t i = 0; i < width; i++) {
        float size = fabsf(source_at(q, first + i));
        largest = size > largest ? size : largest;
    }
    float scale = largest / 127.0f, by = scale == 0 ? 1.0f : scale;
    ((float *)q->matrix.scale)[row] = scale;
    for (int64_t i = 0; i < width; i++)
        codes[i] = (int8_t)clamped(rintf(source_at(q, first + i) / by), -127, 127);
}

static void quantize4(const Quantizing *q, int64_t group) {
    int64_t size = q->matrix.group, first = group * size;
    uint8_t *codes = (uint8_t *)q->matrix.codes + first / 2;
    float largest = 0, value = 0;
    for (int64_t i = 0; i < size; i++) {
        float x = source_at(q, first + i);
        if (fabsf(x) > largest) largest = fabsf(x), value = x;
    }
    float scale = value / -8.0f, by = scale == 0 ? 1.0f : scale;
    ((float *)q->matrix.scale)[group] = scale;
    for (int64_t i = 0; i < size; i += 2) {
        int even = (int)clamped(rintf(source_at(q, first + i) / by), -8, 7) + 8;
        int odd = (int)clamped(rintf(source_at(q, first + i + 1) / by), -8, 7) + 8;
        codes[i / 2] = (uint8_t)(even | odd << 4);
    }
}

static void quantize_rows(const void *context, int64_t begin, int64_t end) {
    const Quantizing *q = context;
    int64_t groups = q->matrix.in / q->matrix.group;
    for (int64_t row = begin; row < end; row++)
        if (q->matrix.bits == 8) quantize8(q, row);
        else
            for (int64_t g = 0; g < groups; g++) quantize4(q, row * groups + g);
}

/* Fill the codes and scales of an int8 or int4 matrix from bf16 (16) or fp32 (32) numbers. */
void ernie_quantize(const void *source, int source_bits, const Matrix *matrix) {
    Quantizing quantizing = {source, source_bits, *matrix};
    for_all(quantize_rows, &quantizing, matrix->out, 16);
}
