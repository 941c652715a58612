"""What this installation can do: versions, machine, data, and who computes each op, with the reasons."""

from __future__ import annotations

import importlib.metadata
import os
import platform

import torch

from glide_fast import __version__, ops
from glide_fast.data.emoji import find_font
from glide_fast.ops import memory, packed
from glide_fast.sampling.pipeline import ASSETS

OPTIONAL = {
    "triton": "triton",
    "emoji": "train",
    "matplotlib": "train",
}  # package -> the extra that brings it
MODELS = tuple(f"emoji_{name}.safetensors" for name in ("base", "upsampler", "inpaint", "clip", "judge"))


def versions() -> dict[str, str]:
    """The versions that a picture's bits can depend on."""
    return {
        "glide_fast": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
    }


def examine() -> str:
    """The whole report, as ``glide-fast doctor`` prints it."""
    parts = {"versions": versions(), "machine": _machine(), "optional packages": _packages(), "data": _data()}
    lines = []
    for title, facts in parts.items():
        lines.append(title)
        lines += [f"  {name:<14} {fact}" for name, fact in facts.items()]
    lines.append("ops, by device")
    for row in ops.implementations():
        lines.append(f"  {row.device:<5} {row.op:<26} {row.name:<20} {row.reason}")
    return "\n".join(lines)


def _machine() -> dict[str, str]:
    cuda = torch.cuda.get_device_name() if torch.cuda.is_available() else "none that this torch can use"
    return {
        "cores": str(os.cpu_count()),
        "torch threads": str(torch.get_num_threads()),
        "CUDA device": cuda,
        "packed weights": f"{packed.kept_bytes() / 1e6:.1f} MB in this process",
        "waiting memory": f"{memory.kept_bytes() / 1e6:.1f} MB in this thread",
    }


def _packages() -> dict[str, str]:
    facts = {}
    for package, extra in OPTIONAL.items():
        try:
            facts[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            facts[package] = f"not installed (pip install 'glide-fast[{extra}]')"
    return facts


def _data() -> dict[str, str]:
    facts = {
        name: "there" if (ASSETS / name).is_file() else "missing: reinstall glide-fast" for name in MODELS
    }
    try:
        facts["emoji font"] = str(find_font())
    except FileNotFoundError as error:
        facts["emoji font"] = str(error)
    return facts
