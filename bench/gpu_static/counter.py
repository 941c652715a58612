"""Counts the launches of a computation on CUDA tensors that have no memory.

An operator of PyTorch costs what :mod:`bench.gpu_static.aten` says. An operator of ours is served as on a
GPU: by what is registered for the CUDA key, which runs on the memoryless tensors up to its kernels; these
are written down in place of being launched. So whatever a launcher does around its kernels, copies and
buffers, is counted as well.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import glide_fast.ops.flops  # noqa: F401 (tells the registry of our ops)
from bench.gpu_static import aten
from bench.gpu_static.launches import Launch, is_half, moved

CAPABILITY = (9, 0)  # of the device that is counted for
# CUDA has kernels of these, for which a decomposition would be found.
_WHOLE = {
    *(torch.ops.aten.upsample_nearest2d, torch.ops.aten.upsample_bilinear2d),
    torch.ops.aten.silu_backward,
}
_CUDA = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)


class LaunchCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Writes down every launch inside its context."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.launches: list[Launch] = []

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Let torch.compile do its work, and see the operators that the compiled code calls."""
        return True

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Call the operator and write its launches down."""
        kwargs = kwargs or {}
        if func in aten.BY_ADDRESS:
            self.launches += aten.BY_ADDRESS[func](args)
            return func(*args)
        if func.namespace == "glide_fast" and any(each.is_cuda for each in aten.tensors_of(args)):
            return self._served(func, args)
        if func._overloadpacket not in _WHOLE and func.namespace != "prim" and func._can_decompose():
            with self:
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        out = func(*args, **kwargs)
        self.launches += aten.launches(func, args, kwargs, out)
        return out

    def _served(self, func: Any, args: tuple[Any, ...]) -> Any:
        """What serves the operator on CUDA; its FLOPs go to the largest kernel where none states its own."""
        first = len(self.launches)
        with self:
            out = func.redispatch(_CUDA, *args)
        name = func._schema.name.removeprefix("glide_fast::")
        mine = _as_calls([replace(each, op=name) for each in self.launches[first:]])
        formula = flop_registry.get(func._overloadpacket)
        if mine and formula and not any(each.flops for each in mine):
            largest = max(range(len(mine)), key=lambda index: mine[index].moved)
            flops = int(formula(*args, out_val=out))
            mine[largest] = replace(mine[largest], flops=flops, half=is_half(aten.tensors_of(args)))
        self.launches[first:] = mine
        return out

    def kernel(self, jit: Any, arguments: dict[str, Any]) -> None:
        """Write down a Triton kernel that is about to be launched with these arguments.

        It moves each of its tensors once, unless its module says more: ``WORK`` maps a kernel's name to a
        function of its arguments that returns bytes and FLOPs.
        """
        name = jit.fn.__name__
        stated = getattr(sys.modules.get(jit.fn.__module__), "WORK", {}).get(name)
        tensors = [getattr(each, "base", each) for each in arguments.values()]
        tensors = [each for each in tensors if isinstance(each, Tensor)]
        bytes_, flops = stated(arguments) if stated else (moved(tensors), 0)
        # What adds a bias alone belongs to the convolution's call, as the kernel of PyTorch that does so.
        further = jit.fn.__module__.endswith("convolution_sum") and not arguments["RESIDUAL"]
        self.launches.append(Launch(name, "triton", bytes_, flops, is_half(tensors), further))


def _as_calls(launches: list[Launch]) -> list[Launch]:
    """One op's launches; a convolution's two gradients are one call, also where they are asked for apart."""
    names = {each.kernel for each in launches}
    apart = {aten.DATA_GRADIENT, aten.WEIGHT_GRADIENT} <= names
    return [
        replace(each, further=each.further or (apart and each.kernel == aten.WEIGHT_GRADIENT))
        for each in launches
    ]


def _without_memory(*_: object) -> None:
    """What nobody calls: the counter sees the operator first."""
    raise RuntimeError("this torch has no kernels for CUDA; run it with one that has")


@contextmanager
def _device(counter: LaunchCounter) -> Iterator[None]:
    """Make launchers believe in the device, and hand their kernels to the counter."""
    with ExitStack() as stack:
        patch = stack.enter_context
        patch(mock.patch.object(FakeTensor, "data_ptr", create=True, return_value=0))
        if not torch.cuda.is_available():
            patch(mock.patch.object(torch.cuda, "_exchange_device", return_value=0))
            patch(mock.patch.object(torch.cuda, "_maybe_exchange_device", return_value=0))
            patch(mock.patch.object(torch.cuda, "current_device", return_value=0))
            patch(mock.patch.object(torch.cuda, "get_device_capability", return_value=CAPABILITY))
        if not torch._C._dispatch_has_kernel_for_dispatch_key("aten::silu_backward", "CUDA"):
            # Without a kernel of CUDA's, autograd decomposes it before the counter sees it.
            library = patch(torch.library._scoped_library("aten", "IMPL"))
            library.impl("silu_backward", _without_memory, "CUDA")
        try:
            from triton.runtime.jit import JITFunction
        except ImportError:
            yield
            return

        def write_down(jit: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:  # noqa: ARG001
            counter.kernel(jit, {**dict(zip(jit.arg_names, args, strict=False)), **kwargs})

        patch(mock.patch.object(JITFunction, "run", write_down))
        yield


def _nothing(_counter: LaunchCounter) -> AbstractContextManager[None]:
    return nullcontext()


def count(
    build: Callable[[], Callable[[], object]],
    within: Callable[[LaunchCounter], AbstractContextManager[None]] = _nothing,
) -> list[Launch]:
    """The launches of the second call of what ``build`` returns; all runs on tensors without memory.

    ``within`` may give the counter more to see: a context in which all of it happens.
    """
    counter = LaunchCounter()
    with FakeTensorMode(allow_non_fake_inputs=True), _device(counter), within(counter):
        call = build()
        with counter:
            call()
            counter.launches.clear()  # with them what is made once
            call()
    return counter.launches


def by_op(launches: Sequence[Launch]) -> list[tuple[str, str, int, int]]:
    """Operator, kernel, number of launches and bytes, the most frequent first."""
    numbers: Counter[tuple[str, str]] = Counter()
    bytes_: Counter[tuple[str, str]] = Counter()
    for each in launches:
        numbers[each.op, each.kernel] += 1
        bytes_[each.op, each.kernel] += each.moved
    return [(*key, number, bytes_[key]) for key, number in numbers.most_common()]
