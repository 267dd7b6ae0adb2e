/* One step of the whole decoder for sequences that each have one new token. */
#pragma once
#include "linear.h"

typedef struct {
    const float *input_norm, *middle_norm;
    Matrix q, k, v, o;
    Matrix gate, up, down; /* of the dense MLP or the shared experts; out == 0: there are none */
    const float *router, *bias; /* fp32 [experts, hidden] and [experts] */
    Matrix expert_gate, expert_up, expert_down; /* the first of each stack */
    int64_t experts, chosen; /* experts == 0: a dense layer */
    float *keys, *values; /* [kv_heads, slots, head_dim] */
} Layer;

typedef struct {
    const Layer *layers;
    const float *norm;
    int64_t count, hidden, heads, kv_heads, head_dim, slots;
    float epsilon;
} Decoder;

/* `seen` lists each row's slots, those of row r from starts[r] to starts[r + 1], the new token's last.
   x [rows, hidden]: embeddings in, normed hidden states out: of all rows, or of the wanted ones, at the beginning of x.
   cos, sin [rows, head_dim / 2]; wanted: rows in rising order, NULL: all. */
typedef struct {
    float *x;
    const float *cos, *sin;
    const int64_t *seen, *starts, *wanted;
    int64_t rows, wanted_rows;
} Step;
