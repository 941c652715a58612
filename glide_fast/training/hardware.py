"""The GPUs that a plan can be made for, with their vendors' published numbers (dense, without sparsity)."""

from __future__ import annotations

from typing import NamedTuple


class Gpu(NamedTuple):
    """Peak FLOP/s of matrix products, bytes of memory (a GB is 10^9), and bytes a second to and from it.

    ``half_flops`` counts for bfloat16 and float16 alike, ``single_flops`` for float32 without TF32.
    """

    half_flops: float
    single_flops: float
    memory: float
    bandwidth: float

    def peak_flops(self, dtype: str) -> float:
        """FLOP/s at most in ``dtype``, "float32" or one of half its size."""
        return self.single_flops if dtype == "float32" else self.half_flops


GPUS = {
    "B200": Gpu(2250e12, 75e12, 180e9, 7.7e12),
    "H200": Gpu(989.4e12, 66.9e12, 141e9, 4.8e12),
    "H100": Gpu(989.4e12, 66.9e12, 80e9, 3.35e12),
    "A100": Gpu(312e12, 19.5e12, 80e9, 2.039e12),
    "A100-40GB": Gpu(312e12, 19.5e12, 40e9, 1.555e12),
    "MI300X": Gpu(1307.4e12, 163.4e12, 192e9, 5.3e12),
    "L40S": Gpu(362e12, 91.6e12, 48e9, 0.864e12),
    "RTX-4090": Gpu(165.2e12, 82.6e12, 24e9, 1.008e12),
    "RTX-3090": Gpu(71e12, 35.6e12, 24e9, 0.936e12),
}
"""By name: SXM and OAM modules where there are several forms, with 80 GB for "A100"."""
