"""What PyTorch's own operators cost on CUDA: how many kernels each launches and the bytes these move.

An operator is one kernel that reads its inputs and writes its outputs once, except for those named here.
The exceptions follow ATen's CUDA sources: cuDNN adds no bias, GroupNorm is three kernels, a fused optimizer
takes so many tensors at a time. Layout conversions inside cuDNN and the workspaces of cuBLAS are not seen
and not counted, which flatters what runs in [B, C, H, W].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import flop_registry

import glide_fast.ops  # noqa: F401 (defines ours)
from bench.gpu_static.launches import Launch, footprint, is_half, moved

aten = torch.ops.aten
FREE = {
    *(aten.empty.memory_format, aten.empty_strided.default, aten.empty_like.default, aten.new_empty.default),
    *(
        aten.new_empty_strided.default,
        aten.detach.default,
        aten.lift_fresh.default,
        aten._unsafe_view.default,
    ),
    *(aten.resize_.default, aten.set_.source_Tensor, torch.ops.prim.device.default),
}
# Of multi-tensor kernels: tensors a launch by the number of lists, blocks a launch, elements a block.
LIST_TENSORS, LIST_BLOCKS, LIST_CHUNK = {1: 110, 2: 64, 3: 48, 4: 36, 5: 30}, 320, 65536
_WRITES_ONLY = {"zeros", "ones", "full", "arange", "zeros_like", "ones_like", "full_like", "new_zeros"}
_WRITES_ONLY |= {"new_ones", "new_full", "zero_", "fill_", "normal_", "uniform_", "randn", "rand"}


def tensors_of(tree: Any) -> list[Tensor]:
    """Every tensor in an operator's arguments or results."""
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def launches(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> list[Launch]:
    """The kernels of one call of an operator on CUDA."""
    inputs, outputs = _given(func, args, kwargs), tensors_of(out)
    if func in FREE or func.is_view or not any(each.is_cuda for each in (*inputs, *outputs)):
        return []
    name = func._schema.name.removeprefix("aten::")
    special = SPECIAL.get(name)
    if special is not None:
        kernels = [Launch(kernel, name, *rest) for kernel, *rest in special(args, out)]
        return [*kernels[:1], *(replace(each, further=True) for each in kernels[1:])]
    if name.startswith(("_foreach_", "_fused_")):
        return [Launch(name, name, bytes_) for bytes_ in _lists(args, name)]
    written = _written(func, args, kwargs) or outputs
    read = [] if name in _WRITES_ONLY else inputs
    formula = flop_registry.get(func._overloadpacket)
    flops = int(formula(*args, **kwargs, out_val=out)) if formula else 0
    return [Launch(name, name, moved(read) + moved(written), flops, is_half(inputs))]


def _given(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The arguments that an operator may read: what it is told to write its result to is none of them."""
    results = {argument.name for argument in func._schema.arguments if argument.is_out}
    return tensors_of((args, {name: value for name, value in kwargs.items() if name not in results}))


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The arguments that an operator writes to."""
    found: list[Any] = []
    for index, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            found.append(args[index] if index < len(args) else kwargs.get(argument.name))
    return tensors_of(found)


DATA_GRADIENT, WEIGHT_GRADIENT = "cudnn dgrad", "cudnn wgrad"
Kernels = Iterator[
    tuple[Any, ...]
]  # name, bytes, then FLOPs and whether of 16-bit operands; the main one first


def _copy(args: tuple[Any, ...], _out: Any) -> Kernels:
    yield "copy", moved(args[:2])


def _convolution(args: tuple[Any, ...], out: Tensor) -> Kernels:
    x, weight, bias = args[:3]
    flops = 2 * out.numel() * math.prod(weight.shape[1:])
    yield "cudnn convolution", moved((x, weight, out)), flops, is_half((x,))
    if bias is not None:
        yield "add bias", 2 * footprint(out) + footprint(bias)


def _convolution_backward(args: tuple[Any, ...], out: tuple[Tensor | None, ...]) -> Kernels:
    grad, x, weight = args[:3]
    flops = 2 * grad.numel() * math.prod(weight.shape[1:])
    if args[10][0]:
        yield DATA_GRADIENT, moved((grad, weight, out[0])), flops, is_half((x,))
    if args[10][1]:
        yield WEIGHT_GRADIENT, moved((grad, x, out[1])), flops, is_half((x,))
    if args[10][2]:
        yield "sum of bias gradient", moved((grad, out[2]))


def _group_norm(args: tuple[Any, ...], out: tuple[Tensor, ...]) -> Kernels:
    x, weight, bias = args[:3]
    folded = 8 * x.shape[0] * x.shape[1]  # float32 gain and offset [B, C]
    yield "group_norm apply", moved((x, out[0])) + folded
    yield "group_norm moments", moved((x, *out[1:]))
    yield "group_norm gains", moved((weight, bias, *out[1:])) + folded


def _group_norm_backward(args: tuple[Any, ...], out: tuple[Tensor | None, ...]) -> Kernels:
    grad, x, mean, rstd, weight = args[:5]
    folded = 4 * x.shape[0] * x.shape[1]
    if out[0] is not None:
        yield "group_norm gradient", moved((grad, x, out[0])) + 2 * folded
        yield "group_norm gain", moved((rstd, weight)) + folded
        yield "group_norm terms", moved((mean, rstd, weight)) + 2 * folded
    yield "group_norm sums", moved((grad, x)) + 2 * folded
    if out[1] is not None:
        yield "group_norm parameters", moved((mean, rstd, *out[1:])) + 2 * folded


def _layer_norm_backward(args: tuple[Any, ...], out: tuple[Tensor | None, ...]) -> Kernels:
    grad, x, _, mean, rstd, weight = args[:6]
    yield "layer_norm gradient", moved((grad, x, mean, rstd, weight, out[0]))
    if out[1] is not None:
        yield "layer_norm parameters", moved((grad, x, mean, rstd, *out[1:]))


def _attention_backward(args: tuple[Any, ...], out: tuple[Tensor, ...]) -> Kernels:
    grad, query, key, value, output = args[:5]
    flops = 10 * query.numel() * key.shape[2]
    yield "flash backward", moved((grad, query, key, value, *out[1:3])) + 4 * query.numel(), flops, True
    yield "flash inner products", moved((grad, output)) + 4 * query.numel() // query.shape[-1]
    yield "flash convert", 4 * query.numel() + moved(out[:1])


def _embedding_backward(args: tuple[Any, ...], out: Tensor) -> Kernels:
    yield "embedding gradient", moved(args[:2]) + footprint(args[0])
    yield "zeros", footprint(out)


def _item(args: tuple[Any, ...], _out: Any) -> Kernels:
    yield "copy to the host", moved(args[:1])


def adamw(args: tuple[Any, ...]) -> list[Launch]:
    """Our fused step: a table of addresses is sent, and one kernel follows it to all tensors."""
    parameters, gradients, _first, _second, average, copies = args[:6]
    held = (*parameters, *parameters, *parameters, *(parameters if average else ()))
    table = 8 * 12 * len(parameters)
    bytes_ = 2 * sum(map(footprint, held)) + sum(map(footprint, (*gradients, *copies)))
    return [Launch("copy to the device", "adamw", table), Launch("adamw_kernel", "adamw", bytes_)]


def gradient_norm(args: tuple[Any, ...]) -> list[Launch]:
    """Our norm of all gradients: a table of addresses is sent, one kernel follows it, another adds up."""
    filled = [each for each in args[0] if each.numel()]
    sums = 4 * sum(-(-each.numel() // 65536) for each in filled)
    return [
        Launch("copy to the device", "gradient_norm", 8 * 4 * len(filled)),
        Launch("squares_kernel", "gradient_norm", sum(map(footprint, filled)) + 2 * sums),
        Launch("root_kernel", "gradient_norm", sums + 8),
    ]


# Ours that follow a table of addresses, which tensors without memory do not have.
BY_ADDRESS: dict[Any, Callable[[tuple[Any, ...]], list[Launch]]] = {
    torch.ops.glide_fast.adamw.default: adamw,
    torch.ops.glide_fast.gradient_norm.default: gradient_norm,
}
SPECIAL: dict[str, Callable[[tuple[Any, ...], Any], Kernels]] = {
    "copy_": _copy,
    "convolution": _convolution,
    "convolution_backward": _convolution_backward,
    "native_group_norm": _group_norm,
    "native_group_norm_backward": _group_norm_backward,
    "native_layer_norm_backward": _layer_norm_backward,
    "_scaled_dot_product_flash_attention_backward": _attention_backward,
    "embedding_dense_backward": _embedding_backward,
    "_local_scalar_dense": _item,
}


def _lists(args: tuple[Any, ...], name: str) -> Iterator[int]:
    """Bytes of each launch of a multi-tensor kernel."""
    given = [each for each in args if isinstance(each, list | tuple) and each and isinstance(each[0], Tensor)]
    lists = [each for each in given if len(given) == 1 or each[0].ndim]  # numbers of steps come along
    limit = LIST_TENSORS[min(max(len(lists), 1), 5)]
    accesses = 2 if name.startswith("_fused_") or name.endswith("_") else 1
    tensors, blocks, total = 0, 0, 0
    for row in zip(*lists, strict=True):
        needed = max(1, -(-row[0].numel() // LIST_CHUNK))
        share = accesses * sum(map(footprint, row)) // needed
        tensors += 1
        for left in reversed(range(needed)):
            blocks, total = blocks + 1, total + share
            if blocks == LIST_BLOCKS or (tensors == limit and not left):
                yield total
                tensors, blocks, total = int(left > 0), 0, 0
    if total:
        yield total
