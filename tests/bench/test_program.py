"""The suites as they are run: from the command line to JSON, table and plots; refusal where a gate is red."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench import __main__ as program
from bench import memory
from bench.report import PLACE

ROOT = Path(__file__).parents[2]
CASE = "attention block 128, 16x16 + text"


def run(out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bench", "--quick", "--seconds", "0.02", "--out", str(out), *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_a_quick_run_of_one_case_writes_all_it_promises(tmp_path: Path) -> None:
    done = run(tmp_path, "--suite", "ops", "-k", "attention and block")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "rows.json").read_text(encoding="utf-8"))
    (row,) = rows["speed"]
    assert row["case"].startswith(CASE)
    assert {"device", "isa", "threads", "torch", "error", "ratio", "share", "memory"} <= set(row)
    (benchmark,) = json.loads((tmp_path / "benchmark.json").read_text(encoding="utf-8"))["benchmarks"]
    pairs = benchmark["extra_info"]["peer_seconds"]
    assert len(pairs) == len(benchmark["stats"]["data"]) == row["pairs"] >= 5
    calls = benchmark["extra_info"]["calls_a_round"]
    assert benchmark["stats"]["median"] / calls == pytest.approx(row["ours"]["median"])
    assert CASE in (tmp_path / "table.md").read_text(encoding="utf-8")
    assert (tmp_path / "roofline.png").exists()


def test_a_red_gate_fails_the_run_and_gives_no_number(tmp_path: Path) -> None:
    suite = tmp_path / "bench_wrong.py"
    suite.write_text(
        "from dataclasses import replace\n"
        "from bench.blocks import cases as right\n"
        "def cases(*, quick, place):\n"
        "    case = right(quick=quick, place=place)[0]\n"
        "    def build():\n"
        "        subject = case.build()\n"
        "        return replace(subject, ours=lambda: (1.01 * subject.ours()[0],))\n"
        "    return [replace(case, build=build)]\n"
        "def test_block(contest, peer, compare):\n"
        "    compare(contest, peer)\n",
        encoding="utf-8",
    )
    rows = tmp_path / "rows.json"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "bench.conftest",
        str(suite),
        "--quick",
        "--rows",
        str(rows),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stdout + done.stderr
    record = json.loads(rows.read_text(encoding="utf-8"))
    assert record["speed"] == []
    (reason,) = record["red"]
    assert "nothing is timed" in reason


@pytest.mark.parametrize("arguments", [["--quick"], ["--suite", "ops"], ["-k", "CLIP"]])
def test_a_part_of_the_suites_does_not_change_the_readme(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["bench", "--readme", *arguments])
    assert program.main() == 2
    assert "needs a whole run" in capsys.readouterr().err
    assert PLACE.begin in (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_suite_has_its_file() -> None:
    files = {path.stem.removeprefix("bench_") for path in (ROOT / "bench").glob("bench_*.py")}
    assert files == set(program.SUITES)


def test_the_peak_of_a_process_is_measured_from_outside() -> None:
    peak = memory.measure("ours", quick=True, steps=1)
    assert peak.peak > peak.weights > 1 << 20
    with pytest.raises(RuntimeError, match="the process that measures memory failed"):
        memory.measure("nobody")
