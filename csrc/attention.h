// What the attention op hands to its kernels. Plain data only: code compiled for different ISAs shares it.
#pragma once

#include "panel.h"

namespace glide_fast {

// [B, T, N, D] with these strides; D is dense.
struct AttentionTensor {
    const float* data;
    int64_t batch, token, head;

    const float* at(int64_t b, int64_t t, int64_t n) const { return data + b * batch + t * token + n * head; }
};

// Keys and values are the text's, followed by the image's. Heads of all pictures are numbered one after
// another.
struct Attention {
    int64_t batch, heads, queries, text, dim;
    AttentionTensor query, key, value, text_key, text_value;
    float *packed_keys,
        *packed_values;     // panels [dim, PANEL] of keys; panels [keys, PANEL]
    int64_t first_packed;   // head
    float* output;          // [B, T, N, D]
    float* log_sum;         // [B, N, T]
    int64_t block_queries;  // of a task
    bool causal;            // a query sees the keys up to its own place; there is no text then

    int64_t keys() const { return text + queries; }
    int64_t key_panels() const { return divide_up(keys(), PANEL); }
    int64_t padded_keys() const { return key_panels() * PANEL; }
    int64_t value_panels() const { return divide_up(dim, PANEL); }
    int64_t padded_dim() const { return value_panels() * PANEL; }
    int64_t packed_floats() const { return padded_keys() * (dim + padded_dim()); }  // of a head
    int64_t query_blocks() const { return divide_up(queries, block_queries); }
};

struct AttentionGradient {
    Attention forward;             // its packed panels are not used
    AttentionTensor output, grad;  // of the forward pass, and the gradient of it
    float *query, *key, *value;    // gradients [B, T, N, D]
    float *text_key, *text_value;  // [B, S, N, D]
};

struct AttentionKernels {
    int64_t (*scratch)(const Attention&);
    void (*pack)(const Attention&, int64_t begin, int64_t end);  // tasks: key panels of heads
    void (*attend)(const Attention&, int64_t begin, int64_t end, float* scratch);  // query blocks of heads
    int64_t (*gradient_scratch)(const AttentionGradient&);
    void (*differentiate)(const AttentionGradient&, int64_t begin, int64_t end, float* scratch);  // heads
};

}  // namespace glide_fast
