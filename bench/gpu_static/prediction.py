"""Predicted: how long a step takes on an H100 by the roofline of each kernel.

Nothing here was measured on a GPU. A kernel takes at least its bytes at the copy rate or its FLOPs at the
peak, whichever is longer. Predictions add what GPUs of this kind were seen to lose: kernels reach four
fifths of their roofline, one that follows another in a CUDA graph costs 1.2 µs, and without a graph the
host needs about 6 µs to launch each. They are good to 30 % in absolute terms; ratios are sturdier.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bench.gpu_static.launches import Launch

BANDWIDTH = 3.0e12  # bytes a second of a large copy on an H100 SXM
PEAK_HALF = 790e12  # FLOP/s of float16 products, as cuBLAS reaches them
PEAK_SINGLE = 60e12  # of float32 ones, without TF32
REACHED = 0.8  # of a kernel's roofline
GAP = 1.2e-6  # seconds between kernels of a graph
HOST = 6.0e-6  # seconds the host needs for a launch


@dataclass(frozen=True)
class Prediction:
    """Seconds of a step on an H100."""

    roofline: float  # nothing can be faster that launches these kernels
    graph: float
    eager: float

    @classmethod
    def of(cls, launches: Sequence[Launch]) -> Prediction:
        """From the launches that were counted."""
        roofline = sum(map(limit, launches))
        graph = roofline / REACHED + GAP * len(launches)
        return cls(roofline=roofline, graph=graph, eager=max(graph, HOST * len(launches)))


def limit(launch: Launch) -> float:
    """The least time of a kernel on an H100, in seconds."""
    peak = PEAK_HALF if launch.half else PEAK_SINGLE
    return max(launch.moved / BANDWIDTH, launch.flops / peak)
