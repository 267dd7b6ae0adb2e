/* Rows of x as integers of two bytes, so that products with int8 and int4 codes are integer products.

   A block of 128 columns has sixteen sums of products, each over eight columns, and for each of them a scale:
   x = (256 * high + low) * scale with |256 * high + low| <= 32512. The error of a number is at most 2^-16 of the
   largest of the eight. */
#pragma once
#include "linear.h"
#include "vector.h"

#define BLOCK 128

typedef struct {
    int8_t high[BLOCK], low[BLOCK]; /* int4: those of the even columns, then those of the odd ones */
    int32_t surplus[LANES]; /* what codes are stored too large by, times the digits, taken off each sum */
    float scale[LANES];
} __attribute__((aligned(64))) Digits;

INLINE int64_t blocks_of(int64_t width) { return (width + BLOCK - 1) / BLOCK; }

/* `count` rows of x for products with codes of `bits` bits; result [count, blocks_of(width)]. */
void to_digits(const float *x, int64_t count, int64_t width, int bits, Digits *result);

/* Row `row` of an int8 or int4 matrix times `rows` rows in digits, into result[0], result[stride], .. */
void dot_digits(const Matrix *m, int64_t row, const Digits *x, int64_t rows, float *result, int64_t stride);
