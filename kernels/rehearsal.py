"""Launches without a GPU: kernels are compiled exactly as a launch on it would compile them, and not run.

The way from a launcher's arguments to machine code is Triton's own, with its types, divisibility and
descriptors; only the driver is a stand-in that names the target. Tensors stay on the CPU as they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from glide_fast.kernels import launch
from glide_fast.kernels.compilation import Resources, gpu_target, read_resources


class _Driver:
    """What Triton asks of a driver before it compiles."""

    def __init__(self, name: str) -> None:
        self.name = name

    def get_current_target(self) -> Any:
        return gpu_target(self.name)

    def get_current_device(self) -> str:
        return self.name  # Triton keeps what it compiled by device

    def get_current_stream(self, _device: str) -> int:
        return 0


@contextmanager
def rehearsal(target: str) -> Iterator[list[Resources]]:
    """Within it, kernels that are launched on CPU tensors are compiled for "sm_90" or another target.

    Yields the list that each launch adds its resources to, named after the kernel's function.

    Raises:
        RuntimeError: TRITON_INTERPRET is set, which leaves nothing to compile.
    """
    import triton

    if triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET=1 interprets kernels; unset it in a process that compiles them")
    launches: list[Resources] = []
    run, active, stand_in_for = triton.JITFunction.run, triton.runtime.driver._active, launch.INTERPRETED_AS

    def compile_only(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        compiled = run(kernel, *arguments, grid=grid, warmup=True, **options)
        if not warmup:
            launches.append(read_resources(compiled, kernel.__name__, target))
        return compiled

    triton.JITFunction.run = compile_only
    triton.runtime.driver.set_active(_Driver(target))
    launch.INTERPRETED_AS = target
    try:
        yield launches
    finally:
        triton.JITFunction.run, launch.INTERPRETED_AS = run, stand_in_for
        triton.runtime.driver._active = active
