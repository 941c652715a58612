// Attention of float32 tensors: shapes, memory and threads. The arithmetic is in the kernels of the chosen
// ISA. Called from glide_fast/ops/attention_cpu.py, which checks.
#include "attention.h"

#include <tuple>

#include "isa.h"
#include "parallel.h"
#include "scratch.h"
#include "tensors.h"

namespace glide_fast {
namespace {

constexpr int64_t BLOCK_QUERIES = 48;  // at most
constexpr int64_t OPERATIONS_PER_EXPONENTIAL = 32;
constexpr int64_t SMALL_HEAD = 1 << 15;  // packed floats that leave room in the second cache
constexpr int64_t HEADS_PER_THREAD = 4;  // fewer would not share out evenly

AttentionTensor view_of(const Tensor& tensor) {
    return {data(tensor), tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

// All of the problem but its output and how the work is cut.
Attention attention_of(const Tensor& query, const Tensor& key, const Tensor& value,
                       const OptionalTensor& text_key, const OptionalTensor& text_value) {
    Attention problem{};
    problem.batch = query.size(0);
    problem.queries = query.size(1);
    problem.heads = query.size(2);
    problem.dim = query.size(3);
    problem.text = text_key ? text_key->size(1) : 0;
    problem.query = view_of(query);
    problem.key = view_of(key);
    problem.value = view_of(value);
    if (text_key) problem.text_key = view_of(*text_key);
    if (text_value) problem.text_value = view_of(*text_value);
    return problem;
}

int64_t operations_of_block(const Attention& problem) {
    return problem.block_queries * problem.keys() * (4 * problem.dim + OPERATIONS_PER_EXPONENTIAL);
}

// One head after the other, its packed keys and values still in the caches when they are read.
void attend_heads(Attention problem, int64_t begin, int64_t end) {
    const AttentionKernels& kernels = *current_isa().attention;
    float* memory = scratch_memory<ScratchUse::OWN>(problem.packed_floats() + kernels.scratch(problem));
    problem.packed_keys = memory;
    problem.packed_values = memory + problem.padded_keys() * problem.dim;
    for (int64_t head = begin; head < end; ++head) {
        problem.first_packed = head;
        kernels.pack(problem, head * problem.key_panels(), (head + 1) * problem.key_panels());
        kernels.attend(problem, head * problem.query_blocks(), (head + 1) * problem.query_blocks(),
                       memory + problem.packed_floats());
    }
}

// All threads at the same heads, with the packed keys and values of all.
void attend_together(Attention problem, int64_t heads, int64_t operations) {
    const AttentionKernels& kernels = *current_isa().attention;
    problem.packed_keys = scratch_memory<ScratchUse::BETWEEN>(heads * problem.packed_floats());
    problem.packed_values = problem.packed_keys + heads * problem.padded_keys() * problem.dim;
    for_each_task(heads * problem.key_panels(), 8 * PANEL * problem.dim,
                  [&](int64_t begin, int64_t end) { kernels.pack(problem, begin, end); });
    for_each_task(heads * problem.query_blocks(), operations, [&](int64_t begin, int64_t end) {
        kernels.attend(problem, begin, end, scratch_memory<ScratchUse::OWN>(kernels.scratch(problem)));
    });
}

void attention_forward(Tensor query, Tensor key, Tensor value, OptionalTensor text_key,
                       OptionalTensor text_value, bool causal, Tensor output, Tensor log_sum) {
    Attention problem = attention_of(query, key, value, text_key, text_value);
    problem.causal = causal;
    problem.block_queries = divide_up(problem.queries, divide_up(problem.queries, BLOCK_QUERIES));

    problem.output = mutable_data(output);
    problem.log_sum = mutable_data(log_sum);
    const int64_t heads = problem.batch * problem.heads, block = operations_of_block(problem);
    const bool small = problem.packed_floats() <= SMALL_HEAD;
    if (small && heads >= HEADS_PER_THREAD * static_cast<int64_t>(torch::stable::get_num_threads()))
        for_each_task(heads, problem.query_blocks() * block,
                      [&](int64_t begin, int64_t end) { attend_heads(problem, begin, end); });
    else
        attend_together(problem, heads, block);
}

using Five = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

Five attention_gradient(Tensor grad, Tensor query, Tensor key, Tensor value, OptionalTensor text_key,
                        OptionalTensor text_value, Tensor output, Tensor log_sum) {
    AttentionGradient problem{};
    problem.forward = attention_of(query, key, value, text_key, text_value);
    problem.forward.log_sum = mutable_data(log_sum);
    problem.output = view_of(output);
    problem.grad = view_of(grad);
    const int64_t batch = query.size(0), heads = query.size(2), dim = query.size(3);
    const std::vector<int64_t> image = {batch, query.size(1), heads, dim};
    const std::vector<int64_t> text =
        text_key ? std::vector<int64_t>{batch, text_key->size(1), heads, dim} : std::vector<int64_t>{0};
    Five gradients = {empty(image), empty(image), empty(image), empty(text), empty(text)};
    problem.query = mutable_data(std::get<0>(gradients));
    problem.key = mutable_data(std::get<1>(gradients));
    problem.value = mutable_data(std::get<2>(gradients));
    problem.text_key = mutable_data(std::get<3>(gradients));
    problem.text_value = mutable_data(std::get<4>(gradients));

    const AttentionKernels& kernels = *current_isa().attention;
    constexpr int64_t PRODUCTS = 5;
    const int64_t operations = PRODUCTS * 2 * problem.forward.queries * problem.forward.keys() * dim;
    for_each_task(batch * heads, operations, [&](int64_t begin, int64_t end) {
        kernels.differentiate(problem, begin, end,
                              scratch_memory<ScratchUse::OWN>(kernels.gradient_scratch(problem)));
    });
    return gradients;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(glide_fast, library) {
    library.def(
        "attention_forward(Tensor query, Tensor key, Tensor value, Tensor? text_key, Tensor? text_value, "
        "bool causal, Tensor(a!) output, Tensor(b!) log_sum) -> ()");
    library.def(
        "attention_gradient(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor? text_key, Tensor? "
        "text_value, Tensor output, Tensor log_sum) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(glide_fast, CPU, library) {
    library.impl("attention_forward", TORCH_BOX(&attention_forward));
    library.impl("attention_gradient", TORCH_BOX(&attention_gradient));
}

}  // namespace glide_fast
