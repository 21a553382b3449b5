// Normalisation, rotation, activation, writing into the KV pool, and the largest logit: one pass over memory each.
#include "vectors.h"

// x += delta if there is one; out = x / sqrt(mean(x^2) + eps) * weight. Strides in elements, between rows.
template <class T>
static void rms_norm(T* x, long ldx, const T* delta, const T* weight, float eps, long rows, long width, T* out,
                     long ldo) {
    for (long r = 0; r < rows; r++, x += ldx, out += ldo, delta += delta ? width : 0) {
        vec squares{};
        long d = 0;
        float rest = 0;
        for (; d + LANES <= width; d += LANES) {
            vec v = load(x + d);
            if (delta) {
                store(x + d, v + load(delta + d));
                v = load(x + d);
            }
            squares += v * v;
        }
        for (; d < width; d++) {
            if (delta) assign(x + d, scalar(x[d]) + scalar(delta[d]));
            rest += scalar(x[d]) * scalar(x[d]);
        }
        const float scale = 1.0f / __builtin_sqrtf((sum(squares) + rest) / (float)width + eps);
        for (d = 0; d + LANES <= width; d += LANES) store(out + d, load(x + d) * scale * load(weight + d));
        for (; d < width; d++) assign(out + d, scalar(x[d]) * scale * scalar(weight[d]));
    }
}

// Cosines and sines of every token's angles, both halves alike; the first half of the sines is negated for `rope`.
template <class T>
static void rope_angles(const int64_t* positions, const float* frequencies, long tokens, long half, T* cosines,
                        T* sines) {
    for (long t = 0; t < tokens; t++, cosines += 2 * half, sines += 2 * half)
        for (long d = 0; d < half; d++) {
            const float angle = (float)positions[t] * frequencies[d];
            const float cosine = __builtin_cosf(angle), sine = __builtin_sinf(angle);
            assign(cosines + d, cosine);
            assign(cosines + half + d, cosine);
            assign(sines + d, -sine);
            assign(sines + half + d, sine);
        }
}

// The first `heads` heads of every token turn in place; cos and sin are [tokens, width], the first half of sin negated.
template <class T>
static void rope(T* x, long ldx, const T* cosines, const T* sines, long tokens, long heads, long width) {
    const long half = width / 2;
    for (long t = 0; t < tokens; t++, x += ldx, cosines += width, sines += width)
        for (long h = 0; h < heads; h++) {
            T *left = x + h * width, *right = left + half;
            long d = 0;
            for (; d + LANES <= half; d += LANES) {
                const vec a = load(left + d), b = load(right + d);
                store(left + d, a * load(cosines + d) + b * load(sines + d));
                store(right + d, b * load(cosines + half + d) + a * load(sines + half + d));
            }
            for (; d < half; d++) {
                const float a = scalar(left[d]), b = scalar(right[d]);
                assign(left + d, a * scalar(cosines[d]) + b * scalar(sines[d]));
                assign(right + d, b * scalar(cosines[half + d]) + a * scalar(sines[half + d]));
            }
        }
}

// out = silu(gate) * up, where a row is gate and up side by side.
template <class T>
static void swiglu(const T* gate_up, long rows, long width, T* out) {
    for (long r = 0; r < rows; r++, gate_up += 2 * width, out += width) {
        long d = 0;
        for (; d + LANES <= width; d += LANES) {
            const vec gate = load(gate_up + d);
            store(out + d, gate / (1.0f + exponential(-gate)) * load(gate_up + width + d));
        }
        for (; d < width; d++) {
            const float gate = scalar(gate_up[d]);
            assign(out + d, gate / (1.0f + __builtin_expf(-gate)) * scalar(gate_up[width + d]));
        }
    }
}

// The slot of token t takes `bytes` of its key and as many of its value.
static void reshape_and_cache(const char* keys, const char* values, long stride_bytes, const int64_t* slots, long tokens,
                              long bytes, char* key_pool, char* value_pool) {
    for (long t = 0; t < tokens; t++, keys += stride_bytes, values += stride_bytes) {
        __builtin_memcpy(key_pool + slots[t] * bytes, keys, bytes);
        __builtin_memcpy(value_pool + slots[t] * bytes, values, bytes);
    }
}

// Index of the largest of each row, the first among equals. A NaN is larger than any number, as it is to torch.
static int64_t first_largest(const float* x, long width) {
    vec best = all(-__builtin_inff());
    ints where{}, here{};
    for (int i = 0; i < LANES; i++) here[i] = i;
    long d = 0;
    for (; d + LANES <= width; d += LANES, here += LANES) {
        const vec v = load(x + d);
        const ints better = ~(v <= best) & (best == best);
        best = better ? v : best;
        where = better ? here : where;
    }
    float value = -__builtin_inff();
    int64_t index = 0;
    for (int i = 0; i < LANES; i++) {
        const bool equal = best[i] == value || (best[i] != best[i] && value != value);
        const bool greater = !equal && value == value && !(best[i] <= value);
        if (greater || (equal && where[i] < index)) value = best[i], index = where[i];
    }
    for (; d < width; d++)
        if (value == value && !(x[d] <= value)) value = x[d], index = d;
    return index;
}

extern "C" void argmax(const float* x, long rows, long width, int64_t* out) {
    for (long r = 0; r < rows; r++) out[r] = first_largest(x + r * width, width);
}

#define FOR_BOTH_TYPES(NAME, T)                                                                                        \
    extern "C" void rms_norm_##NAME(T* x, long ldx, const T* delta, const T* weight, float eps, long rows, long width, \
                                    T* out, long ldo) {                                                                \
        rms_norm(x, ldx, delta, weight, eps, rows, width, out, ldo);                                                   \
    }                                                                                                                  \
    extern "C" void head_norm_##NAME(T* x, long ldx, const T* weights, float eps, long tokens, long heads, long width) {     \
        for (long t = 0; t < tokens; t++)                                                                              \
            for (long h = 0; h < heads; h++) {                                                                         \
                T* head = x + t * ldx + h * width;                                                                     \
                rms_norm(head, width, (const T*)nullptr, weights + h * width, eps, 1, width, head, width);             \
            }                                                                                                          \
    }                                                                                                                  \
    extern "C" void rope_angles_##NAME(const int64_t* positions, const float* frequencies, long tokens, long half,     \
                                       T* cosines, T* sines) {                                                         \
        rope_angles(positions, frequencies, tokens, half, cosines, sines);                                             \
    }                                                                                                                  \
    extern "C" void rope_##NAME(T* x, long ldx, const T* cosines, const T* sines, long tokens, long heads,             \
                                long width) {                                                                          \
        rope(x, ldx, cosines, sines, tokens, heads, width);                                                            \
    }                                                                                                                  \
    extern "C" void swiglu_##NAME(const T* gate_up, long rows, long width, T* out) { swiglu(gate_up, rows, width, out); } \
    extern "C" void reshape_and_cache_##NAME(const T* keys, const T* values, long stride, const int64_t* slots,        \
                                             long tokens, long size, T* key_pool, T* value_pool) {                     \
        reshape_and_cache((const char*)keys, (const char*)values, stride * sizeof(T), slots, tokens, size * sizeof(T), \
                          (char*)key_pool, (char*)value_pool);                                                         \
    }

FOR_BOTH_TYPES(f32, float)
FOR_BOTH_TYPES(bf16, bfloat16)
