"""What a training step of a model takes, found by running it on tensors that have shapes and no memory.

Forward pass, loss and backward pass are the trainer's own, on the meta device: matrix products are counted by
torch's formulas, what autograd keeps with its hooks, and every other tensor while it is alive.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from glide_fast.models.configs import Config
from glide_fast.ops import flops as _formulas  # noqa: F401 (they count our ops)
from glide_fast.training.blank_pass import storage_key, training_loss, training_model


@dataclass(frozen=True, kw_only=True)
class Trace:
    """FLOPs and bytes of one forward and backward pass over ``batch`` pictures.

    ``activations`` is what autograd keeps for the backward pass, ``copies`` the weights that it keeps in the
    dtype of the activations, ``workspace`` what the pass needs besides at its worst moment: temporary
    tensors, and activations that are computed again. Weights and their gradients are not among them.
    """

    batch: int
    forward_flops: int
    step_flops: int
    activations: int
    copies: int
    workspace: int

    @property
    def peak(self) -> int:
        """All the bytes that have to be there at the worst moment."""
        return self.activations + self.copies + self.workspace


def trace(
    config: Config,
    batch: int,
    *,
    dtype: torch.dtype,
    recompute: bool = False,
    device: str = "meta",
) -> Trace:
    """Run one pass for ``batch`` pictures, on meta tensors unless a real ``device`` is to be measured.

    Args:
        config: the model.
        batch: pictures, at least 1.
        dtype: of the activations; weights are float32.
        recompute: whether the blocks' activations are computed again in the backward pass.
        device: "meta" allocates nothing; on another the same pass is computed in earnest.
    """
    model = training_model(config, dtype, recompute=recompute, device=device)
    meter = Meter(model.parameters())
    saved = _Saved(model.parameters())
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(meter.forget_gradient)  # type: ignore[no-untyped-call]
    with meter:
        with saved_tensors_hooks(saved.keep, lambda tensor: tensor):
            loss = training_loss(model, config, batch, device)
        forward_flops = meter.flops
        kept, copies = saved.count(meter.copies)
        torch.autograd.backward(loss)
    return Trace(
        batch=batch,
        forward_flops=forward_flops,
        step_flops=meter.flops,
        activations=kept,
        copies=copies,
        workspace=meter.peak - kept - copies,
    )


class _Saved:
    """The storages that autograd keeps, each once, without those of the parameters."""

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self._parameters = {storage_key(parameter) for parameter in parameters}
        self._kept: dict[int, torch.UntypedStorage] = {}

    def keep(self, tensor: Tensor) -> Tensor:
        """The hook that autograd calls with everything it keeps."""
        key = storage_key(tensor)
        if key not in self._parameters:
            self._kept[key] = tensor.untyped_storage()
        return tensor

    def count(self, copies: set[int]) -> tuple[int, int]:
        """Bytes of activations and of copies of weights; the storages are let go."""
        of_copies = sum(storage.nbytes() for key, storage in self._kept.items() if key in copies)
        total = sum(storage.nbytes() for storage in self._kept.values())
        self._kept.clear()
        return total - of_copies, of_copies


class Meter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Context that counts ``flops``, and the bytes of its tensors: those alive ``now``, and their ``peak``.

    ``copies`` are the storages of parameters in another dtype. The formulas are those of torch's
    ``FlopCounterMode``, which itself would lengthen the life of tensors that are computed again.
    """

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops = self.now = self.peak = 0
        self.copies: set[int] = set()
        self._parameters = {storage_key(parameter) for parameter in parameters}
        self._alive: dict[int, tuple[int, Any]] = {}

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        formula = flop_registry.get(func.overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **kwargs, out_val=result)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._note(leaf.untyped_storage())
        if func is torch.ops.aten._to_copy.default and storage_key(args[0]) in self._parameters:
            self.copies.add(storage_key(result))
        return result

    def forget_gradient(self, parameter: Tensor) -> None:
        """A hook for parameters: their gradients are counted elsewhere."""
        if parameter.grad is not None:
            self._forget(storage_key(parameter.grad))

    def _note(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._alive or key in self._parameters:
            return
        self._alive[key] = (storage.nbytes(), weakref.ref(storage, lambda _: self._forget(key)))
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)

    def _forget(self, key: int) -> None:
        size, _ = self._alive.pop(key, (0, None))
        self.now -= size
        self.copies.discard(key)
