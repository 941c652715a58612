"""A stand-in for CUDA's graphs on the CPU: it records operators with the addresses that they read and write.

As on a GPU nothing else is replayed: no Python, no copy of an argument, no look at a number. Memory from
outside is not kept alive by a recording, and reading it when it is gone is an error; a recording alone
computes nothing; a look into a tensor, or a random number, cannot be recorded.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from glide_fast.sampling.graph import Recording, Tensors

_aten = torch.ops.aten
LOOKS = (_aten._local_scalar_dense, _aten.item, _aten.is_nonzero, _aten.nonzero)


@dataclass(frozen=True)
class Address:
    """Where a tensor from outside is."""

    storage: weakref.ref[torch.UntypedStorage]
    layout: tuple[int, torch.Size, tuple[int, ...]]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> Address:
        layout = tensor.storage_offset(), tensor.shape, tensor.stride()
        return cls(weakref.ref(tensor.untyped_storage()), layout, tensor.dtype)

    def read(self) -> Tensor:
        storage = self.storage()
        if storage is None:
            raise RuntimeError("illegal memory access: a recorded tensor is gone")
        return torch.empty(0, dtype=self.dtype).set_(storage, *self.layout)


class Tape(TorchDispatchMode):
    """Records while it is entered; :meth:`replay` does the operators again."""

    def __init__(self) -> None:
        super().__init__()
        self._own: dict[int, torch.UntypedStorage] = {}
        self._operators: list[tuple[Any, Any, Any, Any]] = []

    @property
    def nbytes(self) -> int | None:
        return sum(storage.nbytes() for storage in self._own.values())

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.overloadpacket in LOOKS:
            raise RuntimeError(f"{func} is not permitted while a stream is captured")
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise RuntimeError(f"{func} draws a random number")
        known = {tensor.untyped_storage()._cdata for tensor in tensors_of((args, kwargs))}
        result = func(*args, **kwargs)
        fresh = [each for each in tensors_of(result) if each.untyped_storage()._cdata not in known]
        arguments = tree_map(self._remember, (args, kwargs))
        for tensor in fresh:
            self._own[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        self._operators.append((func, arguments, result, fresh))
        return result

    def _remember(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or value.untyped_storage()._cdata in self._own:
            return value
        return Address.of(value)

    def forget_results(self) -> None:
        """What a recording leaves in its results is not what was computed while recording."""
        for _, _, _, fresh in self._operators:
            for tensor in fresh:
                if tensor.is_floating_point():
                    tensor.fill_(math.nan)

    def replay(self) -> None:
        for func, arguments, recorded, fresh in self._operators:
            args, kwargs = tree_map(_read, arguments)
            result = func(*args, **kwargs)
            for target, value in zip(tensors_of(recorded), tensors_of(result), strict=True):
                if any(target is each for each in fresh):
                    target.copy_(value)


def _read(value: Any) -> Any:
    return value.read() if isinstance(value, Address) else value


def tensors_of(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


@dataclass
class StandIn:
    """The recorder: counts what it is asked for; ``stream`` is the pretended one, ``bytes`` what it has."""

    stream: int = 0
    bytes: int | None = None
    warm_ups: int = 0
    tapes: list[weakref.ref[Tape]] = field(default_factory=list)
    replays: int = 0

    @property
    def records(self) -> int:
        return len(self.tapes)

    def serves(self, _device: torch.device) -> bool:
        return True

    def place(self, device: torch.device) -> Hashable:
        return device, self.stream

    def room(self, _device: torch.device) -> int | None:
        return self.bytes

    def warm_up(self, _device: torch.device, function: Callable[[], Tensors]) -> Tensors:
        self.warm_ups += 1
        return function()

    def record(self, _device: torch.device, function: Callable[[], Tensors]) -> tuple[Recording, Tensors]:
        tape = Tape()
        with tape:
            results = function()
        tape.forget_results()
        self.tapes.append(weakref.ref(tape))
        return _Counted(tape, self), results


@dataclass
class _Counted:
    tape: Tape
    owner: StandIn

    @property
    def nbytes(self) -> int | None:
        return self.tape.nbytes

    def replay(self) -> None:
        self.owner.replays += 1
        self.tape.replay()
