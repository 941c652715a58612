"""How a module is served: its class is exchanged for a subclass with one method replaced.

A function stored on the instance would be simpler, but it stays bound to the object it was made for: a deep
copy or a ``DataParallel`` replica would compute with the original's weights, and a pickle would carry a
closure. With a class, as PyTorch's own parametrizations and FSDP do it, ``self`` is always the object at
hand; ``isinstance``, attributes, hooks, parameters and buffers are untouched, the instance holds nothing new,
and undoing is one assignment. Copies and pickles are served like their original; loading such a pickle needs
glide_fast, so restore before writing files for others.

The subclass looks for what would not survive being passed over: where a submodule that the replacement skips
has been exchanged, or is watched by a hook, the module's own method runs.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.nn.modules import module as torch_module

from glide_fast.accelerate.plan import ORIGINAL, Plan, types_of
from glide_fast.models.layers import is_watched

_PLAN = "_glide_fast_plan"


def plan_of(module: nn.Module) -> Plan | None:
    """The plan by which a module is served, or None."""
    return getattr(type(module), _PLAN, None)


def serve(module: nn.Module, plan: Plan) -> None:
    """From now on ``plan`` serves the module."""
    original: Any = type(module)
    module.__class__ = served_class(original, plan)


def unserve(module: nn.Module) -> None:
    """Give a module its own class back, if it has a served one.

    Raises:
        ValueError: its class was derived further since, by a parametrization of one of its parameters.
    """
    if plan_of(module) is None:
        return
    if _PLAN not in vars(type(module)):
        raise ValueError(
            f"the class of this {type(module).__name__} was changed after accelerate, as a parametrization "
            f"does it; undo that before restore"
        )
    module.__class__ = getattr(type(module), ORIGINAL)


@functools.cache
def served_class(original: Any, plan: Plan) -> Any:
    """The subclass of a module's class, with its name, whose method ``plan.method`` is served."""
    contents = {
        _PLAN: plan,
        ORIGINAL: original,
        plan.method: _method(getattr(original, plan.method), plan),
        "__reduce_ex__": _reduce,
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
    }
    return type(original)(original.__name__, (original,), contents)


def _method(own: Callable[..., Any], plan: Plan) -> Callable[..., Any]:
    signature = inspect.signature(own)

    @functools.wraps(own)
    def method(self: nn.Module, *inputs: Any, **named: Any) -> Any:
        if named:
            inputs = signature.bind(self, *inputs, **named).args[1:]
        if plan.fits(inputs) and not _is_watched(self, plan):
            return plan.serve(self, inputs)
        return own(self, *inputs)

    return method


def _is_watched(module: nn.Module, plan: Plan) -> bool:
    """Whether a submodule that the plan skips has been exchanged or has someone who waits for its call."""
    inner = plan.inner(module)
    if not inner:
        return False
    if types_of(inner) != plan.inner_types or torch_module._has_any_global_hook():  # type: ignore[no-untyped-call]
        return True
    return any(is_watched(part) or "forward" in part.__dict__ for part in inner)


def _reduce(self: Any, protocol: int) -> Any:
    """As the original class would be pickled or copied, and the plan."""
    served = type(self)
    original = getattr(served, ORIGINAL)
    make, arguments, *rest = original.__reduce_ex__(self, protocol)
    arguments = tuple(original if each is served else each for each in arguments)
    return (_revive, (getattr(served, _PLAN), make, arguments), *rest)


def _revive(plan: Plan, make: Callable[..., nn.Module], arguments: tuple[Any, ...]) -> nn.Module:
    module = make(*arguments)
    serve(module, plan)
    return module
