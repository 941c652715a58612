"""The package as it is built: what the C++ library needs, what an import does, life without the library."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys

import pytest

SPEC = importlib.util.find_spec("glide_fast._C")
NM = shutil.which("nm")


def run(program: str, **environment: str) -> str:
    """The output of a program in a fresh interpreter; what it writes as an error goes along."""
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", program],
        check=False,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def symbols(*options: str) -> list[str]:
    """Dynamic symbols of the built library: kind and demangled name, "U torch_call_dispatcher"."""
    if SPEC is None or SPEC.origin is None:
        pytest.skip("the C++ library is not built")
    if NM is None or sys.platform != "linux":
        pytest.skip("nm of binutils on Linux is needed to list symbols")
    listed = subprocess.run(
        [NM, "--dynamic", "--demangle", *options, SPEC.origin], check=True, capture_output=True, text=True
    )
    return [re.sub(r"^[0-9a-f ]{17}|@.*$", "", line).strip() for line in listed.stdout.splitlines()]


def imported() -> list[str]:
    """Names that the built library leaves to others."""
    return [line.split(maxsplit=1)[1] for line in symbols("--undefined-only")]


def test_of_torch_the_library_imports_only_c_functions() -> None:
    assert [name for name in imported() if re.match(r"(aoti_)?torch_\w+$", name)]
    assert not [name for name in imported() if re.search(r"\b(c10|at|torch|pybind11)::", name)]


def test_every_cpp_symbol_that_the_library_imports_is_of_the_standard_library() -> None:
    standard = re.compile(r"((typeinfo|vtable|VTT) for )?(std|__cxxabiv1)::|operator (new|delete)\b")
    assert not [name for name in imported() if not re.match(r"\w+$", name) and not standard.match(name)]


def test_of_python_the_library_imports_nothing_private() -> None:
    private = {name for name in imported() if name.startswith("_Py")}
    assert private <= {"_Py_Dealloc", "_Py_NoneStruct"}  # what the limited API's macros expand to


def test_the_library_exports_its_init_function_alone() -> None:
    assert [line for line in symbols("--defined-only") if line.startswith("T ")] == ["T PyInit__C"]


def test_the_kernels_package_is_installed_and_names_its_ops() -> None:
    import glide_fast.kernels
    from glide_fast.ops import implementations

    assert set(glide_fast.kernels.REGISTERED) <= {row.op for row in implementations()}


IMPORT = """
import sys, torch
def settings():
    return torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled(), torch.initial_seed()
before, known = settings(), set(sys.modules)
import {module}
assert settings() == before
assert not torch.cuda.is_initialized()
loaded = {{name.split(".")[0] for name in set(sys.modules) - known}}
assert not loaded & {forbidden!r}, loaded
"""
OPTIONAL = {"triton", "matplotlib", "emoji"}
NEEDED_LATER = {"PIL", "tokenizers", "tyro", "tqdm", "pydantic"}


@pytest.mark.parametrize("module", ["models", "sampling", "training"])
def test_an_import_loads_no_optional_package_changes_no_setting_and_prints_nothing(module: str) -> None:
    assert run(IMPORT.format(module=f"glide_fast.{module}", forbidden=OPTIONAL)) == ""


def test_importing_the_package_alone_loads_nothing_that_is_needed_later() -> None:
    assert run(IMPORT.format(module="glide_fast", forbidden=OPTIONAL | NEEDED_LATER)) == ""


def test_importing_the_ops_loads_nothing_that_is_needed_later() -> None:
    assert run(IMPORT.format(module="glide_fast.ops", forbidden=OPTIONAL | NEEDED_LATER)) == ""


ABSENT = """
import sys
sys.modules["glide_fast._C"] = None
import torch
from glide_fast.ops import group_norm, implementations, reference
x, weight, bias = torch.randn(2, 8, 3, 3, requires_grad=True), torch.ones(8), torch.zeros(8)
y = group_norm(x, weight, bias, groups=2, activation="silu")
y.sum().backward()
expected, mean, rstd = reference.group_norm(x.detach(), weight, bias, None, None, 2, 1e-5, True, 0)
assert torch.equal(y.detach(), expected)
saved = x.detach(), weight, bias, None, None, mean, rstd
assert torch.equal(x.grad, reference.group_norm_backward(torch.ones_like(y), *saved, True, 0)[0])
for row in implementations():
    if row.device == "CPU" and row.op.startswith("group_norm"):
        print(row.name, "|", row.reason)
"""
BROKEN = """
import importlib.abc, importlib.machinery, sys
class Broken(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path, target=None):
        return importlib.machinery.ModuleSpec(name, self) if name == "glide_fast._C" else None
    def create_module(self, spec):
        raise ImportError("undefined symbol: aoti_torch_of_the_future")
    def exec_module(self, module):
        pass
sys.meta_path.insert(0, Broken())
"""


def test_without_the_library_the_reference_serves_and_says_how_to_build() -> None:
    lines = run(ABSENT).splitlines()
    assert len(lines) == 2
    for line in lines:
        assert line.startswith(
            "reference | the C++ library is not built (python setup.py build_ext --inplace"
        )


def test_with_a_library_that_does_not_load_the_reference_serves_and_says_why() -> None:
    program = BROKEN + ABSENT.replace('sys.modules["glide_fast._C"] = None', "")
    lines = run(program).splitlines()
    assert len(lines) == 2
    for line in lines:
        assert line.startswith(
            "reference | the C++ library does not load (undefined symbol: aoti_torch_of_the"
        )
        assert "build it again for this torch" in line
