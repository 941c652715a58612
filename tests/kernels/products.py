"""What the tests of the products share: how tiles come, memory full of NaN, errors, statistics."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from glide_fast.kernels import launch
from tests.kernels.interpreter import environment

TOLERANCES = {torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}
PATHS = ("descriptors", "pointers")


def take_path(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles come as on a GPU with, or without, a tensor memory accelerator."""
    if path == "pointers":
        monkeypatch.setattr(launch, "takes_descriptors", lambda *_: False)


def poisoned() -> Iterator[None]:
    """While a test runs, memory that nobody has written holds NaN."""
    torch.use_deterministic_algorithms(True)
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.utils.deterministic.fill_uninitialized_memory = before
    torch.use_deterministic_algorithms(False)


def error(actual: Tensor, exact: Tensor) -> float:
    """The relative error in norm; infinite where anything is not finite."""
    assert actual.shape == exact.shape
    if not bool(actual.isfinite().all()):
        return float("inf")
    return float((actual.double() - exact).norm() / exact.norm().clamp(min=1e-30))


def exact_statistics(x: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor]:
    """Mean and 1/deviation [B, G] of [B, C, *space] in float64."""
    grouped = x.double().reshape(x.shape[0], groups, -1)
    return grouped.mean(2), (grouped.var(2, unbiased=False) + eps).rsqrt()


def compiled(module: str, target: str) -> list[dict[str, Any]]:
    """The resources of every case of a kernel module, compiled in a process of its own."""
    command = [sys.executable, "-m", "glide_fast.kernels.compilation", module, target]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment())
    return [json.loads(line) for line in done.stdout.splitlines()]
