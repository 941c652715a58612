"""The norm of all gradients together: a launch for the sums of their squares, one for the root of their sum.

The second also divides the limit by it: the factor that clips the gradients.

Programs find their tensor in a table of addresses, as those of AdamW do; each sums a run of its elements and
leaves one number, and one program adds these, all in a fixed order. PyTorch's norms of lists take a launch
every 320 blocks of 65536 elements, and one more for the norms of the tensors.

Bytes: each gradient once. 2 FLOP an element: memory is what limits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from glide_fast.kernels import configurations, launch
from glide_fast.kernels.adamw import is_dense, owners
from glide_fast.kernels.compilation import Case
from glide_fast.kernels.configurations import Configuration
from glide_fast.kernels.plan import Launch
from glide_fast.ops import dispatch
from glide_fast.ops.reference_elements import NEVER_ZERO

RUN = 65536  # elements that a program sums at most
ROW = 4  # columns of 8 bytes: address, elements, first program, kind
KINDS = (torch.float32, torch.bfloat16, torch.float16)
SUMS = tl.constexpr(1024)  # that the last program adds at a time
_ALIGNMENT = 16  # bytes, for accesses of 128 bits


@triton.jit
def sum_of_squares(
    found, kind, start, elements, ALIGNED: tl.constexpr, RUN: tl.constexpr, BLOCK: tl.constexpr
):
    """Over a run of the elements at an address."""
    address = found.to(kind)
    if ALIGNED:
        address = tl.multiple_of(address, 16)
    total = tl.zeros([BLOCK], tl.float32)
    end = tl.minimum(start + RUN, elements)
    whole = start + (end - start) // BLOCK * BLOCK
    for first in range(start, whole, BLOCK):  # without a mask, whose end is anywhere, accesses can be wide
        value = tl.load(address + first + tl.arange(0, BLOCK)).to(tl.float32)
        total += value * value
    index = whole + tl.arange(0, BLOCK)
    value = tl.load(address + index, index < end, other=0.0).to(tl.float32)
    return tl.sum(total + value * value, axis=0)


@triton.jit
def squares_kernel(
    table, owners, sums, ALIGNED: tl.constexpr, ROW: tl.constexpr, RUN: tl.constexpr, BLOCK: tl.constexpr
):
    """One run of elements of the tensor that owns this program."""
    program = tl.program_id(0)
    row = table + tl.load(owners + program) * ROW
    found, elements, kind = tl.load(row), tl.load(row + 1), tl.load(row + 3)
    start = (program - tl.load(row + 2)) * RUN
    total = 0.0
    if kind == 0:
        total = sum_of_squares(found, tl.pointer_type(tl.float32), start, elements, ALIGNED, RUN, BLOCK)
    elif kind == 1:
        total = sum_of_squares(found, tl.pointer_type(tl.bfloat16), start, elements, ALIGNED, RUN, BLOCK)
    else:
        total = sum_of_squares(found, tl.pointer_type(tl.float16), start, elements, ALIGNED, RUN, BLOCK)
    tl.store(sums + program, total)


@triton.jit
def root_kernel(sums, norm, factor, programs, limit, scale, NEVER_ZERO: tl.constexpr):
    """The root of the sum of all programs' sums, and the factor that clips to the limit; a NaN stays one."""
    total = tl.zeros([SUMS], tl.float32)
    for first in range(0, programs, SUMS):
        index = first + tl.arange(0, SUMS)
        total += tl.load(sums + index, index < programs, other=0.0)
    root = tl.sqrt(tl.sum(total, axis=0)) / scale
    ratio = limit / (root + NEVER_ZERO)
    tl.store(norm, root)
    tl.store(factor, tl.where(ratio > 1, 1.0, ratio) / scale)


def gradient_norm(gradients: list[Tensor], limit: float, scale: float) -> tuple[Tensor, Tensor]:
    """The op `gradient_norm`; gradients of other dtypes, and none with an element, go to the default."""
    filled = [each if _is_dense(each) else each.contiguous() for each in gradients if each.numel()]
    if not filled or not {each.dtype for each in filled} <= set(KINDS):
        result: tuple[Tensor, Tensor] = dispatch.default("gradient_norm")(gradients, limit, scale)
        return result
    device = filled[0].device
    rows = _rows(filled)
    pinned = rows.pin_memory() if device.type == "cuda" else rows  # so that sending it waits for nothing
    aligned = not bool((rows[:, 0] % _ALIGNMENT).any())
    norm, factor = (torch.empty((), device=device) for _ in range(2))
    told: dict[str, Any] = {"norm": norm, "factor": factor, "limit": float(limit), "scale": float(scale)}
    configuration = configurations.choose("gradient_norm", launch.architecture(device), 32)
    sizes = tuple(each.numel() for each in filled)
    for each in _plan(pinned.to(device, non_blocking=True), sizes, told, aligned, configuration):
        each.start()
    return norm, factor


def _plan(
    table: Tensor, sizes: tuple[int, ...], told: dict[str, Any], aligned: bool, configuration: Configuration
) -> list[Launch]:
    owned = owners(sizes, RUN, table.device)
    sums = torch.empty(len(owned), device=table.device)
    arguments = {
        **told, "table": table, "owners": owned, "sums": sums, "programs": len(owned),
        "NEVER_ZERO": NEVER_ZERO, "ALIGNED": aligned, "ROW": ROW, "RUN": RUN, "BLOCK": configuration.rows,
    }  # fmt: skip
    return [
        Launch(squares_kernel, len(owned), arguments, configuration),
        Launch(root_kernel, 1, arguments, configuration),
    ]


def _rows(gradients: Sequence[Tensor]) -> Tensor:
    """The table [N, ROW], int64, on the CPU."""
    rows = np.zeros((len(gradients), ROW), dtype=np.int64)
    rows[:, 0] = [each.data_ptr() for each in gradients]
    rows[:, 1] = [each.numel() for each in gradients]
    programs = -(-rows[:, 1] // RUN)
    rows[:, 2] = np.cumsum(programs) - programs
    rows[:, 3] = [KINDS.index(each.dtype) for each in gradients]
    return torch.from_numpy(rows)


def _is_dense(gradient: Tensor) -> bool:
    return gradient.is_contiguous() or bool(is_dense(gradient))


def cases(target: str) -> Iterator[Case]:
    """What is compiled to be measured."""
    table = torch.empty(2, ROW, dtype=torch.int64, device="meta")
    configuration = configurations.choose("gradient_norm", target, 32)
    norm, factor = (torch.empty((), device="meta") for _ in range(2))
    told = {"norm": norm, "factor": factor, "limit": 1.0, "scale": 1.0}
    plans = _plan(table, (10**6, 100), told, True, configuration)
    for name, plan in zip(("squares", "root"), plans, strict=True):
        yield plan.case(f"gradient_norm {name}")
