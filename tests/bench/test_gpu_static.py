"""What is counted, predicted and reported of the GPU path without a GPU."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.gpu_static import report, resources
from bench.gpu_static.launches import Launch, Totals
from bench.gpu_static.prediction import BANDWIDTH, GAP, HOST, PEAK_HALF, PEAK_SINGLE, Prediction
from bench.gpu_static.report import Count, Findings
from bench.gpu_static.workloads import halved, in_blocks
from glide_fast.models import UNet
from glide_fast.models.placement import placed
from tests import tiny
from tests.kernels.interpreter import environment

ROOT = Path(__file__).parents[2]
HAS_TRITON = importlib.util.find_spec("triton") is not None


@pytest.fixture(scope="module")
def counted() -> dict[str, Any]:
    """What tests/bench/counted.py prints."""
    command = [sys.executable, "-m", "tests.bench.counted"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=environment())
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def rows(counted: dict[str, Any], case: str) -> list[tuple[str, int, int]]:
    """Kernel, bytes and FLOPs of each launch of a case."""
    return [(each["kernel"], each["moved"], each["flops"]) for each in counted["cases"][case]]


def test_views_and_work_on_the_host_are_free_and_what_crosses_is_not(counted: dict[str, Any]) -> None:
    assert rows(counted, "views") == []
    assert rows(counted, "on the host") == [("_to_copy", 4 * 3, 0)]


def test_an_elementwise_kernel_moves_each_address_once(counted: dict[str, Any]) -> None:
    assert rows(counted, "add") == [("add", 2 * (70 + 7 + 70), 0)]
    assert rows(counted, "in place") == [("add_", 2 * (70 + 70 + 70), 0)]
    assert rows(counted, "twice") == [("mul", 2 * (70 + 70), 0)]
    assert rows(counted, "upsampling") == [("upsample_nearest2d", 2 * (32 + 128), 0)]


def test_products_have_flops_and_a_convolution_adds_its_bias_by_a_second_kernel(
    counted: dict[str, Any],
) -> None:
    assert rows(counted, "product") == [("addmm", 2 * (80 + 128 + 8 + 40), 2 * 5 * 16 * 8)]
    convolution, bias = counted["cases"]["convolution"]
    assert (convolution["moved"], convolution["flops"]) == (2 * (288 + 288 + 576), 2 * 576 * 36)
    assert (convolution["further"], bias["further"], bias["moved"]) == (False, True, 2 * (2 * 576 + 8))


def test_a_convolution_keeps_channels_last_as_cudnn_does(counted: dict[str, Any]) -> None:
    assert [kernel for kernel, *_ in rows(counted, "channels last")] == ["cudnn convolution"]


def test_a_backward_pass_is_counted_with_its_kernels(counted: dict[str, Any]) -> None:
    kernels = [kernel for kernel, *_ in rows(counted, "training")]
    assert kernels[:3] == ["cudnn convolution", "add bias", "sum"]
    assert {"cudnn wgrad", "sum of bias gradient"} <= set(kernels)
    assert "cudnn dgrad" not in kernels


def test_the_gradient_of_silu_is_one_kernel(counted: dict[str, Any]) -> None:
    assert rows(counted, "SiLU") == [("silu", 2 * (70 + 70), 0), ("silu_backward", 2 * (70 + 70 + 70), 0)]


def test_multi_tensor_kernels_take_so_many_tensors_and_blocks_at_a_time(counted: dict[str, Any]) -> None:
    assert [moved for _, moved, _ in rows(counted, "many tensors")] == [64 * 3 * 2 * 4, 36 * 3 * 2 * 4]
    assert [moved for _, moved, _ in rows(counted, "large tensor")] == [
        2 * 2 * 65536 * 320,
        2 * 2 * 65536 * 180,
    ]


@pytest.mark.skipif(not HAS_TRITON, reason="without Triton the reference serves")
def test_our_ops_are_counted_by_what_serves_them_on_cuda(counted: dict[str, Any]) -> None:
    found = counted["cases"]["our norm"]
    assert {each["op"] for each in found} == {"group_norm"}
    assert len(found) <= 2
    assert sum(each["moved"] for each in found) >= 2 * 2 * 512


def test_the_original_is_counted_as_others_have_counted_it(counted: dict[str, Any]) -> None:
    totals = counted["steps"]["base 64 px, batch 2"]["upstream"]
    assert totals["calls"] == pytest.approx(1031, rel=0.05)
    assert totals["call_bytes"] == pytest.approx(6.26e9, rel=0.02)


@pytest.mark.skipif(not HAS_TRITON, reason="without Triton the reference serves")
@pytest.mark.parametrize(
    ("step", "launches", "gigabytes"),
    [
        ("base 64 px, batch 2", 340, 1.6),  # the goals
        ("upsampler 256 px, batch 2", 350, 7.6),  # the goals are 350 and 8.0
        ("base 64 px, training, batch 64", 1250, 120),  # the goals
    ],
)
def test_steps_hold_what_they_have_reached(
    counted: dict[str, Any], step: str, launches: int, gigabytes: float
) -> None:
    found = counted["steps"][step]["ours"]
    assert found["calls"] <= launches
    assert found["call_bytes"] <= 1e9 * gigabytes


def test_a_counted_step_has_its_weights_as_they_are_placed() -> None:
    config = tiny.config().unet
    right = placed(UNet(config).requires_grad_(False), "cpu", torch.float16)
    found = halved(UNet(config), in_blocks)
    for (name, one), other in zip(found.named_parameters(), right.parameters(), strict=True):
        if "transformer" not in name:  # which reads the text beforehand
            assert one.dtype is other.dtype, name


BEGIN, END = report.PLACE
LAUNCHES = [Launch("a", "op", 3000, 0), Launch("b", "op", 30, 79_000_000, half=True, further=True)]


def test_totals_tell_calls_from_kernels() -> None:
    assert Totals.of(LAUNCHES) == Totals(1, 2, 3000, 3030, 79_000_000)


def test_a_prediction_is_the_longer_of_bytes_and_flops_and_what_launches_cost() -> None:
    roofline = 3000 / BANDWIDTH + 79_000_000 / PEAK_HALF
    found = Prediction.of(LAUNCHES)
    assert found.roofline == pytest.approx(roofline)
    assert found.graph == pytest.approx(roofline / 0.8 + 2 * GAP)
    assert found.eager == pytest.approx(2 * HOST)
    single = Prediction.of([Launch("c", "op", 0, 60_000_000, half=False)])
    assert single.roofline == pytest.approx(60_000_000 / PEAK_SINGLE)


def findings() -> Findings:
    ops = [("op", "a", 1, 3000), ("op", "b", 1, 30)]
    counts = [
        Count.of("a step", "ours", LAUNCHES[:1], ops[:1], goal=(1, 3000.0)),
        Count.of("a step", "the original", LAUNCHES, ops),
    ]
    compiled = {
        "module": "m", "name": "a kernel", "target": "sm_90", "registers": 64, "spills": 0, "shared": 2048,
        "blocks": 8, "occupancy": 0.5, "tensor_core": 4, "tma": 0, "wide_loads": 2, "wide_stores": 1,
    }  # fmt: skip
    error = {"op": "norm", "case": "2x3", "dtype": "float16", "error": 1.23e-4, "allowed": 5e-4}
    return Findings(
        facts={"torch": "2.13"}, counts=counts, resources=[compiled], numerics=[error], absent=["x: no"]
    )


def test_every_table_says_what_kind_of_knowledge_it_is() -> None:
    text = report.text(findings())
    for label in report.LABELS:
        assert f"({label})" in text
    assert "| a step | ours | 1 | 0.00 | 1 | 0.00 | 0.00 | 1, 0.0 met |" in text
    assert "| a kernel | sm_90 | 64 | 0 | 2.0 KiB | 8 | 50 % | 4 | 0 | 2 | 1 |" in text
    assert "| norm | 2x3 | float16 | 1.2e-04 | 5e-04 |" in text
    assert "- x: no" in text
    assert "Nothing here ran on a GPU" in text


@pytest.mark.parametrize(("goal", "meets"), [((1, 3000.0), True), ((0, 3000.0), False), ((1, 2999.0), False)])
def test_a_goal_is_met_by_calls_and_their_bytes(goal: tuple[int, float], meets: bool) -> None:
    assert Count.of("a step", "ours", LAUNCHES, [], goal=goal).meets is meets
    assert Count.of("a step", "ours", LAUNCHES, []).meets is None


def test_findings_are_written_as_json_and_between_markers(tmp_path: Path) -> None:
    findings().save(tmp_path / "findings.json")
    content = json.loads((tmp_path / "findings.json").read_text(encoding="utf-8"))
    assert content["counts"][0]["totals"]["calls"] == 1
    assert content["labels"] == report.LABELS
    page = tmp_path / "gpu.md"
    page.write_text(f"above\n{BEGIN}\nold\n{END}\nbelow\n", encoding="utf-8")
    report.PLACE.fill(page, "new")
    assert page.read_text(encoding="utf-8") == f"above\n{BEGIN}\n\nnew\n\n{END}\nbelow\n"
    page.write_text(BEGIN, encoding="utf-8")
    with pytest.raises(ValueError, match="once each, in this order"):
        report.PLACE.fill(page, "new")


@pytest.mark.parametrize("page", ["docs/gpu.md", "README.md"])
def test_pages_have_the_markers(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    assert text.count(BEGIN) == text.count(END) == 1


def test_the_summary_has_steps_in_pairs_and_says_what_failed() -> None:
    found = findings()
    assert "| a step | 1 / 1 | 0.00 / 0.00 | 0.0 ms / 0.0 ms |" in report.summary(found)
    assert "1 kernels, none with spills" in report.summary(found)
    assert "1 results, all within" in report.summary(found)
    found.resources[0]["spills"] = 2
    found.numerics[0]["error"] = 1.0
    assert "1 kernels, 1 with spills" in report.summary(found)
    assert "1 results, not all within" in report.summary(found)


def test_a_compilers_rows_are_kept_and_its_failure_told() -> None:
    found = resources.Resources()
    found.add("norms", "sm_90", ['{"name": "a"}', "a warning"], "out of memory")
    assert found.rows == [{"module": "norms", "name": "a"}]
    assert found.failures == ["norms for sm_90: out of memory"]
    assert "sampler_step" in resources.families()


def test_a_part_does_not_change_the_page(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bench.gpu_static", "--docs", "-k", "CLIP", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "needs a whole run" in done.stderr


def test_the_stand_in_comes_before_torch() -> None:
    program = "import torch\nfrom bench.gpu_static import stand_in\nstand_in.install()"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    expected = 0 if _torch_has_cuda() else 1
    assert done.returncode == expected
    assert expected == 0 or "torch is already imported" in done.stderr


def _torch_has_cuda() -> bool:
    import torch

    return torch.version.cuda is not None or torch.version.hip is not None
