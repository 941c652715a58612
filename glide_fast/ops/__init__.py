"""The hot operations of the networks, one public function each; the dispatcher picks who computes them.

Importing this package loads the compiled C++ library and the Triton kernels where they were built; where they
were not, the reference serves, and `implementations()` says why.
"""

from glide_fast.ops import attention_cpu, convolution_cpu, cuda_elements, layer_norm_cpu, linear_cpu
from glide_fast.ops.adamw import StepNumbers, adamw
from glide_fast.ops.attention import attention
from glide_fast.ops.causal_attention import causal_attention
from glide_fast.ops.dispatch import Implementation, implementations, load_compiled, use_reference
from glide_fast.ops.dropped_group_norm import dropped_group_norm
from glide_fast.ops.gradient_norm import gradient_norm
from glide_fast.ops.group_norm import Activation, Resample, group_norm, group_norm_beside
from glide_fast.ops.hybrid_loss import hybrid_loss
from glide_fast.ops.layer_norm import layer_norm, layer_norm_beside
from glide_fast.ops.linear import LinearActivation, linear
from glide_fast.ops.norm_convolution import norm_convolution, norm_convolution_beside
from glide_fast.ops.projected_attention import AttentionOrder, projected_attention
from glide_fast.ops.sampler_step import StepRule, sampler_step

load_compiled()
attention_cpu.register()
convolution_cpu.register()
cuda_elements.register()
layer_norm_cpu.register()
linear_cpu.register()

__all__ = [
    "Activation",
    "AttentionOrder",
    "Implementation",
    "LinearActivation",
    "Resample",
    "StepNumbers",
    "StepRule",
    "adamw",
    "attention",
    "causal_attention",
    "dropped_group_norm",
    "gradient_norm",
    "group_norm",
    "group_norm_beside",
    "hybrid_loss",
    "implementations",
    "layer_norm",
    "layer_norm_beside",
    "linear",
    "norm_convolution",
    "norm_convolution_beside",
    "projected_attention",
    "sampler_step",
    "use_reference",
]
