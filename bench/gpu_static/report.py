"""All that can be said of the GPU path without a GPU as one JSON file, Markdown tables, and docs/gpu.md."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bench.gpu_static.launches import Launch, Totals
from bench.gpu_static.prediction import Prediction
from bench.marked import Markers
from bench.report import markdown
from glide_fast.files import replacing

PLACE = Markers.of("gpu", "make bench-gpu-static")
SIDES = ("ours", "the original", "Inductor")
SHOWN = 12  # rows of the table of operators
_COUNT_HEAD = ("step", "by", "calls", "GB", "kernels", "GB", "TFLOP", "goal: calls, GB")
_TIME_HEAD = ("step", "by", "roofline", "in a CUDA graph", "without", "times the original's")
_RESOURCE_HEAD = (
    *("kernel", "target", "registers", "spills", "shared memory", "blocks", "occupancy"),
    *("tensor core", "TMA", "128-bit loads", "stores"),
)


@dataclass(frozen=True, kw_only=True)
class Count:
    """What was counted of a step on one side, and the goals that are set for ours."""

    step: str
    side: str
    totals: Totals
    prediction: Prediction
    ops: list[tuple[str, str, int, int]]  # operator, kernel, launches, bytes
    goal: tuple[int, float] | None = None

    @classmethod
    def of(
        cls,
        step: str,
        side: str,
        launches: Sequence[Launch],
        ops: list[tuple[str, str, int, int]],
        goal: tuple[int, float] | None = None,
    ) -> Count:
        """From launches."""
        totals, prediction = Totals.of(launches), Prediction.of(launches)
        return cls(step=step, side=side, totals=totals, prediction=prediction, ops=ops, goal=goal)

    @property
    def meets(self) -> bool | None:
        """Whether the goals are met; None if there are none."""
        if self.goal is None:
            return None
        return self.totals.calls <= self.goal[0] and self.totals.call_bytes <= self.goal[1]


@dataclass
class Findings:
    """Everything of one run."""

    facts: dict[str, Any]
    counts: list[Count] = field(default_factory=list)
    resources: list[dict[str, Any]] = field(default_factory=list)
    numerics: list[dict[str, Any]] = field(default_factory=list)
    refusals: dict[str, str] = field(default_factory=dict)  # why Inductor serves a step not here
    absent: list[str] = field(default_factory=list)  # what could not be found out, and why

    def save(self, path: Path) -> None:
        """Write all of it as JSON."""
        content = {**asdict(self), "labels": LABELS}
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


LABELS = {
    "counted": "launches and bytes of the code that serves CUDA, run on tensors without memory",
    "predicted": "times on an H100 from what was counted; ±30 %",
    "compiled": "read from the machine code",
    "interpreted": "the kernels' code run by Triton's interpreter on the CPU, against float64",
}


def text(findings: Findings) -> str:
    """All tables, each under its label."""
    parts = [_facts(findings)]
    if findings.counts:
        parts += [_heading("Launches and bytes of a step", "counted"), COUNTED, _counts(findings)]
        if findings.refusals or any(count.side == SIDES[2] for count in findings.counts):
            parts.append(INDUCTOR)
        parts += [_heading("Time of a step on an H100", "predicted"), PREDICTED, _times(findings.counts)]
        parts += [_heading("What a step of ours launches", "counted"), *_operators(findings.counts)]
    if findings.resources:
        parts += [_heading("What kernels need", "compiled"), COMPILED, *_resources(findings.resources)]
    if findings.numerics:
        parts += [
            _heading("Errors of the kernels' code", "interpreted"),
            INTERPRETED,
            _errors(findings.numerics),
        ]
    if findings.absent:
        parts.append("Not here:\n\n" + "\n".join(f"- {reason}" for reason in findings.absent))
    return "\n\n".join(parts) + "\n"


COUNTED = (
    "A call is a call of a library or a kernel of ours; a library's call may be several kernels, which are "
    "what a GPU sees: PyTorch adds the bias of cuDNN's convolution by a second one, cuDNN makes gradients "
    "of a convolution's input and weight by two, and PyTorch normalises groups by three. Bytes are those of "
    "inputs and outputs, each once a kernel. Text is encoded before, unless said."
)
INDUCTOR = (
    "Inductor is what torch.compile makes of the original's networks in its default mode: this torch traces "
    "and fuses them for an H100 and writes its Triton kernels and calls of libraries, whose launches are "
    "counted as ours are; no kernel is compiled, tuned or run. There are no CUDA graphs and no max-autotune, "
    "and products are not padded, for these need a GPU to choose by. Weights are in channels last, or each "
    "call would convert them. Of a training step the network is compiled; the loss, the master weights and "
    "the optimiser are the original's."
)
PREDICTED = (
    "The roofline is the sum over kernels of the longer of bytes / 3.0 TB/s and FLOP / 790 TFLOP/s (float32: "
    "60). Predictions take 80 % of it as reached, 1.2 µs a kernel in a CUDA graph, 6 µs a launch without one."
)
COMPILED = (
    "Registers a thread, spilled accesses, shared memory a block, blocks a multiprocessor holds, how many "
    "instructions of a kind the code has."
)
INTERPRETED = "The largest error of all results, in units of the largest exact number, and what is allowed."


def summary(findings: Findings) -> str:
    """A row for each step, with the original's beside it, and what was compiled and interpreted in a line."""
    by_side = {(count.step, count.side): count for count in findings.counts}
    rows = []
    for step in dict.fromkeys(count.step for count in findings.counts):
        ours, original = (by_side[step, side] for side in SIDES[:2])
        pairs = [
            (f"{ours.totals.calls:,}", f"{original.totals.calls:,}"),
            (f"{ours.totals.call_bytes / 1e9:.2f}", f"{original.totals.call_bytes / 1e9:.2f}"),
            (f"{1e3 * ours.prediction.graph:.1f} ms", f"{1e3 * original.prediction.graph:.1f} ms"),
        ]
        rows.append([step, *(f"{own} / {other}" for own, other in pairs)])
    head = ("ours / the original", "launches (counted)", "GB moved (counted)", "H100 (predicted)")
    spilling = sum(row["spills"] > 0 for row in findings.resources)
    targets = len({row["target"] for row in findings.resources})
    exact = all(row["error"] <= row["allowed"] for row in findings.numerics)
    return (
        f"{markdown(head, rows)}\n\nNothing of this ran on a GPU. "
        f"Compiled for {targets} targets: {len(findings.resources)} kernels, "
        f"{spilling or 'none'} with spills. Interpreted against float64: {len(findings.numerics)} results, "
        f"{'all' if exact else 'not all'} within what is allowed."
    )


def _heading(title: str, label: str) -> str:
    return f"### {title} ({label})\n\n*{label.capitalize()}: {LABELS[label]}.*"


def _facts(findings: Findings) -> str:
    known = ", ".join(f"{name} {value}" for name, value in findings.facts.items())
    return f"Nothing here ran on a GPU. Made with {known}."


def _counts(findings: Findings) -> str:
    rows = [_count_row(count) for count in findings.counts]
    rows += [_refusal_row(step, reason) for step, reason in findings.refusals.items()]
    steps = [count.step for count in findings.counts]
    return markdown(_COUNT_HEAD, sorted(rows, key=lambda row: steps.index(row[0])))


def _refusal_row(step: str, reason: str) -> list[str]:
    words = f"{SIDES[2]}, not here: {reason}".replace("|", "/")
    return [step, words, *("–" for _ in _COUNT_HEAD[2:])]


def _count_row(count: Count) -> list[str]:
    totals = count.totals
    goal = "–"
    if count.goal is not None:
        goal = f"{count.goal[0]}, {count.goal[1] / 1e9:.1f} {'met' if count.meets else 'missed'}"
    return [
        *(count.step, count.side, f"{totals.calls}", f"{totals.call_bytes / 1e9:.2f}", f"{totals.kernels}"),
        *(f"{totals.kernel_bytes / 1e9:.2f}", f"{totals.flops / 1e12:.2f}", goal),
    ]


def _times(counts: Sequence[Count]) -> str:
    eager = {count.step: count.prediction.eager for count in counts if count.side == SIDES[1]}
    return markdown(_TIME_HEAD, (_time_row(count, eager.get(count.step)) for count in counts))


def _time_row(count: Count, original: float | None) -> list[str]:
    times = count.prediction
    ratio = "–" if original is None or count.side == SIDES[1] else f"{original / times.graph:.1f}"
    seconds = (times.roofline, times.graph, times.eager)
    return [count.step, count.side, *(f"{1e3 * each:.2f} ms" for each in seconds), ratio]


def _operators(counts: Iterable[Count]) -> Iterable[str]:
    head = ("operator", "kernel", "launches", "MB")
    for count in counts:
        if count.side == SIDES[0]:
            rows = (
                [op, kernel, str(number), f"{moved / 1e6:.1f}"] for op, kernel, number, moved in count.ops
            )
            table = markdown(head, list(rows)[:SHOWN])
            yield f"<details><summary>{count.step}</summary>\n\n{table}\n\n</details>"


def _resources(rows: Sequence[dict[str, Any]]) -> Iterable[str]:
    """A table for each family of kernels."""
    for module in dict.fromkeys(row["module"] for row in rows):
        mine = [row for row in rows if row["module"] == module]
        spilling = sum(row["spills"] > 0 for row in mine)
        words = f"{module}: {len(mine)} kernels and targets, {spilling or 'none'} with spills"
        table = markdown(_RESOURCE_HEAD, map(_resource_row, mine))
        yield f"<details><summary>{words}</summary>\n\n{table}\n\n</details>"


def _resource_row(row: dict[str, Any]) -> list[str]:
    known = row["blocks"] > 0
    return [
        *(
            row["name"],
            row["target"],
            str(row["registers"]),
            str(row["spills"]),
            f"{row['shared'] / 1024:.1f} KiB",
        ),
        *(str(row["blocks"]) if known else "–", f"{100 * row['occupancy']:.0f} %" if known else "–"),
        *(str(row[name]) for name in ("tensor_core", "tma", "wide_loads", "wide_stores")),
    ]


def _errors(rows: Iterable[dict[str, Any]]) -> str:
    head = ("operator", "case", "dtype", "error", "allowed")
    return markdown(
        head,
        (
            [row["op"], row["case"], row["dtype"], f"{row['error']:.1e}", f"{row['allowed']:.0e}"]
            for row in rows
        ),
    )
