"""Interpreted: errors of the kernels' own code, run by Triton's interpreter on the CPU, against float64.

    python -m bench.gpu_static.numerics      # one JSON row a line: op, dtype, case, error, allowed

A row's error is the largest of an op's results, each in units of the largest number of the exact result.
"""

from __future__ import annotations

import importlib
import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from glide_fast import kernels
from glide_fast.diffusion import GaussianDiffusion, Schedule
from glide_fast.diffusion.rules import ddpm_rule

ALLOWED = {torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}
Arguments = tuple[Any, ...]


@dataclass(frozen=True)
class Row:
    """The error of an op's kernels in one dtype on one set of shapes."""

    op: str
    case: str
    dtype: str
    error: float
    allowed: float


def _normal(*shape: int) -> Tensor:
    seed = sum((index + 1) * size for index, size in enumerate(shape))
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _map(*shape: int) -> Tensor:
    return _normal(*shape).contiguous(memory_format=torch.channels_last)


def _norm(channels: int, size: int, mode: int) -> Arguments:
    x, film = _map(2, channels, size, size), _normal(2, 2 * channels) * 0.1
    weight, bias = 1 + 0.1 * _normal(channels), 0.1 * _normal(channels + 1)[1:]
    return x, weight, bias, film[:, :channels], film[:, channels:], 32, 1e-5, True, mode


def _norm_convolution(channels: int, skip: int, size: int, out: int) -> Arguments:
    _, weight, bias, scale, shift, *_ = _norm(channels + skip, size, 0)
    kernel = _map(out, channels + skip, 3, 3) / (9 * channels) ** 0.5
    x, other, residual = _map(2, channels, size, size), _map(2, skip, size, size), _map(2, out, size, size)
    return x, other, weight, bias, scale, shift, 32, 1e-5, 0, kernel, _normal(out), residual


def _heads(tokens: int, text: int, dim: int) -> Arguments:
    query, key, value = _normal(1, tokens, 2, 3, dim).unbind(3)
    text_key, text_value = _normal(1, text, 2, 2, dim).unbind(3)
    return query, key, value, text_key, text_value


def _losses(batch: int, size: int) -> Arguments:
    """Pictures at steps from the first to the last, and a model that misses their noise."""
    diffusion = GaussianDiffusion(schedule=Schedule.create("cosine", 1000))
    x_start, noise = _normal(batch, 3, size, size).clamp(-1, 1), _normal(batch, size, 3, size).transpose(1, 2)
    t = torch.linspace(0, 999, batch).long()
    miss, variance = _normal(batch, 6, size, size).chunk(2, dim=1)
    output = torch.cat([noise + 0.3 * miss, variance], dim=1)
    table = ddpm_rule(diffusion, clip=False, device=t.device).table
    return output, x_start, diffusion.q_sample(x_start, t, noise), noise, t, table


CASES: dict[str, dict[str, Callable[[], Arguments]]] = {
    "group_norm": {
        "192x16x16 FiLM SiLU": lambda: _norm(192, 16, 0),
        "96x33x33 SiLU": lambda: (*_norm(96, 33, 0)[:3], None, None, 32, 1e-5, True, 0),
        "64x8x8 up": lambda: _norm(64, 8, 1),
        "64x8x8 down": lambda: _norm(64, 8, 2),
    },
    "dropped_group_norm": {
        "96x9x9 FiLM SiLU, dropout 0.1": lambda: (*_norm(96, 9, 0)[:7], 0.1, 3),
    },
    "attention": {
        "64+128 keys, head 64": lambda: _heads(64, 128, 64),
        "77+5 keys, head 48": lambda: _heads(77, 5, 48),
    },
    "layer_norm": {
        "2x7x512": lambda: (_normal(2, 7, 512), 1 + 0.1 * _normal(512), 0.1 * _normal(513)[1:], 1e-5),
    },
    "linear": {
        "97x192 x 96, residual": lambda: (
            _normal(97, 192),
            None,
            _normal(96, 192) / 14,
            _normal(96),
            _normal(97, 96),
            0,
        ),
    },
    "norm_convolution": {
        "64x8x8 + 64 x 48": lambda: _norm_convolution(64, 64, 8, 48),
    },
    "hybrid_loss": {
        "4x3x9x9, steps 0 to 999": lambda: _losses(4, 9),
    },
    "gradient_norm": {
        "96x33, 70001, 5, clipped to 1": lambda: ([_normal(96, 33), _normal(70001), _normal(5)], 1.0, 1.0),
    },
}
# Of these only so many arguments may have 16 bits; the others stay float32.
NARROW = {"hybrid_loss": 1}


# Arguments of the backward op, from a gradient, the forward op's arguments and its results. x itself stands
# for the gradient of a path beside a norm.
BACKWARD: dict[str, Callable[[Tensor, Arguments, Arguments], Arguments]] = {
    "group_norm": lambda grad, given, results: (grad, *given[:5], *results[1:], *given[7:], given[0]),
    "dropped_group_norm": lambda grad, given, results: (grad, *given[:5], *results[1:], *given[7:]),
    "attention": lambda grad, given, results: (grad, *given, *results),
    "layer_norm": lambda grad, given, results: (grad, *given[:2], *results[1:], True, True, given[0], 2),
    "hybrid_loss": lambda grad, given, _results: (grad, grad.roll(1), *given),
}


def _converted(arguments: Arguments, dtype: torch.dtype) -> Arguments:
    """The arguments with every floating-point tensor in a dtype, its order in memory as it was."""
    converted: Arguments = pytree.tree_map_only(
        Tensor, lambda each: each.to(dtype) if each.is_floating_point() else each, arguments
    )
    return converted


def _tuple(results: Any) -> tuple[Tensor, ...]:
    return (results,) if isinstance(results, Tensor) else tuple(results)


def _call(op: str, arguments: Arguments) -> tuple[Tensor, ...]:
    """The kernels' results."""
    module = importlib.import_module(f"glide_fast.kernels.{kernels.REGISTERED[op].module}")
    return _tuple(getattr(module, op)(*arguments))


def _error(op: str, found: tuple[Tensor, ...], arguments: Arguments) -> float:
    """The worst error of an op's results against its reference in float64."""
    reference = getattr(torch.ops.glide_fast, f"{op}_reference")
    worst = 0.0
    for mine, truth in zip(found, _tuple(reference(*_converted(arguments, torch.float64))), strict=True):
        if truth.numel():
            error = float((mine.double() - truth).abs().max() / truth.abs().max().clamp_min(1e-30))
            worst = max(worst, error) if math.isfinite(error) else math.inf
    return worst


def rows() -> Iterator[Row]:
    """Every op that has kernels and cases here, forward and backward, in every dtype."""
    for op, named in CASES.items():
        if op not in kernels.REGISTERED:
            continue
        for name, make in named.items():
            for dtype, allowed in ALLOWED.items():
                kind = str(dtype).removeprefix("torch.")
                drawn = make()
                arguments = (
                    *_converted(drawn[: NARROW.get(op)], dtype),
                    *drawn[NARROW.get(op, len(drawn)) :],
                )
                results = _call(op, arguments)
                yield Row(op, name, kind, _error(op, results, arguments), allowed)
                backward = f"{op}_backward"
                if op in BACKWARD and backward in kernels.REGISTERED:
                    grad = torch.empty_like(results[0]).copy_(_normal(*results[0].shape))
                    given = BACKWARD[op](grad, arguments, results)
                    yield Row(backward, name, kind, _error(backward, _call(backward, given), given), allowed)


def measured() -> tuple[list[Row], str]:
    """The rows, from a process in which Triton is an interpreter; and why that failed, or nothing."""
    command = [sys.executable, "-m", "bench.gpu_static.numerics"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = [Row(**json.loads(line)) for line in done.stdout.splitlines() if line.startswith("{")]
    words = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
    return found, words[0] if done.returncode else ""


def main() -> None:
    """Print the rows."""
    for row in rows():
        print(json.dumps(asdict(row)), flush=True)


if __name__ == "__main__":
    importlib.import_module("tests.kernels.interpreter").start()
    main()
