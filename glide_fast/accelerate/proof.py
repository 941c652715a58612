"""The proof that a plan computes what a module computes: on a copy of the module, with random weights.

Weights are random because the module's own may not tell: a zero-initialised last layer would hide any
difference. The copy keeps the model free of traces: no hook runs, no buffer moves, no random number is drawn.
Models on the meta device are proven the same way, on the CPU.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

from glide_fast.accelerate.plan import Noise, Plan, takes
from glide_fast.models.layers import HOOKS

TOLERANCE = 1e-4  # of the largest output, in float32
TOLERANCE_TF32 = 3e-3  # accelerators may round the factors of a product to ten bits
_PERIOD = 4099  # prime, so that the rows of a weight differ


def objection(module: nn.Module, plan: Plan) -> str | None:
    """Why ``plan`` must not serve the module; None if it is proven."""
    original = type(module)
    if plan.method in vars(module):
        return f"its {plan.method} was replaced on the instance"
    if takes(getattr(original, plan.method)) != plan.arity:
        return f"its {plan.method} takes other arguments"
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _difference(plan.subject(module), plan)
    except Exception as error:  # foreign code may fail in any way
        return f"the trial failed: {type(error).__name__}: {error}"


def _difference(module: nn.Module, plan: Plan) -> str | None:
    device = next((parameter.device for parameter in module.parameters()), torch.device("cpu"))
    device = torch.device("cpu") if device.type == "meta" else device
    noise = _noise(device)
    subject = _rehearsal(module, noise, device)
    calls: list[int] = []

    def stand_in(self: nn.Module, *inputs: Any) -> Tensor:
        calls.append(len(inputs))
        return plan.serve(self, inputs)

    original: Any = type(subject)
    substitute = type(original)(original.__name__, (original,), {plan.method: stand_in})
    tolerance = TOLERANCE if device.type == "cpu" else TOLERANCE_TF32
    with torch.autocast(device.type, enabled=False):
        for inputs in plan.examples(subject, noise):
            for training in (False, True):
                subject.train(training)
                subject.__class__ = original
                expected = _run(subject, inputs, device)
                subject.__class__ = substitute
                problem = _compare(_run(subject, inputs, device), expected, tolerance)
                if problem is not None:
                    return problem + (" while training" if training else "")
    return None if calls else f"its forward does not call {plan.method}"


def _run(module: nn.Module, inputs: tuple[Tensor, ...], device: torch.device) -> Tensor:
    """``module.forward(*inputs)``, after which the global random stream is where it was."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        return module.forward(*inputs)  # type: ignore[no-any-return]


def _compare(actual: Tensor, expected: Tensor, tolerance: float) -> str | None:
    if not isinstance(expected, Tensor):
        return f"it returns a {type(expected).__name__}"
    if actual.shape != expected.shape:
        return f"outputs have shape {tuple(expected.shape)} instead of {tuple(actual.shape)}"
    if actual.dtype != expected.dtype:
        return f"outputs are {expected.dtype} instead of {actual.dtype}"
    largest = (actual - expected).abs().max().item()
    allowed = tolerance * max(1.0, expected.abs().max().item())
    return None if largest <= allowed else f"outputs differ by {largest:.2g}"


def _noise(device: torch.device) -> Noise:
    """A source of normal values with a stream of its own, cheap enough for the largest weights."""
    generator = torch.Generator("cpu").manual_seed(0)
    period = torch.randn(_PERIOD, generator=generator, dtype=torch.float32, device="cpu")
    drawn = 0

    def noise(*shape: int) -> Tensor:
        nonlocal drawn
        drawn += 1
        values = period.roll(97 * drawn).repeat(math.prod(shape) // _PERIOD + 1)
        return values[: math.prod(shape)].view(shape).to(device)

    return noise


def _rehearsal(module: nn.Module, noise: Noise, device: torch.device) -> nn.Module:
    """A float32 copy without hooks whose weights are random, of a size that keeps outputs near one."""
    memo: dict[int, Any] = {}
    for parameter in module.parameters():
        spread = math.prod(parameter.shape[1:]) ** -0.5 if parameter.ndim > 1 else 1.0
        memo[id(parameter)] = nn.Parameter(spread * noise(*parameter.shape), requires_grad=False)
    for buffer in module.buffers():
        if buffer.is_floating_point():
            values = noise(*buffer.shape) if buffer.device.type == "meta" else buffer.detach().to(device)
            memo[id(buffer)] = values.to(torch.float32, copy=True)
    subject = copy.deepcopy(module, memo)
    for part in subject.modules():
        for name in HOOKS:
            setattr(part, name, OrderedDict())
    return subject
