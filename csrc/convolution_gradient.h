// The gradient of a 3x3 convolution's weights in Winograd's domain: the transpose of the forward pass.
#pragma once

#include "convolution.h"
#include "group_norm_math.h"
#include "product.h"
#include "winograd.h"

namespace {

using glide_fast::Convolution;
using glide_fast::TileChunk;
using glide_fast::WeightGradient;

// Tiles of the output's gradient; channels from K on, up to the last panel's end, become zero.
template <int64_t TILE>
void transform_gradient(const Convolution& problem, const TileChunk& chunk, const WeightGradient& gradient,
                        int64_t begin, int64_t end) {
    constexpr int64_t SIZE = TILE + 2;
    const int64_t across = problem.tiles_across(), channels = problem.out_channels;
    for (int64_t task = begin; task < end; ++task)
        for (int64_t tile = 0; tile < chunk.tiles(problem); ++tile) {
            const int64_t row = chunk.begin + tile / across, picture = row / problem.tile_rows();
            const int64_t y0 = row % problem.tile_rows() * TILE, x0 = tile % across * TILE;
            const int64_t rows = smaller(TILE, problem.height - y0),
                          columns = smaller(TILE, problem.width - x0);
            const int64_t rest = channels - task * LANES, lanes = rest < 0 ? 0 : smaller(LANES, rest);
            const float* corner = gradient.grad + task * LANES +
                                  ((picture * problem.height + y0) * problem.width + x0) * channels;
            Vector vertical[TILE][SIZE];
            for (int64_t x = 0; x < TILE; ++x) {
                Vector y[TILE] = {};
                for (int64_t i = 0; x < columns && i < rows; ++i) {
                    const float* pixel = corner + (i * problem.width + x) * channels;
                    y[i] = lanes == LANES ? load(pixel) : load_first(pixel, lanes);
                }
                Winograd<TILE>::gradient(y, vertical[x]);
            }
            float* target = gradient.transformed + tile * gradient.tile_stride + task * LANES;
            for (int64_t i = 0; i < SIZE; ++i) {
                Vector y[TILE], result[SIZE];
#pragma GCC unroll 8
                for (int64_t x = 0; x < TILE; ++x) y[x] = vertical[x][i];
                Winograd<TILE>::gradient(y, result);
#pragma GCC unroll 8
                for (int64_t j = 0; j < SIZE; ++j)
                    store(target + (i * SIZE + j) * gradient.position_stride, result[j]);
            }
        }
}

inline void multiply_gradient(const Convolution& problem, const TileChunk& chunk,
                              const WeightGradient& gradient, int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
        const int64_t panel = task / problem.positions(), position = task % problem.positions();
        const float* b = gradient.transformed + position * gradient.position_stride + panel * PANEL;
        multiply_panel<SHORT_SUMS>(
            {chunk.transformed + position * chunk.position_stride, 1, chunk.tile_stride}, problem.channels, b,
            gradient.tile_stride, chunk.tiles(problem), gradient.sums + task * problem.channels * PANEL,
            PANEL, !gradient.first, b + gradient.position_stride);
    }
}

template <int64_t TILE>
void finish_gradient(const Convolution& problem, const WeightGradient& gradient, float* weight, int64_t begin,
                     int64_t end) {
    constexpr int64_t SIZE = TILE + 2;
    for (int64_t panel = begin; panel < end; ++panel)
        for (int64_t lane = 0; lane < PANEL && panel * PANEL + lane < problem.out_channels; lane += LANES)
            for (int64_t channel = 0; channel < problem.channels; ++channel) {
                const float* source =
                    gradient.sums + (panel * SIZE * SIZE * problem.channels + channel) * PANEL + lane;
                Vector vertical[SIZE][3];
                for (int64_t x = 0; x < SIZE; ++x) {
                    Vector u[SIZE];
                    for (int64_t y = 0; y < SIZE; ++y)
                        u[y] = load(source + (y * SIZE + x) * problem.channels * PANEL);
                    Winograd<TILE>::weight_gradient(u, vertical[x]);
                }
                const int64_t first = panel * PANEL + lane;
                const int64_t lanes = smaller(LANES, problem.out_channels - first);
                for (int64_t y = 0; y < 3; ++y) {
                    Vector u[SIZE], result[3];
                    for (int64_t x = 0; x < SIZE; ++x) u[x] = vertical[x][y];
                    Winograd<TILE>::weight_gradient(u, result);
                    for (int64_t x = 0; x < 3; ++x)
                        for (int64_t i = 0; i < lanes; ++i)
                            weight[((first + i) * problem.channels + channel) * 9 + y * 3 + x] = result[x][i];
                }
            }
}

}  // namespace
