/* Sixteen numbers at a time: the compiler maps them to AVX-512, AVX2, SSE or NEON registers. */
#pragma once
#include <stdint.h>
#include <string.h>
#if defined __AVX512F__ || defined __AVX2__
#include <immintrin.h>
#endif

/* The widest codes that `add_products` can multiply; 0: it does not exist here. */
#if defined __AVX512VNNI__ || defined __AVXVNNI__
#define BYTE_PRODUCTS 8
#elif defined __AVX2__
#define BYTE_PRODUCTS 4
#else
#define BYTE_PRODUCTS 0
#endif

#define INLINE static inline __attribute__((always_inline))
#define LANES 16

/* Products ask for what comes so many bytes later: the processor's own look-ahead ends at a page. */
#ifndef AHEAD
#define AHEAD 4096
#endif

typedef float V __attribute__((vector_size(64)));
typedef int32_t I32V __attribute__((vector_size(64)));
typedef uint32_t U32V __attribute__((vector_size(64)));
typedef uint16_t U16V __attribute__((vector_size(32)));
typedef int8_t I8V __attribute__((vector_size(16)));
typedef uint8_t U8V __attribute__((vector_size(16)));
typedef uint8_t Bytes __attribute__((vector_size(64)));

INLINE V load(const float *p) {
    V v;
    memcpy(&v, p, sizeof v);
    return v;
}

INLINE void store(float *p, V v) { memcpy(p, &v, sizeof v); }

INLINE V spread(float x) { return (V){x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x}; }

INLINE float sum(V v) {
#ifdef __AVX512F__
    return _mm512_reduce_add_ps((__m512)v);
#else
    float total = 0;
    for (int i = 0; i < LANES; i++) total += v[i];
    return total;
#endif
}

INLINE V load_bf16(const uint16_t *p) {
#ifdef __AVX512F__
    return (V)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)p)), 16);
#else
    U16V v;
    memcpy(&v, p, sizeof v);
    return (V)(__builtin_convertvector(v, U32V) << 16);
#endif
}

INLINE V load_int8(const int8_t *p) {
#ifdef __AVX512F__
    return (V)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const void *)p)));
#elif defined __AVX2__ /* the compiler's own way is ten times slower */
    __m256 halves[2];
    for (int i = 0; i < 2; i++)
        halves[i] = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const void *)(p + 8 * i))));
    V v;
    memcpy(&v, halves, sizeof v);
    return v;
#else
    I8V v;
    memcpy(&v, p, sizeof v);
    return __builtin_convertvector(v, V);
#endif
}

/* The values of 32 codes in 16 bytes: those of the even columns, then those of the odd ones. */
INLINE void load_int4(const uint8_t *p, V *even, V *odd) {
#ifdef __AVX512F__
    const __m512 values = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
    __m512i codes = _mm512_cvtepu8_epi32(_mm_loadu_si128((const void *)p));
    *even = (V)_mm512_permutexvar_ps(codes, values); /* looks at the low four bits alone */
    *odd = (V)_mm512_permutexvar_ps(_mm512_srli_epi32(codes, 4), values);
#else
    U8V v;
    memcpy(&v, p, sizeof v);
    *even = __builtin_convertvector((I8V)(v & 15), V) - 8.0f;
    *odd = __builtin_convertvector((I8V)(v >> 4), V) - 8.0f;
#endif
}

INLINE float from_bf16(uint16_t bits) {
    uint32_t wide = (uint32_t)bits << 16;
    float x;
    memcpy(&x, &wide, sizeof x);
    return x;
}

/* Round to nearest, ties to even; the numbers are finite. */
INLINE uint16_t to_bf16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

INLINE Bytes load_bytes(const void *p) {
    Bytes v;
    memcpy(&v, p, sizeof v);
    return v;
}

/* Sixteen sums, each plus four products of an unsigned code and a signed digit. */
#ifdef __AVX512VNNI__
INLINE I32V add_products(I32V total, Bytes codes, Bytes digits) {
    return (I32V)_mm512_dpbusd_epi32((__m512i)total, (__m512i)codes, (__m512i)digits);
}
#elif BYTE_PRODUCTS
INLINE __m256i add_half(__m256i total, __m256i codes, __m256i digits) {
#ifdef __AVXVNNI__
    return _mm256_dpbusd_avx_epi32(total, codes, digits);
#else
    __m256i pairs = _mm256_maddubs_epi16(codes, digits); /* 16 bits hold two products of codes below 128 */
    return _mm256_add_epi32(total, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
#endif
}

INLINE I32V add_products(I32V total, Bytes codes, Bytes digits) {
    __m256i sums[2], c[2], d[2];
    memcpy(sums, &total, sizeof sums), memcpy(c, &codes, sizeof c), memcpy(d, &digits, sizeof d);
    for (int i = 0; i < 2; i++) sums[i] = add_half(sums[i], c[i], d[i]);
    memcpy(&total, sums, sizeof sums);
    return total;
}
#else
INLINE I32V add_products(I32V total, Bytes codes, Bytes digits) {
    for (int i = 0; i < 4 * LANES; i++) total[i / 4] += codes[i] * (int8_t)digits[i];
    return total;
}
#endif
