"""AdamW, the average of the weights and their 16-bit copy, over all parameters in one launch.

Programs find their tensor in a table: addresses, sizes and numbers of N tensors in one buffer, which is sent
to the device once a step, because gradients move. A program takes one block of one tensor's elements, in the
order of memory, which is why all of a tensor's companions must have its strides.

Bytes an element: weight, both moments and average are read and written, the gradient read: 36; a 16-bit copy
2 more, a 16-bit gradient 2 less. About 20 FLOP: memory is what limits.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from glide_fast.kernels import configurations, launch
from glide_fast.kernels.compilation import Case
from glide_fast.kernels.configurations import Configuration
from glide_fast.kernels.plan import Launch
from glide_fast.ops import dispatch
from glide_fast.ops.adamw import StepNumbers

ADDRESSES = 6  # columns of 8 bytes; then the elements and the first program, then the numbers of 4 bytes
COLUMNS = ADDRESSES + 2
NUMBERS = len(StepNumbers._fields)
ROW = COLUMNS + NUMBERS // 2  # 8 bytes each
_ALIGNMENT = 16  # bytes, for accesses of 128 bits
is_dense = torch.ops.aten.is_non_overlapping_and_dense
_KINDS = (torch.float32, torch.bfloat16, torch.float16)
# Shapes, dtype of gradients, of copies of what is compiled to be measured.
CASES = (((192, 192, 3, 3), torch.float32, None), ((192, 192, 3, 3), torch.bfloat16, torch.bfloat16))


@triton.jit
def lerp(start, end, share):
    """start + share (end - start), from the nearer end as torch.lerp has it."""
    way = end - start
    return tl.where(share < 0.5, start + share * way, end - (1 - share) * way)


@triton.jit
def address(row, column: tl.constexpr, like, ALIGNED: tl.constexpr):
    """The address in a column of the table, as a pointer of the kind of `like`."""
    found = tl.load(row + column).to(like.dtype)
    if ALIGNED:
        found = tl.multiple_of(found, 16)
    return found


@triton.jit
def update(
    row, number, index, inside, parameter_kind, gradient_kind, copy_kind, factor, AVERAGED: tl.constexpr,
    COPIED: tl.constexpr, SCALED: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """The elements `index` of the tensor of a row of the table, those `inside` it; None if all are."""
    first_share, beta2, second_share = tl.load(number), tl.load(number + 1), tl.load(number + 2)
    eps, decay = tl.load(number + 3), tl.load(number + 4)
    step_size, root = tl.load(number + 5), tl.load(number + 6)
    parameters = address(row, 0, parameter_kind, ALIGNED) + index
    firsts = address(row, 2, parameter_kind, ALIGNED) + index
    seconds = address(row, 3, parameter_kind, ALIGNED) + index

    gradient = tl.load(address(row, 1, gradient_kind, ALIGNED) + index, inside).to(tl.float32)
    if SCALED:
        gradient = gradient * tl.load(factor)
    weight = tl.load(parameters, inside)
    first = lerp(tl.load(firsts, inside), gradient, first_share)
    second = beta2 * tl.load(seconds, inside) + second_share * gradient * gradient
    weight = weight - decay * weight
    weight = weight - step_size * (first / (tl.sqrt(second) / root + eps))
    tl.store(parameters, weight, inside)
    tl.store(firsts, first, inside)
    tl.store(seconds, second, inside)
    if AVERAGED:
        averages = address(row, 4, parameter_kind, ALIGNED) + index
        tl.store(averages, lerp(tl.load(averages, inside), weight, tl.load(number + 7)), inside)
    if COPIED:
        tl.store(address(row, 5, copy_kind, ALIGNED) + index, weight.to(copy_kind.dtype.element_ty), inside)


@triton.jit
def adamw_kernel(
    table, numbers, owners, parameter_kind, gradient_kind, copy_kind, factor, AVERAGED: tl.constexpr,
    COPIED: tl.constexpr, SCALED: tl.constexpr, ALIGNED: tl.constexpr, ROW: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One block of elements of the tensor that owns this program; the kinds are tensors of their dtypes."""
    program = tl.program_id(0)
    owner = tl.load(owners + program)
    row = table + owner * ROW
    number = numbers + owner * (2 * ROW) + 16
    elements = tl.load(row + 6)
    start = (program - tl.load(row + 7)) * BLOCK
    index = start + tl.arange(0, BLOCK)
    if start + BLOCK <= elements:  # without a mask, whose end is anywhere, accesses can be wide
        update(
            row, number, index, None, parameter_kind, gradient_kind, copy_kind, factor, AVERAGED, COPIED,
            SCALED, ALIGNED,
        )  # fmt: skip
    else:
        update(
            row, number, index, index < elements, parameter_kind, gradient_kind, copy_kind, factor, AVERAGED,
            COPIED, SCALED, ALIGNED,
        )  # fmt: skip


def adamw(
    parameters: list[Tensor],
    gradients: list[Tensor],
    first: list[Tensor],
    second: list[Tensor],
    average: list[Tensor],
    copies: list[Tensor],
    numbers: Tensor,
    factor: Tensor | None,
) -> None:
    """The op `adamw`; weights that are not float32, and companions of other strides, go to the default."""
    gradients = [_like(each, parameter) for each, parameter in zip(gradients, parameters, strict=True)]
    if not _covered(parameters, gradients, [first, second, average], copies):
        dispatch.default("adamw")(parameters, gradients, first, second, average, copies, numbers, factor)
        return
    device = parameters[0].device
    configuration = configurations.choose("adamw", launch.architecture(device), 32)
    companions = [parameters, gradients, first, second, average or parameters, copies or parameters]
    rows = _rows(companions, numbers, configuration.rows)
    pinned = rows.pin_memory() if device.type == "cuda" else rows  # so that sending it waits for nothing
    table = pinned.to(device, non_blocking=True)
    aligned = not bool((rows[:, :ADDRESSES] % _ALIGNMENT).any())
    _plan(table, companions, bool(average), bool(copies), factor, aligned, configuration).start()


def _plan(
    table: Tensor,
    companions: Sequence[list[Tensor]],
    averaged: bool,
    copied: bool,
    factor: Tensor | None,
    aligned: bool,
    configuration: Configuration,
) -> Launch:
    parameters, gradients, *_, copies = companions
    sizes = tuple(parameter.numel() for parameter in parameters)
    owned = owners(sizes, configuration.rows, table.device)
    numbers = table.view(torch.float32)
    arguments = {
        "table": table, "numbers": numbers, "owners": owned, "parameter_kind": parameters[0],
        "gradient_kind": gradients[0], "copy_kind": copies[0],
        "factor": numbers if factor is None else factor.float(), "AVERAGED": averaged, "COPIED": copied,
        "SCALED": factor is not None, "ALIGNED": aligned, "ROW": ROW, "BLOCK": configuration.rows,
    }  # fmt: skip
    return Launch(adamw_kernel, len(owned), arguments, configuration)


def _rows(companions: Sequence[list[Tensor]], numbers: Tensor, block: int) -> Tensor:
    """The table [N, ROW], int64, on the CPU."""
    rows = np.zeros((len(companions[0]), ROW), dtype=np.int64)
    for column, tensors in enumerate(companions):
        rows[:, column] = [tensor.data_ptr() for tensor in tensors]
    rows[:, 6] = [parameter.numel() for parameter in companions[0]]
    programs = -(-rows[:, 6] // block)
    rows[:, 7] = np.cumsum(programs) - programs
    rows.view(np.float32)[:, 2 * COLUMNS :] = numbers.numpy()
    return torch.from_numpy(rows)


@functools.lru_cache(maxsize=16)
def owners(sizes: tuple[int, ...], block: int, device: torch.device) -> Tensor:
    """The tensor that each program works on, int32 [programs]."""
    programs = [-(-size // block) for size in sizes]
    return torch.from_numpy(np.repeat(np.arange(len(sizes), dtype=np.int32), programs)).to(device)


def _like(gradient: Tensor, parameter: Tensor) -> Tensor:
    """The gradient with the strides of its parameter, a copy only where it has others."""
    if gradient.stride() == parameter.stride():
        return gradient
    return torch.empty_like(parameter, dtype=gradient.dtype).copy_(gradient)


def _covered(
    parameters: list[Tensor], gradients: list[Tensor], states: Sequence[list[Tensor]], copies: list[Tensor]
) -> bool:
    kinds = {each.dtype for each in gradients}, {each.dtype for each in copies}
    strides = [each.stride() for each in parameters]
    return (
        all(len(each) <= 1 and each <= set(_KINDS) for each in kinds)
        and all({each.dtype for each in tensors} <= {torch.float32} for tensors in (parameters, *states))
        and all(not each or [one.stride() for one in each] == strides for each in (*states, copies))
        and all(each.is_contiguous() or is_dense(each) for each in parameters)
    )


def cases(target: str) -> Iterator[Case]:
    """What is compiled to be measured: float32 training, and training in bfloat16 with its copy."""
    configuration = configurations.choose("adamw", target, 32)
    for shape, kind, copied in CASES:
        weight, gradient = torch.empty(shape, device="meta"), torch.empty(shape, dtype=kind, device="meta")
        copy = weight if copied is None else weight.to(copied)
        companions = [[weight], [gradient], [weight], [weight], [weight], [copy]]
        table = torch.empty(1, ROW, dtype=torch.int64, device="meta")
        plan = _plan(table, companions, True, copied is not None, None, True, configuration)
        yield plan.case(f"adamw gradients {kind} copy {copied}")
