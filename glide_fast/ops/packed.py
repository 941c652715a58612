"""Weights in the form that the CPU's kernels read, kept beside the parameters they were made from.

A form is kept only for parameters that were asked for (:func:`keep`) and only while they are as they were:
their version counter, their memory and a sample of their values are compared at each use. Forms belong to
this process: they are not part of a model's state, its copies or its pickles, and end with their parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary


class _Stamp(NamedTuple):
    version: int
    address: int
    sample: int


@dataclass
class _Forms:
    stamp: _Stamp | None = None
    forms: dict[Any, Tensor] = field(default_factory=dict)


_kept: Any = WeakTensorKeyDictionary()


def keep(weights: Iterable[Tensor]) -> None:
    """From now on keep the packed forms of these weights; each is made when it is first used.

    Inference tensors, which do not count their versions, and views with gaps are passed over.
    """
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
    return sum(form.nbytes for forms in _kept.values() for form in forms.forms.values())


def packed(weight: Tensor, form: Any, pack: Callable[[], Tensor]) -> Tensor | None:
    """The ``form`` of a weight, made by ``pack`` if missing or out of date; None if not kept."""
    forms: _Forms | None = _kept.get(weight)
    if forms is None:
        return None
    stamp = _Stamp(weight._version, weight.data_ptr(), torch.ops.glide_fast.fingerprint(weight))
    if forms.stamp != stamp:
        forms.stamp, forms.forms = stamp, {}
    if form not in forms.forms:
        with torch.inference_mode(False), torch.no_grad():
            forms.forms[form] = pack()
    return forms.forms[form]
