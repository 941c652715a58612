// The convolution's kernels of one ISA on one core, against sums in double: for processors that the tests do
// not run on.
#include <cmath>
#include <cstdio>
#include <vector>

#include "csrc/convolution_isa.cpp"

namespace {

constexpr double ALLOWED = 1e-5;  // of results of about one

std::vector<float> numbers(int64_t count, float scale) {
    static int64_t seed = 0;
    std::vector<float> values(static_cast<size_t>(count));
    for (float& value : values) value = scale * std::sin(12.9898f * static_cast<float>(++seed % 9973));
    return values;
}

// The largest error of SiLU(x * gain + offset), convolved, + bias + residual.
double error_of(int64_t size, int64_t tile) {
    constexpr int64_t BATCH = 2, CHANNELS = 37, OUTPUTS = 45;
    const int64_t pixels = size * size;
    const auto x = numbers(BATCH * pixels * CHANNELS, 1), gain = numbers(BATCH * CHANNELS, 1);
    const auto offset = numbers(BATCH * CHANNELS, 1), weight = numbers(OUTPUTS * CHANNELS * 9, 1.0f / 18);
    const auto bias = numbers(OUTPUTS, 1), residual = numbers(BATCH * pixels * OUTPUTS, 1);
    std::vector<float> output(static_cast<size_t>(BATCH * pixels * OUTPUTS));

    const auto& kernels = glide_fast::GLIDE_FAST_ISA::convolution_kernels;
    Convolution problem{};
    problem.batch = BATCH;
    problem.channels = CHANNELS;
    problem.out_channels = OUTPUTS;
    problem.source_height = problem.source_width = problem.height = problem.width = size;
    problem.sources[0] = {x.data(), CHANNELS};
    problem.gain = gain.data();
    problem.offset = offset.data();
    problem.tile = tile;
    problem.panel_stride = problem.panel_floats();
    std::vector<float> packed(static_cast<size_t>(problem.panels() * problem.panel_floats()));
    kernels.transform_weight({weight.data(), OUTPUTS, CHANNELS, CHANNELS * 9, 9, 3, 1}, tile, packed.data(),
                             0, problem.panels());
    problem.weight = packed.data();
    problem.bias = bias.data();
    problem.residual = residual.data();
    problem.output = output.data();

    TileChunk chunk{0, BATCH * problem.tile_rows(), nullptr, glide_fast::spread_stride(CHANNELS), 0};
    const int64_t tiles = chunk.tiles(problem);
    chunk.position_stride = tiles * chunk.tile_stride + glide_fast::CACHE_LINE_FLOATS;
    std::vector<float> transformed(static_cast<size_t>(chunk.size(problem)));
    chunk.transformed = transformed.data();
    std::vector<float> scratch(
        static_cast<size_t>(kernels.input_scratch(problem, chunk) + kernels.output_scratch(problem, tiles)));
    kernels.transform_input(problem, chunk, 0, glide_fast::divide_up(CHANNELS, kernels.lanes),
                            scratch.data());
    kernels.multiply(problem, chunk, 1, 0, problem.panels(), scratch.data());

    double worst = 0;
    for (int64_t at = 0; at < BATCH * pixels * OUTPUTS; ++at) {
        const int64_t out = at % OUTPUTS, pixel = at / OUTPUTS % pixels, picture = at / OUTPUTS / pixels;
        double sum = bias[out] + residual[at];
        for (int64_t place = 0; place < 9; ++place) {
            const int64_t row = pixel / size + place / 3 - 1, column = pixel % size + place % 3 - 1;
            if (row < 0 || row >= size || column < 0 || column >= size) continue;
            for (int64_t channel = 0; channel < CHANNELS; ++channel) {
                const int64_t from = ((picture * size + row) * size + column) * CHANNELS + channel;
                const int64_t norm = picture * CHANNELS + channel;
                const double z = static_cast<double>(x[from]) * gain[norm] + offset[norm];
                sum += z / (1 + std::exp(-z)) * weight[(out * CHANNELS + channel) * 9 + place];
            }
        }
        worst = std::fmax(worst, std::fabs(sum - output[at]));
    }
    return worst;
}

}  // namespace

int main() {
    double worst = 0;
    for (const int64_t tile : {2, 4})
        for (const int64_t size : {5, 8, 16}) worst = std::fmax(worst, error_of(size, tile));
    std::printf("%d lanes, largest error %.1e\n", static_cast<int>(LANES), worst);
    return worst > ALLOWED;
}
