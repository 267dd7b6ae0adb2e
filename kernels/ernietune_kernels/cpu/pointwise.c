/* Norm, activation and rotation of a training step, forward and backward, in one pass over memory each. */
#include "pointwise.h"

#include <math.h>

#include "linear.h"
#include "numeric.h"

#define NUMBERS_OF_A_TASK 16384

static int64_t rows_of_a_task(int64_t width) { return 1 + NUMBERS_OF_A_TASK / width; }

/* y = x / rms(x) * weight by row; `inverse` [rows] is 1 / rms. Backward: grad_x from the gradient of y. */
typedef struct {
    const float *x, *weight;
    float *inverse, *y;
    const float *gradient;
    float *grad_x;
    int64_t rows, width;
    float epsilon;
} Norm;

static void norm_some(const void *context, int64_t begin, int64_t end) {
    const Norm *n = context;
    for (int64_t r = begin; r < end; r++) {
        const float *x = n->x + r * n->width;
        float *y = n->y + r * n->width;
        float inverse = 1.0f / sqrtf(inner_product(x, x, n->width) / (float)n->width + n->epsilon);
        n->inverse[r] = inverse;
        for (int64_t i = 0; i < n->width; i++) y[i] = x[i] * inverse * n->weight[i];
    }
}

void ernie_rms_norm(const Norm *norm) { for_all(norm_some, norm, norm->rows, rows_of_a_task(norm->width)); }

static void norm_back_some(const void *context, int64_t begin, int64_t end) {
    const Norm *n = context;
    for (int64_t r = begin; r < end; r++) {
        const float *x = n->x + r * n->width, *gradient = n->gradient + r * n->width;
        float *grad_x = n->grad_x + r * n->width, inverse = n->inverse[r];
        for (int64_t i = 0; i < n->width; i++) grad_x[i] = gradient[i] * n->weight[i];
        float shrink = inner_product(grad_x, x, n->width) / (float)n->width * inverse * inverse;
        for (int64_t i = 0; i < n->width; i++) grad_x[i] = inverse * (grad_x[i] - x[i] * shrink);
    }
}

void ernie_rms_norm_back(const Norm *norm) { for_all(norm_back_some, norm, norm->rows, rows_of_a_task(norm->width)); }

static void swiglu_some(const void *context, int64_t begin, int64_t end) {
    const Swiglu *s = context;
    for (int64_t i = begin; i < end; i += LANES) {
        int64_t left = end - i;
        V gate = load_some(s->gate + i, left);
        store_some(s->y + i, gate * sigmoid(gate) * load_some(s->up + i, left), left);
    }
}

void ernie_swiglu(const Swiglu *swiglu) { for_all(swiglu_some, swiglu, swiglu->count, NUMBERS_OF_A_TASK); }

static void swiglu_back_some(const void *context, int64_t begin, int64_t end) {
    const Swiglu *s = context;
    for (int64_t i = begin; i < end; i += LANES) {
        int64_t left = end - i;
        V gate = load_some(s->gate + i, left), gradient = load_some(s->gradient + i, left), open = sigmoid(gate);
        V slope = open * (1.0f + gate * (1.0f - open));
        store_some(s->grad_gate + i, gradient * load_some(s->up + i, left) * slope, left);
        store_some(s->grad_up + i, gradient * gate * open, left);
    }
}

void ernie_swiglu_back(const Swiglu *swiglu) { for_all(swiglu_back_some, swiglu, swiglu->count, NUMBERS_OF_A_TASK); }

/* Adjacent pairs of numbers [tokens, heads, width] turned by their token's angles [tokens, width / 2], or back. */
typedef struct {
    const float *x, *cos, *sin;
    float *y;
    int64_t tokens, heads, width;
    float direction; /* 1, or -1: back */
} Rotation;

static void rotate_some(const void *context, int64_t begin, int64_t end) {
    const Rotation *r = context;
    int64_t half = r->width / 2;
    for (int64_t t = begin; t < end; t++) {
        const float *cos = r->cos + t * half, *sin = r->sin + t * half;
        for (int64_t h = 0; h < r->heads; h++) {
            const float *x = r->x + (t * r->heads + h) * r->width;
            float *restrict y = r->y + (t * r->heads + h) * r->width;
            for (int64_t j = 0; j < half; j++) {
                float even = x[2 * j], odd = x[2 * j + 1], up = r->direction * sin[j];
                y[2 * j] = even * cos[j] - odd * up;
                y[2 * j + 1] = odd * cos[j] + even * up;
            }
        }
    }
}

void ernie_rotate(const Rotation *rotation) {
    for_all(rotate_some, rotation, rotation->tokens, rows_of_a_task(rotation->heads * rotation->width));
}
