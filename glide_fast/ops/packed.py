"""Weights in the form that the CPU's kernels read, kept beside the parameters they were made from.

A form is kept only for parameters that were asked for (:func:`keep`) and only while they are as they were:
their version counter, their memory and a sample of their values are compared at each use. Forms belong to
this process: they are not part of a model's state, its copies or its pickles, and end with their parameter.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from glide_fast.ops.dispatch import cpp_library


class _Stamp(NamedTuple):
    version: int
    address: int
    sample: int


class _Projection(NamedTuple):
    source: weakref.ref[Tensor]
    sample: int
    result: Tensor


@dataclass
class _Forms:
    stamp: _Stamp | None = None
    forms: dict[Any, Any] = field(default_factory=dict)


_kept: Any = WeakTensorKeyDictionary()


def keep(weights: Iterable[Tensor]) -> None:
    """From now on keep the packed forms of these weights; each is made when it is first used.

    Inference tensors, which do not count their versions, and views with gaps are passed over. Without the C++
    library, whose forms they are, nothing is kept.
    """
    if cpp_library() is None:
        return
    for weight in weights:
        if weight not in _kept and not weight.is_inference() and _is_dense(weight):
            _kept[weight] = _Forms()


def _is_dense(weight: Tensor) -> bool:
    return weight.is_contiguous() or (
        weight.ndim == 4 and weight.is_contiguous(memory_format=torch.channels_last)
    )


def forget(weights: Iterable[Tensor]) -> None:
    """Keep no forms of these weights, and free those there are."""
    for weight in weights:
        _kept.pop(weight, None)


def kept_bytes() -> int:
    """Memory of all kept forms."""
    forms = (form for kept in _kept.values() for form in kept.forms.values())
    return sum((form.result if isinstance(form, _Projection) else form).nbytes for form in forms)


def trained(weight: Tensor) -> Tensor:
    """A weight as the forward pass of its training sees it: no form is kept that the next step outdates."""
    return weight.detach() if weight.requires_grad and weight.device.type == "cpu" else weight


def _forms_of(weight: Tensor) -> dict[Any, Any] | None:
    """The forms of a weight as it is now; None if none are kept."""
    kept: _Forms | None = _kept.get(weight) if weight.device.type == "cpu" else None
    if kept is None:
        return None
    stamp = _Stamp(weight._version, weight.data_ptr(), torch.ops.glide_fast.fingerprint(weight))
    if kept.stamp != stamp:
        kept.stamp, kept.forms = stamp, {}
    return kept.forms


def packed(weight: Tensor, form: Any, pack: Callable[[], Tensor]) -> Tensor | None:
    """The ``form`` of a weight, made by ``pack`` if missing or out of date; None if not kept."""
    forms = _forms_of(weight)
    if forms is None:
        return None
    if form not in forms:
        with torch.inference_mode(False), torch.no_grad():
            forms[form] = pack()
    return forms[form]  # type: ignore[no-any-return]


def projected(weight: Tensor, source: Tensor, project: Callable[[], Tensor]) -> Tensor:
    """``project()``, or its last result if weight and source are those of the last time and unchanged.

    For what a model computes of its prompt at every step: the same tensor ``source`` gives the same result.
    """
    differentiable = torch.is_grad_enabled() and (source.requires_grad or weight.requires_grad)
    forms = None if differentiable else _forms_of(weight)
    if forms is None:
        return project()
    last: _Projection | None = forms.get(_Projection)
    sample = torch.ops.glide_fast.fingerprint(source.contiguous())
    if last is None or last.source() is not source or last.sample != sample:
        last = _Projection(weakref.ref(source), sample, project().detach())
        forms[_Projection] = last
    return last.result
