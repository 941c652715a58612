// The launchers of csrc/cuda: CUDA on one side, torch's stable ABI on the other.
#pragma once

#include "../norm_apply.h"
#include "../sampler_step.h"

namespace glide_fast {

enum class Element { FLOAT, HALF, BFLOAT16 };

// Both start one kernel on the stream, a cudaStream_t, and return what CUDA says, or null for success.
const char* launch_sampler_step(const StepProblem& problem, Element output, void* stream);
const char* launch_norm_apply(const NormApplyProblem& problem, Element element, void* stream);

}  // namespace glide_fast
