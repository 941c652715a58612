"""Triton's interpreter, mended: bfloat16 is right, and arithmetic on it is an error.

Kernels compute in float32 and use bfloat16 in loads, stores and dot products alone. The interpreter keeps
bfloat16 as integers: its dot multiplies them as such and its casts truncate. Here dot widens them first,
casts round to nearest even, and sums, products or comparisons of bfloat16 raise.
"""

from __future__ import annotations

import importlib
import os
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from glide_fast import kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def start() -> None:
    """Import Triton as an interpreter, unless there is a GPU to run the kernels on.

    Raises:
        RuntimeError: Triton was imported before as a compiler.
    """
    if DEVICE == "cuda":
        return
    os.environ["TRITON_INTERPRET"] = "1"
    import triton.language as tl
    from triton.runtime.interpreter import InterpretedFunction

    if not isinstance(tl.standard.sum, InterpretedFunction):
        raise RuntimeError(
            "Triton was imported before TRITON_INTERPRET was set; run pytest tests/kernels first"
        )
    _mend_bfloat16()


class use_kernels(TorchDispatchMode):  # noqa: N801 (reads as a verb)
    """Context in which the registered kernels serve their ops on any device, also interpreted on the CPU."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call the kernel in place of an op that has one."""
        op = func.name().removeprefix("glide_fast::").removesuffix(".default")
        if func.namespace != "glide_fast" or op not in kernels.REGISTERED:
            return func(*args, **(kwargs or {}))
        module = importlib.import_module(f"glide_fast.kernels.{kernels.REGISTERED[op].module}")
        return getattr(module, op)(*args, **(kwargs or {}))


def environment() -> dict[str, str]:
    """This process' environment for a child that compiles kernels."""
    return {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}


def _widen(data: np.ndarray) -> np.ndarray:
    return (data.astype(np.uint32) << 16).view(np.float32)


def _narrow(data: np.ndarray) -> np.ndarray:
    bits = data.astype(np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(data), 0x7FC0, rounded).astype(np.uint16)


def _mend_bfloat16() -> None:
    import triton.language as tl
    from triton.runtime import interpreter

    builder: Any = interpreter.InterpreterBuilder
    handle = interpreter.TensorHandle
    cast, convert, dot = builder.cast_impl, builder.create_fp_to_fp, builder.create_dot
    binary, unary, total = builder.binary_op, builder.unary_op, interpreter.ReduceOps.apply_impl

    def is_bfloat16(value: Any) -> bool:
        return value.dtype.scalar == tl.bfloat16

    def float32(value: Any) -> Any:
        return handle(_widen(value.data), tl.float32) if is_bfloat16(value) else value

    def mended_cast(self: Any, source: Any, kind: Any, *rest: Any) -> Any:
        original = convert if rest else cast
        if is_bfloat16(source) and kind.scalar == tl.bfloat16:
            return source
        if kind.scalar == tl.bfloat16:
            return handle(_narrow(cast(self, float32(source), tl.float32).data), tl.bfloat16)
        source = float32(source)
        if source.dtype.scalar == kind.scalar:
            return source
        return original(self, source, kind, *rest)

    def mended_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return dot(self, float32(a), float32(b), *rest)

    def refuse(original: Any) -> Any:
        def call(self: Any, *arguments: Any) -> Any:
            for argument in arguments:
                values = argument if isinstance(argument, tuple) else (argument,)
                if any(getattr(value, "dtype", None) is not None and is_bfloat16(value) for value in values):
                    raise TypeError("arithmetic on bfloat16; convert to float32 first")
            return original(self, *arguments)

        return call

    builder.cast_impl, builder.create_fp_to_fp, builder.create_dot = mended_cast, mended_cast, mended_dot
    builder.binary_op, builder.unary_op = refuse(binary), refuse(unary)
    interpreter.ReduceOps.apply_impl = refuse(total)
