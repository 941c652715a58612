// Attention for one ISA: blocks of queries go over blocks of keys with a running maximum and sum (online
// softmax; Milakov & Gimelshein 2018, arXiv 1805.02867; Dao et al. 2022, arXiv 2205.14135).
#include "attention.h"

#include "attention_gradient.h"
#include "attention_panels.h"
#include "group_norm_math.h"
#include "product.h"

namespace {

using glide_fast::Attention;
using glide_fast::AttentionTensor;

constexpr float LOWEST = -3.0e38f;

int64_t scratch(const Attention& problem) {
    return problem.block_queries * (BLOCK_KEYS + problem.padded_dim() + LANES + 1);
}

void pack_panel(const Attention& problem, int64_t picture, int64_t head, int64_t panel) {
    const int64_t index = picture * problem.heads + head - problem.first_packed, dim = problem.dim;
    float* keys = problem.packed_keys + (index * problem.key_panels() + panel) * dim * PANEL;
    float* values = problem.packed_values + index * problem.padded_keys() * problem.padded_dim();
    const int64_t width = problem.padded_dim(), stride = problem.padded_keys() * PANEL;
    for (int64_t column = 0; column < PANEL; ++column) {
        const int64_t number = panel * PANEL + column;
        const bool is_text = number < problem.text;
        const int64_t token = is_text ? number : number - problem.text;
        if (number < problem.keys()) {
            copy_column((is_text ? problem.text_key : problem.key).at(picture, token, head), dim,
                        keys + column);
            copy_row((is_text ? problem.text_value : problem.value).at(picture, token, head), dim, width,
                     stride, values + number * PANEL);
        } else {
            clear_column(dim, keys + column);
            copy_row(nullptr, 0, width, stride, values + number * PANEL);
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
    float lanes[LANES];
    store(lanes, value);
    for (int64_t half = LANES / 2; half > 0; half /= 2)
        for (int64_t lane = 0; lane < half; ++lane)
            lanes[lane] = lanes[lane] > lanes[lane + half] ? lanes[lane] : lanes[lane + half];
    return lanes[0];
}

// Scores become weights exp(scale * score - maximum); the running maximum and the sums of each lane go on.
// Returns by how much what was summed before has to shrink. The scores behind `keys`, up to the panel's end,
// become zero.
inline float exponentiate(float* scores, int64_t keys, float scale, float* maximum, float* sums) {
    Vector highest = splat(LOWEST);
    const int64_t whole = keys / LANES * LANES;
    for (int64_t k = 0; k < whole; k += LANES) {
        const Vector score = load(scores + k);
        highest = score > highest ? score : highest;
    }
    float top = largest_lane(highest);
    for (int64_t k = whole; k < keys; ++k) top = scores[k] > top ? scores[k] : top;
    const float before = *maximum, now = top * scale > before ? top * scale : before;
    const float shrink = before == LOWEST ? 0.0f : before == now ? 1.0f : exponential(splat(before - now))[0];

    Vector total = load(sums) * shrink;
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
    *maximum = now;
    store(sums, total);
    return shrink;
}

// The scores of keys from `seen` on become zero, but for those of an incomplete vector.
inline void hide(float* scores, int64_t seen, int64_t padded) {
    const int64_t first = seen <= 0 ? 0 : (seen + LANES - 1) / LANES * LANES;
    for (int64_t k = first; k < padded; k += LANES) store(scores + k, Vector{});
}

void attend_block(const Attention& problem, int64_t index, int64_t first, int64_t rows, float* scratch) {
    const int64_t picture = index / problem.heads, head = index % problem.heads, width = problem.padded_dim();
    const float scale = scale_of(problem);
    float *scores = scratch, *sums = scores + rows * BLOCK_KEYS;
    float *totals = sums + rows * width, *maximum = totals + rows * LANES;
    const int64_t place = index - problem.first_packed;
    const float* keys = problem.packed_keys + place * problem.key_panels() * problem.dim * PANEL;
    const float* values = problem.packed_values + place * problem.padded_keys() * width;
    for (int64_t row = 0; row < rows; ++row) maximum[row] = LOWEST, store(totals + row * LANES, Vector{});
    const int64_t seen = problem.causal ? first + rows : problem.keys();
    for (int64_t begin = 0; begin < seen; begin += BLOCK_KEYS) {
        const int64_t count = smaller(BLOCK_KEYS, seen - begin);
        const int64_t padded = (count + PANEL - 1) / PANEL * PANEL;
        for (int64_t k = 0; k < padded; k += PANEL)
            multiply_panel<LONG_SUMS>({problem.query.at(picture, first, head), problem.query.token, 1}, rows,
                                      keys + (begin + k) * problem.dim, PANEL, problem.dim, scores + k,
                                      BLOCK_KEYS, false);
        for (int64_t row = 0; row < rows; ++row) {
            const int64_t own = problem.causal ? smaller(count, first + row + 1 - begin) : count;
            if (problem.causal) hide(scores + row * BLOCK_KEYS, own, padded);
            if (own <= 0) continue;
            const float shrink =
                exponentiate(scores + row * BLOCK_KEYS, own, scale, maximum + row, totals + row * LANES);
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
        const float total = static_cast<float>(sum_of_lanes(load(totals + row * LANES)));
        const float inverse = 1.0f / total;
        for (int64_t d = 0; d < problem.dim; d += LANES)
            store_first(target + d, load(sums + row * width + d) * inverse, smaller(LANES, problem.dim - d));
        problem.log_sum[index * problem.queries + first + row] =
            static_cast<float>(maximum[row] + __builtin_log(static_cast<double>(total)));
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
const AttentionKernels attention_kernels = {scratch, pack, attend, gradient_scratch, differentiate};

}  // namespace GLIDE_FAST_ISA
}  // namespace glide_fast
