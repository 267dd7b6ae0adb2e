/* Attention of several new tokens of one sequence over its keys, with queries in the lanes of vectors. */
#pragma once
#include <stdint.h>

#define WIDEST 256 /* head_dim at most */

/* The query heads [rows, repeat] that share keys: head h of row r is at q + r * stride + h * width, and so is its
   output. `slots` lists all `length` keys; the last row sees all of them, each row before it one less. */
typedef struct {
    const float *q, *keys, *values;
    float *output;
    const int64_t *slots;
    int64_t length, rows, repeat, width, stride;
} Sequence;

/* Queries [first, first + 16) of the rows * repeat ones, as many as there are; softmax piece by piece. */
void attend_sequence(const Sequence *sequence, int64_t first);
