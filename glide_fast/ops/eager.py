"""Whether an op is called by eager code, whose tensors tell when they change.

Compiled code calls ops as well, but reuses the memory of their results without raising versions: what a
kernel keeps beside a result, to be looked up by the next op, must not be kept there.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch


class _Calls(threading.local):
    eager = False


_calls = _Calls()


def eagerly(op: Callable[..., Any], *args: Any) -> Any:
    """Call an op; while it runs :func:`is_eager` is true, unless this is being compiled."""
    if torch.compiler.is_compiling():
        return op(*args)
    outer, _calls.eager = _calls.eager, True
    try:
        return op(*args)
    finally:
        _calls.eager = outer


def is_eager() -> bool:
    """Whether the op that runs was called by :func:`eagerly`."""
    return _calls.eager
