// The convolution's input as tiles in Winograd's domain: normalised, activated and resampled while it is
// read.
#pragma once

#include "convolution.h"
#include "group_norm_math.h"
#include "winograd.h"

namespace {

using glide_fast::Convolution;
using glide_fast::TileChunk;

// A vector of channels of one picture, from one source or across the border of two.
struct ChannelBlock {
    const float* data[2];
    int64_t stride[2], count[2];
    Vector gain, offset;

    ChannelBlock(const Convolution& problem, int64_t picture, int64_t first) {
        const int64_t pixels = problem.source_height * problem.source_width;
        int64_t left = smaller(LANES, problem.channels - first), begin = 0;
        const int64_t all = left;
        for (int64_t side = 0; side < 2; ++side) {
            const auto& source = problem.sources[side];
            const int64_t skipped = first > begin ? first - begin : 0;
            const int64_t rest = source.channels > skipped ? source.channels - skipped : 0;
            count[side] = smaller(left, rest);
            stride[side] = source.channels;
            data[side] = source.data + picture * pixels * source.channels + skipped;
            left -= count[side];
            begin += source.channels;
        }
        gain = offset = Vector{};
        if (problem.gain != nullptr) {
            gain = load_first(problem.gain + picture * problem.channels + first, all);
            offset = load_first(problem.offset + picture * problem.channels + first, all);
        }
    }

    int64_t whole_source() const { return count[0] == LANES ? 0 : count[1] == LANES ? 1 : -1; }

    Vector mixed(int64_t pixel) const {
        float values[LANES] = {};
        for (int64_t lane = 0; lane < count[0]; ++lane) values[lane] = data[0][pixel * stride[0] + lane];
        for (int64_t lane = 0; lane < count[1]; ++lane)
            values[count[0] + lane] = data[1][pixel * stride[1] + lane];
        return load(values);
    }
};

constexpr int64_t PIXELS_AHEAD = 16;  // whose loads are begun early: processors do not foresee such strides

// Where the pixels of a block are read.
struct WholeBlock {
    const float* data;
    int64_t stride;

    Vector operator()(int64_t pixel) const { return load(data + pixel * stride); }
    void prefetch(int64_t pixel) const { __builtin_prefetch(data + pixel * stride); }
};

struct MixedBlock {
    const ChannelBlock& block;

    Vector operator()(int64_t pixel) const { return block.mixed(pixel); }
    void prefetch(int64_t) const {}
};

template <bool ACTIVATE>
Vector activated(const ChannelBlock& block, Vector x) {
    return ACTIVATE ? activate<true>(x * block.gain + block.offset) : x;
}

// A row of the padded map: `columns` pixels, the first of which is left of the picture.
template <bool ACTIVATE, typename Source>
void fill_row(const Convolution& problem, const ChannelBlock& block, Source source, int64_t row,
              float* target, int64_t columns) {
    const int64_t width = problem.width, source_width = problem.source_width;
    float* pixel = target + LANES;
    if (problem.resample == Resample::NONE) {
        for (int64_t x = 0; x < width; ++x) {
            source.prefetch(row * width + x + PIXELS_AHEAD);
            store(pixel + x * LANES, activated<ACTIVATE>(block, source(row * width + x)));
        }
    } else if (problem.resample == Resample::UP) {
        for (int64_t x = 0; x < source_width; ++x) {
            const Vector value = activated<ACTIVATE>(block, source(row / 2 * source_width + x));
            store(pixel + 2 * x * LANES, value);
            store(pixel + (2 * x + 1) * LANES, value);
        }
    } else {
        for (int64_t x = 0; x < width; ++x) {
            Vector sum{};
            for (int64_t part = 0; part < 4; ++part)
                sum += activated<ACTIVATE>(block,
                                           source((2 * row + part / 2) * source_width + 2 * x + part % 2));
            store(pixel + x * LANES, sum * 0.25f);
        }
    }
    store(target, Vector{});
    for (int64_t x = width + 1; x < columns; ++x) store(target + x * LANES, Vector{});
}

// The rows that `tile_rows` rows of tiles need, beginning one above row `first` of the convolved map.
template <bool ACTIVATE, typename Source>
void fill_strip(const Convolution& problem, const ChannelBlock& block, Source source, int64_t first,
                int64_t tile_rows, float* strip, int64_t columns) {
    const int64_t rows = tile_rows * problem.tile + 2;
    for (int64_t k = 0; k < rows; ++k) {
        const int64_t row = first - 1 + k;
        float* target = strip + k * columns * LANES;
        if (row < 0 || row >= problem.height)
            for (int64_t x = 0; x < columns; ++x) store(target + x * LANES, Vector{});
        else if (problem.resample == Resample::UP && row % 2 == 1 && k > 0)  // a copy of the row above
            for (int64_t x = 0; x < columns; ++x)
                store(target + x * LANES, load(target + (x - columns) * LANES));
        else
            fill_row<ACTIVATE>(problem, block, source, row, target, columns);
    }
}

// One row of tiles: `strip` [TILE + 2, columns] -> transformed tiles; `vertical` holds [columns, TILE + 2].
template <int64_t TILE>
void transform_row(const float* strip, int64_t columns, int64_t tiles, float* vertical,
                   const TileChunk& chunk, float* transformed) {
    constexpr int64_t SIZE = TILE + 2;
    for (int64_t x = 0; x < columns; ++x) {
        Vector d[SIZE], result[SIZE];
#pragma GCC unroll 8
        for (int64_t i = 0; i < SIZE; ++i) d[i] = load(strip + (i * columns + x) * LANES);
        Winograd<TILE>::input(d, result);
#pragma GCC unroll 8
        for (int64_t i = 0; i < SIZE; ++i) store(vertical + (x * SIZE + i) * LANES, result[i]);
    }
    for (int64_t tile = 0; tile < tiles; ++tile)
        for (int64_t i = 0; i < SIZE; ++i) {
            Vector d[SIZE], result[SIZE];
#pragma GCC unroll 8
            for (int64_t j = 0; j < SIZE; ++j) d[j] = load(vertical + ((tile * TILE + j) * SIZE + i) * LANES);
            Winograd<TILE>::input(d, result);
            float* target = transformed + i * SIZE * chunk.position_stride + tile * chunk.tile_stride;
#pragma GCC unroll 8
            for (int64_t j = 0; j < SIZE; ++j) store(target + j * chunk.position_stride, result[j]);
        }
}

inline int64_t padded_columns(const Convolution& problem) {
    return problem.tiles_across() * problem.tile + 2;
}

inline int64_t input_scratch(const Convolution& problem, const TileChunk& chunk) {
    const int64_t rows = smaller(chunk.end - chunk.begin, problem.tile_rows());
    return (rows * problem.tile + 2 + problem.tile + 2) * padded_columns(problem) * LANES;
}

template <int64_t TILE>
void transform_input(const Convolution& problem, const TileChunk& chunk, int64_t begin, int64_t end,
                     float* scratch) {
    const int64_t columns = padded_columns(problem), across = problem.tiles_across();
    float *vertical = scratch, *strip = scratch + (TILE + 2) * columns * LANES;
    for (int64_t task = begin; task < end; ++task)
        for (int64_t row = chunk.begin; row < chunk.end;) {
            const int64_t picture = row / problem.tile_rows(), first = row % problem.tile_rows();
            const int64_t rows = smaller(chunk.end - row, problem.tile_rows() - first);
            const ChannelBlock block(problem, picture, task * LANES);
            const int64_t side = block.whole_source();
            const auto fill = [&](auto source) {
                (problem.gain ? fill_strip<true, decltype(source)>
                              : fill_strip<false, decltype(source)>)(problem, block, source, first * TILE,
                                                                     rows, strip, columns);
            };
            if (side < 0)
                fill(MixedBlock{block});
            else
                fill(WholeBlock{block.data[side], block.stride[side]});
            for (int64_t k = 0; k < rows; ++k)
                transform_row<TILE>(
                    strip + k * TILE * columns * LANES, columns, across, vertical, chunk,
                    chunk.transformed + (row - chunk.begin + k) * across * chunk.tile_stride + task * LANES);
            row += rows;
        }
}

}  // namespace
