// Vectors of floats as wide as the core's registers, and the two types that tensors have.
//
// Everything here is the compiler's own vector types: the same source serves AVX-512 and AVX2, and needs no intrinsics.
// All arithmetic is float32; bfloat16 exists in memory only.
#pragma once
#include <cstdint>

#if defined(__AVX512F__)
constexpr int LANES = 16;
#else
constexpr int LANES = 8;
#endif

typedef float vec __attribute__((vector_size(LANES * 4)));
typedef float vec_anywhere __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef uint32_t bits __attribute__((vector_size(LANES * 4)));
typedef int32_t ints __attribute__((vector_size(LANES * 4)));
typedef uint16_t half_bits __attribute__((vector_size(LANES * 2)));
typedef uint16_t half_bits_anywhere __attribute__((vector_size(LANES * 2), aligned(2), may_alias));

struct bfloat16 {
    uint16_t bits;
};

static inline vec all(float x) { return x - vec{}; }

static inline vec load(const float* p) { return *(const vec_anywhere*)p; }
static inline vec load(const bfloat16* p) {
    const half_bits half = *(const half_bits_anywhere*)p;
    return (vec)(__builtin_convertvector(half, bits) << 16);
}

static inline void store(float* p, vec x) { *(vec_anywhere*)p = x; }
static inline void store(bfloat16* p, vec x) {  // to the nearest, ties to even
    const bits u = (bits)x;
    *(half_bits_anywhere*)p = __builtin_convertvector((u + 0x7fff + ((u >> 16) & 1)) >> 16, half_bits);
}

static inline float scalar(float x) { return x; }
static inline float scalar(bfloat16 x) {
    const uint32_t u = (uint32_t)x.bits << 16;
    float f;
    __builtin_memcpy(&f, &u, 4);
    return f;
}
static inline void assign(float* p, float x) { *p = x; }
static inline void assign(bfloat16* p, float x) {
    uint32_t u;
    __builtin_memcpy(&u, &x, 4);
    p->bits = (uint16_t)((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

static inline vec larger(vec a, vec b) { return a > b ? a : b; }

// What a reduction does log2(LANES) times: the neighbour at distance 8, 4, 2, 1 of every lane.
#if defined(__AVX512F__)
static inline vec across8(vec x) {
    return __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
}
static inline vec across4(vec x) {
    return __builtin_shufflevector(x, x, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11);
}
static inline vec across2(vec x) {
    return __builtin_shufflevector(x, x, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
}
static inline vec across1(vec x) {
    return __builtin_shufflevector(x, x, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
}
#else
static inline vec across4(vec x) { return __builtin_shufflevector(x, x, 4, 5, 6, 7, 0, 1, 2, 3); }
static inline vec across2(vec x) { return __builtin_shufflevector(x, x, 2, 3, 0, 1, 6, 7, 4, 5); }
static inline vec across1(vec x) { return __builtin_shufflevector(x, x, 1, 0, 3, 2, 5, 4, 7, 6); }
#endif

static inline float sum(vec x) {
#if defined(__AVX512F__)
    x += across8(x);
#endif
    x += across4(x);
    x += across2(x);
    x += across1(x);
    return x[0];
}

static inline float largest(vec x) {
#if defined(__AVX512F__)
    x = larger(x, across8(x));
#endif
    x = larger(x, across4(x));
    x = larger(x, across2(x));
    x = larger(x, across1(x));
    return x[0];
}

// exp(x) = 2^n exp(r), n = round(x / ln 2); the Taylor series of exp(r), |r| < 0.35, to the 6th power errs by 1e-7.
static inline vec exponential(vec x) {
    x = larger(x, all(-87.0f));
    x = x < all(88.0f) ? x : all(88.0f);
    const vec magic = all(12582912.0f);  // 1.5 * 2^23: adding it rounds to a whole number
    const vec n = (x * 1.44269504f + magic) - magic;
    const vec r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    vec p = all(1.0f / 720) * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    return (vec)((ints)p + (__builtin_convertvector(n, ints) << 23));
}
