// The ops glide_fast::group_norm and group_norm_backward for CPU tensors: shapes, dtypes and threads. Their
// arithmetic is in the kernels of the chosen ISA. Only the stable ABI is used: one binary for torch >= 2.10.
//
// Rule of dtypes: float32 runs as it is; bfloat16 and float16 are converted to float32 and back (the
// reference's arithmetic, rounded once at the end); all else, float64 above all, goes to the reference op.
#include "group_norm.h"

#include <numeric>
#include <tuple>

#include "isa.h"
#include "tensors.h"

namespace glide_fast {
namespace {

constexpr int64_t LANES_OF_WIDEST_ISA = 16;
constexpr int64_t COEFFICIENTS = 4;            // arrays of a channels-last block
constexpr int64_t ELEMENTS_PER_THREAD = 8192;  // below that, waking a thread costs more than it saves

MemoryFormat format_of(int64_t dims, bool channels_last) {
    if (!channels_last) return MemoryFormat::Contiguous;
    return dims == 5 ? MemoryFormat::ChannelsLast3d : MemoryFormat::ChannelsLast;
}

GroupNormShape shape_of(const Tensor& x, int64_t groups, bool silu, int64_t mode) {
    GroupNormShape shape;
    const int64_t dims = x.dim();
    shape.batch = x.size(0);
    shape.channels = x.size(1);
    shape.groups = groups;
    shape.depth = dims == 5 ? x.size(2) : 1;
    shape.height = dims >= 4 ? x.size(dims - 2) : 1;
    shape.width = x.size(dims - 1);
    shape.resample = static_cast<Resample>(mode);
    shape.factor_depth = dims == 5 && shape.resample != Resample::NONE ? 2 : 1;
    shape.factor_height = dims >= 4 && shape.resample != Resample::NONE ? 2 : 1;
    shape.channels_last = is_channels_last(x);
    shape.silu = silu;
    return shape;
}

GroupNormTasks tasks_of(const GroupNormShape& shape) {
    GroupNormTasks tasks;
    if (!shape.channels_last) {
        tasks = {shape.batch * shape.groups, 1, shape.resample == Resample::NONE ? 0 : shape.pixels(), 0};
    } else {
        const int64_t members = shape.channels_per_group();
        tasks.groups_per_task = LANES_OF_WIDEST_ISA / std::gcd(members, LANES_OF_WIDEST_ISA);
        const int64_t blocks = (shape.groups + tasks.groups_per_task - 1) / tasks.groups_per_task;
        tasks.tasks = shape.batch * blocks;
        tasks.scratch_floats = COEFFICIENTS * tasks.groups_per_task * members;
        tasks.scratch_doubles = 2 * tasks.groups_per_task * members;
    }
    return tasks;
}

template <typename Problem, typename Kernel>
void run(const Problem& problem, Kernel kernel) {
    const GroupNormTasks tasks = tasks_of(problem.shape);
    if (tasks.tasks == 0) return;
    const int64_t elements =
        problem.shape.batch * problem.shape.channels * problem.shape.pixels() / tasks.tasks;
    const int64_t grain = (ELEMENTS_PER_THREAD + elements - 1) / elements;
    torch::stable::parallel_for(0, tasks.tasks, grain, [&](int64_t begin, int64_t end) {
        std::vector<float> floats(tasks.scratch_floats);
        std::vector<double> doubles(tasks.scratch_doubles);
        kernel(problem, tasks, begin, end, Scratch{floats.data(), doubles.data()});
    });
}

bool is_served(ScalarType type) {
    return type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half;
}

Tensor as_float(const Tensor& tensor, MemoryFormat format = MemoryFormat::Contiguous) {
    const bool converted = tensor.scalar_type() != ScalarType::Float;
    return torch::stable::contiguous(converted ? torch::stable::to(tensor, ScalarType::Float) : tensor,
                                     format);
}

Tensor as_type(const Tensor& tensor, ScalarType type) {
    return type == ScalarType::Float ? tensor : torch::stable::to(tensor, type);
}

// Rows of [B, C] need not be adjacent: FiLM's scale and shift are halves of one projection.
OptionalTensor as_film(const OptionalTensor& film) {
    if (!film || (film->scalar_type() == ScalarType::Float && film->stride(1) == 1)) return film;
    return as_float(*film);
}

template <typename Problem>
void set_film(Problem& problem, const OptionalTensor& scale, const OptionalTensor& shift) {
    problem.scale = data(scale);
    problem.shift = data(shift);
    problem.scale_stride = scale ? scale->stride(0) : 0;
    problem.shift_stride = shift ? shift->stride(0) : 0;
}

using Three = std::tuple<Tensor, Tensor, Tensor>;
using Six = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Three group_norm(Tensor x, Tensor weight, Tensor bias, OptionalTensor scale, OptionalTensor shift,
                 int64_t groups, double eps, bool silu, int64_t mode) {
    using torch::stable::detail::from;
    using torch::stable::detail::to;
    const ScalarType type = x.scalar_type();
    if (!is_served(type)) {
        const auto results = call_reference<3>(
            "glide_fast::group_norm_reference",
            std::array<StableIValue, 9>{from(x), from(weight), from(bias), from(scale), from(shift),
                                        from(groups), from(eps), from(silu), from(mode)});
        return {to<Tensor>(results[0]), to<Tensor>(results[1]), to<Tensor>(results[2])};
    }
    GroupNormForward problem;
    problem.shape = shape_of(x, groups, silu, mode);
    problem.eps = eps;
    const MemoryFormat format = format_of(x.dim(), problem.shape.channels_last);
    x = as_float(x, format);
    weight = as_float(weight);
    bias = as_float(bias);
    scale = as_film(scale);
    shift = as_film(shift);

    std::vector<int64_t> sizes = sizes_of(x);
    for (size_t dim = 2; dim < sizes.size(); ++dim) {
        if (problem.shape.resample == Resample::UP) sizes[dim] *= 2;
        if (problem.shape.resample == Resample::DOWN) sizes[dim] /= 2;
    }
    Tensor output = empty(sizes, format);
    Tensor mean = empty({problem.shape.batch, groups}), rstd = empty({problem.shape.batch, groups});
    problem.x = data(x);
    problem.weight = data(weight);
    problem.bias = data(bias);
    set_film(problem, scale, shift);
    problem.output = mutable_data(output);
    problem.mean = mutable_data(mean);
    problem.rstd = mutable_data(rstd);
    run(problem, current_isa().group_norm->forward);
    return {as_type(output, type), mean, rstd};
}

// The gradients of weight, bias ([C], summed over the batch in its order) and of scale, shift ([B, C]).
struct ParameterGradients {
    Tensor weight, bias, scale, shift;
};

// `film` is given because the pointers to an empty batch's scale and shift are null too.
ParameterGradients parameter_gradients(const GroupNormBackward& problem, bool film) {
    const int64_t batch = problem.shape.batch, channels = problem.shape.channels;
    std::vector<int64_t> film_sizes = {0};
    if (film) film_sizes = {batch, channels};
    ParameterGradients gradients{empty({channels}), empty({channels}), empty(film_sizes), empty(film_sizes)};
    float* weight = mutable_data(gradients.weight);
    float* bias = mutable_data(gradients.bias);
    float* scale = mutable_data(gradients.scale);
    float* shift = mutable_data(gradients.shift);
    std::vector<double> weight_sum(channels), bias_sum(channels);
    for (int64_t picture = 0; picture < batch; ++picture)
        for (int64_t channel = 0; channel < channels; ++channel) {
            const int64_t at = picture * channels + channel;
            const double sum = problem.grad_sum[at], normal_sum = problem.grad_normal_sum[at];
            double factor = 1;
            if (film) {
                factor += problem.scale[picture * problem.scale_stride + channel];
                scale[at] =
                    static_cast<float>(normal_sum * problem.weight[channel] + sum * problem.bias[channel]);
                shift[at] = static_cast<float>(sum);
            }
            weight_sum[channel] += normal_sum * factor;
            bias_sum[channel] += sum * factor;
        }
    for (int64_t channel = 0; channel < channels; ++channel) {
        weight[channel] = static_cast<float>(weight_sum[channel]);
        bias[channel] = static_cast<float>(bias_sum[channel]);
    }
    return gradients;
}

Six group_norm_backward(Tensor grad, Tensor x, Tensor weight, Tensor bias, OptionalTensor scale,
                        OptionalTensor shift, Tensor mean, Tensor rstd, bool silu, int64_t mode,
                        OptionalTensor summand, int64_t copies) {
    using torch::stable::detail::from;
    using torch::stable::detail::to;
    const ScalarType type = x.scalar_type();
    if (!is_served(type) || copies > 0) {  // on CPU nobody asks for sums
        const auto results = call_reference<6>(
            "glide_fast::group_norm_backward_reference",
            std::array<StableIValue, 12>{from(grad), from(x), from(weight), from(bias), from(scale),
                                         from(shift), from(mean), from(rstd), from(silu), from(mode),
                                         from(summand), from(copies)});
        return {to<Tensor>(results[0]), to<Tensor>(results[1]), to<Tensor>(results[2]),
                to<Tensor>(results[3]), to<Tensor>(results[4]), to<Tensor>(results[5])};
    }
    GroupNormBackward problem;
    problem.shape = shape_of(x, mean.size(1), silu, mode);
    const MemoryFormat format = format_of(x.dim(), problem.shape.channels_last);
    const ScalarType weight_type = weight.scalar_type(), bias_type = bias.scalar_type();
    const ScalarType scale_type = scale ? scale->scalar_type() : type;
    const ScalarType shift_type = shift ? shift->scalar_type() : type;
    grad = as_float(grad, format);
    x = as_float(x, format);
    weight = as_float(weight);
    bias = as_float(bias);
    scale = as_film(scale);
    shift = as_film(shift);
    mean = as_float(mean);
    rstd = as_float(rstd);

    if (summand) summand = as_float(*summand, format);
    Tensor grad_x = empty(sizes_of(x), format);
    std::vector<double> sums(2 * problem.shape.batch * problem.shape.channels);
    problem.grad = data(grad);
    problem.x = data(x);
    problem.weight = data(weight);
    problem.bias = data(bias);
    set_film(problem, scale, shift);
    problem.mean = data(mean);
    problem.rstd = data(rstd);
    problem.summand = data(summand);
    problem.grad_x = mutable_data(grad_x);
    problem.grad_sum = sums.data();
    problem.grad_normal_sum = sums.data() + problem.shape.batch * problem.shape.channels;
    run(problem, current_isa().group_norm->backward);
    const ParameterGradients gradients = parameter_gradients(problem, scale.has_value());
    return {as_type(grad_x, type),
            as_type(gradients.weight, weight_type),
            as_type(gradients.bias, bias_type),
            as_type(gradients.scale, scale_type),
            as_type(gradients.shift, shift_type),
            as_type(empty({0}), type)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(glide_fast, CPU, library) {
    library.impl("group_norm", TORCH_BOX(&group_norm));
    library.impl("group_norm_backward", TORCH_BOX(&group_norm_backward));
}

}  // namespace glide_fast
