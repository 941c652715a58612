"""The CPU's kernels for 64-bit ARM, where this machine has a compiler for it: read, and emulated."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
TARGET = "aarch64-linux-gnu"
GXX, OBJDUMP = shutil.which(f"{TARGET}-g++"), shutil.which(f"{TARGET}-objdump")
EMULATOR = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")
pytestmark = pytest.mark.skipif(
    GXX is None or OBJDUMP is None, reason=f"no {TARGET}-g++: NEON is not compiled on this machine"
)


def call(*command: str | Path) -> str:
    done = subprocess.run([str(each) for each in command], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def flags(build: dict[str, Any]) -> list[str]:
    vector_bytes, isa_flags = build["ISAS"]["generic"]  # what an ARM machine builds
    defines = ["-DGLIDE_FAST_ISA=generic", f"-DVECTOR_BYTES={vector_bytes}"]
    return [*build["COMMON_FLAGS"].split(), *isa_flags.split(), *defines, "-Werror", f"-I{ROOT}"]


def test_products_stay_in_registers(build: dict[str, Any], tmp_path: Path) -> None:
    """A step in depth multiplies and adds, and reaches for the stack not once."""
    for source in build["ISA_SOURCES"]:
        call(GXX or "", *flags(build), "-c", ROOT / source, "-o", tmp_path / f"{Path(source).stem}.o")
    code = call(OBJDUMP or "", "-d", "-C", tmp_path / "linear_isa.o")
    functions = re.split(r"\n[0-9a-f]+ <", code)
    rows = int(
        re.findall(r"defined\(__aarch64__\)\n.*MAX_ROWS = (\d+)", (ROOT / "csrc/product.h").read_text())[0]
    )
    (product,) = (each for each in functions if re.match(rf".*product<128l, {rows}l, .*NothingBeside>", each))
    assert product.count("\tfmla\t") == 4 * rows  # a step, and one after it, of two vectors a row
    assert not re.search(r"\t(ldr|str|ldp|stp)\tq.*\[sp", product)


@pytest.mark.skipif(EMULATOR is None, reason="no qemu-aarch64: NEON does not run on this machine")
def test_the_convolution_is_right(build: dict[str, Any], tmp_path: Path) -> None:
    program = tmp_path / "convolution"
    source = ROOT / "tests" / "one_core_convolution.cpp"
    call(GXX or "", *flags(build), "-static", source, "-o", program)
    assert "4 lanes" in call(EMULATOR or "", program)
