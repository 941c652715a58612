"""A CUDA device for tensors without memory, where torch was built without CUDA.

FakeTensorMode makes CUDA tensors on any machine, but slicing them asks torch for a device guard and a
backward pass asks for streams. ``cuda_stand_in.cpp`` answers both, and nothing else: no memory, no kernels.
Torch looks for it once, when it is first imported, so that :func:`install` comes before that.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

SOURCE = Path(__file__).with_name("cuda_stand_in.cpp")
BUILD = Path(__file__).parents[2] / "build" / "gpu_static"
_loaded: list[ctypes.CDLL] = []


def install() -> None:
    """Build the stand-in if need be, and load it; where torch has CUDA of its own, do nothing.

    Raises:
        RuntimeError: torch is already imported, or the compiler fails.
    """
    if _loaded:
        return
    torch = _torch_folder()
    if _knows_cuda(torch):
        return
    if "torch" in sys.modules:
        raise RuntimeError("torch is already imported; call install() in a new process, before that")
    _loaded.append(ctypes.CDLL(str(_built(torch))))


def _torch_folder() -> Path:
    found = importlib.util.find_spec("torch")
    if found is None or found.origin is None:
        raise RuntimeError("torch is not installed; install it first")
    return Path(found.origin).parent


def _knows_cuda(torch: Path) -> bool:
    text = (torch / "version.py").read_text(encoding="utf-8")
    return re.search(r"^(cuda|hip)\b[^=]*= '", text, re.MULTILINE) is not None


def _built(torch: Path) -> Path:
    known = SOURCE.read_bytes() + (torch / "version.py").read_bytes() + str(torch).encode()
    target = BUILD / f"cuda_stand_in_{hashlib.sha256(known).hexdigest()[:12]}.so"
    if target.exists():
        return target
    BUILD.mkdir(parents=True, exist_ok=True)
    temporary = target.with_suffix(f".{os.getpid()}")
    libraries = torch / "lib"
    command = [os.environ.get("CXX", "c++"), "-std=c++20", "-shared", "-fPIC", f"-I{torch / 'include'}"]
    command += [str(SOURCE), "-o", str(temporary), f"-L{libraries}", "-lc10", "-ltorch_cpu"]
    try:
        done = subprocess.run(
            [*command, f"-Wl,-rpath,{libraries}"], capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        raise RuntimeError("there is no C++ compiler; install one or set CXX") from None
    if done.returncode:
        raise RuntimeError(f"{SOURCE.name} does not compile: {done.stderr[-1000:]}")
    temporary.replace(target)
    return target
