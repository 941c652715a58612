"""The CUDA C++ of csrc/cuda behind the ops that Triton would serve, where Triton is missing.

It is built where nvcc and a torch with CUDA are, as `glide_fast._cuda`, and covers what is done element by
element: a sampler's step, and the affine map, FiLM and SiLU after GroupNorm's statistics.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import torch

from glide_fast.ops import norm_apply
from glide_fast.ops.dispatch import implement, is_implemented

LAUNCHED = ("sampler_step", "norm_apply")


def library() -> Any | None:
    """The loaded module `glide_fast._cuda` (architectures), or None."""
    if importlib.util.find_spec("glide_fast._cuda") is None:
        return None
    try:
        return importlib.import_module("glide_fast._cuda")
    except ImportError:  # built for a torch with CUDA, which this one is not, or for another CUDA
        return None


def register() -> None:
    """Put the CUDA C++ behind its ops, unless Triton serves them or it was not built."""
    if is_implemented("sampler_step", "CUDA"):  # by Triton
        return
    loaded = library()
    if loaded is None:
        return
    built = f"csrc/cuda for {loaded.architectures()}, as Triton is missing"
    for op in LAUNCHED:
        launcher = getattr(torch.ops.glide_fast, f"{op}_launch").default
        implement(op, "CUDA", launcher, name="CUDA C++", reason=built)
    statistics = f"norm_apply after ATen's statistics: {built}"
    implement("group_norm", "CUDA", norm_apply.group_norm, name="CUDA C++", reason=statistics)
