"""The benchmarks: what they report, and that a wrong implementation is never timed."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bench import __main__ as program
from bench import ops
from bench.parity import excess
from bench.suite import Case, ParityError, gate, measure

SMALLEST = ops.norm_case(32, 4)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Callable[[Case], None]:
    """Makes one case the whole of the suite."""
    return lambda case: monkeypatch.setattr(ops, "cases", lambda: [case])


def wrong(*inputs: Tensor) -> Tensor:
    """Off by a ten-thousandth."""
    return SMALLEST.peer(*inputs) * 1.0001


def test_every_case_names_itself_once_and_comes_with_its_backward() -> None:
    names = [case.name for case in ops.cases()]
    assert len(set(names)) == len(names)
    assert names[1::2] == [f"{name} + backward" for name in names[::2]]


def test_the_cases_are_the_maps_of_glide_base() -> None:
    names = " ".join(case.name for case in ops.cases())
    assert all(shape in names for shape in ("192x64x64", "384x32x32", "576x16x16", "768x8x8"))
    assert "attention 6 heads 32x32 + 128" in names


@pytest.mark.parametrize(
    "case",
    [
        SMALLEST,
        ops.with_backward(SMALLEST),
        ops.with_backward(ops.norm_case(32, 4, resample="down")),
        ops.with_backward(ops.norm_case(32, 4, resample="up")),
        ops.with_backward(ops.attention_case(32, 4, heads=2, text=5)),
    ],
    ids=lambda case: case.name,
)
def test_the_gate_is_green_for_what_is_right(case: Case) -> None:
    assert 0 < gate(case, "cpu") <= 1


@pytest.mark.parametrize("backward", [False, True])
def test_a_wrong_implementation_makes_the_gate_red(backward: bool) -> None:
    case = replace(SMALLEST, ours=wrong, backward=backward)
    with pytest.raises(ParityError, match=r"GroupNorm FiLM SiLU 32x4x4: the error is .* nothing is timed"):
        measure(case)


def test_a_wrong_gradient_makes_the_gate_red_though_the_output_is_right() -> None:
    def detached(x: Tensor, weight: Tensor, bias: Tensor, film: Tensor) -> Tensor:
        return SMALLEST.peer(x, weight, bias.detach() + 0 * bias, film)

    gate(replace(SMALLEST, ours=detached), "cpu")
    with pytest.raises(ParityError):
        gate(replace(SMALLEST, ours=detached, backward=True), "cpu")


def test_nan_makes_the_gate_red() -> None:
    exact = torch.ones(3, dtype=torch.float64)
    assert excess(torch.full((3,), float("nan")), exact.float(), exact) == float("inf")


def test_a_row_has_medians_an_ordered_spread_and_a_rate() -> None:
    row = measure(SMALLEST, seconds=0.01)
    median, low, high = row.ratio
    assert 0 < low <= median <= high
    assert row.ours_ms > 0
    assert row.rate == pytest.approx(SMALLEST.work / row.ours_ms / 1e6)


def test_the_program_prints_a_table_and_writes_json_only_when_asked(
    small: Callable[[Case], None],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    small(SMALLEST)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["bench", "--seconds", "0.01"])
    assert program.main() == 0
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(sys, "argv", ["bench", "--seconds", "0.01", "--out", "results/run.json"])
    assert program.main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert len({text.count("|") for text in lines}) == 1
    (row,) = json.loads((tmp_path / "results/run.json").read_text(encoding="utf-8"))
    assert row["case"] == SMALLEST.name
    assert {"device", "isa", "threads", "torch", "error"} <= set(row)


def test_the_program_reports_red_as_an_error_without_a_number(
    small: Callable[[Case], None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small(replace(SMALLEST, ours=wrong))
    monkeypatch.setattr(sys, "argv", ["bench"])
    assert program.main() == 1
    printed = capsys.readouterr()
    assert len(printed.out.splitlines()) == 2  # the head of the table alone
    assert printed.err.startswith("RED GroupNorm FiLM SiLU 32x4x4")
