"""Builds the C++ ops (csrc/) with ninja into `glide_fast._C`; everything else is in pyproject.toml.

    pip install --no-build-isolation -e .     # or a wheel; both build the ops
    python setup.py build_ext --inplace       # only the ops, beside the sources

The binary uses torch's stable ABI and Python's limited API: one file serves torch >= 2.10 and Python >= 3.10.
Each kernel file is compiled once for each instruction set, which needs flags by object file; hence the small
ninja file written here. Without a compiler, ninja or torch the package is installed all the same: the
reference in plain PyTorch serves every op, and `glide-fast doctor` says so. GLIDE_FAST_REQUIRE_CPP=1 makes
that an error. Where nvcc and a torch with CUDA are, csrc/cuda is built into `glide_fast._cuda` besides; it
serves GPUs without Triton.
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
from collections.abc import Sequence
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
    "csrc/norm_apply.cpp",
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
CUDA_MODULE = "glide_fast._cuda"
CUDA_SOURCES = ("csrc/cuda/module.cpp", "csrc/cuda/ops.cpp")
CUDA_KERNELS = ("csrc/cuda/elements.cu",)
CUDA_ARCHITECTURES = ("80", "90a", "100a")  # machine code for these, PTX of the first for all other GPUs
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
NVCC_FLAGS = "-O3 -std=c++17 -Xcompiler -fPIC,-fvisibility=hidden,-Wall,-Wextra"


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


def find_nvcc() -> str | None:
    """nvcc of CUDA_HOME or of the path, if it is there and torch was built with CUDA."""
    try:
        import torch
    except ImportError:
        return None
    home = os.environ.get("CUDA_HOME")
    nvcc = shutil.which("nvcc", path=str(Path(home, "bin"))) if home else shutil.which("nvcc")
    return nvcc if torch.version.cuda is not None else None


def nvcc_flags(nvcc: str, architectures: Sequence[str] = CUDA_ARCHITECTURES) -> str:
    """What nvcc compiles csrc/cuda with, for those of the GPUs that it knows; PTX of the first besides."""
    listed = subprocess.run([nvcc, "--list-gpu-arch"], check=True, capture_output=True, text=True).stdout
    known = [name for name in architectures if f"compute_{name.rstrip('a')}" in listed.split()]
    codes = [f"-gencode arch=compute_{name},code=sm_{name}" for name in known]
    portable = [f"-gencode arch=compute_{name},code=compute_{name}" for name in known[:1] if name.isdigit()]
    return " ".join([NVCC_FLAGS, *codes, *portable])


def cuda_ninja_file(output: Path, compiler: str, nvcc: str, torch: Path) -> str:
    """Text of the build.ninja that compiles csrc/cuda and links `output`."""
    names = ", ".join(f"sm_{name}" for name in CUDA_ARCHITECTURES if f"code=sm_{name}" in nvcc_flags(nvcc))
    flags = f"{host_flags(torch)} -DUSE_CUDA '-DGLIDE_FAST_ARCHITECTURES=\"{names}\"'"
    libraries = f"-L{shlex.quote(str(torch / 'lib'))} -ltorch_cpu -ltorch_cuda"
    lines = [
        "ninja_required_version = 1.5",
        "rule compile",
        f"  command = {compiler} -MMD -MF $out.d {flags} -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule compile_kernels",
        f"  command = {nvcc} -MD -MF $out.d {nvcc_flags(nvcc)} -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {nvcc} -shared -cudart static $in -o $out {libraries}",
    ]
    objects = []
    for source in (*CUDA_SOURCES, *CUDA_KERNELS):
        objects.append(f"cuda_{Path(source).stem}.o")
        rule = "compile_kernels" if source in CUDA_KERNELS else "compile"
        lines.append(f"build {objects[-1]}: {rule} {ninja_path(ROOT / source)}")
    lines.append(f"build {ninja_path(output)}: link {' '.join(objects)}")
    return "\n".join(lines) + "\n"


def host_flags(torch: Path) -> str:
    """What the C++ compiler is given for every file."""
    includes = [torch / "include", sysconfig.get_path("include")]
    system = [f"-isystem {shlex.quote(str(path))}" for path in includes]
    return " ".join([COMMON_FLAGS, STABLE_ABI, LIMITED_API, *system])


def ninja_path(path: Path) -> str:
    """The path as ninja's `build` lines spell it."""
    return re.sub(r"([$ :])", r"$\1", str(path))


def ninja_file(output: Path, compiler: str, torch: Path) -> str:
    """Text of the build.ninja that compiles csrc/ and links `output`."""
    flags = host_flags(torch)
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
            work = Path(self.build_temp, "cuda" if ext.name == CUDA_MODULE else "").resolve()
            work.mkdir(parents=True, exist_ok=True)
            output.parent.mkdir(parents=True, exist_ok=True)
            nvcc = find_nvcc() if ext.name == CUDA_MODULE else None
            text = (
                ninja_file(output, compiler, find_torch())
                if nvcc is None
                else cuda_ninja_file(output, compiler, nvcc, find_torch())
            )
            (work / "build.ninja").write_text(text, encoding="utf-8")
            done = subprocess.run([ninja, "-C", str(work)], check=False)
            if done.returncode:
                raise BuildError(f"ninja failed with exit status {done.returncode}; its output is above")
        except BuildError as error:
            output.unlink(missing_ok=True)  # of an earlier build, and out of date
            if ext.name == CUDA_MODULE:
                self.warn(f"csrc/cuda is not built: {error}. Where Triton is missing, the reference serves.")
                return
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


def extensions() -> list[Extension]:
    """The modules to build: the CUDA one where it can be."""
    modules = [Extension("glide_fast._C", sources=[*SOURCES, *ISA_SOURCES], py_limited_api=True)]
    if find_nvcc() is not None:
        modules.append(Extension(CUDA_MODULE, sources=[*CUDA_SOURCES, *CUDA_KERNELS], py_limited_api=True))
    return modules


setup(
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildWithNinja},
    packages=[*find_packages(include=["glide_fast*"]), "glide_fast.assets", "glide_fast.kernels"],
    package_dir={"glide_fast.kernels": "kernels"},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
