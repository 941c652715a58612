"""Gathers what the parts find out."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict

import torch

from bench.gpu_static import inductor, numerics, resources
from bench.gpu_static.counter import by_op, count
from bench.gpu_static.report import SIDES, Count, Findings
from bench.gpu_static.workloads import Workload, workloads
from glide_fast import __version__
from glide_fast.kernels.compilation import TARGETS


def gather(parts: Sequence[str], name: str, targets: tuple[str, ...]) -> Findings:
    """The findings of the parts; counted are the steps with ``name`` in their names, compiled the targets."""
    found = Findings(facts=_facts())
    with ThreadPoolExecutor(1) as pool:
        if "counted" in parts:
            inductors = pool.submit(inductor.counted, name)  # takes minutes, in a process of its own
            for workload in workloads():
                if name in workload.name:
                    found.counts += counted(workload)
        if "compiled" in parts:
            compiled = resources.compiled(resources.families(), targets or TARGETS)
            found.resources, found.absent = compiled.rows, [*found.absent, *compiled.failures]
        if "interpreted" in parts:
            rows, failure = numerics.measured()
            found.numerics = [asdict(row) for row in rows]
            found.absent += [f"the interpreter: {failure}"] if failure else []
        if "counted" in parts:
            add_inductor(found, inductors.result())
    return found


def add_inductor(found: Findings, served: inductor.Served) -> None:
    """Put Inductor's counts after those of the same step, and why it has served others not."""
    steps = [count.step for count in found.counts]
    found.counts += [
        Count.of(step, SIDES[2], launches, by_op(launches)) for step, launches in served.launches.items()
    ]
    found.counts.sort(key=lambda count: steps.index(count.step))
    found.refusals = served.refusals


def counted(workload: Workload) -> Iterator[Count]:
    """Ours, then the original's."""
    goal = None
    if workload.most_launches is not None and workload.most_bytes is not None:
        goal = workload.most_launches, workload.most_bytes
    ours, upstream = count(workload.ours), count(workload.upstream)
    yield Count.of(workload.name, SIDES[0], ours, by_op(ours), goal)
    yield Count.of(workload.name, SIDES[1], upstream, by_op(upstream))


def _facts() -> dict[str, str]:
    facts = {"glide_fast": __version__, "torch": torch.__version__}
    try:
        facts["triton"] = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        facts["triton"] = "not installed"
    return facts
