// Attention for one ISA: blocks of queries go over blocks of keys with a running maximum and sum (online
// softmax; Milakov & Gimelshein 2018, arXiv 1805.02867; Dao et al. 2022, arXiv 2205.14135).
#include "attention.h"

#include "group_norm_math.h"
#include "product.h"

namespace {

using glide_fast::Attention;
using glide_fast::AttentionTensor;

constexpr int64_t BLOCK_KEYS = 256;  // whose scores are in memory at a time
constexpr float LOWEST = -3.0e38f;

int64_t scratch(const Attention& problem) {
    return problem.block_queries * (BLOCK_KEYS + problem.padded_dim() + 2);
}

void pack_panel(const Attention& problem, int64_t picture, int64_t head, int64_t panel) {
    const int64_t index = picture * problem.heads + head, dim = problem.dim;
    float* keys = problem.packed_keys + (index * problem.key_panels() + panel) * dim * PANEL;
    float* values = problem.packed_values + index * problem.padded_keys() * problem.padded_dim();
    for (int64_t column = 0; column < PANEL; ++column) {
        const int64_t number = panel * PANEL + column;
        const bool exists = number < problem.keys(), is_text = number < problem.text;
        const int64_t token = is_text ? number : number - problem.text;
        const AttentionTensor& key = is_text ? problem.text_key : problem.key;
        const AttentionTensor& value = is_text ? problem.text_value : problem.value;
        const float* key_row = exists ? key.at(picture, token, head) : nullptr;
        const float* value_row = exists ? value.at(picture, token, head) : nullptr;
        for (int64_t d = 0; d < dim; ++d) keys[d * PANEL + column] = exists ? key_row[d] : 0.0f;
        for (int64_t part = 0; part < problem.value_panels(); ++part) {
            float* target = values + (part * problem.padded_keys() + number) * PANEL;
            for (int64_t d = 0; d < PANEL; ++d) {
                const int64_t at = part * PANEL + d;
                target[d] = exists && at < dim ? value_row[at] : 0.0f;
            }
        }
    }
}

void pack(const Attention& problem, int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
        const int64_t index = task / problem.key_panels();
        pack_panel(problem, index / problem.heads, index % problem.heads, task % problem.key_panels());
    }
}

inline float largest_lane(Vector value) {
    float result = value[0];
    for (int64_t lane = 1; lane < LANES; ++lane) result = value[lane] > result ? value[lane] : result;
    return result;
}

// Scores become weights exp(scale * score - maximum); the running maximum and sum go on. Returns by how much
// what was summed before has to shrink. The scores behind `keys`, up to the panel's end, become zero.
inline float exponentiate(float* scores, int64_t keys, float scale, float* maximum, float* sum) {
    Vector highest = splat(LOWEST);
    const int64_t whole = keys / LANES * LANES;
    for (int64_t k = 0; k < whole; k += LANES) {
        const Vector score = load(scores + k);
        highest = score > highest ? score : highest;
    }
    float top = largest_lane(highest);
    for (int64_t k = whole; k < keys; ++k) top = scores[k] > top ? scores[k] : top;
    const float before = *maximum, now = top * scale > before ? top * scale : before;

    Vector total{};
    for (int64_t k = 0; k < whole; k += LANES) {
        const Vector weight = exponential(load(scores + k) * scale - now);
        store(scores + k, weight);
        total += weight;
    }
    if (whole < keys) {
        const Vector weight = exponential(load(scores + whole) * scale - now);
        store(scores + whole, Vector{});
        store_first(scores + whole, weight, keys - whole);
        total += load(scores + whole);
        for (int64_t k = whole + LANES; k % PANEL != 0; k += LANES) store(scores + k, Vector{});
    }
    const float shrink = before == LOWEST ? 0.0f : exponential(splat(before - now))[0];
    *maximum = now;
    *sum = *sum * shrink + static_cast<float>(sum_of_lanes(total));
    return shrink;
}

void attend_block(const Attention& problem, int64_t index, int64_t first, int64_t rows, float* scratch) {
    const int64_t picture = index / problem.heads, head = index % problem.heads, width = problem.padded_dim();
    const float scale = static_cast<float>(1.0 / __builtin_sqrt(static_cast<double>(problem.dim)));
    float *scores = scratch, *sums = scores + rows * BLOCK_KEYS;
    float *maximum = sums + rows * width, *total = maximum + rows;
    const float* keys = problem.packed_keys + index * problem.key_panels() * problem.dim * PANEL;
    const float* values = problem.packed_values + index * problem.padded_keys() * width;
    for (int64_t row = 0; row < rows; ++row) maximum[row] = LOWEST, total[row] = 0.0f;
    for (int64_t begin = 0; begin < problem.keys(); begin += BLOCK_KEYS) {
        const int64_t count = smaller(BLOCK_KEYS, problem.keys() - begin);
        const int64_t padded = (count + PANEL - 1) / PANEL * PANEL;
        for (int64_t k = 0; k < padded; k += PANEL)
            multiply_panel<LONG_SUMS>({problem.query.at(picture, first, head), problem.query.token, 1}, rows,
                                      keys + (begin + k) * problem.dim, PANEL, problem.dim, scores + k,
                                      BLOCK_KEYS, false);
        for (int64_t row = 0; row < rows; ++row) {
            const float shrink =
                exponentiate(scores + row * BLOCK_KEYS, count, scale, maximum + row, total + row);
            if (begin > 0 && shrink != 1.0f)
                for (int64_t d = 0; d < width; d += LANES)
                    store(sums + row * width + d, load(sums + row * width + d) * shrink);
        }
        for (int64_t d = 0; d < width; d += PANEL)
            multiply_panel<LONG_SUMS>({scores, BLOCK_KEYS, 1}, rows,
                                      values + d * problem.padded_keys() + begin * PANEL, PANEL, padded,
                                      sums + d, width, begin > 0);
    }
    for (int64_t row = 0; row < rows; ++row) {
        float* target =
            problem.output + ((picture * problem.queries + first + row) * problem.heads + head) * problem.dim;
        const float inverse = 1.0f / total[row];
        for (int64_t d = 0; d < problem.dim; d += LANES)
            store_first(target + d, load(sums + row * width + d) * inverse, smaller(LANES, problem.dim - d));
        problem.log_sum[index * problem.queries + first + row] = maximum[row] + __builtin_logf(total[row]);
    }
}

void attend(const Attention& problem, int64_t begin, int64_t end, float* scratch) {
    for (int64_t task = begin; task < end; ++task) {
        const int64_t first = task % problem.query_blocks() * problem.block_queries;
        attend_block(problem, task / problem.query_blocks(), first,
                     smaller(problem.block_queries, problem.queries - first), scratch);
    }
}

}  // namespace

namespace glide_fast {
namespace GLIDE_FAST_ISA {

extern const AttentionKernels attention_kernels;
const AttentionKernels attention_kernels = {scratch, pack, attend};

}  // namespace GLIDE_FAST_ISA
}  // namespace glide_fast
