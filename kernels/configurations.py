"""The static table of tiles: by kernel, architecture, bits of an element and shape class.

Kernels look their configuration up here, so that a process runs the same code every time and captures graphs
without a warm-up. With `GLIDE_FAST_AUTOTUNE=1` on a GPU, `run` instead times every configuration that the
table has for a kernel, once for each key, and keeps the fastest.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch

from glide_fast.kernels import launch

AUTOTUNE_VARIABLE = "GLIDE_FAST_AUTOTUNE"
Result = TypeVar("Result")


@dataclass(frozen=True)
class Configuration:
    """How a kernel is cut: rows and columns of its tile (TABLE says which they are), warps, stages.

    `registers` is the most a thread may have, on NVIDIA's GPUs alone; None leaves it to the assembler.
    """

    rows: int
    columns: int
    warps: int
    stages: int
    registers: int | None = None

    @property
    def options(self) -> dict[str, int | bool]:
        """Launch options that every kernel is given, also when it is compiled without a GPU."""
        limit = {} if self.registers is None else {"maxnreg": self.registers}
        return {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True, **limit}


# The first row that fits is taken; None fits everything. A shape class is a number: the row fits up to it.
#   kernel, architectures, bits of an element, largest shape class: rows, columns, warps, stages
TABLE: tuple[tuple[str, tuple[str, ...] | None, int | None, int | None, Configuration], ...] = (
    # rows are queries, columns keys, the shape class the head dimension up to a power of two
    ("attention", ("gfx942",), None, None, Configuration(64, 32, 4, 2)),
    ("attention", ("sm_120",), 16, 64, Configuration(64, 64, 4, 3)),
    ("attention", ("sm_120",), 16, 128, Configuration(128, 64, 8, 2)),
    ("attention", None, 16, 128, Configuration(64, 64, 4, 2)),
    ("attention", ("sm_80", "sm_120"), 32, 64, Configuration(32, 32, 4, 2)),
    ("attention", None, 32, 64, Configuration(64, 32, 4, 2)),
    ("attention", ("sm_100",), 32, 128, Configuration(64, 32, 8, 2)),
    ("attention", None, 32, 128, Configuration(16, 32, 4, 1)),
    ("attention_of_many", ("sm_90", "sm_100"), 16, 32, Configuration(64, 64, 4, 2)),
    ("attention_of_many", ("sm_90", "sm_100"), 16, 128, Configuration(128, 64, 8, 2)),
    ("attention_backward", ("gfx942",), None, None, Configuration(32, 32, 4, 1)),
    ("attention_backward", ("sm_80", "sm_120"), 16, 64, Configuration(64, 32, 4, 1)),
    ("attention_backward", ("sm_80", "sm_120"), 16, 128, Configuration(32, 32, 4, 1)),
    ("attention_backward", None, 16, 64, Configuration(64, 64, 4, 1)),
    ("attention_backward", None, 16, 128, Configuration(64, 64, 8, 1)),
    ("attention_backward", ("sm_80",), 32, 64, Configuration(16, 32, 4, 1, registers=255)),
    ("attention_backward", ("sm_90",), 32, 64, Configuration(32, 16, 4, 1, registers=192)),
    ("attention_backward", ("sm_120",), 32, 64, Configuration(32, 32, 8, 1)),
    ("attention_backward", ("sm_120",), 32, 128, Configuration(16, 16, 8, 1)),
    ("attention_backward", None, 32, 64, Configuration(16, 32, 4, 1)),
    ("attention_backward", None, 32, 128, Configuration(16, 16, 4, 1)),
    # rows are pixels, columns channels, the shape class the pixels of a picture
    ("group_norm", ("gfx942",), None, None, Configuration(64, 64, 4, 1)),
    ("group_norm", ("sm_100",), None, None, Configuration(32, 64, 8, 1, registers=64)),
    ("group_norm", None, None, None, Configuration(64, 64, 8, 1, registers=64)),
    ("group_norm_one_pass", ("gfx942",), None, None, Configuration(64, 64, 4, 1)),
    ("group_norm_one_pass", None, None, None, Configuration(64, 64, 8, 1)),  # rows if columns are as many
    ("group_norm_backward", ("gfx942",), None, None, Configuration(32, 64, 4, 1)),
    ("group_norm_backward", None, None, None, Configuration(32, 64, 8, 1, registers=80)),
    ("dropped_group_norm", ("gfx942",), None, None, Configuration(32, 64, 4, 1)),
    ("dropped_group_norm", None, None, None, Configuration(32, 64, 8, 1, registers=64)),
    ("dropped_group_norm_backward", ("gfx942",), None, None, Configuration(16, 64, 4, 1)),
    ("dropped_group_norm_backward", None, None, None, Configuration(16, 64, 8, 1, registers=64)),
    ("convolution_sum", ("gfx942",), None, None, Configuration(32, 64, 4, 1)),
    ("convolution_sum", None, None, None, Configuration(32, 64, 8, 1)),
    # rows times columns are a program's elements, the shape class the channels
    ("activation", ("gfx942",), None, None, Configuration(1, 2048, 4, 1)),
    ("activation", None, None, None, Configuration(1, 1024, 4, 1)),
    ("activation_backward", ("gfx942",), None, None, Configuration(16, 128, 4, 1)),
    ("activation_backward", None, None, None, Configuration(8, 128, 4, 1)),
    ("layer_norm", None, None, 2048, Configuration(1, 2048, 4, 1)),
    ("layer_norm", None, None, None, Configuration(1, 4096, 8, 1)),
    ("layer_norm_backward", ("gfx942",), None, 2048, Configuration(1, 2048, 4, 1)),
    ("layer_norm_backward", None, 16, 2048, Configuration(1, 2048, 8, 1, registers=80)),
    ("layer_norm_backward", None, None, 2048, Configuration(1, 2048, 8, 1)),
    ("layer_norm_backward", None, None, None, Configuration(1, 4096, 8, 1)),
    ("layer_norm_parameters", None, None, None, Configuration(32, 32, 4, 1)),
    # rows are pixels, columns channels, the shape class the widest tile that is worth its while
    ("convolution", ("sm_80",), None, None, Configuration(128, 64, 8, 4)),
    ("convolution", ("sm_120",), None, None, Configuration(128, 64, 8, 3)),
    ("convolution", ("gfx942",), None, None, Configuration(128, 64, 4, 2)),
    ("convolution", None, None, 64, Configuration(128, 64, 4, 3)),
    ("convolution", ("sm_100",), None, 128, Configuration(128, 128, 4, 3)),
    ("convolution", None, None, 128, Configuration(128, 128, 8, 3)),
    ("linear", ("sm_80",), None, None, Configuration(128, 64, 8, 4)),
    ("linear", ("sm_120",), None, None, Configuration(128, 64, 8, 3)),
    ("linear", ("gfx942",), None, None, Configuration(128, 64, 4, 2)),
    ("linear", None, None, 64, Configuration(128, 64, 4, 3)),
    ("linear", ("sm_100",), None, 128, Configuration(128, 128, 4, 3)),
    ("linear", None, None, 128, Configuration(128, 128, 8, 3)),
    # rows are elements of a tensor or of a picture
    ("adamw", None, None, None, Configuration(1024, 1, 4, 1)),
    ("sampler_step", None, None, None, Configuration(1024, 1, 4, 1)),
    ("hybrid_loss", None, None, None, Configuration(1024, 1, 4, 1)),
    ("gradient_norm", None, None, None, Configuration(2048, 1, 8, 1)),
    ("product_sum", None, None, None, Configuration(64, 32, 4, 1)),
    ("column_sums", None, None, None, Configuration(128, 32, 8, 1)),
    # rows times columns are the moments that a program reads at a time
    ("moments", None, None, None, Configuration(16, 64, 4, 1)),
)

# GPUs without rows of their own, and the kin whose shared memory and matrix instructions they share.
_KIN = {"sm_86": "sm_120", "sm_87": "sm_80", "sm_89": "sm_120", "sm_103": "sm_100", "sm_121": "sm_120"}


def kin(architecture: str) -> str:
    """The architecture whose rows of the table a GPU takes: its own, or that of its kin."""
    return "gfx942" if architecture.startswith("gfx") else _KIN.get(architecture, architecture)


@functools.cache
def choose(kernel: str, architecture: str, bits: int, shape_class: int = 0) -> Configuration:
    """The configuration of a kernel.

    Args:
        kernel: its name in the table.
        architecture: as `launch.architecture` gives it.
        bits: of an element of the main operand, 16 or 32.
        shape_class: what the kernel's rows are graded by, such as the padded head dimension.

    Raises:
        ValueError: no row fits.
    """
    own = kin(architecture)
    for name, architectures, row_bits, largest, configuration in TABLE:
        fits = name == kernel and (architectures is None or own in architectures)
        if fits and row_bits in (None, bits) and (largest is None or shape_class <= largest):
            return configuration
    raise ValueError(
        f"no configuration of kernel {kernel!r} for {architecture}, {bits} bits, shape class {shape_class}; "
        "add a row to TABLE in kernels/configurations.py"
    )


_fastest: dict[tuple[str, str, int, int], Configuration] = {}


def run(
    kernel: str,
    device: torch.device,
    bits: int,
    shape_class: int,
    launcher: Callable[[Configuration], Result],
) -> Result:
    """Call a launcher with the kernel's configuration, the fastest one where autotuning was asked for.

    Autotuning calls the launcher many times: it must write nothing that it also reads.
    """
    architecture = launch.architecture(device)
    wanted = os.environ.get(AUTOTUNE_VARIABLE) == "1" and device.type == "cuda"
    key = kernel, architecture, bits, shape_class
    if wanted and key not in _fastest and not torch.cuda.is_current_stream_capturing():
        _fastest[key] = _measure(candidates(kernel, architecture, bits), launcher)
    return launcher(_fastest[key] if wanted and key in _fastest else choose(*key))


def candidates(kernel: str, architecture: str, bits: int) -> list[Configuration]:
    """Every configuration of a kernel, also those of other GPUs; limits of registers are NVIDIA's alone."""
    found = dict.fromkeys(row[4] for row in TABLE if row[0] == kernel and row[2] in (None, bits))
    limited = launch.number(architecture) > 0
    return [each for each in found if limited or each.registers is None]


def _measure(tried: list[Configuration], launcher: Callable[[Configuration], object]) -> Configuration:
    import triton

    times: dict[Configuration, float] = {}
    for configuration in tried:
        try:
            times[configuration] = triton.testing.do_bench(lambda each=configuration: launcher(each))
        except triton.runtime.errors.OutOfResources:  # another architecture's tile
            continue
    return min(times, key=times.__getitem__)
