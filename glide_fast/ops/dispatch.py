"""The operator library `glide_fast`: schemas, implementations by device, and the switch to the reference.

PyTorch's dispatcher chooses the implementation (there is no `if backend ==` anywhere):

- schemas are defined here, in Python, once;
- the reference of `reference.py` is registered as CompositeExplicitAutograd: the default on every device;
- csrc/ (built by setup.py as `glide_fast._C`) registers the CPU key when it is loaded;
- `glide_fast.kernels` (Triton) registers the CUDA key;
- a fake of each op serves Meta tensors and torch.compile.

A later registration for a device key wins over the default.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

NAMESPACE = "glide_fast"
LIBRARY: Any = torch.library.Library(NAMESPACE, "FRAGMENT")  # type: ignore[no-untyped-call]
DEVICE_KEYS = ("CPU", "CUDA")
ISA_VARIABLE = "GLIDE_FAST_ISA"
_ISA_NAMES = {"generic": "C++", "avx2": "C++ AVX2+FMA", "avx512": "C++ AVX-512"}
_CPP_OPS = ("group_norm", "group_norm_backward")  # by instruction set
_PLAIN_CPP_OPS = ("norm_apply", "sampler_step")  # the same on every CPU


@dataclass(frozen=True, kw_only=True)
class Implementation:
    """Which code serves one op on one device key, and why: a row of `glide-fast doctor`."""

    op: str
    device: str
    name: str
    reason: str


_references: dict[Any, Callable[..., Any]] = {}
_defaults: dict[str, Callable[..., Any]] = {}
# (op, device key) -> name and reason of the implementation
_served: dict[tuple[str, str], tuple[str, str]] = {}
# Why a device key has nothing but the reference.
_missing = dict.fromkeys(DEVICE_KEYS, "no library was loaded")


def define(
    name: str,
    schema: str,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    default: Callable[..., Any] | None = None,
) -> Any:
    """Define op `name` with its default and its fake; returns the callable overload.

    The reference can also be called as op `name`_reference, which no device overrides: compiled code hands
    over to it what it does not serve itself.

    Args:
        name: name inside the namespace `glide_fast`.
        schema: arguments and returns, "(Tensor x) -> Tensor".
        reference: plain PyTorch on the op's own arguments; it defines what is correct.
        fake: returns empty tensors of the right shapes, dtypes and strides.
        default: serves devices that have nothing of their own, if that is not the reference: what is made
            of other ops, each served by the device's best.
    """
    for op, function in ((name, default or reference), (f"{name}_reference", reference)):
        LIBRARY.define(op + schema, tags=(torch.Tag.pt2_compliant_tag,))
        LIBRARY.impl(op, function, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{op}", fake, lib=LIBRARY)
    overload = getattr(getattr(torch.ops, NAMESPACE), name).default
    _references[overload] = reference
    _defaults[name] = default or reference
    return overload


def default(op: str) -> Callable[..., Any]:
    """What serves `op` on a device that has nothing of its own: its default, or the reference."""
    return _defaults[op]


def differentiable(name: str, function: Callable[..., Any]) -> None:
    """Register `function(keyset, *args)` as the op's autograd kernel.

    It receives the dispatch key set, so that without gradients it can go on at the cost of one redispatch.
    """
    LIBRARY.impl(name, function, "Autograd", with_keyset=True)


def needs_gradient(tensors: Iterable[torch.Tensor | None]) -> bool:
    """Whether autograd has to see an op called on these tensors."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def implement(op: str, device: str, function: Callable[..., Any], *, name: str, reason: str) -> None:
    """Register a Python implementation of `op` for a device key; name and reason are what doctor prints."""
    LIBRARY.impl(op, function, device)
    _served[op, device] = (name, reason)


def is_implemented(op: str, device: str) -> bool:
    """Whether `implement` has registered something for an op's device key."""
    return (op, device) in _served


def has_kernel(op: str, x: torch.Tensor) -> bool:
    """Whether a kernel of ours that this GPU can run computes an op of x; never in compiled code."""
    if not x.is_cuda or torch.compiler.is_compiling() or not is_implemented(op, "CUDA"):
        return False
    return importlib.import_module("glide_fast.kernels.launch").too_old(x.device) is None


class use_reference(TorchDispatchMode):  # type: ignore[no-untyped-call]  # noqa: N801 (reads as a verb)
    """Context in which every glide_fast op, forward and backward, is served by its reference.

    A backward pass is covered where `backward()` itself is called inside the context.
    """

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Call the reference in place of an op of ours, and everything else as it is."""
        return _references.get(func, func)(*args, **(kwargs or {}))

    def __enter__(self) -> use_reference:
        """Switch on, for this thread."""
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Switch off."""
        super().__exit__(kind, error, trace)  # type: ignore[no-untyped-call]


def load_compiled() -> None:
    """Load the C++ library and the Triton kernels where they exist; remember why where they do not.

    Raises:
        ValueError: GLIDE_FAST_ISA names an instruction set that is unknown or cannot run here.
    """
    _missing["CPU"] = _load_cpp()
    _missing["CUDA"] = _load_triton()


def cpp_library() -> Any | None:
    """The loaded module `glide_fast._C` (capability, capabilities, select, compiler), or None."""
    try:
        return importlib.import_module("glide_fast._C")
    except ImportError:
        return None


def _load_cpp() -> str:
    if importlib.util.find_spec("glide_fast._C") is None:
        return (
            "the C++ library is not built (python setup.py build_ext --inplace, or reinstall with a compiler)"
        )
    try:
        library = importlib.import_module("glide_fast._C")
    except ImportError as error:
        return f"the C++ library does not load ({error}); build it again for this torch {torch.__version__}"
    wanted = os.environ.get(ISA_VARIABLE)
    if wanted is not None:
        try:
            library.select(wanted)
        except ValueError as error:
            raise ValueError(f"{ISA_VARIABLE}: {error}") from None
    return "the C++ library does not implement this op"


def _load_triton() -> str:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install glide-fast[triton])"
    try:
        kernels = importlib.import_module("glide_fast.kernels")
    except ImportError as error:
        return f"glide_fast.kernels does not load ({error}); install the package"
    kernels.register(implement, default)
    return "no Triton kernel for this op"


def _cpp_row(op: str) -> tuple[str, str] | None:
    library = cpp_library()
    if library is None or op not in _CPP_OPS + _PLAIN_CPP_OPS:
        return None
    reason = "float32; bfloat16 and float16 by way of float32; float64 by the reference. "
    if op in _PLAIN_CPP_OPS:
        return "C++", f"{reason}Built by {library.compiler()}"
    runnable = ", ".join(library.capabilities())
    name = _ISA_NAMES[library.capability()]
    return name, f"{reason}Built by {library.compiler()}; this CPU can run {runnable}"


def implementations() -> list[Implementation]:
    """One row for each op and device key: what serves it in this process, and why."""
    rows = []
    for overload in _references:
        op = overload.name().removeprefix(f"{NAMESPACE}::")
        for key in DEVICE_KEYS:
            served = (_cpp_row(op) if key == "CPU" else None) or _served.get((op, key))
            if served is not None and key == "CUDA":
                served = _on_this_gpu(*served)
            fallback = "reference" if _defaults[op] is _references[overload] else "composed"
            name, reason = served or (fallback, _missing[key])
            rows.append(Implementation(op=op, device=key, name=name, reason=reason))
    return rows


def _on_this_gpu(name: str, reason: str) -> tuple[str, str]:
    """The row of a registered kernel: whether there is a GPU here, and one that is new enough."""
    if not torch.cuda.is_available():
        return name, f"{reason}. Waits for a GPU: this torch {torch.__version__} can use none here"
    too_old = importlib.import_module("glide_fast.kernels.launch").too_old(torch.device("cuda"))
    return (name, reason) if too_old is None else ("reference", too_old)
