/* Attention of the last `queries` of `keys` positions, forward and backward, in fp32. */
#pragma once
#include <stdint.h>

/* The `width` numbers of a token's head start at numbers[token * t + head * h]. */
typedef struct {
    float *numbers;
    int64_t token, head;
} Rows;

/* Queries [row, end), which see keys of [low, high) at most; at most 64 of them. */
typedef struct {
    int64_t row, end, low, high;
} Stretch;

/* Query row i stands at i + keys - queries, and sees key j when first[j] <= that < until[j]. Blocks of one
   unit share no keys with those of another; unit u has the blocks units[u] to units[u + 1]. */
typedef struct {
    Rows q, k, v, output;
    float *log_sums; /* [heads, queries]: of the powers of two; NULL: not kept */
    Rows gradient, grad_q, grad_k, grad_v; /* of the output and of the rest: backward only; grad_k, grad_v are contiguous */
    const Stretch *blocks;
    const int64_t *first, *until, *units;
    int64_t block_count, unit_count, queries, keys, heads, groups, width;
    float scale;
} Attention;
