"""Tensors out of a TorchScript archive, such as OpenAI's CLIP files, without running anything in it.

Such an archive is a zip of tensor records, compiled code, and ``data.pkl``, a pickle that says which tensor
is which attribute of which module. ``torch.jit.load`` would hand the code to the interpreter, and
``torch.load(weights_only=True)`` does not read it. Here the pickle may name tensors and plain containers;
classes of the archive become inert holders of attributes, everything else is refused, the code stays shut.
"""

from __future__ import annotations

import io
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
_DECLARATION = r"class {name}\(Module\):\s+__parameters__ = \[[^]]*\]\s+__buffers__ = \[[^]]*\]"
_MALFORMED = (AttributeError, EOFError, LookupError, RuntimeError, TypeError, ValueError)


class _Holder:
    """Stands for an object of the archive's own classes: attributes, no behaviour.

    ``declared`` are those that count as weights; None if the archive does not say.
    """

    declared: frozenset[str] | None = None

    def __init__(self, *_arguments: object) -> None:
        self.attributes: dict[str, object] = {}

    def __setstate__(self, state: object) -> None:
        if isinstance(state, dict):
            self.attributes = state


def is_torchscript(path: Path) -> bool:
    """Whether the file is a TorchScript archive."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def read_torchscript(path: Path) -> dict[str, Tensor]:
    """Every tensor of the archive's modules, on the CPU, by its path: "visual.conv1.weight" → tensor.

    Raises:
        ValueError: the archive is damaged, or its pickle names anything but tensors, containers and modules.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            root = next(name for name in archive.namelist() if name.endswith("/data.pkl")).rpartition("/")[0]
            module = _Unpickler(archive, root).load()
    except (zipfile.BadZipFile, pickle.UnpicklingError, StopIteration, *_MALFORMED) as error:
        reason = f"{type(error).__name__} {error}"
        raise ValueError(f"{path} is not a readable TorchScript archive: {reason}") from None
    return dict(_tensors(module, ""))


def _tensors(module: object, prefix: str) -> Iterator[tuple[str, Tensor]]:
    if not isinstance(module, _Holder):
        return
    for name, value in module.attributes.items():
        if isinstance(value, Tensor):
            if module.declared is None or name in module.declared:
                yield f"{prefix}{name}", value
        else:
            yield from _tensors(value, f"{prefix}{name}.")


class _Unpickler(pickle.Unpickler):
    """Reads ``data.pkl``; a name it does not know ends the reading."""

    def __init__(self, archive: zipfile.ZipFile, root: str) -> None:
        super().__init__(io.BytesIO(archive.read(f"{root}/data.pkl")))
        self._archive = archive
        self._root = root
        self._records: dict[str, Tensor] = {}
        self._modules: dict[tuple[str, str], type] = {}

    def find_class(self, module: str, name: str) -> Any:
        """What a name of the pickle stands for."""
        if module == "__torch__" or module.startswith("__torch__."):
            return self._module(module, name)
        known: dict[tuple[str, str], Callable[..., Any]] = {
            ("collections", "OrderedDict"): OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2"): self._view,
            ("torch.jit._pickle", "restore_type_tag"): self._untagged,
        }
        if (module, name) in known:
            return known[module, name]
        if module == "torch.jit._pickle" and name.startswith("build_"):
            return list
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        raise pickle.UnpicklingError(f"it names {module}.{name}, which is no tensor, container or module")

    def persistent_load(self, reference: Any) -> Tensor:
        """The record ("storage", dtype, key, device, size) as a flat tensor; its device does not matter."""
        _, dtype, key, _, _ = reference
        if key not in self._records:
            record = bytearray(self._archive.read(f"{self._root}/data/{key}"))
            self._records[key] = (
                torch.frombuffer(record, dtype=dtype) if record else torch.empty(0, dtype=dtype)
            )
        return self._records[key]

    def _module(self, module: str, name: str) -> type:
        """A holder of this reader's own, lest a pickle alter what others read with."""
        if (module, name) not in self._modules:
            declared = self._declared(module, name)
            self._modules[module, name] = type("Module", (_Holder,), {"declared": declared})
        return self._modules[module, name]

    def _declared(self, module: str, name: str) -> frozenset[str] | None:
        """Parameters and buffers, as the class's code lists them; a mask, say, is neither."""
        try:
            code = self._archive.read(f"{self._root}/code/{module.replace('.', '/')}.py").decode()
        except KeyError:
            return None
        match = re.search(_DECLARATION.format(name=re.escape(name)), code)
        return None if match is None else frozenset(re.findall(r'"([^"]+)"', match[0]))

    def _view(self, record: Tensor, offset: int, size: Any, stride: Any, *_gradients: object) -> Tensor:
        return record.as_strided(tuple(size), tuple(stride), offset)

    def _untagged(self, value: object, _type: object) -> object:
        return value
