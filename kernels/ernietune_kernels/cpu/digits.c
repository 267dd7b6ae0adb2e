#include "digits.h"

#include <math.h>

/* Stored codes are unsigned: int4 ones are 8 too large, int8 ones become so by adding 128. */
INLINE Bytes codes_of(int bits, const uint8_t *p, int half) {
    if (bits == 8) return load_bytes(p + half * 64) ^ 128;
    return half ? load_bytes(p) >> 4 : load_bytes(p) & 15;
}

INLINE I32V all(int32_t x) { return (I32V){} + x; }

/* Sixteen sums over a block; the same columns of codes and digits meet in the same sum. */
INLINE I32V block_sums(Bytes first, Bytes second, const Digits *x, I32V low) {
    I32V high = add_products(all(0), first, load_bytes(x->high));
    high = add_products(high, second, load_bytes(x->high + 64));
    low = add_products(low, first, load_bytes(x->low));
    low = add_products(low, second, load_bytes(x->low + 64));
    return (high << 8) + low;
}

/* The byte at `place` of a block holds this column. */
INLINE int column_of(int bits, int place) { return bits == 8 ? place : place % 64 * 2 + place / 64; }

INLINE void block_to_digits(const float *x, int bits, Digits *result) {
    float placed[BLOCK], largest[LANES], factor[LANES];
    for (int p = 0; p < BLOCK; p++) placed[p] = x[column_of(bits, p)];
    for (int i = 0; i < LANES; i++) {
        largest[i] = 0;
        for (int j = 0; j < 8; j++) {
            float size = fabsf(placed[j / 4 * 64 + i * 4 + j % 4]);
            largest[i] = size > largest[i] ? size : largest[i];
        }
    }
    for (int i = 0; i < LANES; i++) {
        result->scale[i] = largest[i] / 32512.0f;
        factor[i] = largest[i] > 0 ? 32512.0f / largest[i] : 0;
    }
    for (int p = 0; p < BLOCK; p++) {
        int32_t whole = (int32_t)rintf(placed[p] * factor[p % 64 / 4]);
        result->low[p] = (int8_t)whole;
        result->high[p] = (int8_t)((whole - result->low[p]) >> 8);
    }
    Bytes excess = (Bytes){} + (uint8_t)(bits == 8 ? 128 : 8);
    I32V surplus = -block_sums(excess, excess, result, all(0));
    memcpy(result->surplus, &surplus, sizeof surplus);
}

void to_digits(const float *x, int64_t count, int64_t width, int bits, Digits *result) {
    int64_t whole = width / BLOCK, rest = width % BLOCK;
    for (int64_t r = 0; r < count; r++, x += width) {
        for (int64_t b = 0; b < whole; b++)
            if (bits == 8) block_to_digits(x + b * BLOCK, 8, result++);
            else block_to_digits(x + b * BLOCK, 4, result++);
        if (!rest) continue;
        float filled[BLOCK] = {0};
        memcpy(filled, x + whole * BLOCK, (size_t)rest * sizeof(float));
        block_to_digits(filled, bits, result++);
    }
}

/* The scale of each of the sixteen sums of a block whose columns have `groups` scales. */
INLINE V scales_of(int groups, const float *s) {
    if (groups == 1) return spread(s[0]);
    if (groups == 2) return (V){s[0], s[0], s[0], s[0], s[0], s[0], s[0], s[0], s[1], s[1], s[1], s[1], s[1], s[1], s[1], s[1]};
    return (V){s[0], s[0], s[0], s[0], s[1], s[1], s[1], s[1], s[2], s[2], s[2], s[2], s[3], s[3], s[3], s[3]};
}

/* `groups` scales a block, 0: none. Codes and scales of a block that the row does not fill come from copies. */
INLINE void dot(int bits, int groups, int R, const uint8_t *codes, const float *scale, const Digits *x, int64_t width,
                float *result, int64_t stride) {
    int64_t blocks = blocks_of(width), bytes = BLOCK * bits / 8;
    uint8_t last_codes[BLOCK] = {0};
    float last_scale[4] = {0};
    V total[4];
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) total[r] = spread(0);
    for (int64_t b = 0; b < blocks; b++, codes += bytes, scale += groups) {
        if (b == width / BLOCK) {
            memcpy(last_codes, codes, (size_t)(width % BLOCK * bits / 8));
            if (groups) memcpy(last_scale, scale, (size_t)(width % BLOCK * groups / BLOCK) * sizeof(float));
            codes = last_codes, scale = last_scale;
        }
        for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(codes + AHEAD + i, 0, 3);
        Bytes first = codes_of(bits, codes, 0), second = codes_of(bits, codes, 1);
        V factor = groups ? scales_of(groups, scale) : spread(1);
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) {
            const Digits *block = x + r * blocks + b;
            I32V surplus;
            memcpy(&surplus, block->surplus, sizeof surplus);
            V sums = __builtin_convertvector(block_sums(first, second, block, surplus), V);
            total[r] += sums * (factor * load(block->scale));
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) result[r * stride] = sum(total[r]);
}

INLINE void some_rows(const Matrix *m, int64_t row, int R, const Digits *x, float *y, int64_t stride) {
    const uint8_t *codes = (const uint8_t *)m->codes + row * m->in * m->bits / 8;
    const float *scale = m->scale + row * (m->bits == 4 ? m->in / m->group : 1);
    if (m->bits == 8) {
        dot(8, 0, R, codes, scale, x, m->in, y, stride);
        for (int r = 0; r < R; r++) y[r * stride] *= *scale;
    } else if (m->group == 128) dot(4, 1, R, codes, scale, x, m->in, y, stride);
    else if (m->group == 64) dot(4, 2, R, codes, scale, x, m->in, y, stride);
    else dot(4, 4, R, codes, scale, x, m->in, y, stride);
}

void dot_digits(const Matrix *m, int64_t row, const Digits *x, int64_t rows, float *result, int64_t stride) {
    int64_t blocks = blocks_of(m->in);
    for (; rows >= 4; rows -= 4, x += 4 * blocks, result += 4 * stride) some_rows(m, row, 4, x, result, stride);
    for (; rows >= 2; rows -= 2, x += 2 * blocks, result += 2 * stride) some_rows(m, row, 2, x, result, stride);
    if (rows) some_rows(m, row, 1, x, result, stride);
}
