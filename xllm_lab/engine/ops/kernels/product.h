// The one loop that all float32 matrix products here are made of.
#pragma once
#include "vectors.h"

#if defined(__AVX512F__)
constexpr int TILE_ROWS = 8, PANEL_VECS = 3;  // 24 sums, 3 columns and a factor: 28 of 32 registers
#else
constexpr int TILE_ROWS = 4, PANEL_VECS = 2;  // 8, 2 and 1 of 16
#endif
constexpr int PANEL = PANEL_VECS * LANES;

// y[r, :] (+)= x[r, :] panel, for ROWS rows and VECS * LANES columns. `panel` is [depth, ldp], its columns together.
// With AHEAD, what lies so many floats behind is fetched on the way.
template <int ROWS, int VECS, bool ADD, long AHEAD>
static inline void tile(const float* x, long ldx, const float* panel, long ldp, long depth, float* y, long ldy) {
    vec sums[ROWS][VECS];
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
        for (int v = 0; v < VECS; v++) sums[r][v] = ADD ? load(y + r * ldy + v * LANES) : vec{};
    for (long k = 0; k < depth; k++) {
        vec column[VECS];
#pragma GCC unroll 4
        for (int v = 0; v < VECS; v++) {
            column[v] = load(panel + k * ldp + v * LANES);
            if (AHEAD) __builtin_prefetch(panel + k * ldp + v * LANES + AHEAD);
        }
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++) {
            const vec factor = all(x[r * ldx + k]);
#pragma GCC unroll 4
            for (int v = 0; v < VECS; v++) sums[r][v] += factor * column[v];
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
        for (int v = 0; v < VECS; v++) store(y + r * ldy + v * LANES, sums[r][v]);
}

template <int VECS, bool ADD, long AHEAD, int ROWS = TILE_ROWS>
static inline void tile_of(long rows, const float* x, long ldx, const float* panel, long ldp, long depth, float* y,
                           long ldy) {
    if constexpr (ROWS > 0) {
        if (rows >= ROWS)
            tile<ROWS, VECS, ADD, AHEAD>(x, ldx, panel, ldp, depth, y, ldy);
        else
            tile_of<VECS, ADD, AHEAD, ROWS - 1>(rows, x, ldx, panel, ldp, depth, y, ldy);
    }
}

// Any number of rows.
template <int VECS, bool ADD, long AHEAD = 0>
static inline void rows_times_panel(long rows, const float* x, long ldx, const float* panel, long ldp, long depth,
                                    float* y, long ldy) {
    for (long r = 0; r < rows; r += TILE_ROWS)
        tile_of<VECS, ADD, AHEAD>(rows - r, x + r * ldx, ldx, panel, ldp, depth, y + r * ldy, ldy);
}
