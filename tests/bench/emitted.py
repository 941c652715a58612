"""Counts small computations as torch.compile serves them, in a process that prints them as JSON.

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

from bench.gpu_static import inductor  # noqa: E402
from bench.gpu_static.counter import count  # noqa: E402
from bench.gpu_static.workloads import Build, Call, Workload, channels_last, upstream_step  # noqa: E402
from bench.gpu_static.workloads import compiled as by_compiler  # noqa: E402
from tests import tiny  # noqa: E402
from tests.bench.counted import half  # noqa: E402

Make = Callable[[], tuple[Any, ...]]


def compiled(make: Make, function: Callable[..., object]) -> Build:
    def build() -> Call:
        with torch.device("cuda"):
            given = make()
        served = torch.compile(function)
        return lambda: served(*given)

    return build


def likeness(x: Tensor) -> Tensor:
    """Has a gradient with a constant that is the same everywhere."""
    return torch.autograd.grad(torch.linalg.norm(x, dim=-1).sum(), x)[0]


def block(x: Tensor, layer: nn.Conv2d, norm: nn.GroupNorm) -> Tensor:
    return F.silu(norm(layer(x)))


@torch.no_grad()
def without_gradients(x: Tensor, layer: nn.Conv2d, norm: nn.GroupNorm) -> Tensor:
    return block(x, layer, norm)


def layers() -> tuple[Tensor, nn.Module, nn.Module]:
    layer, norm = channels_last(nn.Conv2d(4, 8, 3, padding=1)), nn.GroupNorm(2, 8)
    return torch.empty(2, 4, 6, 6).to(memory_format=torch.channels_last), layer, norm


def train() -> Call:
    """The sum is outside of what is compiled."""
    with torch.device("cuda"):
        x, layer, norm = layers()
    served = torch.compile(block)

    def call() -> None:
        layer.zero_grad(set_to_none=True)
        served(x, layer, norm).sum().backward()

    return call


def fail() -> Call:
    raise ArithmeticError("first line\nsecond line")


CASES: dict[str, Build] = {
    "fused": compiled(lambda: (half(10, 7), half(1, 7)), lambda x, y: torch.relu(x * 2 + y)),
    "in place": compiled(lambda: (half(10, 7), half(10, 7)), Tensor.add_),
    "a part": compiled(lambda: (half(10, 14),), lambda x: x[:, :7] * 2),
    "product": compiled(lambda: (half(5, 16), half(16, 8)), torch.mm),
    "block": compiled(layers, without_gradients),
    "constant": compiled(lambda: (torch.empty(4, 5, requires_grad=True),), likeness),
    "training": train,
}


def main() -> None:
    """Print the launches of each case, a small network's on both sides, and a refusal."""
    cases = {name: [asdict(each) for each in count(build, inductor.emitted)] for name, build in CASES.items()}
    config = tiny.config().unet
    plain, served = upstream_step(config, 2), upstream_step(config, 2, prepare=by_compiler)
    network = Workload(name="small", ours=plain, upstream=plain, compiled=served)
    refused = Workload(name="broken", ours=plain, upstream=plain, compiled=fail)
    steps = {
        "upstream": [asdict(each) for each in count(plain)],
        "compiled": inductor.row(network),
        "refused": inductor.row(refused),
    }
    print(json.dumps({"cases": cases, "steps": steps}))


if __name__ == "__main__":
    main()
