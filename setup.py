"""Builds the C++ ops (csrc/) with ninja into `glide_fast._C`; everything else is in pyproject.toml.

    pip install --no-build-isolation -e .     # or a wheel; both build the ops
    python setup.py build_ext --inplace       # only the ops, beside the sources

The binary uses torch's stable ABI and Python's limited API: one file serves torch >= 2.10 and Python >= 3.10.
Each kernel file is compiled once for each instruction set, which needs flags by object file; hence the small
ninja file written here. Without a compiler, ninja or torch the package is installed all the same: the
reference in plain PyTorch serves every op, and `glide-fast doctor` says so. GLIDE_FAST_REQUIRE_CPP=1 makes
that an error.
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
SOURCES = (
    "csrc/activation.cpp",
    "csrc/attention.cpp",
    "csrc/convolution.cpp",
    "csrc/group_norm.cpp",
    "csrc/group_norm_coefficients.cpp",
    "csrc/isa.cpp",
    "csrc/layer_norm.cpp",
    "csrc/linear.cpp",
    "csrc/module.cpp",
    "csrc/sampler_step.cpp",
)
ISA_SOURCES = (
    "csrc/activation_isa.cpp",
    "csrc/attention_isa.cpp",
    "csrc/convolution_isa.cpp",
    "csrc/group_norm_isa.cpp",
    "csrc/layer_norm_isa.cpp",
    "csrc/linear_isa.cpp",
)
ROUNDED_LIKE_PYTORCH = ("csrc/sampler_step.cpp",)  # each product before it is added
IS_X86 = platform.machine().lower() in ("x86_64", "amd64")
# Name of the variant -> bytes of a vector and the compiler's flags.
ISAS = {"generic": (16, "")}
if IS_X86:
    ISAS["avx2"] = (32, "-mavx2 -mfma")
    ISAS["avx512"] = (64, "-mavx512f -mavx512vl -mavx512dq -mavx512bw -mfma -mprefer-vector-width=512")
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020a000000000000"  # symbols of torch 2.10, no newer ones
LIMITED_API = "-DPy_LIMITED_API=0x030a0000"
COMMON_FLAGS = "-O3 -std=c++17 -fPIC -fvisibility=hidden -fno-math-errno -Wall -Wextra -Wno-psabi"


class BuildError(Exception):
    """Why the C++ ops cannot be built here."""


def find_tools() -> tuple[str, str]:
    """The C++ compiler's command and ninja's path.

    Raises:
        BuildError: one of them is missing, or the platform has no suitable compiler.
    """
    if sys.platform == "win32":
        raise BuildError(
            "the kernels need GCC's or Clang's vector extensions, and Windows' default compiler has none"
        )
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), None)
    if compiler is None:
        raise BuildError("no C++ compiler found; install g++ or clang++, or set CXX")
    if shutil.which(shlex.split(compiler)[0]) is None:
        raise BuildError(f"the C++ compiler {compiler!r} is not found; correct CXX or unset it")
    scripts = [str(Path(sys.executable).parent), sysconfig.get_path("scripts"), os.environ.get("PATH", "")]
    ninja = shutil.which("ninja", path=os.pathsep.join(scripts))
    if ninja is None:
        raise BuildError("ninja not found; pip install ninja")
    return compiler, ninja


def find_torch() -> Path:
    """Folder of the installed torch.

    Raises:
        BuildError: torch is not installed in the environment that builds.
    """
    try:
        import torch
    except ImportError as error:
        raise BuildError(
            f"torch is not importable here ({error}); pip install --no-build-isolation"
        ) from error
    return Path(torch.__file__).parent


def ninja_path(path: Path) -> str:
    """The path as ninja's `build` lines spell it."""
    return re.sub(r"([$ :])", r"$\1", str(path))


def ninja_file(output: Path, compiler: str, torch: Path) -> str:
    """Text of the build.ninja that compiles csrc/ and links `output`."""
    includes = [torch / "include", sysconfig.get_path("include")]
    system = [f"-isystem {shlex.quote(str(path))}" for path in includes]
    flags = " ".join([COMMON_FLAGS, STABLE_ABI, LIMITED_API, *system])
    if IS_X86:
        flags += " -DGLIDE_FAST_X86"
    link = "-shared"
    if sys.platform == "darwin":
        link = "-bundle -undefined dynamic_lookup"
    lines = [
        "ninja_required_version = 1.5",
        "rule compile",
        f"  command = {compiler} -MMD -MF $out.d {flags} $isa_flags -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {compiler} {link} $in -o $out -L{shlex.quote(str(torch / 'lib'))} -ltorch_cpu",
    ]
    objects = []

    def add(source: str, suffix: str, isa_flags: str) -> None:
        objects.append(f"{Path(source).stem}{suffix}.o")
        lines.append(f"build {objects[-1]}: compile {ninja_path(ROOT / source)}")
        lines.append(f"  isa_flags = {isa_flags}")

    for source in SOURCES:
        add(source, "", "-ffp-contract=off" if source in ROUNDED_LIKE_PYTORCH else "")
    for source in ISA_SOURCES:
        for name, (vector_bytes, isa_flags) in ISAS.items():
            defines = f"-DGLIDE_FAST_ISA={name} -DVECTOR_BYTES={vector_bytes}"
            add(source, f".{name}", f"{defines} {isa_flags}")
    lines.append(f"build {ninja_path(output)}: link {' '.join(objects)}")
    return "\n".join(lines) + "\n"


class BuildWithNinja(build_ext):
    """setuptools' build_ext, with ninja in place of its own compilation."""

    def build_extension(self, ext: Extension) -> None:
        """Build `ext`, or warn and go on without it (an error under GLIDE_FAST_REQUIRE_CPP=1)."""
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        try:
            compiler, ninja = find_tools()
            work = Path(self.build_temp).resolve()
            work.mkdir(parents=True, exist_ok=True)
            output.parent.mkdir(parents=True, exist_ok=True)
            (work / "build.ninja").write_text(ninja_file(output, compiler, find_torch()), encoding="utf-8")
            done = subprocess.run([ninja, "-C", str(work)], check=False)
            if done.returncode:
                raise BuildError(f"ninja failed with exit status {done.returncode}; its output is above")
        except BuildError as error:
            output.unlink(missing_ok=True)  # of an earlier build, and out of date
            if os.environ.get("GLIDE_FAST_REQUIRE_CPP") == "1":
                raise
            self.warn(f"the C++ ops are not built: {error}. The slower reference will serve every op.")

    def copy_extensions_to_source(self) -> None:
        """Put what was built beside the sources, by rename: a process may have the old file mapped."""
        for ext in self.extensions:
            built = Path(self.build_lib) / self.get_ext_filename(ext.name)
            if built.exists():
                target = Path(self.get_ext_fullpath(ext.name))
                fresh = target.with_suffix(".new")
                shutil.copy2(built, fresh)
                os.replace(fresh, target)

    def get_outputs(self) -> list[str]:
        """The files that exist: a skipped extension must not be missed by install."""
        return [path for path in super().get_outputs() if Path(path).exists()]


setup(
    ext_modules=[Extension("glide_fast._C", sources=[*SOURCES, *ISA_SOURCES], py_limited_api=True)],
    cmdclass={"build_ext": BuildWithNinja},
    packages=[*find_packages(include=["glide_fast*"]), "glide_fast.assets", "glide_fast.kernels"],
    package_dir={"glide_fast.kernels": "kernels"},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
