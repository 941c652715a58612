// 3x3 convolution of channels-last float32 maps by Winograd's method: shapes, chunks and threads. The
// arithmetic is in the kernels of the chosen ISA. Called from glide_fast/ops/convolution_cpu.py, which
// checks.
#include "convolution.h"

#include <algorithm>

#include "isa.h"
#include "parallel.h"
#include "scratch.h"
#include "tensors.h"

namespace glide_fast {
namespace {

// Transformed tiles of a chunk: few enough for the caches, many enough to use each weight often.
constexpr int64_t CHUNK_FLOATS = 3 << 19;
constexpr int64_t CHUNK_TILES = 128;
constexpr int64_t TASKS_PER_THREAD = 2;
constexpr int64_t COLUMNS_A_TILE = 16;        // of the weights, see pays_apart; measured
constexpr int64_t TRANSFORM_OPERATIONS = 64;  // in whose time a number is transformed, memory included

// Of the products of one panel with so many tiles.
int64_t product_operations(const Convolution& problem, int64_t tiles) {
    return 2 * problem.positions() * tiles * problem.channels * PANEL;
}

// Rows of tiles, and into how many chunks of about the same size they are cut. `other_stride` as below.
struct Chunks {
    int64_t rows, count;

    Chunks(const Convolution& problem, int64_t other_stride) {
        const int64_t tile_floats = problem.positions() * (spread_stride(problem.channels) + other_stride);
        const int64_t tiles = std::min(CHUNK_FLOATS / tile_floats, CHUNK_TILES);
        rows = problem.batch * problem.tile_rows();
        count = divide_up(rows, std::max<int64_t>(1, tiles / problem.tiles_across()));
    }

    // Where a chunk is; its memory is to be filled in.
    TileChunk chunk(const Convolution& problem, int64_t number) const {
        TileChunk chunk;
        chunk.begin = rows * number / count;
        chunk.end = rows * (number + 1) / count;
        chunk.tile_stride = spread_stride(problem.channels);
        chunk.position_stride = chunk.tiles(problem) * chunk.tile_stride + CACHE_LINE_FLOATS;
        return chunk;
    }
};

// Calls `work(chunk, memory)` for one chunk after the other, its input transformed. `memory` has room for
// another transform, of rows `other_stride` floats long.
template <typename Work>
void for_each_chunk(const Convolution& problem, int64_t other_stride, Work work) {
    const ConvolutionKernels& kernels = *current_isa().convolution;
    const Chunks chunks(problem, other_stride);
    for (int64_t number = 0; number < chunks.count; ++number) {
        TileChunk chunk = chunks.chunk(problem, number);
        const int64_t size = chunk.size(problem);
        const int64_t other = problem.positions() * (chunk.tiles(problem) * other_stride + CACHE_LINE_FLOATS);
        chunk.transformed = scratch_memory<ScratchUse::BETWEEN>(size + other);
        for_each_task(divide_up(problem.channels, kernels.lanes),
                      problem.positions() * chunk.tiles(problem) * kernels.lanes * TRANSFORM_OPERATIONS,
                      [&](int64_t begin, int64_t end) {
                          float* scratch =
                              scratch_memory<ScratchUse::OWN>(kernels.input_scratch(problem, chunk));
                          kernels.transform_input(problem, chunk, begin, end, scratch);
                      });
        work(chunk, chunk.transformed + size);
    }
}

// Whether it pays that each thread reads all weights, in order to read no tiles of another's: the more tiles
// a thread has for each column of the weights, the less that costs.
bool pays_apart(const Convolution& problem, const Chunks& chunks, int64_t threads) {
    const bool even = chunks.rows % threads == 0 || chunks.rows >= 4 * threads;
    return even && chunks.rows * problem.tiles_across() * COLUMNS_A_TILE >= threads * problem.out_channels;
}

// Every thread has chunks of its own: none waits for another, or reads what another has in its caches.
void convolve_apart(const Convolution& problem, const Chunks& chunks) {
    const ConvolutionKernels& kernels = *current_isa().convolution;
    const int64_t tiles = divide_up(chunks.rows, chunks.count) * problem.tiles_across();
    const int64_t operations = product_operations(problem, tiles) * problem.panels();
    for_each_task(chunks.count, operations, [&](int64_t begin, int64_t end) {
        for (int64_t number = begin; number < end; ++number) {
            TileChunk chunk = chunks.chunk(problem, number);
            chunk.transformed = scratch_memory<ScratchUse::BETWEEN>(chunk.size(problem));
            float* scratch = scratch_memory<ScratchUse::OWN>(
                std::max(kernels.input_scratch(problem, chunk),
                         kernels.output_scratch(problem, chunk.tiles(problem))));
            kernels.transform_input(problem, chunk, 0, divide_up(problem.channels, kernels.lanes), scratch);
            kernels.multiply(problem, chunk, 1, 0, problem.panels(), scratch);
        }
    });
}

void convolve(const Convolution& problem) {
    const ConvolutionKernels& kernels = *current_isa().convolution;
    const int64_t threads = static_cast<int64_t>(torch::stable::get_num_threads());
    Chunks chunks(problem, 0);
    if (pays_apart(problem, chunks, threads)) {
        chunks.count = std::min(divide_up(chunks.count, threads) * threads, chunks.rows);
        return convolve_apart(problem, chunks);
    }
    for_each_chunk(problem, 0, [&](const TileChunk& chunk, float*) {
        const int64_t tiles = chunk.tiles(problem);
        const int64_t parts = std::min(divide_up(TASKS_PER_THREAD * threads, problem.panels()), tiles);
        for_each_task(problem.panels() * parts, product_operations(problem, tiles) / parts,
                      [&](int64_t begin, int64_t end) {
                          float* scratch = scratch_memory<ScratchUse::OWN>(
                              kernels.output_scratch(problem, divide_up(tiles, parts)));
                          kernels.multiply(problem, chunk, parts, begin, end, scratch);
                      });
    });
}

// With a weight that was not transformed: where all tiles are in one chunk, a panel of it is needed only
// once, and is transformed when its turn comes.
void convolve_and_pack(const Convolution& problem, const WeightLayout& layout) {
    const ConvolutionKernels& kernels = *current_isa().convolution;
    for_each_chunk(problem, 0, [&](const TileChunk& chunk, float*) {
        const int64_t tiles = chunk.tiles(problem);
        for_each_task(problem.panels(), product_operations(problem, tiles), [&](int64_t begin, int64_t end) {
            const int64_t size = problem.panel_floats();
            float* packed = scratch_memory<ScratchUse::OWN>(size + kernels.output_scratch(problem, tiles));
            Convolution part = problem;
            part.weight = packed;
            part.panel_stride = 0;
            for (int64_t panel = begin; panel < end; ++panel) {
                WeightLayout rest = layout;
                rest.data += panel * PANEL * layout.out_stride;
                rest.out_channels -= panel * PANEL;
                kernels.transform_weight(rest, problem.tile, packed, 0, 1);
                kernels.multiply(part, chunk, 1, panel, panel + 1, packed + size);
            }
        });
    });
}

WeightLayout layout_of(const Tensor& weight, bool transposed) {
    WeightLayout layout{data(weight),     weight.size(0),   weight.size(1),  weight.stride(0),
                        weight.stride(1), weight.stride(2), weight.stride(3)};
    if (transposed) {  // the gradient of the input: roles exchanged, the kernel turned by 180 degrees
        layout.data += 2 * layout.row_stride + 2 * layout.column_stride;
        std::swap(layout.out_channels, layout.channels);
        std::swap(layout.out_stride, layout.in_stride);
        layout.row_stride = -layout.row_stride;
        layout.column_stride = -layout.column_stride;
    }
    return layout;
}

void pack_into(const WeightLayout& layout, int64_t tile, float* packed) {
    const int64_t panels = divide_up(layout.out_channels, PANEL);
    for_each_task(panels, layout.channels * PANEL * (tile + 2) * (tile + 2) * TRANSFORM_OPERATIONS,
                  [&](int64_t begin, int64_t end) {
                      current_isa().convolution->transform_weight(layout, tile, packed, begin, end);
                  });
}

std::vector<int64_t> packed_sizes(const WeightLayout& layout, int64_t tile) {
    return {divide_up(layout.out_channels, PANEL), (tile + 2) * (tile + 2), layout.channels, PANEL};
}

Tensor pack_convolution(Tensor weight, int64_t tile) {
    const WeightLayout layout = layout_of(weight, false);
    Tensor packed = empty(packed_sizes(layout, tile));
    pack_into(layout, tile, mutable_data(packed));
    return packed;
}

// All of the problem but weights, output and what is added to it.
Convolution problem_of(const Tensor& x, const OptionalTensor& skip, const OptionalTensor& gain,
                       const OptionalTensor& offset, int64_t mode, int64_t out_channels, int64_t tile) {
    Convolution problem{};
    problem.batch = x.size(0);
    problem.sources[0] = {data(x), x.size(1)};
    problem.sources[1] = {data(skip), skip ? skip->size(1) : 0};
    problem.channels = problem.sources[0].channels + problem.sources[1].channels;
    problem.out_channels = out_channels;
    problem.source_height = problem.height = x.size(2);
    problem.source_width = problem.width = x.size(3);
    problem.resample = static_cast<Resample>(mode);
    if (problem.resample == Resample::UP) problem.height *= 2, problem.width *= 2;
    if (problem.resample == Resample::DOWN) problem.height /= 2, problem.width /= 2;
    problem.gain = data(gain);
    problem.offset = data(offset);
    problem.tile = tile;
    return problem;
}

void convolution(Tensor x, OptionalTensor skip, OptionalTensor gain, OptionalTensor offset, int64_t mode,
                 Tensor weight, OptionalTensor packed, int64_t tile, bool transposed, OptionalTensor bias,
                 OptionalTensor residual, Tensor output) {
    const WeightLayout layout = layout_of(weight, transposed);
    Convolution problem = problem_of(x, skip, gain, offset, mode, layout.out_channels, tile);
    problem.bias = data(bias);
    problem.bias_stride = bias && bias->dim() == 2 ? bias->stride(0) : 0;
    problem.residual = data(residual);
    problem.residual_halved = residual && residual->size(2) != problem.height;
    problem.output = mutable_data(output);
    const bool once = Chunks(problem, 0).count == 1 &&
                      problem.panels() >= static_cast<int64_t>(torch::stable::get_num_threads());
    if (!packed && once) return convolve_and_pack(problem, layout);
    problem.panel_stride = problem.panel_floats();
    if (packed) {
        problem.weight = data(*packed);
    } else {
        float* memory = scratch_memory<ScratchUse::WEIGHTS>(problem.panels() * problem.panel_floats());
        pack_into(layout, tile, memory);
        problem.weight = memory;
    }
    convolve(problem);
}

Tensor convolution_weight_gradient(Tensor grad, Tensor x, OptionalTensor gain, OptionalTensor offset,
                                   int64_t mode, int64_t tile) {
    const Convolution problem = problem_of(x, std::nullopt, gain, offset, mode, grad.size(1), tile);
    const ConvolutionKernels& kernels = *current_isa().convolution;
    Tensor weight = empty({problem.out_channels, problem.channels, 3, 3});
    WeightGradient gradient{};
    gradient.grad = data(grad);
    gradient.sums = scratch_memory<ScratchUse::WEIGHTS>(problem.panels() * problem.positions() *
                                                        problem.channels * PANEL);
    gradient.tile_stride = spread_stride(problem.panels() * PANEL);
    gradient.first = true;
    for_each_chunk(problem, gradient.tile_stride, [&](const TileChunk& chunk, float* memory) {
        gradient.transformed = memory;
        gradient.position_stride = chunk.tiles(problem) * gradient.tile_stride + CACHE_LINE_FLOATS;
        const int64_t vectors = problem.panels() * PANEL / kernels.lanes;
        for_each_task(vectors,
                      problem.positions() * chunk.tiles(problem) * kernels.lanes * TRANSFORM_OPERATIONS,
                      [&](int64_t begin, int64_t end) {
                          kernels.transform_gradient(problem, chunk, gradient, begin, end);
                      });
        for_each_task(problem.panels() * problem.positions(),
                      product_operations(problem, chunk.tiles(problem)) / problem.positions(),
                      [&](int64_t begin, int64_t end) {
                          kernels.multiply_gradient(problem, chunk, gradient, begin, end);
                      });
        gradient.first = false;
    });
    float* target = mutable_data(weight);
    for_each_task(
        problem.panels(), problem.channels * PANEL * problem.positions() * TRANSFORM_OPERATIONS,
        [&](int64_t begin, int64_t end) { kernels.finish_gradient(problem, gradient, target, begin, end); });
    return weight;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(glide_fast, library) {
    library.def("pack_convolution(Tensor weight, int tile) -> Tensor");
    library.def(
        "convolution(Tensor x, Tensor? skip, Tensor? gain, Tensor? offset, int mode, Tensor weight, "
        "Tensor? packed, int tile, bool transposed, Tensor? bias, Tensor? residual, Tensor(a!) output) -> "
        "()");
    library.def(
        "convolution_weight_gradient(Tensor grad, Tensor x, Tensor? gain, Tensor? offset, int mode, int "
        "tile) "
        "-> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(glide_fast, CPU, library) {
    library.impl("pack_convolution", TORCH_BOX(&pack_convolution));
    library.impl("convolution", TORCH_BOX(&convolution));
    library.impl("convolution_weight_gradient", TORCH_BOX(&convolution_weight_gradient));
}

}  // namespace glide_fast
