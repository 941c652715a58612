"""Every element of every output is written: the same results where fresh memory is full of garbage.

torch's own filling of empty tensors reaches only those made from Python. Here the C library fills every block
that it hands out, so that the outputs and the scratch memory of the C++ kernels are covered too.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from tests.ops import (
    attention_cases,
    norm_convolution_cases,
    test_attention,
    test_group_norm,
    test_norm_convolution,
)

# glibc fills with the complement of the byte: 0x7e7e7e7e is 8.5e37 as a float32, and huge as any other dtype.
# The cache of freed blocks is off, since what it hands out is not filled.
TUNABLES = "glibc.malloc.perturb=129:glibc.malloc.tcache_count=0"
NOT_FILLED = 77


def main() -> None:
    """Check every odd case in this process, whose memory must be filled with garbage."""
    if not all((torch.empty(size) > 1e37).all() for size in (5, 1000, 100_000, 10_000_000)):
        sys.exit(NOT_FILLED)
    for case in [*test_group_norm.ODD_CASES, *test_group_norm.PRESET_CASES[:2]]:
        test_group_norm.assert_exact(case)
    for case in (*test_attention.ODD, test_attention.PRESETS[2]):
        attention_cases.assert_exact(case)
    for case in [*test_norm_convolution.MAP_CASES[::5], *test_norm_convolution.OTHER_CASES]:
        norm_convolution_cases.assert_exact(case)


def test_every_element_of_every_output_is_written() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.ops.test_memory"],
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, "GLIBC_TUNABLES": TUNABLES},
    )
    if done.returncode == NOT_FILLED:
        pytest.skip("this C library cannot fill fresh memory (GLIBC_TUNABLES)")
    assert done.returncode == 0, done.stderr


if __name__ == "__main__":
    main()
