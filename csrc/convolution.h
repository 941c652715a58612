// What the convolution op hands to its kernels. Plain data only: code compiled for different ISAs shares it.
//
// The work goes through the output in chunks of tile rows, and through a chunk in two phases: transform the
// input's tiles, then multiply with the weights and transform back. What a chunk needs stays in the caches.
// Where there are chunks for all threads, each thread has its own. Otherwise all threads go through a chunk
// together (tasks: vectors of channels, then panels of output channels): small maps have few tiles, and the
// weights, which are most of their memory traffic, are read once.
#pragma once

#include "group_norm.h"
#include "panel.h"

namespace glide_fast {

struct ConvolutionSource {
    const float* data;  // [B, height, width, channels]
    int64_t channels;
};

// output = conv3x3(resample(SiLU(x * gain + offset))) + bias + residual, x the sources side by side.
struct Convolution {
    int64_t batch, channels, out_channels;
    int64_t source_height, source_width;
    int64_t height, width;  // after resampling
    Resample resample;
    ConvolutionSource sources[2];  // the second may have no channels
    const float *gain, *offset;    // [B, C]; or both null, and there is no SiLU either
    int64_t tile;                  // 2 or 4: F(2x2, 3x3) or F(4x4, 3x3)
    const float* weight;           // [panels, (tile + 2)^2, C, PANEL]
    int64_t panel_stride;          // of the weight; 0 where one panel after the other is put there
    const float* bias;             // [K], [B, K] or null
    int64_t bias_stride;           // between pictures
    const float* residual;         // [B, H, W, K], or half of H and W where `residual_halved`, or null
    bool residual_halved;
    float* output;  // [B, H, W, K]

    int64_t positions() const { return (tile + 2) * (tile + 2); }
    int64_t tile_rows() const { return divide_up(height, tile); }  // of a picture
    int64_t tiles_across() const { return divide_up(width, tile); }
    int64_t panels() const { return divide_up(out_channels, PANEL); }
    int64_t panel_floats() const { return positions() * channels * PANEL; }  // of the weight
};

// Tile rows of all pictures one after the other, and where their transforms are.
struct TileChunk {
    int64_t begin, end;  // tile rows
    float* transformed;  // [positions, tiles, channels], with these strides
    int64_t tile_stride, position_stride;

    int64_t tiles(const Convolution& problem) const { return (end - begin) * problem.tiles_across(); }
    int64_t size(const Convolution& problem) const { return problem.positions() * position_stride; }
};

// The gradient of the weights: sums over tiles of products of transformed inputs and transformed gradients.
struct WeightGradient {
    const float* grad;   // [B, H, W, K], of the output
    float* transformed;  // [positions, tiles, K rounded up to panels], with these strides
    int64_t tile_stride, position_stride;
    float* sums;  // [panels, positions, C, PANEL], of all chunks so far
    bool first;   // chunk
};

struct WeightLayout {
    const float* data;
    int64_t out_channels, channels;
    int64_t out_stride, in_stride, row_stride, column_stride;
};

struct ConvolutionKernels {
    // Floats of scratch that a thread brings to each phase.
    int64_t (*input_scratch)(const Convolution&, const TileChunk&);
    int64_t (*output_scratch)(const Convolution&, int64_t tiles);
    int64_t lanes;  // channels of a task of the first phase
    void (*transform_input)(const Convolution&, const TileChunk&, int64_t begin, int64_t end, float* scratch);
    // Tasks: `parts` ranges of tiles for each panel.
    void (*multiply)(const Convolution&, const TileChunk&, int64_t parts, int64_t begin, int64_t end,
                     float* scratch);
    // Tasks: panels of `packed`.
    void (*transform_weight)(const WeightLayout&, int64_t tile, float* packed, int64_t begin, int64_t end);
    // Tasks: vectors of output channels; positions of panels; panels of `sums`, written to [K, C, 3, 3].
    void (*transform_gradient)(const Convolution&, const TileChunk&, const WeightGradient&, int64_t begin,
                               int64_t end);
    void (*multiply_gradient)(const Convolution&, const TileChunk&, const WeightGradient&, int64_t begin,
                              int64_t end);
    void (*finish_gradient)(const Convolution&, const WeightGradient&, float* weight, int64_t begin,
                            int64_t end);
};

}  // namespace glide_fast
