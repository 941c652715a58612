"""Through a model, module by module: what can be served is, the rest is reported."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Literal, TypeAlias, TypeVar, get_args

import torch
from torch import Tensor, nn

from glide_fast.accelerate.attention import propose_attention
from glide_fast.accelerate.clip import propose_clip_attention, propose_clip_pool
from glide_fast.accelerate.norm import propose_head, propose_norm
from glide_fast.accelerate.perceptron import propose_perceptron
from glide_fast.accelerate.plan import Plan
from glide_fast.accelerate.products import Products, check_products
from glide_fast.accelerate.proof import objection
from glide_fast.accelerate.report import Entry, Report
from glide_fast.accelerate.residual import looks_like_residual, propose_residual
from glide_fast.accelerate.swap import plan_of, serve, unserve
from glide_fast.models.kept import available_bytes, fits, packed_bytes, product_weights
from glide_fast.ops import chosen, packed

Model = TypeVar("Model", bound=nn.Module)
Memory: TypeAlias = Literal["full", "low"]

PROPOSALS = (
    propose_residual,
    propose_head,
    propose_norm,
    propose_attention,
    propose_clip_attention,
    propose_clip_pool,
    propose_perceptron,
)
_OURS = "our own module, served already"
_UNKNOWN = "not a form that glide_fast knows"
_PYTORCH = "PyTorch's own computes it"
_WAITING = "can be served: call glide_fast.accelerate(model)"


@dataclass(frozen=True, kw_only=True)
class _Finding:
    path: str
    module: nn.Module
    plan: Plan | None  # that serves it or can
    note: str  # why it is left alone, where there is no plan


def accelerate(model: Model, *, memory: Memory = "full", conv: Products = "library") -> Model:
    """Serve the hot paths of a model, of whatever origin, by our ops; the model itself is returned.

    Residual blocks, GroupNorms and attentions are replaced where structure and a trial on random numbers show
    that ours compute the same, within 1e-4 of the largest output in float32; in half precision ours round
    less often. Parameters are shared and read when they are used; names, attributes, hooks, checkpointing,
    dtype and device changes go on as before. Once accelerated, a model is differentiable once: second
    derivatives need :func:`restore`. A second call only looks for what is new.

    On CPU, inference reads weights in a packed form, which for 3x3 convolutions is up to four times as large.
    ``memory="full"`` keeps that form of every weight that is not being trained, until the weight changes or
    :func:`restore` is called; with "low" it is made again at each use.

    On a GPU, ``conv="triton"`` has our Triton kernels compute 3x3 convolutions and linear layers, with what
    follows them and the statistics of the next norm in one launch; with "library" cuDNN and cuBLAS compute
    them. For it, 3x3 weights are laid out channels-last, as ``model.to(memory_format=torch.channels_last)``
    does, until :func:`restore`; safetensors' own ``save_file`` wants them restored.

    Raises:
        TypeError: ``model`` is not an ``nn.Module``.
        ValueError: an unknown ``memory`` or ``conv``; or ``conv="triton"`` for weights that are not on a GPU,
            or without Triton, or on a GPU that is too old for it.
        MemoryError: the packed forms do not fit into the memory that is available.

    Warns:
        UserWarning: nothing in the model was recognised.
    """
    if memory not in get_args(Memory):
        raise ValueError(f"unknown memory {memory!r}; use one of {', '.join(get_args(Memory))}")
    check_products(model, conv)
    findings = _examine(model)
    for finding in findings:
        if finding.plan is not None and plan_of(finding.module) is None:
            serve(finding.module, finding.plan)
    if not any(finding.plan is not None or finding.note == _OURS for finding in findings):
        warnings.warn(
            f"nothing in this {type(model).__name__} is a form that glide_fast knows; it stays as it was "
            f"(glide_fast.accelerate.report(model) has the details)",
            stacklevel=2,
        )
    products = _products(model)
    chosen.forget(products)
    if conv == "triton":
        chosen.choose(products)
    weights = [weight for weight in products if weight.device.type == "cpu"]
    if memory == "low":
        packed.forget(weights)
    elif not fits(weights):
        raise MemoryError(
            f"packed weights would take up to {packed_bytes(weights) / 1e9:.1f} GB and the system has "
            f'{(available_bytes() or 0) / 1e9:.1f} GB; use accelerate(model, memory="low")'
        )
    else:
        packed.keep(weights)
    return model


def _products(model: nn.Module) -> list[Tensor]:
    """The weights that our ops multiply by."""
    plans = ((module, plan_of(module)) for module in model.modules())
    return [
        *product_weights(model.modules()),
        *(weight for module, plan in plans if plan is not None for weight in plan.products(module)),
    ]


def restore(model: Model) -> Model:
    """Undo :func:`accelerate`: every module computes as its own class says; the model is returned.

    Raises:
        TypeError: ``model`` is not an ``nn.Module``.
        ValueError: a served module was parametrized since; remove the parametrization first.
    """
    _check(model)
    products = _products(model)
    packed.forget(products)
    chosen.forget(products)
    for module in model.modules():
        unserve(module)
    return model


def report(model: nn.Module) -> Report:
    """What our ops serve in a model as it is now, and what was left alone, with the reason.

    Raises:
        TypeError: ``model`` is not an ``nn.Module``.
    """
    served: list[Entry] = []
    left: list[Entry] = []
    for finding in _examine(model):
        active = plan_of(finding.module) is not None or finding.note == _OURS
        note = finding.note if finding.plan is None else finding.plan.title if active else _WAITING
        entry = Entry(path=finding.path, kind=type(finding.module).__name__, note=note)
        (served if active else left).append(entry)
    products = _products(model)
    by_triton = sum(chosen.is_chosen(weight) for weight in products)
    return Report(
        model=type(model).__name__,
        served=tuple(served),
        left=tuple(left),
        products=len(products),
        by_triton=by_triton,
    )


def _check(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; give an nn.Module, or its parts one by one")


def _examine(model: nn.Module) -> list[_Finding]:
    """What is served, can be served, or looks as if it should be; a block stands for the parts it skips."""
    _check(model)
    findings: list[_Finding] = []
    passed: set[nn.Module] = set()
    for path, module in model.named_modules():
        if module in passed:
            continue
        plan, note = _decide(module)
        if plan is not None:
            passed.update(plan.inner(module))
        if note == _OURS or isinstance(module, torch.jit.ScriptModule):
            passed.update(module.modules())
        if plan is not None or note:
            findings.append(_Finding(path=path, module=module, plan=plan, note=note))
    return [finding for finding in findings if not _is_container(finding, findings)]


def _decide(module: nn.Module) -> tuple[Plan | None, str]:
    """The plan for a module; or why it has none, "" where nobody would expect one."""
    plan = plan_of(module)
    if plan is not None:
        return plan, ""
    if isinstance(module, torch.jit.ScriptModule):
        return None, "a compiled script, closed to replacements; load the model as Python code"
    if type(module).__module__.partition(".")[0] == "glide_fast":
        return None, _OURS
    objections = []
    for plan in (plan for propose in PROPOSALS for plan in propose(module)):
        problem = objection(module, plan)
        if problem is None:
            return plan, ""
        objections.append(f"not {plan.title}: {problem}")
    return None, "; ".join(objections) or _expectation(module)


def _expectation(module: nn.Module) -> str:
    """A note on a module that no plan was proposed for, if it is of a kind that is hot."""
    name = type(module).__name__.lower()
    if "norm" in name and not module._modules:
        return _PYTORCH if isinstance(module, _TORCH_NORMS) else _UNKNOWN
    if "attention" in name or looks_like_residual(module):
        return _PYTORCH if isinstance(module, nn.MultiheadAttention) else _UNKNOWN
    return ""


_TORCH_NORMS = (nn.LayerNorm, nn.modules.batchnorm._BatchNorm, nn.RMSNorm)


def _is_container(finding: _Finding, findings: list[_Finding]) -> bool:
    """Whether an unknown attention only holds one that was found inside it."""
    if finding.note != _UNKNOWN or looks_like_residual(finding.module):
        return False
    prefix = f"{finding.path}." if finding.path else ""
    inside = (each for each in findings if each is not finding and each.path.startswith(prefix))
    return any("attention" in type(each.module).__name__.lower() for each in inside)
