"""What is counted of the code that torch.compile writes for a GPU, without one."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench.gpu_static import inductor, report
from bench.gpu_static.counter import LaunchCounter
from bench.gpu_static.findings import add_inductor
from bench.gpu_static.launches import Launch
from bench.gpu_static.report import SIDES, Count, Findings
from tests.kernels.interpreter import environment

ROOT = Path(__file__).parents[2]
CLIP = "noise-aware CLIP, gradient, batch 4"
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Inductor needs Triton")


@pytest.fixture(scope="module")
def emitted() -> dict[str, Any]:
    """What tests/bench/emitted.py prints."""
    command = [sys.executable, "-m", "tests.bench.emitted"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=environment())
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def moved(emitted: dict[str, Any], case: str) -> list[tuple[str, int]]:
    """Operator and bytes of each launch of a case; Inductor names its kernels as it likes."""
    return [(each["op"], each["moved"]) for each in emitted["cases"][case]]


@needs_triton
def test_a_chain_of_elements_is_one_kernel_that_moves_each_address_once(emitted: dict[str, Any]) -> None:
    assert moved(emitted, "fused") == [("triton", 2 * (70 + 7 + 70))]
    assert moved(emitted, "in place") == [("triton", 2 * (70 + 70 + 70))]


@needs_triton
def test_of_what_is_sliced_the_part_is_counted(emitted: dict[str, Any]) -> None:
    assert moved(emitted, "a part") == [("triton", 2 * (70 + 70))]


@needs_triton
def test_libraries_are_counted_as_without_a_compiler(emitted: dict[str, Any]) -> None:
    assert emitted["cases"]["product"][0]["flops"] == 2 * 5 * 16 * 8
    assert moved(emitted, "product") == [("mm", 2 * (80 + 128 + 40))]


@needs_triton
def test_a_norm_takes_two_kernels_that_add_the_convolutions_bias(emitted: dict[str, Any]) -> None:
    x, out, weight, each, moments = 2 * 4 * 36, 2 * 8 * 36, 8 * 4 * 9, 8, 2 * 2
    assert moved(emitted, "block") == [
        ("convolution", 4 * (x + weight + out)),
        ("triton", 4 * (out + each + 2 * moments)),
        ("triton", 4 * (out + 3 * each + 2 * moments + out)),
    ]


@needs_triton
def test_constants_of_a_gradient_need_no_device(emitted: dict[str, Any]) -> None:
    assert {op for op, _ in moved(emitted, "constant")} == {"triton", "ones_like"}


@needs_triton
def test_a_backward_pass_and_what_is_around_the_compiled_code_are_counted(emitted: dict[str, Any]) -> None:
    kernels = [each["kernel"] for each in emitted["cases"]["training"]]
    assert kernels.count("cudnn convolution") == kernels.count("cudnn wgrad") == kernels.count("sum") == 1
    assert "cudnn dgrad" not in kernels
    assert any("backward" in kernel for kernel in kernels)


@needs_triton
def test_a_network_does_the_same_products_in_fewer_launches(emitted: dict[str, Any]) -> None:
    plain, compiled = emitted["steps"]["upstream"], emitted["steps"]["compiled"]["launches"]
    assert sum(each["flops"] for each in compiled) == sum(each["flops"] for each in plain) > 0
    assert len(compiled) < len(plain) / 2
    for op in ("bmm", "addmm"):
        one, other = (sum(each["moved"] for each in side if each["op"] == op) for side in (plain, compiled))
        assert one == other > 0, op
    assert sum(each["moved"] for each in compiled) < 0.6 * sum(each["moved"] for each in plain)


@needs_triton
def test_a_step_that_does_not_compile_says_why(emitted: dict[str, Any]) -> None:
    assert emitted["steps"]["refused"] == {"step": "broken", "refusal": "ArithmeticError: first line"}


def test_a_kernel_that_does_not_say_what_it_moves_is_not_guessed() -> None:
    with pytest.raises(ValueError, match="does not say what triton_poi_0 moves"):
        inductor.WrittenKernel(LaunchCounter(), "triton_poi_0", "def triton_poi_0(in_ptr0, xnumel):\n")


def test_a_process_that_fails_is_the_reason_of_each_of_its_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    row = '{"step": "another step", "launches": [{"kernel": "k", "op": "triton", "moved": 8}]}'
    monkeypatch.setattr(inductor, "PROGRAM", f"print('''{row}'''); raise SystemExit('no compiler')")
    found = inductor.counted("CLIP")
    assert found.launches == {"another step": [Launch("k", "triton", 8)]}
    assert found.refusals == {CLIP: "no compiler"}


def findings() -> Findings:
    launches = [Launch("k", "op", 8)]
    counts = [Count.of(step, side, launches, []) for step in ("one", "two") for side in SIDES[:2]]
    return Findings(facts={"torch": "2.13"}, counts=counts)


def test_inductors_rows_stand_below_the_originals() -> None:
    found = findings()
    launches = [Launch("triton_poi_0", "triton", 3_000_000_000), Launch("mm", "mm", 1_000_000_000)]
    add_inductor(found, inductor.Served(launches={"one": launches}, refusals={"two": "no | Triton"}))
    assert [(count.step, count.side) for count in found.counts] == [
        *(("one", side) for side in SIDES),
        *(("two", side) for side in SIDES[:2]),
    ]
    rows = report.text(found).splitlines()
    place = rows.index("| one | Inductor | 2 | 4.00 | 2 | 4.00 | 0.00 | – |")
    assert rows[place + 3] == "| two | Inductor, not here: no / Triton | – | – | – | – | – | – |"
    assert report.INDUCTOR in rows


def test_without_inductor_nothing_is_said_of_it() -> None:
    assert "Inductor" not in report.text(findings())
