// Memory that a thread keeps between calls: new memory from the system costs a page fault every 4 KiB.
#pragma once

#include <stdint.h>

#include <cstdlib>
#include <memory>
#include <new>

namespace glide_fast {

// What lives at the same time: packed weights, results between two phases, what a task needs beside them.
enum class ScratchUse { WEIGHTS, BETWEEN, OWN };

// At least `floats` uninitialised floats from the beginning of a cache line, until this thread asks again for
// the same use.
template <ScratchUse USE>
float* scratch_memory(int64_t floats) {
    struct Release {
        void operator()(float* memory) const { std::free(memory); }
    };
    static thread_local std::unique_ptr<float, Release> memory;
    static thread_local int64_t size = 0;
    constexpr int64_t PAGE_FLOATS = 1024;
    if (floats > size) {
        memory.reset();
        size = (floats + PAGE_FLOATS - 1) / PAGE_FLOATS * PAGE_FLOATS;
        memory.reset(static_cast<float*>(std::aligned_alloc(64, static_cast<size_t>(size) * sizeof(float))));
        if (!memory) {
            size = 0;
            throw std::bad_alloc();
        }
    }
    return memory.get();
}

}  // namespace glide_fast
