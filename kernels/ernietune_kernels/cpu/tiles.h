/* Products of many rows with stored weights on the tile unit of a processor (AMX), where there is one.

   x becomes the sum of two bf16 numbers, exact to 2^-17. A tile holds 16 rows of 32 columns: of the weights as they
   are stored, where they are bf16, else of a widened panel. */
#pragma once
#include "linear.h"

/* So many columns of y at a time keep their sums in the second cache. */
#define COLUMNS 512

/* Whether the processor, the compiler and the operating system all have tiles. */
int tiles_ready(void);

/* Bytes that the tiles of x [rows, width] take, a multiple of 64. */
int64_t tiles_bytes(int64_t rows, int64_t width);

/* Both halves of x in tiles, on all threads; `tiles` is aligned to 64 bytes. */
void to_tiles(const float *x, int64_t rows, int64_t width, char *tiles);

/* Columns `begin` to `end` of y [rows, matrix->out] = x times the matrix transposed. -1: no memory. */
int tiled_columns(const Matrix *matrix, int64_t begin, int64_t end, const char *tiles, int64_t rows, float *y);
