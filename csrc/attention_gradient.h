// Attention's gradients. Weights are computed again from the scores and the logarithm of their
// sum (Dao et al. 2022, arXiv 2205.14135, algorithm 4), for a block of keys and all queries at a time:
//
//   weight = exp(scale * query key^T - log_sum)           grad_value = weight^T grad
//   slope = weight * (grad value^T - sum(grad * output))  grad_key = scale * slope^T query
//                                                         grad_query = scale * slope key
#pragma once

#include "attention.h"
#include "attention_panels.h"
#include "group_norm_math.h"
#include "product.h"

namespace {

using glide_fast::Attention;
using glide_fast::AttentionGradient;
using glide_fast::AttentionTensor;

constexpr int64_t BLOCK_QUERIES = 48;
constexpr int64_t ROW = BLOCK_KEYS + glide_fast::CACHE_LINE_FLOATS;  // of a block's scores

// One head's tokens in panels, its gradients so far, and a block's scores.
struct Workspace {
    float *key_columns, *value_columns;         // panels [dim, PANEL] of keys
    float *key_rows, *query_rows, *grad_rows;   // panels [tokens, PANEL]
    float *grad_query, *grad_key, *grad_value;  // [queries, padded dim], [BLOCK_KEYS, padded dim]
    float *weights, *slopes;                    // [BLOCK_QUERIES, ROW]
    float* deltas;                              // [queries]
    int64_t floats;

    Workspace(const Attention& problem, float* memory) {
        const int64_t keys = problem.padded_keys(), width = problem.padded_dim();
        floats = 0;
        const auto take = [&](int64_t count) {
            float* part = memory == nullptr ? nullptr : memory + floats;
            floats += count;
            return part;
        };
        key_columns = take(keys * problem.dim), value_columns = take(keys * problem.dim);
        key_rows = take(keys * width);
        query_rows = take(problem.queries * width), grad_rows = take(problem.queries * width);
        grad_query = take(problem.queries * width);
        grad_key = take(BLOCK_KEYS * width), grad_value = take(BLOCK_KEYS * width);
        weights = take(BLOCK_QUERIES * ROW), slopes = take(BLOCK_QUERIES * ROW);
        deltas = take(problem.queries);
    }
};

int64_t gradient_scratch(const AttentionGradient& problem) {
    return Workspace(problem.forward, nullptr).floats;
}

struct Head {
    int64_t picture, number;
};

inline float product_of_rows(const float* a, const float* b, int64_t dim) {
    Vector sum{};
    for (int64_t d = 0; d < dim; d += LANES) {
        const int64_t lanes = smaller(LANES, dim - d);
        sum += load_first(a + d, lanes) * load_first(b + d, lanes);
    }
    return static_cast<float>(sum_of_lanes(sum));
}

inline float scale_of(const Attention& problem) {
    return static_cast<float>(1.0 / __builtin_sqrt(static_cast<double>(problem.dim)));
}

void store_scaled(const float* source, float scale, int64_t dim, float* target) {
    for (int64_t d = 0; d < dim; d += LANES) {
        const int64_t lanes = smaller(LANES, dim - d);
        store_first(target + d, load_first(source + d, lanes) * scale, lanes);
    }
}

void pack(const AttentionGradient& gradient, Head head, const Workspace& space) {
    const Attention& problem = gradient.forward;
    const int64_t dim = problem.dim, width = problem.padded_dim(), keys = problem.padded_keys();
    for (int64_t token = 0; token < keys; ++token) {
        const int64_t column = token / PANEL * dim * PANEL + token % PANEL;
        if (token >= problem.keys()) {
            clear_column(dim, space.key_columns + column);
            clear_column(dim, space.value_columns + column);
            continue;
        }
        const bool is_text = token < problem.text;
        const int64_t place = is_text ? token : token - problem.text;
        const float* key = (is_text ? problem.text_key : problem.key).at(head.picture, place, head.number);
        const float* value =
            (is_text ? problem.text_value : problem.value).at(head.picture, place, head.number);
        copy_column(key, dim, space.key_columns + column);
        copy_column(value, dim, space.value_columns + column);
        copy_row(key, dim, width, keys * PANEL, space.key_rows + token * PANEL);
    }
    for (int64_t token = 0; token < problem.queries; ++token) {
        const float* grad = gradient.grad.at(head.picture, token, head.number);
        const float* query = problem.query.at(head.picture, token, head.number);
        copy_row(query, dim, width, problem.queries * PANEL, space.query_rows + token * PANEL);
        copy_row(grad, dim, width, problem.queries * PANEL, space.grad_rows + token * PANEL);
        space.deltas[token] =
            product_of_rows(grad, gradient.output.at(head.picture, token, head.number), dim);
    }
}

// [rows, dim] of queries or their gradients times the columns of a block of keys or values.
void multiply_columns(Matrix a, int64_t rows, const float* columns, int64_t dim, int64_t keys,
                      float* scores) {
    for (int64_t k = 0; k < keys; k += PANEL)
        multiply_panel<LONG_SUMS>(a, rows, columns + k * dim, PANEL, dim, scores + k, ROW, false);
}

// C [rows, padded dim] = or += A [rows, depth] times rows of panels.
void multiply_rows(const Attention& problem, Matrix a, int64_t rows, const float* panels,
                   int64_t panel_stride, int64_t depth, float* c, bool add) {
    const int64_t width = problem.padded_dim();
    for (int64_t d = 0; d < width; d += PANEL)
        multiply_panel<LONG_SUMS>(a, rows, panels + d / PANEL * panel_stride, PANEL, depth, c + d, width,
                                  add);
}

// Scores become weights, and the gradients of the weights slopes.
void differentiate_softmax(const Workspace& space, const float* log_sum, int64_t first, int64_t rows,
                           int64_t keys, float scale) {
    for (int64_t row = 0; row < rows; ++row) {
        float *weights = space.weights + row * ROW, *slopes = space.slopes + row * ROW;
        const float sum = log_sum[first + row], delta = space.deltas[first + row];
        for (int64_t k = 0; k < keys; k += LANES) {
            const Vector weight = exponential(load(weights + k) * scale - sum);
            store(weights + k, weight);
            store(slopes + k, weight * (load(slopes + k) - delta));
        }
    }
}

void store_keys(const AttentionGradient& gradient, Head head, const Workspace& space, int64_t begin,
                int64_t count) {
    const Attention& problem = gradient.forward;
    const int64_t width = problem.padded_dim();
    for (int64_t k = 0; k < count; ++k) {
        const bool is_text = begin + k < problem.text;
        const int64_t token = is_text ? begin + k : begin + k - problem.text;
        const int64_t tokens = is_text ? problem.text : problem.queries;
        const int64_t at = ((head.picture * tokens + token) * problem.heads + head.number) * problem.dim;
        store_scaled(space.grad_key + k * width, scale_of(problem), problem.dim,
                     (is_text ? gradient.text_key : gradient.key) + at);
        store_scaled(space.grad_value + k * width, 1.0f, problem.dim,
                     (is_text ? gradient.text_value : gradient.value) + at);
    }
}

void differentiate_head(const AttentionGradient& gradient, int64_t index, float* memory) {
    const Attention& problem = gradient.forward;
    const Head head = {index / problem.heads, index % problem.heads};
    const int64_t dim = problem.dim, width = problem.padded_dim(), queries = problem.queries;
    const float* log_sum = problem.log_sum + index * queries;
    const Workspace space(problem, memory);
    pack(gradient, head, space);
    for (int64_t begin = 0; begin < problem.keys(); begin += BLOCK_KEYS) {
        const int64_t count = smaller(BLOCK_KEYS, problem.keys() - begin);
        for (int64_t first = 0; first < queries; first += BLOCK_QUERIES) {
            const int64_t rows = smaller(BLOCK_QUERIES, queries - first);
            multiply_columns({problem.query.at(head.picture, first, head.number), problem.query.token, 1},
                             rows, space.key_columns + begin * dim, dim, count, space.weights);
            multiply_columns({gradient.grad.at(head.picture, first, head.number), gradient.grad.token, 1},
                             rows, space.value_columns + begin * dim, dim, count, space.slopes);
            differentiate_softmax(space, log_sum, first, rows, count, scale_of(problem));
            const Matrix weights_of_keys = {space.weights, 1, ROW}, slopes_of_keys = {space.slopes, 1, ROW};
            multiply_rows(problem, weights_of_keys, count, space.grad_rows + first * PANEL, queries * PANEL,
                          rows, space.grad_value, first > 0);
            multiply_rows(problem, slopes_of_keys, count, space.query_rows + first * PANEL, queries * PANEL,
                          rows, space.grad_key, first > 0);
            multiply_rows(problem, {space.slopes, ROW, 1}, rows, space.key_rows + begin * PANEL,
                          problem.padded_keys() * PANEL, count, space.grad_query + first * width, begin > 0);
        }
        store_keys(gradient, head, space, begin, count);
    }
    for (int64_t token = 0; token < queries; ++token)
        store_scaled(space.grad_query + token * width, scale_of(problem), dim,
                     gradient.query + ((head.picture * queries + token) * problem.heads + head.number) * dim);
}

void differentiate(const AttentionGradient& problem, int64_t begin, int64_t end, float* scratch) {
    for (int64_t head = begin; head < end; ++head) differentiate_head(problem, head, scratch);
}

}  // namespace
