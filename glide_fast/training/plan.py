"""What a training run will need before it is started: memory a GPU by part, FLOPs, speed, days.

Nothing is allocated: a step is traced on meta tensors. What is computed as the trainer does it: float32
weights, gradients, AdamW's two moments and the average, activations in one dtype. Under "ddp" each GPU has
all of them; "fsdp" (ZeRO, arXiv 1910.02054) divides what belongs to weights, and gathers the blocks in turn.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Literal

import torch
from torch import nn

from glide_fast.models.configs import Config, describe
from glide_fast.training.distributed import BLOCKS
from glide_fast.training.hardware import GPUS, Gpu
from glide_fast.training.trace import Trace, trace

FLOAT32 = 4  # bytes
OPTIMIZER_TRAFFIC = 9 * FLOAT32  # a weight: read it, its gradient, two moments, average; write all but one


@dataclass(frozen=True, kw_only=True)
class Setup:
    """The machine and how it is used.

    ``batch`` pictures an optimiser step on all ``gpus``, taken in ``accumulate`` parts, until ``images`` have
    been seen. ``utilisation`` is the share of the peak FLOP/s that forward and backward passes are assumed to
    reach.

    Raises:
        ValueError: names every field that is wrong.
    """

    gpus: int
    batch: int
    images: float
    gpu: str = "H100"
    accumulate: int = 1
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    sharding: Literal["ddp", "fsdp"] = "ddp"
    checkpoint_activations: bool = False
    utilisation: float = 0.4

    def __post_init__(self) -> None:
        counts = ("gpus", "batch", "images", "accumulate")
        problems = [
            f"{name} {getattr(self, name):g} must be at least 1" for name in counts if getattr(self, name) < 1
        ]
        if not 0 < self.utilisation <= 1:
            problems.append(f"utilisation {self.utilisation:g} must lie in 0 .. 1, more than 0")
        if self.gpu not in GPUS:
            problems.append(f"unknown GPU {self.gpu!r}; known: {', '.join(GPUS)}")
        parts = self.gpus * self.accumulate
        if min(self.gpus, self.batch, self.accumulate) >= 1 and self.batch % parts:
            among = f"{self.gpus} GPUs" + (f" x {self.accumulate} parts" if self.accumulate > 1 else "")
            nearest = max(1, round(self.batch / parts)) * parts
            problems.append(f"batch {self.batch} is not divisible by {among}; the nearest that is: {nearest}")
        if problems:
            raise ValueError("; ".join(problems))

    @property
    def hardware(self) -> Gpu:
        """The numbers of one GPU."""
        return GPUS[self.gpu]

    @property
    def at_a_time(self) -> int:
        """Pictures in one forward pass of one GPU."""
        return self.batch // (self.gpus * self.accumulate)

    @property
    def shards(self) -> int:
        """GPUs that share one copy of the weights and of what belongs to them."""
        return self.gpus if self.sharding == "fsdp" else 1


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on one GPU by part.

    ``gathered`` are the blocks that fsdp has whole at a time; ``copies`` the weights in the activations'
    dtype that autograd keeps, which no sharding divides; ``workspace`` is as in :class:`Trace`.
    """

    weights: float
    gradients: float
    optimizer: float
    average: float
    gathered: float
    copies: float
    activations: float
    workspace: float

    @property
    def total(self) -> float:
        """All parts together."""
        return float(sum(getattr(self, part.name) for part in fields(self)))


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What :func:`plan` found; ``str`` of it is a page to read. FLOPs are those of one picture."""

    name: str
    setup: Setup
    parameters: int
    forward_flops: float
    step_flops: float
    memory: Memory
    remedies: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        """Whether a GPU has the memory."""
        return self.memory.total <= self.setup.hardware.memory

    @property
    def optimizer_seconds(self) -> float:
        """Time of AdamW and the average in one step, bound by the memory's bandwidth."""
        return self.parameters / self.setup.shards * OPTIMIZER_TRAFFIC / self.setup.hardware.bandwidth

    @property
    def step_seconds(self) -> float:
        """Time of one optimiser step of the whole batch; the network between GPUs costs nothing here."""
        setup = self.setup
        flops = self.step_flops * setup.batch / setup.gpus
        speed = setup.hardware.peak_flops(setup.dtype) * setup.utilisation
        return flops / speed + self.optimizer_seconds

    @property
    def images_per_second(self) -> float:
        """Pictures that all GPUs learn from in a second."""
        return self.setup.batch / self.step_seconds

    @property
    def days(self) -> float:
        """Time until ``setup.images`` have been seen."""
        return self.setup.images / self.images_per_second / 86_400

    def __str__(self) -> str:
        setup = self.setup
        peak = setup.hardware.peak_flops(setup.dtype) / 1e12
        recomputed = ", activations computed again" if setup.checkpoint_activations else ""
        return "\n".join(
            [
                f"{self.name}: {self.parameters / 1e6:,.1f} M parameters",
                f"{setup.gpus} x {setup.gpu}, {setup.sharding}, {setup.dtype}{recomputed}; a batch of "
                f"{setup.batch:,}, {setup.at_a_time:,} at a time on each GPU",
                "",
                f"FLOPs a picture: forward {_short(self.forward_flops)}, training step "
                f"{_short(self.step_flops)} (matrix products)",
                f"speed: {self.images_per_second:,.0f} pictures/s, {self.step_seconds:,.3g} s a step; "
                f"{setup.images:,.0f} pictures take {_duration(self.days)}",
                f"  assuming {setup.utilisation:.0%} of the GPU's {peak:,.0f} TFLOP/s, and no waiting for "
                "data or for other GPUs",
                "",
                *_memory_lines(self.memory, setup),
                *self._verdict(),
            ]
        )

    def _verdict(self) -> list[str]:
        total, there = self.memory.total, self.setup.hardware.memory
        if self.fits:
            spare = there - total
            tight = ", which fragmentation may need: it is tight" if spare < 0.1 * there else ""
            return [f"fits in {_gb(there)} GB; {_gb(spare)} GB are left{tight}"]
        return [
            f"does not fit in {_gb(there)} GB: {_gb(total - there)} GB too much",
            *(f"  it fits with {remedy}" for remedy in self.remedies),
            *([] if self.remedies else [_hopeless(self)]),
        ]


def plan(name: str, model: Config, setup: Setup) -> Plan:
    """Trace a training step of ``model``, and say what a run on ``setup`` takes; ``name`` is for the reader.

    Takes seconds, whatever the size: no tensor of the model is ever allocated.
    """
    network = describe(model)
    step = _trace(model, setup)
    found = Plan(
        name=name,
        setup=setup,
        parameters=sum(parameter.numel() for parameter in network.parameters()),
        forward_flops=step.forward_flops / step.batch,
        step_flops=step.step_flops / step.batch,
        memory=memory_of(network, step, setup),
    )
    if found.fits:
        return found
    return replace(found, remedies=tuple(_remedies(model, network, setup)))


def memory_of(network: nn.Module, step: Trace, setup: Setup) -> Memory:
    """The bytes of one GPU for a traced step of ``network``."""
    weights = sum(parameter.numel() for parameter in network.parameters()) * FLOAT32
    share = weights / setup.shards
    return Memory(
        weights=share,
        gradients=share,
        optimizer=2 * share,
        average=share,
        gathered=_gathered(network) if setup.shards > 1 else 0,
        copies=step.copies,
        activations=step.activations,
        workspace=step.workspace,
    )


def _trace(model: Config, setup: Setup, pictures: int | None = None) -> Trace:
    return trace(
        model,
        setup.at_a_time if pictures is None else pictures,
        dtype=getattr(torch, setup.dtype),
        recompute=setup.checkpoint_activations,
    )


def _gathered(network: nn.Module) -> float:
    """Bytes of what fsdp by block has whole: the two largest blocks and what is in none, with gradients."""
    blocks = [
        sum(parameter.numel() for parameter in module.parameters())
        for module in network.modules()
        if isinstance(module, BLOCKS)
    ]
    rest = sum(parameter.numel() for parameter in network.parameters()) - sum(blocks)
    return float((rest + sum(sorted(blocks)[-2:])) * 2 * FLOAT32)


def _remedies(model: Config, network: nn.Module, setup: Setup) -> Iterator[str]:
    """The options that make a plan fit, from the least change to the greatest."""
    shardings = dict.fromkeys([setup.sharding, "fsdp"] if setup.gpus > 1 else [setup.sharding])
    traces: dict[tuple[bool, int], Trace] = {}
    for sharding in shardings:
        for again in dict.fromkeys([setup.checkpoint_activations, True]):
            changed = replace(setup, sharding=sharding, checkpoint_activations=again)
            for pictures in {1, setup.at_a_time} - {key[1] for key in traces if key[0] == again}:
                traces[again, pictures] = _trace(model, changed, pictures)
            options = [
                *(["--sharding fsdp"] if sharding != setup.sharding else []),
                *(["--checkpoint-activations"] if again != setup.checkpoint_activations else []),
            ]
            steps = traces[again, 1], traces[again, setup.at_a_time]
            pictures = _most_at_a_time(network, changed, *steps)
            if pictures == 0:
                continue
            if pictures < setup.at_a_time:
                parts = setup.accumulate * setup.at_a_time // pictures
                options.append(f"--accumulate {parts} ({pictures:,} pictures at a time)")
            yield " ".join(options)


def _most_at_a_time(network: nn.Module, setup: Setup, one: Trace, whole: Trace) -> int:
    """The largest divisor of ``setup.at_a_time`` that fits; 0 if a single picture does not.

    The memory of a step is the largest of many sums that grow linearly with its pictures. Between ``one``
    picture and the ``whole`` it is therefore at most what a straight line says.
    """
    state = memory_of(network, whole, setup).total - whole.peak
    slope = (whole.peak - one.peak) / max(1, whole.batch - one.batch)
    for pictures in range(whole.batch, 0, -1):
        if whole.batch % pictures == 0:
            needed = state + one.peak + slope * (pictures - 1)
            if needed <= setup.hardware.memory:
                return pictures
    return 0


def _hopeless(found: Plan) -> str:
    memory, setup = found.memory, found.setup
    state = memory.weights + memory.gradients + memory.optimizer + memory.average
    more = "more GPUs" if setup.sharding == "fsdp" else "more GPUs with --sharding fsdp"
    return (
        f"  no option makes it fit on {setup.gpus} x {setup.gpu}: weights and what belongs to them take "
        f"{_gb(state)} GB; take {more}, or larger ones"
    )


def _memory_lines(memory: Memory, setup: Setup) -> list[str]:
    divided = f", divided by {setup.shards}" if setup.shards > 1 else ""
    notes = {
        "weights": f"float32{divided}",
        "gradients": f"float32{divided}",
        "optimizer": f"AdamW's two moments, float32{divided}",
        "average": f"EMA, float32{divided}",
        "gathered": "two blocks whole, with gradients",
        "copies": f"weights in {setup.dtype} that autograd keeps",
        "activations": f"of {setup.at_a_time:,} at a time, kept for the backward pass",
        "workspace": "temporary tensors at the worst moment",
    }
    rows = [(name, getattr(memory, name), note) for name, note in notes.items()]
    lines = [f"  {name:<12}{_gb(size):>9}  {note}" for name, size, note in rows if size]
    return ["memory a GPU, GB:", *lines, f"  {'total':<12}{_gb(memory.total):>9}"]


def _gb(size: float) -> str:
    return f"{size / 1e9:,.2f}"


def _duration(days: float) -> str:
    for unit, length in (("days", 1.0), ("hours", 24.0)):
        if days * length >= 1:
            return f"{days * length:,.3g} {unit}"
    return f"{days * 24 * 60:,.2g} minutes"


def _short(count: float) -> str:
    """1.23e12 -> "1.23 T"."""
    for unit, factor in (("P", 1e15), ("T", 1e12), ("G", 1e9)):
        if count >= factor:
            return f"{count / factor:,.3g} {unit}"
    return f"{count / 1e6:,.3g} M"
