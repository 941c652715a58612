"""What a benchmark is: a case, its parity gate, interleaved pairs of timings.

A suite is a module with `cases() -> Iterable[Case]`; `bench.__main__` names it in SUITES.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.parity import excess

MIN_PAIRS = 7
SAMPLE_SECONDS = 2e-3  # shorter calls are repeated, so that the clock's resolution does not matter
Function = Callable[..., Tensor]


class ParityError(Exception):
    """Ours is further from float64 than the gate allows: there is nothing to time."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One computation, done by us and by a peer.

    `inputs` makes the float32 inputs; with `backward` all of them get gradients. `layout` gives ours the same
    values in other strides. `work` is what one call moves or computes at least, in `unit` without its giga.
    """

    name: str
    ours: Function
    peer: Function
    inputs: Callable[[], tuple[Tensor, ...]]
    work: float
    unit: str
    backward: bool = False
    layout: Callable[[Tensor], Tensor] = torch.clone

    def leaves(self, device: str, dtype: torch.dtype, layout: Function = torch.clone) -> list[Tensor]:
        """New inputs on the device."""
        tensors = (layout(tensor.to(device, dtype)) for tensor in self.inputs())
        return [tensor.detach().requires_grad_(self.backward) for tensor in tensors]

    def call(self, function: Function, inputs: list[Tensor]) -> list[Tensor]:
        """The output; with `backward` also every input's gradient of half the output's squared norm."""
        if not self.backward:
            with torch.no_grad():
                return [function(*inputs)]
        output = function(*inputs)
        return [output.detach(), *torch.autograd.grad(output, inputs, output.detach())]


@dataclass(frozen=True)
class Row:
    """Medians in ms, and median, p20, p80 of the pairs' ratios peer / ours: above 1 we are faster."""

    case: str
    ours_ms: float
    peer_ms: float
    ratio: tuple[float, float, float]
    rate: float
    unit: str
    error: float  # as a part of what the gate allows


def gate(case: Case, device: str) -> float:
    """The largest error of ours against the peer's formula in float64, as a part of what is allowed.

    Raises:
        ParityError: the part is above 1.
    """
    exact = case.call(case.peer, case.leaves(device, torch.float64))
    peer = case.call(case.peer, case.leaves(device, torch.float32))
    ours = case.call(case.ours, case.leaves(device, torch.float32, case.layout))
    worst = max(excess(*triple) for triple in zip(ours, peer, exact, strict=True))
    if worst > 1:
        raise ParityError(f"{case.name}: the error is {worst:.3g} times what is allowed; nothing is timed")
    return worst


def measure(case: Case, *, device: str = "cpu", seconds: float = 2.0) -> Row:
    """Run the gate, then time pairs for about `seconds`; who goes first alternates.

    Raises:
        ParityError: the gate is red.
    """
    error = gate(case, device)
    inputs = {case.ours: case.leaves(device, torch.float32, case.layout)}
    inputs[case.peer] = case.leaves(device, torch.float32)

    def time_of(function: Function, repeats: int) -> float:
        start = time.perf_counter()
        for _ in range(repeats):
            case.call(function, inputs[function])
        if device == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / repeats

    warm = [time_of(function, 1) for function in (case.ours, case.peer, case.ours, case.peer)]
    repeats = max(1, round(SAMPLE_SECONDS / min(warm)))
    pairs: list[tuple[float, float]] = []
    end = time.perf_counter() + seconds
    while len(pairs) < MIN_PAIRS or time.perf_counter() < end:
        order = (case.ours, case.peer) if len(pairs) % 2 else (case.peer, case.ours)
        times = {function: time_of(function, repeats) for function in order}
        pairs.append((times[case.ours], times[case.peer]))
    samples = torch.tensor(pairs, dtype=torch.float64)
    ours, peer = samples.median(dim=0).values.tolist()
    ratios = samples[:, 1] / samples[:, 0]
    median, low, high = (float(ratios.quantile(part)) for part in (0.5, 0.2, 0.8))
    return Row(
        case.name, 1e3 * ours, 1e3 * peer, (median, low, high), case.work / ours / 1e9, case.unit, error
    )
