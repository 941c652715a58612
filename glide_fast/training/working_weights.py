"""16-bit copies of a model's weights, which its passes read in place of converting the weights at each use.

The float32 weights remain the truth (Mixed Precision Training, arXiv 1710.03740, section 3.1): they are what
is saved, averaged and resumed. A copy has the values that converting would give, and its 16-bit gradient
becomes that of its weight; where a batch is taken in parts, these are summed in float32.

Only for a process alone: DDP exchanges the gradients of the weights it was given at the start, and under
FSDP2 a process has but a share of them, so that there weights are converted as they are used.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from glide_fast.models.configs import Config
from glide_fast.training.blank_pass import storage_key, training_loss, training_model
from glide_fast.training.config import TrainConfig
from glide_fast.training.distributed import World


class WorkingWeights:
    """Copies in ``dtype`` of the parameters of a model that have these names."""

    def __init__(self, model: nn.Module, names: Collection[str], dtype: torch.dtype) -> None:
        self._parameters = [model.get_parameter(name) for name in names]
        self._copies = [
            nn.Parameter(torch.empty_like(each, dtype=dtype, memory_format=torch.preserve_format))
            for each in self._parameters
        ]
        owners = [name.rpartition(".") for name in names]
        self._places = [(model.get_submodule(owner)._parameters, key) for owner, _, key in owners]
        self._versions: list[int] = []
        for each in self._parameters:
            each.grad_dtype = None  # any

    @classmethod
    def of(cls, model: nn.Module, config: TrainConfig, world: World) -> WorkingWeights:
        """Those of a run's model where it is; none in float32, or with other processes."""
        dtype: torch.dtype = getattr(torch, config.compute_dtype)
        return cls(model, [] if world.size > 1 else converted_names(config.network, dtype), dtype)

    @property
    def copies(self) -> Mapping[Tensor, Tensor]:
        """The copy of each parameter that has one."""
        return dict(zip(self._parameters, self._copies, strict=True))

    @contextmanager
    def lent(self) -> Iterator[None]:
        """For a forward and a backward pass; afterwards their gradients are added to those of the weights."""
        self._refresh()
        self._put(self._copies)
        try:
            yield
        finally:
            self._put(self._parameters)
        self._collect()

    def written(self) -> None:
        """To be told by who changed the weights and wrote the same into the copies."""
        self._versions = [each._version for each in self._parameters]

    def _refresh(self) -> None:
        """Copy weights that have changed: loaded, resumed, or moved by an optimiser that writes no copies."""
        if self._versions != [each._version for each in self._parameters]:
            with torch.no_grad():
                torch._foreach_copy_([*self._copies], [*self._parameters])
            self.written()

    def _put(self, tensors: Sequence[nn.Parameter]) -> None:
        for (parameters, key), tensor in zip(self._places, tensors, strict=True):
            parameters[key] = tensor

    def _collect(self) -> None:
        """The first gradient of a weight is the copy's own; with more they are summed in float32."""
        more: list[tuple[Tensor, Tensor]] = []
        for parameter, copy in zip(self._parameters, self._copies, strict=True):
            gradient, copy.grad = copy.grad, None
            if gradient is not None and parameter.grad is not None:
                more.append((parameter, gradient))
            elif gradient is not None:
                parameter.grad = gradient
        if more:
            parameters = [parameter for parameter, _ in more]
            widen_gradients(parameters)
            sums = [each.grad for each in parameters if each.grad is not None]
            torch._foreach_add_(sums, _widened([gradient for _, gradient in more]))


def widen_gradients(parameters: Sequence[Tensor]) -> None:
    """Make gradients float32 that have fewer bits than their float32 parameters."""
    narrow = [each for each in parameters if each.grad is not None and each.grad.dtype is not each.dtype]
    wide = _widened([each.grad for each in narrow if each.grad is not None])
    for parameter, gradient in zip(narrow, wide, strict=True):
        parameter.grad = gradient


def _widened(tensors: list[Tensor]) -> list[Tensor]:
    wide = [torch.empty_like(each, dtype=torch.float32) for each in tensors]
    if wide:
        torch._foreach_copy_(wide, tensors)
    return wide


def converted_names(config: Config, dtype: torch.dtype) -> list[str]:
    """The parameters that a training step's forward pass converts to ``dtype``, once, and uses no other way.

    Found by running it on tensors without memory; in float32 there are none.
    """
    if dtype is torch.float32:
        return []
    model = training_model(config, dtype, recompute=False, device="meta")
    uses = _Uses(dtype)
    with uses:
        training_loss(model, config, 1, "meta")
    return [
        name
        for name, parameter in model.named_parameters()
        if (uses.converted[storage_key(parameter)], uses.others[storage_key(parameter)]) == (1, 0)
    ]


class _Uses(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts how often each storage is converted to a dtype, and read in another way."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._dtype = dtype
        self.converted: Counter[int] = Counter()
        self.others: Counter[int] = Counter()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        is_conversion = func is torch.ops.aten._to_copy.default and result.dtype is self._dtype
        counter = self.converted if is_conversion else self.others
        counter.update(storage_key(each) for each in tree_leaves(args) if isinstance(each, Tensor))
        return result
