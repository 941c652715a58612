"""Benchmarks behind parity gates, as a Markdown table; the whole quick run takes less than a minute.

python -m bench
python -m bench --seconds 20 --filter attention --out bench/results/attention.json
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from bench import ops
from bench.suite import ParityError, Row, measure
from glide_fast.ops.dispatch import cpp_library

SUITES = {"ops": ops}
HEADER = "| case | ours ms | peer ms | ratio | p20-p80 | rate | device | ISA | threads | torch |"


def environment(device: str) -> dict[str, str | int]:
    """What a timing depends on besides the code."""
    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if device == "cpu" and cpuinfo.exists():
        lines = cpuinfo.read_text(encoding="utf-8").splitlines()
        name = next((line.split(": ")[1] for line in lines if line.startswith("model name")), name)
    library = cpp_library()
    isa = "reference" if library is None else str(library.capability())
    return {"device": name, "isa": isa, "threads": torch.get_num_threads(), "torch": torch.__version__}


def line(row: Row, facts: dict[str, str | int]) -> str:
    """The row in Markdown."""
    median, low, high = row.ratio
    cells = [row.case, f"{row.ours_ms:.3f}", f"{row.peer_ms:.3f}", f"{median:.2f}", f"{low:.2f}-{high:.2f}"]
    return "| " + " | ".join([*cells, f"{row.rate:.1f} {row.unit}", *map(str, facts.values())]) + " |"


def main() -> int:
    """Run the suites; 1 if a gate was red."""
    parser = argparse.ArgumentParser(prog="python -m bench", description="Speed, behind parity gates.")
    parser.add_argument("--suite", choices=SUITES, help="default: all")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--seconds", type=float, default=2.0, help="for the pairs of one case")
    parser.add_argument("--filter", default="", help="only cases whose name contains this")
    parser.add_argument("--out", type=Path, help="also write the rows to this JSON file")
    options = parser.parse_args()
    facts = environment(options.device)
    print(HEADER, "|" + " --- |" * (HEADER.count("|") - 1), sep="\n")
    rows, red = [], False
    for suite in [options.suite] if options.suite else SUITES:
        for case in SUITES[suite].cases():
            if options.filter not in case.name:
                continue
            try:
                row = measure(case, device=options.device, seconds=options.seconds)
            except ParityError as error:
                red = True
                print(f"RED {error}", file=sys.stderr)
            else:
                print(line(row, facts), flush=True)
                rows.append({**asdict(row), **facts})
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return int(red)


if __name__ == "__main__":
    sys.exit(main())
