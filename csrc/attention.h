// What the attention op hands to its kernels. Plain data only: code compiled for different ISAs shares it.
#pragma once

#include <stdint.h>

namespace glide_fast {

constexpr int64_t ATTENTION_PANEL = 32;  // keys, or numbers of a head's value, of a packed panel

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
        *packed_values;     // panels [dim, ATTENTION_PANEL] of keys; panels [keys, ATTENTION_PANEL]
    float* output;          // [B, T, N, D]
    float* log_sum;         // [B, N, T]
    int64_t block_queries;  // of a task

    int64_t keys() const { return text + queries; }
    int64_t key_panels() const { return (keys() + ATTENTION_PANEL - 1) / ATTENTION_PANEL; }
    int64_t padded_keys() const { return key_panels() * ATTENTION_PANEL; }
    int64_t value_panels() const { return (dim + ATTENTION_PANEL - 1) / ATTENTION_PANEL; }
    int64_t padded_dim() const { return value_panels() * ATTENTION_PANEL; }
    int64_t query_blocks() const { return (queries + block_queries - 1) / block_queries; }
};

struct AttentionKernels {
    int64_t (*scratch)(const Attention&);
    void (*pack)(const Attention&, int64_t begin, int64_t end);  // tasks: key panels of heads
    void (*attend)(const Attention&, int64_t begin, int64_t end, float* scratch);  // query blocks of heads
};

}  // namespace glide_fast
