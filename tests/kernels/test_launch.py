"""Who serves an op on a GPU: registration without Triton, the GPU's name, its tiles, and the way back."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from glide_fast import kernels
from glide_fast.doctor import examine
from glide_fast.kernels import configurations, launch
from glide_fast.ops import dispatch

CUDA = torch.device("cuda", 0)


def run(program: str) -> str:
    """The output of a program in a fresh interpreter."""
    done = subprocess.run([sys.executable, "-c", program], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Let the first CUDA device be a GPU of the given architecture."""

    def pretend(architecture: str) -> None:
        monkeypatch.setattr(launch, "_architecture", lambda _index: architecture)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: "NVIDIA Model")
        monkeypatch.setattr(torch.cuda, "device", lambda _device: contextlib.nullcontext())
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)

    return pretend


def rows() -> dict[str, dispatch.Implementation]:
    return {row.op: row for row in dispatch.implementations() if row.device == "CUDA"}


def test_every_registered_op_is_a_function_of_its_module() -> None:
    for op, kernel in kernels.REGISTERED.items():
        module = __import__(f"glide_fast.kernels.{kernel.module}", fromlist=[op])
        assert callable(getattr(module, op))
        assert op in rows()


def test_registration_imports_no_triton_and_touches_no_gpu() -> None:
    program = """
import sys, torch
from glide_fast.ops import implementations
import glide_fast.kernels.launch, glide_fast.kernels.configurations, glide_fast.kernels.compilation
print({row.name for row in implementations() if row.op == "attention" and row.device == "CUDA"})
print("triton" in sys.modules, torch.cuda.is_initialized())
"""
    assert run(program) == "{'Triton'}\nFalse False\n"


def test_without_triton_the_reference_serves_and_says_so() -> None:
    program = """
import sys
sys.modules["triton"] = None
from glide_fast.ops import implementations
for row in implementations():
    if row.op == "attention" and row.device == "CUDA":
        print(row.name, "|", row.reason)
"""
    assert run(program) == "reference | Triton is not installed (pip install glide-fast[triton])\n"


def test_without_a_gpu_the_row_says_what_would_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    row = rows()["attention"]
    assert row.name == "Triton"
    assert row.reason.startswith(kernels.REGISTERED["attention"].covers)
    assert f"torch {torch.__version__} can use none here" in row.reason


def test_a_gpu_that_is_new_enough_is_served(gpu: Callable[[str], None]) -> None:
    gpu("sm_90")
    assert rows()["attention"].reason == kernels.REGISTERED["attention"].covers
    assert launch.too_old(CUDA) is None


def test_a_gpu_that_is_too_old_keeps_the_default_and_the_row_says_why(gpu: Callable[[str], None]) -> None:
    gpu("sm_75")
    row = rows()["attention"]
    assert row.name == "reference"
    assert row.reason == "NVIDIA Model is sm_75; the Triton kernels need sm_80 or newer"


def test_an_op_without_a_kernel_says_so() -> None:
    others = [row for op, row in rows().items() if op not in kernels.REGISTERED]
    assert others
    assert all(row.name in ("composed", "reference") for row in others)
    assert all(row.reason == "no Triton kernel for this op" for row in others)


@pytest.mark.parametrize(
    ("architecture", "served"), [("sm_75", "default"), ("sm_90", "kernel"), ("gfx942", "kernel")]
)
def test_the_stand_in_chooses_by_the_gpu(
    gpu: Callable[[str], None], monkeypatch: pytest.MonkeyPatch, architecture: str, served: str
) -> None:
    gpu(architecture)
    monkeypatch.setattr(launch, "device_of", lambda _arguments: CUDA)
    monkeypatch.setitem(
        sys.modules, "glide_fast.kernels.mine", type("Module", (), {"op": lambda x: ("kernel", x)})
    )
    monkeypatch.setattr(kernels, "REGISTERED", {"op": kernels.Kernel("mine", "everything")})
    registered: dict[str, Any] = {}

    def implement(op: str, device: str, function: Callable[..., Any], *, name: str, reason: str) -> None:
        registered.update(op=op, device=device, function=function, name=name, reason=reason)

    kernels.register(implement, lambda _op: lambda x: ("default", x))
    assert registered["function"](3) == (served, 3)
    del registered["function"]
    assert registered == {"op": "op", "device": "CUDA", "name": "Triton", "reason": "everything"}


def test_the_device_is_that_of_the_first_tensor() -> None:
    x = torch.empty(1, device="meta")
    assert launch.device_of([None, 3, x]) == x.device
    assert launch.device_of([None, [x]]) == x.device
    with pytest.raises(ValueError, match="without a tensor"):
        launch.device_of([None, 3, []])


def test_names_of_gpus_have_numbers_where_nvidia_gave_them() -> None:
    assert [launch.number(name) for name in ("sm_80", "sm_120", "gfx942")] == [80, 120, 0]


def test_descriptors_need_a_new_gpu_and_aligned_strides(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(4, 6, 40, dtype=torch.float16)
    monkeypatch.setattr(launch, "INTERPRETED_AS", "sm_90")
    assert launch.takes_descriptors(x, None)
    assert launch.takes_descriptors(x[:, ::2, 8:24])
    assert not launch.takes_descriptors(x, x[:, :, 1:])  # base
    assert not launch.takes_descriptors(torch.zeros(4, 6, 33, dtype=torch.float16))  # strides
    assert not launch.takes_descriptors(x.mT)
    assert not launch.takes_descriptors(x[:1].expand(3, 6, 40))
    assert not launch.takes_descriptors(x[:0])
    monkeypatch.setattr(launch, "INTERPRETED_AS", "sm_80")
    assert not launch.takes_descriptors(x)


@pytest.mark.parametrize(
    ("kin", "architecture"), [("sm_86", "sm_120"), ("sm_103", "sm_100"), ("gfx950", "gfx942")]
)
def test_gpus_without_rows_of_their_own_take_their_kins(kin: str, architecture: str) -> None:
    for bits, dim in ((16, 64), (16, 128), (32, 64)):
        assert configurations.choose("attention", kin, bits, dim) == configurations.choose(
            "attention", architecture, bits, dim
        )


def test_a_kernel_without_a_row_is_an_error_that_says_where_to_add_one() -> None:
    with pytest.raises(ValueError, match=r"'polish' for sm_90, 16 bits, shape class 7; add a row to TABLE"):
        configurations.choose("polish", "sm_90", 16, 7)


def test_autotuning_keeps_the_fastest_that_fits(
    gpu: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    import triton

    gpu("sm_90")
    slow, fast, large = (configurations.Configuration(size, 64, 4, 1) for size in (16, 32, 128))
    table = tuple(("mine", None, None, None, each) for each in (slow, fast, large))
    times = {slow: 2.0, fast: 1.0}
    calls: list[configurations.Configuration] = []

    def launcher(configuration: configurations.Configuration) -> float:
        calls.append(configuration)
        if configuration is large:
            raise triton.runtime.errors.OutOfResources(200, 100, "shared memory")
        return times[configuration]

    monkeypatch.setattr(configurations, "TABLE", table)
    monkeypatch.setattr(configurations, "_fastest", {})
    monkeypatch.setattr(triton.testing, "do_bench", lambda run: run())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    configurations.choose.cache_clear()
    assert configurations.run("mine", CUDA, 16, 64, launcher) == 2.0
    assert calls == [slow]
    monkeypatch.setenv(configurations.AUTOTUNE_VARIABLE, "1")
    assert [configurations.run("mine", CUDA, 16, 64, launcher) for _ in range(2)] == [1.0, 1.0]
    assert calls[1:] == [slow, fast, large, fast, fast]


def test_autotuning_limits_registers_on_nvidias_gpus_alone() -> None:
    for kernel in dict.fromkeys(row[0] for row in configurations.TABLE):
        on_amd = configurations.candidates(kernel, "gfx942", 16)
        assert on_amd
        assert not any("maxnreg" in each.options for each in on_amd)
    limited = configurations.candidates("group_norm_backward", "sm_90", 16)
    assert any("maxnreg" in each.options for each in limited)


def test_the_doctor_prints_the_rows() -> None:
    found = [line for line in examine().splitlines() if line.split()[:2] == ["CUDA", "attention_backward"]]
    assert len(found) == 1
    assert "Triton" in found[0]
