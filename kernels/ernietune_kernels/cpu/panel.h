/* Products of small matrices that lie in the nearest caches, by tiles that stay in registers. */
#pragma once
#include "vector.h"

/* A tile is ROWS x SPAN vectors: as many sums as there are registers, less the numbers that go into them. */
#define ROWS 6
#ifdef __AVX512F__
#define SPAN 4
#else
#define SPAN 1
#endif

/* The number in row r and column k is numbers[r * row + k * step]. */
typedef struct {
    const float *numbers;
    int64_t row, step;
} Panel;

INLINE void tile(int R, int U, Panel a, int64_t depth, const float *b, int64_t b_row, float *c, int64_t c_row, int add) {
    V sum[ROWS * SPAN];
#pragma GCC unroll 6
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int u = 0; u < U; u++) sum[r * U + u] = add ? load(c + r * c_row + u * LANES) : spread(0);
    for (int64_t k = 0; k < depth; k++) {
        V row[SPAN];
#pragma GCC unroll 4
        for (int u = 0; u < U; u++) row[u] = load(b + k * b_row + u * LANES);
#pragma GCC unroll 6
        for (int r = 0; r < R; r++) {
            V number = spread(a.numbers[r * a.row + k * a.step]);
#pragma GCC unroll 4
            for (int u = 0; u < U; u++) sum[r * U + u] += number * row[u];
        }
    }
#pragma GCC unroll 6
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int u = 0; u < U; u++) store(c + r * c_row + u * LANES, sum[r * U + u]);
}

/* All rows of U vectors of columns. */
INLINE void strip(int U, Panel a, int64_t rows, int64_t depth, const float *b, int64_t b_row, float *c, int64_t c_row,
                  int add) {
    int64_t r = 0;
    for (; r + ROWS <= rows; r += ROWS, a.numbers += ROWS * a.row, c += ROWS * c_row)
        tile(ROWS, U, a, depth, b, b_row, c, c_row, add);
    switch (rows - r) {
    case 5: tile(5, U, a, depth, b, b_row, c, c_row, add); break;
    case 4: tile(4, U, a, depth, b, b_row, c, c_row, add); break;
    case 3: tile(3, U, a, depth, b, b_row, c, c_row, add); break;
    case 2: tile(2, U, a, depth, b, b_row, c, c_row, add); break;
    case 1: tile(1, U, a, depth, b, b_row, c, c_row, add); break;
    default: break;
    }
}

/* c [rows, columns] = a [rows, depth] times b [depth, columns], or that much more with `add`. */
static void panel_product(Panel a, int64_t rows, int64_t depth, const float *b, int64_t b_row, int64_t columns, float *c,
                          int64_t c_row, int add) {
    int64_t i = 0;
    for (; i + SPAN * LANES <= columns; i += SPAN * LANES)
        strip(SPAN, a, rows, depth, b + i, b_row, c + i, c_row, add);
    for (; i + LANES <= columns; i += LANES) strip(1, a, rows, depth, b + i, b_row, c + i, c_row, add);
    for (; i < columns; i++)
        for (int64_t r = 0; r < rows; r++) {
            float sum = add ? c[r * c_row + i] : 0.0f;
            for (int64_t k = 0; k < depth; k++) sum += a.numbers[r * a.row + k * a.step] * b[k * b_row + i];
            c[r * c_row + i] = sum;
        }
}
