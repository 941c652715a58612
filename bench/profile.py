"""Where a step's time goes: every op by the size of its maps, its rate, and the share of the machine's peak.

python -m bench.profile                        the U-Nets of the README's table, and the embedded pipeline
python -m bench.profile glide-base --steps 5   one of them
python -m bench.profile --docs                 also writes the tables into docs/cpu.md

A 3x3 convolution has two rates: what it would take to compute it directly, and the products that Winograd's
method leaves, which are what the peak limits. Ops are timed one by one, so that the rest is what lies between
them: Python, and PyTorch's own small ops.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from bench import pictures
from bench.machine import facts
from bench.marked import Markers
from bench.networks import step, text_step
from glide_fast.models.presets import preset
from glide_fast.ops import flops as _formulas  # noqa: F401 (they count our ops)
from glide_fast.ops.convolution_cpu import winograd_tile

EMBEDDED, EMBEDDED_STEPS = "embedded", 20
DOCS = Path(__file__).parents[1] / "docs" / "cpu.md"
PLACE = Markers.of("profile", "python -m bench.profile --docs")
BATCHES = {"glide-base": 2, "glide-upsample": 1, "guided-64x64-diffusion": 4, EMBEDDED: 4}
_FEWEST_MICROSECONDS = 20  # of an op of PyTorch's own that gets a row


@dataclass
class Spent:
    """What all calls of one kind took."""

    calls: int = 0
    seconds: float = 0.0
    direct: float = 0.0  # FLOPs
    computed: float = 0.0

    def add(self, seconds: float, direct: float, computed: float) -> None:
        """One more call."""
        self.calls += 1
        self.seconds += seconds
        self.direct += direct
        self.computed += computed


class Stopwatch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Times every op that is called inside; ops that an op calls belong to it."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.spent: defaultdict[tuple[str, str], Spent] = defaultdict(Spent)

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Call the op, and remember how long it took."""
        start = time.perf_counter()
        out = func(*args, **(kwargs or {}))
        seconds = time.perf_counter() - start
        name = str(func).removesuffix(".default")
        if name.startswith("glide_fast") or 1e6 * seconds >= _FEWEST_MICROSECONDS:
            first = out[0] if isinstance(out, tuple) else out
            direct = _flops(func, args, kwargs or {}, out)
            size = _size(name, first) if isinstance(first, Tensor) else ""
            self.spent[name, size].add(seconds, direct, direct * _left_by_winograd(name, args))
        return out


def _flops(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> float:
    """FLOPs of products, by the formulas of FlopCounterMode."""
    formula = FlopCounterMode(display=False).flop_registry.get(func.overloadpacket)
    return 0.0 if formula is None else float(formula(*args, **kwargs, out_val=out))


def _left_by_winograd(name: str, args: tuple[Any, ...]) -> float:
    """The share of a direct convolution's products that is computed."""
    if not name.endswith("norm_convolution"):
        return 1.0
    x, mode, weight = args[0], args[8], args[9]
    tile = winograd_tile(x, mode, weight, weight.shape[1])
    return (tile + 2) ** 2 / (9 * tile**2) if tile else 1.0


def _size(name: str, output: Tensor) -> str:
    is_map = output.ndim == 4 and not name.endswith("attention")
    sizes = output.shape[2:] if is_map else output.shape[1:2]
    return "x".join(map(str, sizes))


def subject_of(name: str) -> Callable[[], object]:
    """A step of a published network, or the sampling of the embedded pipeline, as the suites have it."""
    batch = BATCHES[name]
    if name == EMBEDDED:
        return pictures.sampling(pictures.ours(), batch, EMBEDDED_STEPS)
    config = preset(name).unet
    return (step(config, batch) if config.text is None else text_step(config, batch)).ours


def measure(call: Callable[[], object], steps: int) -> tuple[dict[tuple[str, str], Spent], float]:
    """What the ops of ``steps`` calls took, and the median call alone in seconds."""
    call()
    whole = []
    watch = Stopwatch()
    for _ in range(steps):
        start = time.perf_counter()
        call()
        whole.append(time.perf_counter() - start)
        with watch:
            call()
    return watch.spent, sorted(whole)[steps // 2]


def lines(spent: dict[tuple[str, str], Spent], steps: int, whole: float, peak: float) -> Iterator[str]:
    """A Markdown table; times are those of one step."""
    yield "| op | map or tokens | calls | ms | share | GFLOP/s as if direct | computed | of the peak |"
    yield "|---|---|---|---|---|---|---|---|"
    rest = whole
    for (name, size), each in sorted(spent.items(), key=lambda item: -item[1].seconds):
        seconds = each.seconds / steps
        rest -= seconds
        if seconds < 0.005 * whole:
            continue
        direct, computed = (flops / each.seconds / 1e9 for flops in (each.direct, each.computed))
        rates = f"{direct:.0f} | {computed:.0f} | {computed / peak:.0%}" if each.direct else "| |"
        calls = each.calls / steps
        yield f"| {name} | {size} | {calls:.0f} | {1e3 * seconds:.1f} | {seconds / whole:.1%} | {rates} |"
    yield f"| rest | | | {1e3 * rest:.1f} | {rest / whole:.1%} | | | |"


def main() -> None:
    """Print a table for each model."""
    parser = argparse.ArgumentParser(prog="python -m bench.profile", description="Where a step's time goes.")
    parser.add_argument("models", nargs="*", default=list(BATCHES), help=", ".join(BATCHES))
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--docs", action="store_true", help="write the tables into docs/cpu.md")
    chosen = parser.parse_args()
    unknown = set(chosen.models) - set(BATCHES)
    if unknown:
        parser.error(f"no model {', '.join(sorted(unknown))}; choose among {', '.join(BATCHES)}")
    machine = facts()
    peak = float(machine["peak_gflops"])
    parts = [
        f"{machine['device']}, {machine['isa']}, {machine['threads']} threads, torch {machine['torch']}; "
        f"peak {peak:.0f} GFLOP/s ({machine['peak_probe']})."
    ]
    for name in chosen.models:
        spent, whole = measure(subject_of(name), chosen.steps)
        what = f"{EMBEDDED_STEPS} steps of both stages" if name == EMBEDDED else "a step"
        parts.append(f"**{name}**, batch {BATCHES[name]}: {1e3 * whole:.0f} ms for {what}.")
        parts.append("\n".join(lines(spent, chosen.steps, whole, peak)))
    text = "\n\n".join(parts)
    print(text)
    if chosen.docs:
        PLACE.fill(DOCS, text)


if __name__ == "__main__":
    main()
