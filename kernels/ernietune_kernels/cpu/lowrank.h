/* The low-rank half of linear layers: y += scale (x A^T) B^T and its gradients, for rows sorted by expert. */
#pragma once
#include <stdint.h>

/* Rows of expert e follow those of e - 1, counts[e] of them. */
typedef struct {
    const float *x, *a, *b;      /* [rows, in], [experts, rank, in], [experts, out, rank] */
    float *narrow;               /* [rows, rank] = scale x A^T: written forward, read backward */
    float *y;                    /* [rows, out]; forward */
    const float *gradient;       /* of y; backward, like all below */
    float *grad_x, *grad_narrow; /* [rows, in], which is added to, or NULL; room for [rows, rank] */
    float *grad_a, *grad_b;      /* shaped like a and b */
    const int64_t *counts;
    int64_t experts, in, out, rank;
    float scale;
} LowRank;
