"""csrc/cuda compiles for every GPU that is named, needs C functions of torch alone, and finds its place."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]
COMPILER = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
NM = shutil.which("nm")


@pytest.fixture(scope="module")
def nvcc() -> str:
    home = os.environ.get("CUDA_HOME")
    found = shutil.which("nvcc", path=str(Path(home, "bin"))) if home else shutil.which("nvcc")
    if found is None:
        pytest.skip("no nvcc, of CUDA_HOME or of the path: csrc/cuda is not compiled on this machine")
    return found


def call(command: str) -> str:
    done = subprocess.run(shlex.split(command), check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.mark.parametrize("architecture", ["80", "90a", "100a"])
def test_the_kernels_compile_without_spills(
    build: dict[str, Any], nvcc: str, architecture: str, tmp_path: Path
) -> None:
    assert architecture in build["CUDA_ARCHITECTURES"]
    flags = build["nvcc_flags"](nvcc, (architecture,))
    assert f"code=sm_{architecture}" in flags, f"{nvcc} does not know sm_{architecture}"
    for source in build["CUDA_KERNELS"]:
        told = call(f"{nvcc} {flags} -Xptxas -v -c {ROOT / source} -o {tmp_path / 'kernels.o'}")
        kernels = re.findall(rf"Compiling entry function '(\w+)' for 'sm_{architecture}'", told)
        assert len(kernels) == 9, told  # three kernels of three dtypes
        assert re.findall(r"(\d+) bytes spill", told) == ["0"] * len(re.findall(r"bytes spill", told))
        assert max(int(each) for each in re.findall(r"Used (\d+) registers", told)) <= 48
        assert "warning" not in told


def test_it_links_and_leaves_torch_c_functions_alone(
    build: dict[str, Any], nvcc: str, tmp_path: Path
) -> None:
    """Against the headers of any torch: symbols of CUDA's part of it are looked up when it is loaded."""
    if COMPILER is None or NM is None or sys.platform != "linux":
        pytest.skip("a C++ compiler and nm on Linux are needed to look at what is linked")
    text = build["cuda_ninja_file"](tmp_path / "out.so", COMPILER, nvcc, Path(torch.__file__).parent)
    commands = dict(re.findall(r"rule (\w+)\n  command = (.*)", text))
    commands["compile_kernels"] = commands["compile_kernels"].replace(
        build["nvcc_flags"](nvcc), build["nvcc_flags"](nvcc, ("90a",))
    )
    objects = []
    for name, rule, source in re.findall(r"build (\S+): (compile\w*) (\S+)", text):
        objects.append(str(tmp_path / name))
        call(commands[rule].replace("$in", source).replace("$out", objects[-1]))
    linking = commands["link"].replace(" -ltorch_cpu -ltorch_cuda", "")
    call(linking.replace("$in", " ".join(objects)).replace("$out", str(tmp_path / "out.so")))

    listed = call(f"{NM} --dynamic --demangle --undefined-only {tmp_path / 'out.so'}")
    names = [re.sub(r"^\s*\w\s+|@.*$", "", line).strip() for line in listed.splitlines()]
    assert "aoti_torch_get_current_cuda_stream" in names
    assert not [name for name in names if re.search(r"\b(c10|at|torch)::", name)]
    exported = call(f"{NM} --dynamic --defined-only {tmp_path / 'out.so'}")
    assert re.findall(r" T (PyInit\w+)", exported) == ["PyInit__cuda"]


def test_every_thread_of_its_grids_does_its_part(tmp_path: Path) -> None:
    """The kernels' own code with the threads one after the other, on the CPU."""
    if COMPILER is None:
        pytest.skip("no C++ compiler: the threads of csrc/cuda are not run one by one on this machine")
    program = tmp_path / "threads"
    flags = f"-O1 -std=c++17 -Wall -Wextra -Werror -Wno-unknown-pragmas -I{ROOT}"
    call(f"{COMPILER} {flags} {ROOT / 'tests/cuda_threads.cpp'} -o {program}")
    assert call(str(program)) == "equal\n"


def test_it_is_built_only_where_torch_has_cuda(build: dict[str, Any]) -> None:
    modules = [module.name for module in build["extensions"]()]
    assert ("glide_fast._cuda" in modules) == (build["find_nvcc"]() is not None)
    if torch.version.cuda is None:
        assert modules == ["glide_fast._C"]


REGISTERED = """
import sys, types
sys.modules["triton"] = None
import torch
from importlib.machinery import ModuleSpec
from torch.library import Library
library = Library("glide_fast", "FRAGMENT")
library.define("sampler_step_launch(Tensor x, Tensor output, Tensor? noise, Tensor table, Tensor t, "
               "Tensor? guidance, int deviation, int direction, bool clip) -> (Tensor, Tensor)")
library.define("norm_apply_launch(Tensor x, Tensor mean, Tensor rstd, Tensor weight, Tensor bias, "
               "Tensor? scale, Tensor? shift, bool silu) -> Tensor")
module = types.ModuleType("glide_fast._cuda")
module.__spec__ = ModuleSpec("glide_fast._cuda", None)
module.architectures = lambda: "sm_80, sm_90a"
sys.modules["glide_fast._cuda"] = module
from glide_fast import ops
for row in ops.implementations():
    if row.device == "CUDA":
        print(row.op, "|", row.name, "|", row.reason)
"""


def test_without_triton_it_serves_and_says_so() -> None:
    done = subprocess.run([sys.executable, "-c", REGISTERED], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = {line.split(" | ")[0]: line.split(" | ")[1:] for line in done.stdout.splitlines()}
    built = "csrc/cuda for sm_80, sm_90a, as Triton is missing"
    assert rows["sampler_step"][0] == rows["norm_apply"][0] == rows["group_norm"][0] == "CUDA C++"
    assert rows["sampler_step"][1].startswith(built)
    assert rows["group_norm"][1].startswith(f"norm_apply after ATen's statistics: {built}")
    assert rows["adamw"][0] == "reference"
    assert rows["adamw"][1].startswith("Triton is not installed")
