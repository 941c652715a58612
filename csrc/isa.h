// Which instruction set serves: chosen once when the library is loaded, by what the CPU can do.
#pragma once

#include <string>
#include <vector>

#include "activation.h"
#include "attention.h"
#include "convolution.h"
#include "group_norm.h"
#include "layer_norm.h"
#include "linear.h"

namespace glide_fast {

struct Isa {
    const char* name;
    bool (*supported)();
    const GroupNormKernels* group_norm;
    const ConvolutionKernels* convolution;
    const LinearKernels* linear;
    const AttentionKernels* attention;
    const ActivationKernels* activation;
    const LayerNormKernels* layer_norm;
};

// The variants that were compiled and that this CPU can run, slowest first.
std::vector<std::string> runnable_isas();

// The variant in use.
const Isa& current_isa();

// Uses the named variant from now on; throws std::invalid_argument for one that cannot run here.
void select_isa(const std::string& name);

}  // namespace glide_fast
