"""Says what can be said of the GPU path without a GPU: JSON, Markdown tables, a plot, on demand docs/gpu.md.

python -m bench.gpu_static                       everything, a few minutes: build/gpu_static/
python -m bench.gpu_static --part counted        one part: counted, compiled or interpreted
python -m bench.gpu_static --docs                also docs/gpu.md, its plot and the README's table
                                                 (make bench-gpu-static)
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

from bench.gpu_static import stand_in

ROOT = Path(__file__).parents[2]
PARTS = ("counted", "compiled", "interpreted")


def options() -> argparse.Namespace:
    """What was asked for on the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_static", description=__doc__.splitlines()[0])
    parser.add_argument("--part", choices=PARTS, action="append", help="default: all")
    parser.add_argument(
        "-k", default="", metavar="NAME", help="only steps with this in their name are counted"
    )
    parser.add_argument("--target", action="append", help="sm_90, gfx942, …; default: all that are listed")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "build" / "gpu_static", help="folder of the results"
    )
    parser.add_argument(
        "--docs", action="store_true", help="update docs/gpu.md and README.md from a whole run"
    )
    return parser.parse_args()


def main() -> int:
    """Find out, report; not 0 if a goal is missed or a part fails."""
    chosen = options()
    partial = chosen.part or chosen.k or chosen.target
    if chosen.docs and partial:
        print("--docs needs a whole run: leave --part, -k and --target out", file=sys.stderr)
        return 2
    stand_in.install()  # before torch is imported
    from bench.gpu_static import findings, plots, report

    found = findings.gather(chosen.part or PARTS, chosen.k, tuple(chosen.target or ()))
    chosen.out.mkdir(parents=True, exist_ok=True)
    found.save(chosen.out / "findings.json")
    words = report.text(found)
    (chosen.out / "tables.md").write_text(words, encoding="utf-8")
    drawn = plots.work(found.counts, chosen.out / "gpu_work.png")
    print(words)
    if chosen.docs:
        if drawn:
            shutil.copy(chosen.out / "gpu_work.png", ROOT / "docs" / "gpu_work.png")
        report.PLACE.fill(ROOT / "docs" / "gpu.md", words)
        report.PLACE.fill(ROOT / "README.md", report.summary(found))
    missed = [count.step for count in found.counts if count.meets is False]
    for step in missed:
        print(f"MISSED {step}", file=sys.stderr)
    return 1 if missed or found.absent else 0


if __name__ == "__main__":
    sys.exit(main())
