"""Compiles kernels for GPUs that are not here and reads what they need from the machine code.

    python -m glide_fast.kernels.compilation attention sm_90     # one JSON row for each case

Each kernel module lists its cases by a function `cases(target)`. Registers, spills and instructions come from
the cubin by the disassembler in Triton's wheel, for AMD from the assembly text. Nothing is run.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glide_fast.kernels import launch

TARGETS = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")
# Shared memory of a multiprocessor and the most warps on it; every one has 65,536 registers.
_SHARED = {"sm_80": 164, "sm_90": 228, "sm_100": 228, "sm_120": 100}  # KiB, 1 of them reserved a block
_WARPS = {"sm_80": 64, "sm_90": 64, "sm_100": 64, "sm_120": 48}


@dataclass(frozen=True)
class Case:
    """One kernel with everything that fixes its machine code.

    `signature` gives each argument in order: "*fp16:16" is a pointer, and "i32:16" a number, that 16 divides;
    "tensordesc<fp16[64,64]>" a host descriptor; "constexpr" takes its value from `constants`, where None can
    stand for an absent tensor; a tuple of numbers is a tuple here.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str | tuple[str, ...]]
    constants: Mapping[str, Any]
    num_warps: int
    num_stages: int
    registers: int | None = None  # the most a thread may have


@dataclass(frozen=True)
class Resources:
    """What a compiled case needs and which instructions it has; counts are of the text, not of what runs."""

    name: str
    target: str
    warps: int
    registers: int  # a thread
    spills: int  # loads and stores of local memory, or spilled registers on AMD
    shared: int  # bytes a block
    tensor_core: int  # matrix products of every kind
    warpgroup: int  # those of them that four warps issue together: HGMMA on sm_90, UTC*MMA on sm_100
    tma: int
    wide_loads: int  # of 128 bits a thread, from global memory
    wide_stores: int

    @property
    def blocks(self) -> int:
        """Blocks that a multiprocessor holds at a time; 0 where its limits are not known here."""
        if self.target not in _SHARED:
            return 0
        allotted = -(-self.registers // 8) * 8 * 32 * self.warps
        by_shared = _SHARED[self.target] * 1024 // (self.shared + 1024)
        return min(65536 // allotted, by_shared, _WARPS[self.target] // self.warps, 32)

    @property
    def occupancy(self) -> float:
        """Share of the multiprocessor's warps that can be there; 0 where not known."""
        return self.blocks * self.warps / _WARPS.get(self.target, 1)


def gpu_target(target: str) -> Any:
    """Triton's description of "sm_90" or "gfx942"."""
    from triton.backends.compiler import GPUTarget

    if target.startswith("sm_"):
        return GPUTarget("cuda", launch.number(target), 32)
    return GPUTarget("hip", target, 64)


def compile_case(case: Case, target: str) -> Resources:
    """Compile a case for a target and read its resources.

    Raises:
        RuntimeError: TRITON_INTERPRET is set, which leaves nothing to compile.
    """
    import triton
    from triton.compiler import ASTSource

    if triton.knobs.runtime.interpret or not isinstance(case.kernel, triton.JITFunction):
        raise RuntimeError(
            "TRITON_INTERPRET=1 interprets the kernels; unset it in a process that compiles them"
        )
    signature, divisible = _specialized(case.signature)
    source = ASTSource(case.kernel, signature, dict(case.constants), divisible)
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages, "enable_fp_fusion": True}
    if case.registers is not None:
        options["maxnreg"] = case.registers
    compiled = triton.compile(source, target=gpu_target(target), options=options)
    return read_resources(compiled, case.name, target)


def read_resources(compiled: Any, name: str, target: str) -> Resources:
    """The resources of a kernel that Triton compiled."""
    read = _read_cubin if "cubin" in compiled.asm else _read_amd
    return Resources(
        name=name,
        target=target,
        warps=compiled.metadata.num_warps,
        shared=compiled.metadata.shared,
        **read(compiled.asm),
    )


def _specialized(signature: Mapping[str, str | tuple[str, ...]]) -> tuple[dict[str, Any], dict[Any, Any]]:
    """Triton's own signature, and its attributes by the path of an argument: what 16 divides."""
    kinds, divisible = {}, {}
    for index, (name, kind) in enumerate(signature.items()):
        parts = kind if isinstance(kind, tuple) else (kind,)
        plain = tuple(part.removesuffix(":16") for part in parts)
        kinds[name] = plain if isinstance(kind, tuple) else plain[0]
        for place, part in enumerate(parts):
            if part.endswith(":16"):
                path = (index, place) if isinstance(kind, tuple) else (index,)
                divisible[path] = [["tt.divisibility", 16]]
    return kinds, divisible


def _read_cubin(asm: Mapping[str, Any]) -> dict[str, int]:
    import triton

    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        usage, text = (
            subprocess.run(
                [str(tools / tool[0]), *tool[1:], file.name], check=True, capture_output=True, text=True
            )
            for tool in (("cuobjdump", "-res-usage"), ("nvdisasm", "-c"))
        )
    registers = re.search(r"REG:(\d+)", usage.stdout + usage.stderr)
    sass = text.stdout
    return {
        "registers": int(registers[1]) if registers else 0,
        "spills": _count(r"\b(STL|LDL)\b", sass),
        "warpgroup": _count(r"\b(HGMMA|QGMMA|UTC\w*MMA)\b", sass),
        "tensor_core": _count(r"\b(HGMMA|QGMMA|UTC\w*MMA|HMMA|QMMA)\b", sass),
        "tma": _count(r"\bUTMA(LDG|STG|REDG)\b", sass),
        "wide_loads": _count(r"\b(LDG|LDGSTS)\.[\w.]*128", sass),
        "wide_stores": _count(r"\bSTG\.[\w.]*128", sass),
    }


def _read_amd(asm: Mapping[str, Any]) -> dict[str, int]:
    text = asm["amdgcn"]

    def noted(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", text)
        return int(found[1]) if found else 0

    return {
        "registers": noted("vgpr_count"),
        "spills": noted("vgpr_spill_count"),
        "tensor_core": _count(r"\bv_mfma_", text),
        "warpgroup": 0,
        "tma": 0,
        "wide_loads": _count(r"\b(global|buffer)_load_dwordx4\b", text),
        "wide_stores": _count(r"\b(global|buffer)_store_dwordx4\b", text),
    }


def _count(pattern: str, text: str) -> int:
    return sum(1 for _ in re.finditer(pattern, text))


def main(arguments: Sequence[str]) -> None:
    """Print one JSON row a case of the module (first argument) for each target (all others)."""
    module = importlib.import_module(f"glide_fast.kernels.{arguments[0]}")
    for target in arguments[1:]:
        for case in module.cases(target):
            resources = compile_case(case, target)
            row = {
                **dataclasses.asdict(resources),
                "blocks": resources.blocks,
                "occupancy": resources.occupancy,
            }
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
