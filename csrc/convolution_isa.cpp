// The 3x3 convolution's kernels for one ISA: products in Winograd's domain and the way back.
#include "convolution_gradient.h"
#include "convolution_tiles.h"
#include "product.h"

namespace {

using glide_fast::WeightLayout;

constexpr int64_t SPREAD =
    glide_fast::CACHE_LINE_FLOATS;  // between positions, against conflicts in the cache

// Where a tile's pixels go.
struct TileTarget {
    int64_t picture, rows, columns, corner;  // of the output, at the panel's first channel
    int64_t residual_corner, residual_row;   // and of the residual

    TileTarget(const Convolution& problem, int64_t tile_row, int64_t tile_column, int64_t channel) {
        picture = tile_row / problem.tile_rows();
        const int64_t y = tile_row % problem.tile_rows() * problem.tile, x = tile_column * problem.tile;
        rows = smaller(problem.tile, problem.height - y);
        columns = smaller(problem.tile, problem.width - x);
        corner = ((picture * problem.height + y) * problem.width + x) * problem.out_channels + channel;
        const int64_t shift = problem.residual_halved;
        residual_row = (problem.width >> shift) * problem.out_channels;
        residual_corner = (picture * (problem.height >> shift) + (y >> shift)) * residual_row +
                          (x >> shift) * problem.out_channels + channel;
    }
};

enum class Residual { NONE, WHOLE, HALVED };

// Products [positions, LANES] -> pixels of the output, with bias and residual. WHOLE: no pixel and no channel
// is beyond the map.
template <int64_t TILE, bool WHOLE, Residual RESIDUAL>
void transform_tile(const Convolution& problem, const float* products, int64_t position_stride,
                    const TileTarget& target, int64_t lane, int64_t lanes, Vector bias) {
    constexpr int64_t SIZE = TILE + 2;
    Vector horizontal[SIZE][TILE];
#pragma GCC unroll 8
    for (int64_t i = 0; i < SIZE; ++i) {
        Vector m[SIZE];
#pragma GCC unroll 8
        for (int64_t j = 0; j < SIZE; ++j) m[j] = load(products + (i * SIZE + j) * position_stride);
        Winograd<TILE>::output(m, horizontal[i]);
    }
#pragma GCC unroll 8
    for (int64_t x = 0; x < TILE; ++x) {
        Vector m[SIZE], result[TILE];
#pragma GCC unroll 8
        for (int64_t i = 0; i < SIZE; ++i) m[i] = horizontal[i][x];
        Winograd<TILE>::output(m, result);
#pragma GCC unroll 8
        for (int64_t y = 0; y < TILE; ++y) {
            if (!WHOLE && (y >= target.rows || x >= target.columns)) continue;
            const int64_t at = target.corner + (y * problem.width + x) * problem.out_channels + lane;
            Vector value = result[y] + bias;
            if (RESIDUAL != Residual::NONE) {
                constexpr int64_t SHIFT = RESIDUAL == Residual::HALVED;
                const int64_t from = target.residual_corner + (y >> SHIFT) * target.residual_row +
                                     (x >> SHIFT) * problem.out_channels + lane;
                value += load_lanes<WHOLE>(problem.residual + from, lanes);
            }
            store_lanes<WHOLE>(problem.output + at, value, lanes);
        }
    }
}

template <int64_t TILE, Residual RESIDUAL>
auto transform_of(bool whole) {
    return whole ? transform_tile<TILE, true, RESIDUAL> : transform_tile<TILE, false, RESIDUAL>;
}

// Begin to load what the tile after the next one reads and writes.
template <int64_t TILE>
void prefetch_tile(const Convolution& problem, const TileTarget& target) {
    const int64_t ahead = target.corner + 2 * TILE * problem.out_channels;
    for (int64_t y = 0; y < TILE; ++y)
        for (int64_t x = 0; x < TILE; ++x)
            for (int64_t line = 0; line < PANEL; line += glide_fast::CACHE_LINE_FLOATS) {
                const int64_t at = ahead + (y * problem.width + x) * problem.out_channels + line;
                if (problem.residual != nullptr && !problem.residual_halved)
                    __builtin_prefetch(problem.residual + at);
                __builtin_prefetch(problem.output + at, 1);
            }
}

template <int64_t TILE>
void transform_panel(const Convolution& problem, const float* products, int64_t position_stride,
                     int64_t tile_row, int64_t tile_column, int64_t channel) {
    const TileTarget target(problem, tile_row, tile_column, channel);
    if (tile_column + 2 < problem.tiles_across()) prefetch_tile<TILE>(problem, target);
    for (int64_t lane = 0; lane < PANEL && channel + lane < problem.out_channels; lane += LANES) {
        const int64_t lanes = smaller(LANES, problem.out_channels - channel - lane);
        Vector bias{};
        if (problem.bias != nullptr)
            bias = load_first(problem.bias + target.picture * problem.bias_stride + channel + lane, lanes);
        const bool whole = lanes == LANES && target.rows == TILE && target.columns == TILE;
        const auto transform = problem.residual == nullptr ? transform_of<TILE, Residual::NONE>(whole)
                               : problem.residual_halved   ? transform_of<TILE, Residual::HALVED>(whole)
                                                           : transform_of<TILE, Residual::WHOLE>(whole);
        transform(problem, products + lane, position_stride, target, lane, lanes, bias);
    }
}

int64_t output_scratch(const Convolution& problem, int64_t tiles) {
    return problem.positions() * (tiles * PANEL + SPREAD);
}

template <int64_t TILE>
void multiply(const Convolution& problem, const TileChunk& chunk, int64_t parts, int64_t begin, int64_t end,
              float* products) {
    constexpr int64_t POSITIONS = (TILE + 2) * (TILE + 2);
    const int64_t all = chunk.tiles(problem), across = problem.tiles_across();
    for (int64_t task = begin; task < end; ++task) {
        const int64_t panel = task / parts, part = task % parts;
        const int64_t first = all * part / parts, tiles = all * (part + 1) / parts - first;
        const int64_t stride = tiles * PANEL + SPREAD;
        for (int64_t position = 0; position < POSITIONS; ++position) {
            const float* a = chunk.transformed + position * chunk.position_stride + first * chunk.tile_stride;
            const float* b =
                problem.weight + panel * problem.panel_stride + position * problem.channels * PANEL;
            const float* next = b + problem.channels * PANEL;
            multiply_panel<SHORT_SUMS>({a, chunk.tile_stride, 1}, tiles, b, PANEL, problem.channels,
                                       products + position * stride, PANEL, false, next);
        }
        for (int64_t tile = 0; tile < tiles; ++tile)
            transform_panel<TILE>(problem, products + tile * PANEL, stride,
                                  chunk.begin + (first + tile) / across, (first + tile) % across,
                                  panel * PANEL);
    }
}

template <int64_t TILE>
void transform_weight(const WeightLayout& weight, float* packed, int64_t begin, int64_t end) {
    constexpr int64_t SIZE = TILE + 2;
    for (int64_t panel = begin; panel < end; ++panel)
        for (int64_t channel = 0; channel < weight.channels; ++channel)
            for (int64_t lane = 0; lane < PANEL; lane += LANES) {
                const int64_t first = panel * PANEL + lane;
                Vector g[3][3] = {};
                for (int64_t i = 0; i < LANES && first + i < weight.out_channels; ++i) {
                    const float* source =
                        weight.data + (first + i) * weight.out_stride + channel * weight.in_stride;
                    for (int64_t row = 0; row < 3; ++row)
                        for (int64_t column = 0; column < 3; ++column)
                            g[row][column][i] =
                                source[row * weight.row_stride + column * weight.column_stride];
                }
                Vector horizontal[3][SIZE];
                for (int64_t row = 0; row < 3; ++row) Winograd<TILE>::weight(g[row], horizontal[row]);
                for (int64_t x = 0; x < SIZE; ++x) {
                    const Vector column[3] = {horizontal[0][x], horizontal[1][x], horizontal[2][x]};
                    Vector result[SIZE];
                    Winograd<TILE>::weight(column, result);
                    for (int64_t y = 0; y < SIZE; ++y)
                        store(packed +
                                  ((panel * SIZE * SIZE + y * SIZE + x) * weight.channels + channel) * PANEL +
                                  lane,
                              result[y]);
                }
            }
}

void any_transform_input(const Convolution& problem, const TileChunk& chunk, int64_t begin, int64_t end,
                         float* scratch) {
    (problem.tile == 4 ? transform_input<4> : transform_input<2>)(problem, chunk, begin, end, scratch);
}

void any_multiply(const Convolution& problem, const TileChunk& chunk, int64_t parts, int64_t begin,
                  int64_t end, float* scratch) {
    (problem.tile == 4 ? multiply<4> : multiply<2>)(problem, chunk, parts, begin, end, scratch);
}

void any_transform_weight(const WeightLayout& weight, int64_t tile, float* packed, int64_t begin,
                          int64_t end) {
    (tile == 4 ? transform_weight<4> : transform_weight<2>)(weight, packed, begin, end);
}

void any_transform_gradient(const Convolution& problem, const TileChunk& chunk,
                            const WeightGradient& gradient, int64_t begin, int64_t end) {
    (problem.tile == 4 ? transform_gradient<4> : transform_gradient<2>)(problem, chunk, gradient, begin, end);
}

void any_finish_gradient(const Convolution& problem, const WeightGradient& gradient, float* weight,
                         int64_t begin, int64_t end) {
    (problem.tile == 4 ? finish_gradient<4> : finish_gradient<2>)(problem, gradient, weight, begin, end);
}

}  // namespace

namespace glide_fast {
namespace GLIDE_FAST_ISA {

extern const ConvolutionKernels convolution_kernels;
const ConvolutionKernels convolution_kernels = {
    input_scratch,          output_scratch,    LANES,
    any_transform_input,    any_multiply,      any_transform_weight,
    any_transform_gradient, multiply_gradient, any_finish_gradient,
};

}  // namespace GLIDE_FAST_ISA
}  // namespace glide_fast
