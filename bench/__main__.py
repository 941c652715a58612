"""Runs the suites and reports them: JSON, a Markdown table, two plots, and on demand the README's table.

    python -m bench                                  all suites, about half an hour: build/bench/
    python -m bench --quick                          reduced shapes, about a minute
    python -m bench --suite models -k "CLIP"         what pytest's -k selects
    python -m bench --readme                         also README.md and docs/ (make bench)

`pytest bench` runs the same without the reports; its options are those of pytest and pytest-benchmark.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

import pytest

from bench import plots, report
from bench.place import DEVICES, Place
from bench.rows import Record

ROOT = Path(__file__).parents[1]
SUITES = ("ops", "models", "sampling", "training", "end_to_end")
PLOTS = {"bars.png": plots.bars, "roofline.png": plots.roofline}
TITLES = {
    "bars.png": "How many times faster than each peer",
    "roofline.png": "Each case below the roofline of this machine",
}


def options() -> argparse.Namespace:
    """What was asked for on the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench", description="Speed and memory, behind parity gates."
    )
    parser.add_argument("--suite", choices=SUITES, help="default: all")
    parser.add_argument("-k", default="", metavar="NAME", help="only cases that pytest's -k selects")
    parser.add_argument("--quick", action="store_true", help="reduced shapes, about a minute in all")
    parser.add_argument("--device", choices=DEVICES, default="cpu", help="rehearsal: as on a GPU, on the CPU")
    parser.add_argument("--seconds", type=float, help="for the pairs of one case and peer")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "bench", help="folder of the results")
    parser.add_argument("--readme", action="store_true", help="update README.md and docs/ from a whole run")
    return parser.parse_args()


def arguments(chosen: argparse.Namespace, out: Path) -> list[str]:
    """What pytest is called with."""
    folder = Path(__file__).parent
    paths = [folder / f"bench_{suite}.py" for suite in ([chosen.suite] if chosen.suite else SUITES)]
    given = [*map(str, paths), "-q", "--rootdir", str(ROOT), "-p", "no:cacheprovider"]
    given += ["--rows", str(out / "rows.json"), "--benchmark-json", str(out / "benchmark.json")]
    given += ["--benchmark-columns=median,rounds", "--device", chosen.device]
    given += ["--quick"] if chosen.quick else []
    given += ["-k", chosen.k] if chosen.k else []
    given += ["--seconds", str(chosen.seconds)] if chosen.seconds else []
    return given


def main() -> int:
    """Run, report; not 0 if a gate was red or a suite failed."""
    chosen = options()
    partial = chosen.quick or chosen.suite or chosen.k
    if chosen.readme and partial:
        print("--readme needs a whole run: leave --quick, --suite and -k out", file=sys.stderr)
        return 2
    if chosen.readme and chosen.device != "cpu":
        print("--readme is for the CPU's numbers; a GPU's are in the folder --out", file=sys.stderr)
        return 2
    try:
        Place.of(chosen.device)
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 2
    out: Path = chosen.out
    out.mkdir(parents=True, exist_ok=True)
    status = int(pytest.main(arguments(chosen, out)))
    record = Record.load(out / "rows.json")
    text = report.table(record)
    (out / "table.md").write_text(text, encoding="utf-8")
    drawn = [name for name, draw in PLOTS.items() if draw(record, out / name)]
    print(text)
    for reason in record.red:
        print(f"RED {reason}", file=sys.stderr)
    if chosen.readme and status == 0:
        for name in drawn:
            shutil.copy(out / name, ROOT / "docs" / f"bench_{name}")
        pictures = "\n\n".join(f"![{TITLES[name]}](docs/bench_{name})" for name in drawn)
        report.update_readme(ROOT / "README.md", record, pictures)
    return status


if __name__ == "__main__":
    sys.exit(main())
