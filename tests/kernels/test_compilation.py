"""Resources are read from machine code of GPUs that are not here, and limits are computed from them."""

from __future__ import annotations

import pytest

from glide_fast.kernels import compilation
from glide_fast.kernels.compilation import Case, Resources
from tests.kernels.compiled import rehearse
from tests.kernels.interpreter import DEVICE

# Doubles 8 numbers of 16 bits a thread: one load and one store of 128 bits.
PROGRAM = """
import importlib.util, pathlib, tempfile
from glide_fast.kernels.configurations import Configuration
source = '''
import triton, triton.language as tl
@triton.jit
def double(x, y, count, absent, strides, SIZE: tl.constexpr):
    i = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    values = tl.load(x + i * strides[1], mask=i < count)
    if absent is None:
        tl.store(y + i, values * 2, mask=i < count)
'''
with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / "double.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location("double", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    x = torch.arange(2048, dtype=torch.float16)
    y = torch.full_like(x, 7)
    module.double[(1,)](x, y, 2048, None, (0, 1), 1024, **Configuration(1, 1, 4, 1).options)
    assert (y == 7).all()
"""


def resources(**changes: object) -> Resources:
    values = {"name": "any", "target": "sm_90", "warps": 4, "registers": 128, "spills": 0, "shared": 0}
    counts = dict.fromkeys(("tensor_core", "warpgroup", "tma", "wide_loads", "wide_stores"), 0)
    return Resources(**{**values, **counts, **changes})


@pytest.mark.parametrize(
    ("changes", "blocks", "occupancy"),
    [
        ({}, 4, 0.25),  # 65536 registers / (128 · 128 threads)
        ({"registers": 129}, 3, 12 / 64),  # rounded up to 136 a thread
        ({"registers": 32}, 16, 1.0),  # the most warps
        ({"registers": 16, "warps": 1}, 32, 0.5),  # the most blocks
        ({"shared": 56 * 1024}, 4, 0.25),  # 228 KiB / (56 + 1)
        ({"shared": 57 * 1024}, 3, 12 / 64),
        ({"target": "sm_120", "registers": 32}, 12, 1.0),
        ({"target": "gfx942"}, 0, 0.0),  # not known here
    ],
)
def test_blocks_are_limited_by_registers_shared_memory_and_warps(
    changes: dict[str, object], blocks: int, occupancy: float
) -> None:
    assert resources(**changes).blocks == blocks
    assert resources(**changes).occupancy == pytest.approx(occupancy)


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_a_rehearsed_launch_is_compiled_and_not_run(target: str) -> None:
    (row,) = rehearse(target, PROGRAM)
    assert (row["name"], row["target"], row["warps"], row["spills"]) == ("double", target, 4, 0)
    assert 0 < row["registers"] <= 32
    assert row["tensor_core"] == row["tma"] == row["warpgroup"] == 0
    if target == "sm_90":
        assert (row["wide_loads"], row["wide_stores"]) == (1, 1)
        assert row["occupancy"] == 1.0


@pytest.mark.skipif(DEVICE == "cuda", reason="nothing is interpreted where there is a GPU")
def test_compiling_what_is_interpreted_is_an_error_that_says_what_to_unset() -> None:
    with pytest.raises(RuntimeError, match="unset it"):
        compilation.compile_case(Case("any", None, {}, {}, 4, 1), "sm_90")
