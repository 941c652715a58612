// The ops norm_apply and sampler_step_launch for CUDA tensors, on torch's stable ABI: dtypes, strides,
// streams.
//
// sampler_step_launch has the arguments of sampler_step: glide_fast/ops/cuda_elements.py puts it behind that
// op where no Triton kernel serves.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/headeronly/util/Exception.h>

#include <tuple>

#include "../norm_apply_problem.h"
#include "../sampler_step_problem.h"
#include "launch.h"

namespace glide_fast {
namespace {

bool is_served(ScalarType type) {
    return type == ScalarType::Float || type == ScalarType::Half || type == ScalarType::BFloat16;
}

Element element_of(ScalarType type) {
    if (type == ScalarType::Half) return Element::HALF;
    return type == ScalarType::BFloat16 ? Element::BFLOAT16 : Element::FLOAT;
}

void* current_stream(const Tensor& tensor) {
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
    return stream;
}

void check(const char* error) {
    STD_TORCH_CHECK(error == nullptr, "a kernel of csrc/cuda did not start: ", error);
}

std::tuple<Tensor, Tensor> sampler_step(Tensor x, Tensor output, OptionalTensor noise, Tensor table, Tensor t,
                                        OptionalTensor guidance, int64_t deviation, int64_t direction,
                                        bool clip) {
    if (x.scalar_type() != ScalarType::Float || !is_served(output.scalar_type()))
        return step_by_reference(x, output, noise, table, t, guidance, deviation, direction, clip);
    const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
    StepTensors tensors(x, output, noise, table, t, guidance);
    const StepProblem problem =
        tensors.problem({static_cast<Deviation>(deviation), static_cast<Direction>(direction), clip});
    check(launch_sampler_step(problem, element_of(output.scalar_type()), current_stream(x)));
    return {tensors.next, tensors.x_start};
}

Tensor norm_apply(Tensor x, Tensor mean, Tensor rstd, Tensor weight, Tensor bias, OptionalTensor scale,
                  OptionalTensor shift, bool silu) {
    STD_TORCH_CHECK(is_served(x.scalar_type()), "norm_apply on a GPU takes float32, float16 and bfloat16");
    const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
    NormApplyTensors tensors(x, mean, rstd, weight, bias, scale, shift);
    check(launch_norm_apply(tensors.problem(silu), element_of(x.scalar_type()), current_stream(x)));
    return tensors.y;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(glide_fast, library) {
    library.def(
        "sampler_step_launch(Tensor x, Tensor output, Tensor? noise, Tensor table, Tensor t, Tensor? "
        "guidance, "
        "int deviation, int direction, bool clip) -> (Tensor next, Tensor x_start)");
    library.def(
        "norm_apply_launch(Tensor x, Tensor mean, Tensor rstd, Tensor weight, Tensor bias, Tensor? scale, "
        "Tensor? shift, bool silu) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(glide_fast, CUDA, library) {
    library.impl("sampler_step_launch", TORCH_BOX(&sampler_step));
    library.impl("norm_apply_launch", TORCH_BOX(&norm_apply));
}

}  // namespace glide_fast
