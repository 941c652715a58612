"""A launch as data: which kernel, how many programs, with what arguments.

Launchers that plan before they start can be asked for their plan without a GPU: tensors on the meta device
will do. So the kernels that are compiled to be measured are those that would run.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from glide_fast.kernels.compilation import Case
from glide_fast.kernels.configurations import Configuration

_TYPES = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
_ALIGNMENT = 16  # what Triton specialises pointers and numbers by


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel by a configuration's options.

    Arguments may come in any order and be more than the kernel takes: some launches share theirs.
    """

    kernel: Any
    programs: int
    arguments: Mapping[str, Any]
    configuration: Configuration

    def start(self) -> None:
        """Launch it, on the current device."""
        arguments = {name: self.arguments[name] for name in self.kernel.arg_names}
        self.kernel[(self.programs,)](**arguments, **self.configuration.options)

    def case(self, name: str) -> Case:
        """What is compiled for it: as the launch itself specialises its arguments."""
        signature, constants = {}, {}
        for parameter in self.kernel.params:
            value = self.arguments[parameter.name]
            kind = "constexpr" if parameter.is_constexpr else _kind(value)
            if parameter.do_not_specialize:
                kind = _integer(value)
            signature[parameter.name] = kind
            if kind == "constexpr":
                constants[parameter.name] = value
        configuration = self.configuration
        return Case(
            name,
            self.kernel,
            signature,
            constants,
            configuration.warps,
            configuration.stages,
            configuration.registers,
        )


def start(launches: Iterable[Launch]) -> None:
    """Launch one after the other."""
    for each in launches:
        each.start()


def _kind(value: Any) -> str | tuple[str, ...]:
    if isinstance(value, tuple):
        return tuple(str(_kind(part)) for part in value)
    if isinstance(value, Tensor):
        aligned = value.storage_offset() * value.element_size() % _ALIGNMENT == 0
        return _TYPES[value.dtype] + (":16" if aligned else "")
    if hasattr(value, "block_shape"):  # a tensor descriptor
        return f"tensordesc<{_TYPES[value.base.dtype][1:]}[{','.join(map(str, value.block_shape))}]>"
    if isinstance(value, float):
        return "fp32"
    if value is None or value == 1:
        return "constexpr"
    return _integer(value) + (":16" if value % _ALIGNMENT == 0 else "")


def _integer(value: int) -> str:
    return "i32" if -(2**31) <= value < 2**31 else "i64"
