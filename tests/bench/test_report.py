"""Percentiles, rows, tables and the README: what is printed is what was measured."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from bench import plots, report
from bench.machine import peak_gflops, peak_of_call
from bench.rows import Labels, MemoryRow, Record, SpeedRow
from bench.timing import Duel, Spread

FACTS = {
    "device": "a CPU",
    "isa": "avx2",
    "threads": 2,
    "torch": "2.13",
    "peak_gflops": 200.0,
    "peak_probe": "chains",
    "copy_gbs": 20.0,
}
DUEL = Duel(ours=[1.0, 2.0, 1.0], peer=[3.0, 3.0, 4.0], ours_memory=3 << 20, peer_memory=None)
LABELS = Labels(suite="models", case="a step", peer="upstream", work=3e11, intensity=100.0)
ROW = SpeedRow.of(LABELS, DUEL, (0.5, 0.25), FACTS)

BEGIN, END = report.PLACE


def record() -> Record:
    return Record(
        facts=FACTS,
        speed=[ROW, replace(ROW, suite="ops", case="an op", unit="GB/s", peer="upstream")],
        memory=[MemoryRow(case="a peak", peer="upstream", ours=1.5, theirs=3.0, unit="× weights")],
        absent=[("a step", "openvino", "it cannot")],
    )


def test_a_spread_is_the_median_and_the_percentiles() -> None:
    assert Spread.of([float(number) for number in range(11)]) == (5.0, 2.0, 8.0)
    assert Spread.of([1.0, 2.0]) == pytest.approx((1.5, 1.2, 1.8))
    assert Spread.of([7.0]) == (7.0, 7.0, 7.0)


def test_the_ratio_is_that_of_the_pairs_not_of_the_medians() -> None:
    assert DUEL.ratios == [3.0, 1.5, 4.0]
    assert ROW.ratio.median == 3.0
    assert (ROW.ours.median, ROW.theirs.median) == (1.0, 3.0)


def test_rates_and_shares_are_of_the_work_and_the_measured_limit() -> None:
    assert (ROW.rate, ROW.peer_rate) == (300.0, 100.0)
    assert (ROW.share, ROW.peer_share) == (1.5, 0.5)
    assert (ROW.memory, ROW.peer_memory) == (3.0, None)
    moved = SpeedRow.of(replace(LABELS, work=5e9, unit="GB/s"), DUEL, (0.0, 0.0), FACTS)
    assert moved.share == 0.25


def test_a_record_survives_its_file(tmp_path: Path) -> None:
    record().save(tmp_path / "rows.json")
    assert Record.load(tmp_path / "rows.json") == record()


def test_the_table_has_every_row_the_reasons_and_the_machine() -> None:
    text = report.table(record())
    assert "| a step | upstream | 1.00 s | 3.00 s | 3.00 | 2.10–3.60 |" in text
    assert "a peak | upstream | 1.50 × weights | 3.00 × weights | 0.50" in text
    assert "- a step, openvino: it cannot" in text
    assert "a CPU, our kernels in avx2, 2 threads, float32; torch 2.13." in text
    for line in text.splitlines():
        assert not line.startswith("|") or line.endswith("|")


def test_the_readme_is_updated_between_its_markers_and_only_there(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"above\n\n{BEGIN}\nold numbers\n{END}\n\nbelow\n", encoding="utf-8")
    report.update_readme(readme, record(), "![a plot](plot.png)")
    once = readme.read_text(encoding="utf-8")
    assert once.startswith(f"above\n\n{BEGIN}\n")
    assert once.endswith(f"{END}\n\nbelow\n")
    assert "old numbers" not in once
    assert "a step" in once
    assert "an op" not in once
    assert "![a plot](plot.png)" in once
    report.update_readme(readme, record(), "![a plot](plot.png)")
    assert readme.read_text(encoding="utf-8") == once


@pytest.mark.parametrize(
    ("change", "message"),
    [({"quick": True}, "a quick run"), ({"red": ["a step: wrong"]}, "a gate was red .a step: wrong")],
)
def test_the_readme_stays_after_a_quick_run_or_a_red_gate(
    tmp_path: Path, change: dict[str, object], message: str
) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"{BEGIN}\n{END}\n", encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        report.update_readme(readme, replace(record(), **change), "")  # type: ignore[arg-type]
    assert readme.read_text(encoding="utf-8") == f"{BEGIN}\n{END}\n"


@pytest.mark.parametrize("text", ["", BEGIN, f"{END}\n{BEGIN}", 2 * (BEGIN + END)])
def test_a_readme_without_its_markers_is_refused(tmp_path: Path, text: str) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match="once each, in this order"):
        report.update_readme(readme, record(), "")


def test_this_readme_has_the_markers() -> None:
    text = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    assert text.count(BEGIN) == text.count(END) == 1


def test_plots_are_drawn_where_there_is_something_to_draw(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for name, draw in (("bars.png", plots.bars), ("roofline.png", plots.roofline)):
        assert not draw(Record(), tmp_path / name)
        assert not (tmp_path / name).exists()
        assert draw(record(), tmp_path / name)
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_the_peak_of_this_machine_is_plausible() -> None:
    peak, probe = peak_gflops(1)
    assert 1 < peak < 2000
    assert probe


def test_the_memory_of_a_call_is_seen() -> None:
    seen = peak_of_call(lambda: bytearray(b"1") * (64 << 20))
    if seen is None:
        pytest.skip("this system does not tell")
    assert 60 << 20 < seen < 200 << 20
