/* What the element-wise kernels share; powers are right to about 1e-7 relative. */
#pragma once
#include "vector.h"

typedef int32_t I32V __attribute__((vector_size(64)));

#define LOG2_E 1.44269504088896f

INLINE V larger(V a, V b) {
#ifdef __AVX512F__
    return (V)_mm512_max_ps((__m512)a, (__m512)b);
#else
    I32V first = a > b;
    return (V)(((I32V)a & first) | ((I32V)b & ~first));
#endif
}

/* 2^x for x < 128; zero below the smallest normal number, so for minus infinity too. */
INLINE V power_of_two(V x) {
    const float magic = 12582912.0f; /* 1.5 * 2^23: adding it rounds to a whole number */
#ifdef __AVX512F__
    V whole = (V)_mm512_roundscale_ps((__m512)x, 8);
#else
    V whole = (x + magic) - magic;
#endif
    V f = x - whole;
    V p = f * 1.535336188e-4f + 1.339887440e-3f;
    p = p * f + 9.618437357e-3f;
    p = p * f + 5.550332471e-2f;
    p = p * f + 2.402264791e-1f;
    p = p * f + 6.931472028e-1f;
    p = p * f + 1.0f;
#ifdef __AVX512F__
    (void)magic;
    __mmask16 normal = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-126.0f), _CMP_GE_OQ);
    return (V)_mm512_maskz_scalef_ps(normal, (__m512)p, (__m512)whole);
#else
    I32V normal = x >= -126.0f, bits = (I32V)(x + magic) - 0x4b400000 + 127;
    return (V)((I32V)(p * (V)(bits << 23)) & normal);
#endif
}

/* 1 / (1 + e^-x) */
INLINE V sigmoid(V x) {
    V size = larger(x, -x);
    V small = power_of_two(size * -LOG2_E), one = spread(1.0f);
    I32V negative = x < 0.0f;
    V top = (V)(((I32V)small & negative) | ((I32V)one & ~negative));
    return top / (one + small);
}

INLINE float inner_product(const float *a, const float *b, int64_t width) {
    V total = spread(0);
    int64_t i = 0;
    for (; i + LANES <= width; i += LANES) total += load(a + i) * load(b + i);
    float result = sum(total);
    for (; i < width; i++) result += a[i] * b[i];
    return result;
}

/* The vector whose first `count` numbers, at most LANES, are given; the others are zero. */
INLINE V load_some(const float *p, int64_t count) {
    if (count >= LANES) return load(p);
    float numbers[LANES] = {0};
    for (int64_t i = 0; i < count; i++) numbers[i] = p[i];
    return load(numbers);
}

INLINE void store_some(float *p, V v, int64_t count) {
    if (count >= LANES) {
        store(p, v);
        return;
    }
    float numbers[LANES];
    store(numbers, v);
    for (int64_t i = 0; i < count; i++) p[i] = numbers[i];
}
