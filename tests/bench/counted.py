"""Counts small computations and the steps with goals, in a process that prints them as JSON.

The process is one of its own because the stand-in for CUDA must be there before torch is imported.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from bench.gpu_static import stand_in

stand_in.install()

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from bench.gpu_static.counter import count  # noqa: E402
from bench.gpu_static.launches import Totals  # noqa: E402
from bench.gpu_static.workloads import workloads  # noqa: E402
from glide_fast import ops  # noqa: E402

LAST = torch.channels_last


def half(*shape: int) -> Tensor:
    return torch.empty(*shape, dtype=torch.float16)


def launches(make: Callable[[], tuple[Any, ...]], call: Callable[..., object]) -> list[dict[str, Any]]:
    def build() -> Callable[[], object]:
        with torch.device("cuda"):
            given = make()
        return lambda: call(*given)

    return [asdict(each) for each in count(build)]


def channels_last_stays(x: Tensor, weight: Tensor) -> None:
    y = F.conv2d(x, weight, padding=1)
    if not y.is_contiguous(memory_format=LAST):
        raise ValueError(f"the convolution's output has strides {y.stride()}")


def train(layer: nn.Conv2d, x: Tensor) -> None:
    layer(x).sum().backward()


def silu_gradient(x: Tensor, grad: Tensor) -> None:
    torch.autograd.grad(F.silu(x.requires_grad_()), x, grad)


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return ops.group_norm(x, weight, weight, groups=2)


CASES: dict[str, tuple[Callable[[], tuple[Any, ...]], Callable[..., object]]] = {
    "views": (lambda: (half(2, 3, 4),), lambda x: x.transpose(1, 2)[:, :2].unsqueeze(0)),
    "add": (lambda: (half(10, 7), half(1, 7).expand(10, 7)), torch.add),
    "in place": (lambda: (half(10, 7), half(10, 7)), Tensor.add_),
    "twice": (lambda: (half(10, 7),), lambda x: x * x),
    "product": (lambda: (half(5, 16), half(8, 16), half(8)), F.linear),
    "convolution": (
        lambda: (half(2, 4, 6, 6), half(8, 4, 3, 3), half(8)),
        lambda x, weight, bias: F.conv2d(x, weight, bias, padding=1),
    ),
    "channels last": (
        lambda: (half(2, 4, 6, 6).to(memory_format=LAST), half(8, 4, 3, 3)),
        channels_last_stays,
    ),
    "training": (lambda: (nn.Conv2d(4, 8, 3, padding=1), torch.empty(2, 4, 6, 6)), train),
    "on the host": (lambda: (torch.ones(3, device="cpu"),), lambda x: (x * 2).to("cuda")),
    "upsampling": (lambda: (half(1, 2, 4, 4),), lambda x: F.interpolate(x, scale_factor=2.0)),
    "SiLU": (lambda: (half(10, 7), half(10, 7)), silu_gradient),
    "many tensors": (
        lambda: ([half(3) for _ in range(100)], [half(3) for _ in range(100)]),
        torch._foreach_add_,
    ),
    "large tensor": (lambda: ([half(65536 * 500)],), lambda tensors: torch._foreach_mul_(tensors, 2.0)),
    "our norm": (lambda: (half(2, 4, 8, 8).to(memory_format=LAST), half(4)), norm),
}


def main() -> None:
    """Print the launches of each case, and the totals of the steps that have goals."""
    cases = {name: launches(*case) for name, case in CASES.items()}
    steps = {}
    for workload in workloads():
        if workload.most_launches is not None:
            goal = [workload.most_launches, workload.most_bytes]
            steps[workload.name] = {"goal": goal, "ours": asdict(Totals.of(count(workload.ours)))}
    first = workloads()[0]
    steps[first.name]["upstream"] = asdict(Totals.of(count(first.upstream)))
    print(json.dumps({"cases": cases, "steps": steps}))


if __name__ == "__main__":
    main()
