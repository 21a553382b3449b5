// Causal attention of each sequence's new tokens over its paged keys and values: a few new tokens read the pool as it
// lies, one after another, many are worth laying the keys out for matrix products first. Either way the softmax is kept running, so
// that memory does not grow with the context.
#include <algorithm>
#include <vector>

#include "product.h"

struct Shape {
    long heads, kv_heads, head_dim, block_size, table_width, row;  // row: elements between tokens of q
    float scale;
};

struct Sequence {
    const int32_t* blocks;
    long length, block_size, kv_heads, head_dim;
    // Offsets into the pool of `count` tokens' keys or values.
    void at(long start, long count, long kv_head, long* offset) const {
        const long token_size = kv_heads * head_dim;
        const int32_t* block = blocks + start / block_size;
        for (long i = 0, in_block = start % block_size; i < count; block++, in_block = 0)
            for (long base = *block * block_size; in_block < block_size && i < count; in_block++)
                offset[i++] = (base + in_block) * token_size + kv_head * head_dim;
    }
};

constexpr float LOWEST = -1e30f;

// ---- a new token by itself: `GROUP` query heads share a KV head and read each key and value once

#if defined(__AVX512F__)
// Sums of 16 vectors, as one vector: each step adds halves, quarters, ... of neighbours.
static inline vec sums_of_16(const vec* x) {
#define HALVES(a, b)                                                                                               \
    (__builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +                       \
     __builtin_shufflevector(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31))
#define QUARTERS(a, b)                                                                                             \
    (__builtin_shufflevector(a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +                     \
     __builtin_shufflevector(a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31))
#define EIGHTHS(a, b)                                                                                              \
    (__builtin_shufflevector(a, b, 0, 1, 4, 5, 8, 9, 12, 13, 16, 17, 20, 21, 24, 25, 28, 29) +                     \
     __builtin_shufflevector(a, b, 2, 3, 6, 7, 10, 11, 14, 15, 18, 19, 22, 23, 26, 27, 30, 31))
#define PAIRS(a, b)                                                                                                \
    (__builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30) +                    \
     __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31))
    vec h[8], q[4];
    for (int i = 0; i < 8; i++) h[i] = HALVES(x[2 * i], x[2 * i + 1]);
    for (int i = 0; i < 4; i++) q[i] = QUARTERS(h[2 * i], h[2 * i + 1]);
    const vec left = EIGHTHS(q[0], q[1]), right = EIGHTHS(q[2], q[3]);
    return PAIRS(left, right);
}
#endif

constexpr long SPAN = 64;  // tokens whose scores are had before their values are read

// The softmax of one KV head's queries over the tokens seen so far: largest score, sum of weights, weighted values.
template <int GROUP, int VECS>
struct Running {
    float most[GROUP], weight[GROUP];
    vec total[GROUP][VECS];
};

// One span of keys and values, at `offset`, enters `running`; those at `next` are fetched on the way.
template <class T, int GROUP, int VECS>
static void decode_span(const T* q, const T* keys, const T* values, const long* offset, long count, const long* next,
                        float scale, Running<GROUP, VECS>& running) {
    constexpr long H = VECS * LANES, LINE = 64 / (long)sizeof(T);
    alignas(64) float score[GROUP][SPAN];
    vec query[GROUP][VECS];
    for (int g = 0; g < GROUP; g++)
        for (int v = 0; v < VECS; v++) query[g][v] = load(q + g * H + v * LANES) * scale;
    for (long t = 0; t < count; t += LANES) {
        vec partial[GROUP][LANES];
        const long some = std::min((long)LANES, count - t);
        for (long i = 0; i < some; i++) {
            const T* key_row = keys + offset[t + i];
            vec product[GROUP] = {};
#pragma GCC unroll 8
            for (int v = 0; v < VECS; v++) {
                const vec key = load(key_row + v * LANES);
#pragma GCC unroll 8
                for (int g = 0; g < GROUP; g++) product[g] += query[g][v] * key;
            }
#pragma GCC unroll 8
            for (int g = 0; g < GROUP; g++) partial[g][i] = product[g];
            for (long d = 0; d < H; d += LINE) __builtin_prefetch(keys + next[t + i] + d);
        }
        for (int g = 0; g < GROUP; g++) {
            for (long i = some; i < LANES; i++) partial[g][i] = vec{};
#if defined(__AVX512F__)
            store(score[g] + t, sums_of_16(partial[g]));
#else
            for (int i = 0; i < LANES; i++) score[g][t + i] = sum(partial[g][i]);
#endif
            for (long i = some; i < LANES; i++) score[g][t + i] = LOWEST;
        }
    }
    const long padded = (count + LANES - 1) / LANES * LANES;
    for (int g = 0; g < GROUP; g++) {
        vec high = load(score[g]);
        for (long t = LANES; t < padded; t += LANES) high = larger(high, load(score[g] + t));
        const float now = std::max(running.most[g], largest(high));
        const float shrink = now == running.most[g] ? 1.0f : __builtin_expf(running.most[g] - now);
        vec added{};
        for (long t = 0; t < padded; t += LANES) {
            const vec e = exponential(load(score[g] + t) - now);
            store(score[g] + t, e);
            added += e;
        }
        // What lies behind the last token weighs exp(-87), which is nothing in float32 beside exp(0).
        running.weight[g] = running.weight[g] * shrink + sum(added);
        for (int v = 0; v < VECS; v++) running.total[g][v] *= shrink;
        running.most[g] = now;
    }
    vec total[GROUP][VECS];
    __builtin_memcpy(total, running.total, sizeof total);
    for (long t = 0; t < count; t++) {
        const T* value_row = values + offset[t];
        for (long d = 0; d < H; d += LINE) __builtin_prefetch(values + next[t] + d);
#pragma GCC unroll 8
        for (int v = 0; v < VECS; v++) {
            const vec value = load(value_row + v * LANES);
#pragma GCC unroll 8
            for (int g = 0; g < GROUP; g++) total[g][v] += score[g][t] * value;
        }
    }
    __builtin_memcpy(running.total, total, sizeof total);
}

// All heads of one sequence pass over its tokens together, so that the pool is read in the order in which it lies.
template <class T, int GROUP, int VECS>
static void decode(const T* q, const T* keys, const T* values, const Sequence& sequence, float scale, T* out) {
    constexpr long H = VECS * LANES;
    std::vector<Running<GROUP, VECS>> running(sequence.kv_heads);
    for (auto& r : running)
        for (int g = 0; g < GROUP; g++) {
            r.most[g] = LOWEST;
            r.weight[g] = 0;
            for (int v = 0; v < VECS; v++) r.total[g][v] = vec{};
        }
    long offsets[2][SPAN];
    sequence.at(0, std::min(SPAN, sequence.length), 0, offsets[0]);
    for (long start = 0, turn = 0; start < sequence.length; start += SPAN, turn ^= 1) {
        const long count = std::min(SPAN, sequence.length - start);
        long *offset = offsets[turn], *next = offsets[turn ^ 1];
        const long left = std::min(SPAN, std::max(0L, sequence.length - start - SPAN));
        sequence.at(start + SPAN, left, 0, next);
        for (long t = left; t < count; t++) next[t] = offset[t];
        for (long k = 0; k < sequence.kv_heads; k++)
            decode_span<T, GROUP, VECS>(q + k * GROUP * H, keys + k * H, values + k * H, offset, count, next, scale,
                                        running[k]);
    }
    for (long k = 0; k < sequence.kv_heads; k++)
        for (int g = 0; g < GROUP; g++)
            for (int v = 0; v < VECS; v++)
                store(out + (k * GROUP + g) * H + v * LANES, running[k].total[g][v] / running[k].weight[g]);
}

// Whether there is a decode for this shape, and if so, its result.
template <class T, int VECS>
static bool decoded(const T* q, const T* keys, const T* values, const Sequence& sequence, const Shape& shape, T* out) {
    switch (shape.heads / shape.kv_heads) {
#define CASE(GROUP) \
    case GROUP: decode<T, GROUP, VECS>(q, keys, values, sequence, shape.scale, out); return true;
        CASE(1) CASE(2) CASE(3) CASE(4) CASE(7) CASE(8)
#undef CASE
    }
    return false;
}

// ---- many new tokens: scores of a span of keys are one product, their values another

constexpr long SPAN_KEYS = 4 * LANES, STEP = 2 * LANES;

// Lanes of b without `bit` change places with the lanes of a that have it.
static inline void swap_lanes(vec& a, vec& b, int bit) {
#if defined(__AVX512F__)
    const ints lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const vec from_b = bit == 8 ? across8(b) : bit == 4 ? across4(b) : bit == 2 ? across2(b) : across1(b);
    const vec from_a = bit == 8 ? across8(a) : bit == 4 ? across4(a) : bit == 2 ? across2(a) : across1(a);
#else
    const ints lane = {0, 1, 2, 3, 4, 5, 6, 7};
    const vec from_b = bit == 4 ? across4(b) : bit == 2 ? across2(b) : across1(b);
    const vec from_a = bit == 4 ? across4(a) : bit == 2 ? across2(a) : across1(a);
#endif
    const ints has = (lane & bit) != 0;
    a = has ? from_b : a;
    b = has ? b : from_a;
}

// Keys of a span, transposed: keys_HS[d, s].
template <class T>
static void transpose(const T* keys, const long* offset, long count, long H, float* keys_HS) {
    for (long s = 0; s < count; s += LANES)
        for (long d = 0; d < H; d += LANES) {
            vec square[LANES];
            for (long i = 0; i < LANES; i++) square[i] = load(keys + offset[std::min(s + i, count - 1)] + d);
            // Rows whose numbers differ in one bit swap the half of their lanes that differ in that bit.
            for (int bit = 1; bit < LANES; bit *= 2)
                for (int i = 0; i < LANES; i++)
                    if (!(i & bit)) swap_lanes(square[i], square[i + bit], bit);
            for (long j = 0; j < LANES; j++) store(keys_HS + (d + j) * SPAN_KEYS + s, square[j]);
        }
}

// Queries of `tokens` new tokens that start at `first`, all the heads that share `kv_head`.
template <class T>
static void chunk(const T* q, const T* keys, const T* values, const Sequence& sequence, const Shape& shape, long first,
                  long tokens, long kv_head, T* out, std::vector<float>& scratch) {
    const long H = shape.head_dim, group = shape.heads / shape.kv_heads, rows = tokens * group;
    const long needed = rows * (2 * H + SPAN_KEYS + 2) + 2 * SPAN_KEYS * H;
    if ((long)scratch.size() < needed) scratch.resize(needed);
    float *query = scratch.data(), *total = query + rows * H, *score = total + rows * H;
    float *keys_HS = score + rows * SPAN_KEYS, *values_SH = keys_HS + SPAN_KEYS * H;
    float *most = values_SH + SPAN_KEYS * H, *weight = most + rows;
    for (long r = 0; r < rows; r++) {
        const T* from = q + (r / group) * shape.row + (kv_head * group + r % group) * H;
        for (long d = 0; d < H; d += LANES) {
            store(query + r * H + d, load(from + d) * shape.scale);
            store(total + r * H + d, vec{});
        }
        most[r] = LOWEST;
        weight[r] = 0;
    }
    for (long start = 0; start < first + tokens; start += SPAN_KEYS) {
        const long count = std::min(SPAN_KEYS, first + tokens - start);
        const long padded = (count + STEP - 1) / STEP * STEP;
        long offset[SPAN_KEYS];
        sequence.at(start, count, kv_head, offset);
        transpose(keys, offset, count, H, keys_HS);
        for (long s = 0; s < padded; s++)
            for (long d = 0; d < H; d += LANES)
                store(values_SH + s * H + d, s < count ? load(values + offset[s] + d) : vec{});
        // Tokens before `start` have nothing to see here.
        const long skipped = std::max(0L, start - first) * group;
        for (long s = 0; s < padded; s += STEP)
            rows_times_panel<2, false>(rows - skipped, query + skipped * H, H, keys_HS + s, SPAN_KEYS, H,
                                       score + skipped * SPAN_KEYS + s, SPAN_KEYS);
        for (long r = skipped; r < rows; r++) {
            float* row = score + r * SPAN_KEYS;
            const long visible = std::min(count, first + r / group + 1 - start);
            for (long s = visible; s < padded; s++) row[s] = LOWEST;
            vec high = load(row);
            for (long s = LANES; s < padded; s += LANES) high = larger(high, load(row + s));
            const float now = std::max(most[r], largest(high));
            vec added{};
            for (long s = 0; s < padded; s += LANES) {
                const vec e = exponential(load(row + s) - now);
                store(row + s, e);
                added += e;
            }
            if (now != most[r]) {
                const float shrink = __builtin_expf(most[r] - now);
                weight[r] *= shrink;
                for (long d = 0; d < H; d += LANES) store(total + r * H + d, load(total + r * H + d) * shrink);
                most[r] = now;
            }
            weight[r] += sum(added);
        }
        for (long d = 0; d < H; d += STEP)
            if (H - d >= STEP)
                rows_times_panel<2, true>(rows - skipped, score + skipped * SPAN_KEYS, SPAN_KEYS, values_SH + d, H,
                                          padded, total + skipped * H + d, H);
            else
                rows_times_panel<1, true>(rows - skipped, score + skipped * SPAN_KEYS, SPAN_KEYS, values_SH + d, H,
                                          padded, total + skipped * H + d, H);
    }
    for (long r = 0; r < rows; r++) {
        T* to = out + ((r / group) * shape.heads + kv_head * group + r % group) * H;
        for (long d = 0; d < H; d += LANES) store(to + d, load(total + r * H + d) / weight[r]);
    }
}

// New tokens up to which each passes by itself. That is faster up to 4 and alike at 5; a step of 9 rows takes 2 to 4 %
// longer than by products (SmolLM2, 512 tokens of context). But so many drafts of a request are judged by the very bits
// that plain decoding computes.
constexpr long FEW = 9;

template <class T>
static bool few_decoded(const T* q, const T* keys, const T* values, Sequence sequence, const Shape& shape, long tokens,
                        T* out) {
    const long H = shape.head_dim, last = sequence.length;
    for (long t = 0; t < tokens; t++) {
        const T* q_here = q + t * shape.row;
        T* out_here = out + t * shape.heads * H;
        sequence.length = last - tokens + t + 1;
        if (!(H == 4 * LANES && decoded<T, 4>(q_here, keys, values, sequence, shape, out_here)) &&
            !(H == 8 * LANES && decoded<T, 8>(q_here, keys, values, sequence, shape, out_here)))
            return false;
    }
    return true;
}

template <class T>
static void paged_attention(const T* q, const T* keys, const T* values, const int32_t* tables, const int32_t* starts,
                            const int32_t* lengths, long sequences, const Shape& shape, T* out, int threads) {
    const long H = shape.head_dim, group = shape.heads / shape.kv_heads;
    const long chunk_tokens = std::max(1L, 192 / group);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        std::vector<float> scratch;
#pragma omp for schedule(dynamic)
        for (long s = 0; s < sequences; s++) {
            const Sequence sequence{tables + s * shape.table_width, lengths[s], shape.block_size, shape.kv_heads, H};
            const long tokens = starts[s + 1] - starts[s], computed = lengths[s] - tokens;
            const T* q_here = q + starts[s] * shape.row;
            T* out_here = out + starts[s] * shape.heads * H;
            if (tokens <= FEW && few_decoded(q_here, keys, values, sequence, shape, tokens, out_here)) continue;
            for (long kv_head = 0; kv_head < shape.kv_heads; kv_head++)
                for (long t = 0; t < tokens; t += chunk_tokens)
                    chunk(q_here + t * shape.row, keys, values, sequence, shape, computed + t,
                          std::min(chunk_tokens, tokens - t), kv_head, out_here + t * shape.heads * H, scratch);
        }
    }
}

#define FOR_TYPE(NAME, T)                                                                                             \
    extern "C" void paged_attention_##NAME(                                                                           \
        const T* q, long row, const T* keys, const T* values, const int32_t* tables, long table_width,                \
        const int32_t* starts, const int32_t* lengths, long sequences, long heads, long kv_heads, long head_dim,      \
        long block_size, float scale, T* out, int threads) {                                                          \
        const Shape shape{heads, kv_heads, head_dim, block_size, table_width, row, scale};                            \
        paged_attention(q, keys, values, tables, starts, lengths, sequences, shape, out, threads);                    \
    }

FOR_TYPE(f32, float)
FOR_TYPE(bf16, bfloat16)

extern "C" int attention_lanes() { return LANES; }
