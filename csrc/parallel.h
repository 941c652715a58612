// Threads for what is worth them.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>

namespace glide_fast {

// Floating-point operations below which waking a thread costs more than it saves, with memory traffic counted
// as some operations a number.
constexpr int64_t OPERATIONS_PER_THREAD = 1 << 21;

// Calls `work(begin, end)` for ranges of tasks, each of which takes about so many operations.
template <typename Work>
void for_each_task(int64_t tasks, int64_t operations, const Work& work) {
    const int64_t grain = OPERATIONS_PER_THREAD / std::max<int64_t>(operations, 1) + 1;
    if (tasks > 0) torch::stable::parallel_for(0, tasks, grain, work);
}

}  // namespace glide_fast
