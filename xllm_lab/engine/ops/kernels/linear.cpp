// y = x W' + b, with W laid out once as panels of neighbouring outputs.
#include <cstring>
#if defined(__AMX_BF16__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "product.h"

constexpr long ROWS = 64;  // whose sums stay in the first-level cache while their panel passes by
// Floats between a weight in use and one that is fetched. A row more than one fills the core's queue of instructions
// sooner than its queue of misses, so without it 5 rows took 1.5 times as long as 1, with it 1.2 times, and 64 rows an
// eighth less; 768 to 3072 were alike (SmolLM2, Xeon with AVX-512).
constexpr long FETCH_AHEAD = 1536;

extern "C" long linear_f32_panel() { return PANEL; }

// [outputs, inputs] -> [ceil(outputs / PANEL), inputs, PANEL], padded with zeros.
extern "C" void linear_f32_pack(const float* w, long outputs, long inputs, float* packed) {
    for (long o = 0; o < outputs; o += PANEL)
        for (long i = 0; i < inputs; i++)
            for (long j = 0; j < PANEL; j++)
                packed[o * inputs + i * PANEL + j] = o + j < outputs ? w[(o + j) * inputs + i] : 0.0f;
}

extern "C" void linear_f32(const float* x, long rows, long inputs, const float* packed, const float* bias,
                           long outputs, float* y, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (long o = 0; o < outputs; o += PANEL) {
        const float* panel = packed + o * inputs;
        const long width = outputs - o < PANEL ? outputs - o : PANEL;
        alignas(64) float sums[ROWS * PANEL];
        for (long r = 0; r < rows; r += ROWS) {
            const long count = rows - r < ROWS ? rows - r : ROWS;
            rows_times_panel<PANEL_VECS, false, FETCH_AHEAD>(count, x + r * inputs, inputs, panel, PANEL, inputs, sums, PANEL);
            for (long i = 0; i < count; i++) {
                float* to = y + (r + i) * outputs + o;
                if (width == PANEL && !bias)
                    memcpy(to, sums + i * PANEL, sizeof(float) * PANEL);
                else
                    for (long j = 0; j < width; j++) to[j] = sums[i * PANEL + j] + (bias ? bias[o + j] : 0.0f);
            }
        }
    }
}

// y[t] = row tokens[t] of the matrix that was packed: a tied embedding needs no second copy.
extern "C" void linear_f32_rows(const float* packed, long inputs, const int64_t* tokens, long count, float* y) {
    for (long t = 0; t < count; t++, y += inputs) {
        const float* from = packed + tokens[t] / PANEL * PANEL * inputs + tokens[t] % PANEL;
        for (long i = 0; i < inputs; i++) y[i] = from[i * PANEL];
    }
}

// ---- bfloat16 on the matrix unit (AMX). A tile is 16 rows of 64 bytes; one instruction multiplies 16 x 32 by 32 x 16.

// Asks the kernel for the tiles, once a process; 0 where it has none to give or the compiler knew of none.
extern "C" int matrix_unit_granted() {
#if defined(__AMX_BF16__)
    constexpr long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILE_DATA
    return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
#else
    return 0;
#endif
}

// [outputs, inputs] -> [ceil(outputs / 32), inputs / 32, 2 tiles, 16 pairs of inputs, 16 outputs, 2], zeros where no
// output is. `inputs` is a multiple of 32.
extern "C" void linear_bf16_pack(const uint16_t* w, long outputs, long inputs, uint16_t* packed) {
    for (long o = 0; o < outputs; o += 32)
        for (long i = 0; i < inputs; i += 32)
            for (long half = 0; half < 2; half++)
                for (long pair = 0; pair < 16; pair++)
                    for (long j = 0; j < 16; j++, packed += 2) {
                        const long output = o + half * 16 + j;
                        if (output < outputs)
                            memcpy(packed, w + output * inputs + i + 2 * pair, 4);
                        else
                            memset(packed, 0, 4);
                    }
}

extern "C" void linear_bf16_rows(const uint16_t* packed, long inputs, const int64_t* tokens, long count, uint16_t* y) {
    for (long t = 0; t < count; t++, y += inputs) {
        const uint16_t* from = packed + tokens[t] / 32 * 32 * inputs + tokens[t] % 32 / 16 * 512 + tokens[t] % 16 * 2;
        for (long i = 0; i < inputs; i += 2) memcpy(y + i, from + i / 32 * 1024 + i % 32 * 16, 4);
    }
}

#if defined(__AMX_BF16__)

// Tiles 0 1 / 2 3 sum up to 16 + 16 rows by 16 + 16 outputs; 4 and 5 hold inputs of the rows, 6 and 7 weights.
struct alignas(64) TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {};
    TileConfig(int upper, int lower) {
        const uint8_t of[8] = {(uint8_t)upper, (uint8_t)upper, (uint8_t)lower, (uint8_t)lower,
                               (uint8_t)upper, (uint8_t)lower, 16,             16};
        memcpy(rows, of, 8);
    }
};

#define ZERO(t) asm volatile("tilezero %%tmm" #t ::: "memory")
#define LOAD(t, p, bytes) asm volatile("tileloadd (%0,%1,1), %%tmm" #t ::"r"(p), "r"((long)(bytes)) : "memory")
#define STORE(t, p, bytes) asm volatile("tilestored %%tmm" #t ", (%0,%1,1)" ::"r"(p), "r"((long)(bytes)) : "memory")
#define MULTIPLY(c, a, b) asm volatile("tdpbf16ps %%tmm" #b ", %%tmm" #a ", %%tmm" #c ::: "memory")

// part[32, 32] = up to 32 rows of x times 32 outputs.
template <bool LOWER>
static inline void amx_tile(const uint16_t* x, long inputs, const uint16_t* panel, float* part) {
    ZERO(0);
    ZERO(1);
    if (LOWER) {
        ZERO(2);
        ZERO(3);
    }
    for (long i = 0; i < inputs; i += 32, panel += 1024) {
        LOAD(4, x + i, 2 * inputs);
        LOAD(6, panel, 64);
        LOAD(7, panel + 512, 64);
        __builtin_prefetch((const char*)panel + 4096);
        MULTIPLY(0, 4, 6);
        MULTIPLY(1, 4, 7);
        if (LOWER) {
            LOAD(5, x + 16 * inputs + i, 2 * inputs);
            MULTIPLY(2, 5, 6);
            MULTIPLY(3, 5, 7);
        }
    }
    STORE(0, part, 128);
    STORE(1, part + 16, 128);
    if (LOWER) {
        STORE(2, part + 16 * 32, 128);
        STORE(3, part + 16 * 32 + 16, 128);
    }
}

template <class Y>
static void finish(const float* part, long rows, long width, const bfloat16* bias, Y* y, long outputs) {
    for (long r = 0; r < rows; r++, part += 32, y += outputs) {
        if (width == 32 && !bias) {
            for (long j = 0; j < 32; j += LANES) store(y + j, load(part + j));
            continue;
        }
        for (long j = 0; j < width; j++) assign(y + j, part[j] + (bias ? scalar(bias[j]) : 0.0f));
    }
}

template <class Y>
static void linear_amx(const uint16_t* x, long rows, long inputs, const uint16_t* packed, const bfloat16* bias,
                       long outputs, Y* y, int threads) {
    constexpr long BAND = 256;  // rows whose inputs stay in the second-level cache while the weights pass by
    for (long band = 0; band < rows; band += BAND) {
        const long end = rows - band < BAND ? rows : band + BAND;
#pragma omp parallel num_threads(threads) if (threads > 1)
        {
            const TileConfig whole(16, 16);
            const long tail = (end - band) % 32;
            const TileConfig last(tail < 16 ? (int)tail : 16, tail > 16 ? (int)tail - 16 : 1);
            asm volatile("ldtilecfg %0" ::"m"(whole) : "memory");
            alignas(64) float part[32 * 32];
#pragma omp for schedule(static)
            for (long o = 0; o < outputs; o += 32) {
                const uint16_t* panel = packed + o * inputs;
                const bfloat16* bias_here = bias ? bias + o : nullptr;
                const long width = outputs - o < 32 ? outputs - o : 32;
                long r = band;
                if (end - r >= 32) {
                    if (tail) asm volatile("ldtilecfg %0" ::"m"(whole) : "memory");
                    for (; end - r >= 32; r += 32) {
                        amx_tile<true>(x + r * inputs, inputs, panel, part);
                        finish(part, 32, width, bias_here, y + r * outputs + o, outputs);
                    }
                }
                if (tail) {
                    asm volatile("ldtilecfg %0" ::"m"(last) : "memory");
                    if (tail > 16)
                        amx_tile<true>(x + r * inputs, inputs, panel, part);
                    else
                        amx_tile<false>(x + r * inputs, inputs, panel, part);
                    finish(part, tail, width, bias_here, y + r * outputs + o, outputs);
                }
            }
            asm volatile("tilerelease" ::: "memory");
        }
    }
}

extern "C" void linear_bf16(const uint16_t* x, long rows, long inputs, const uint16_t* packed, const bfloat16* bias,
                            long outputs, void* y, int y_is_f32, int threads) {
    if (y_is_f32)
        linear_amx(x, rows, inputs, packed, bias, outputs, (float*)y, threads);
    else
        linear_amx(x, rows, inputs, packed, bias, outputs, (bfloat16*)y, threads);
}

#endif
