"""Golden numbers of the original code (tests/parity): entries, inputs by rule, stored tolerances.

from tests.golden import assert_close, data, entry, fill, normal

x = normal("x", (2, 3, 8, 8), entry("glide_base")["weights_seed"])
assert_close(model(x), "glide_base", "out")
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch

PARITY = Path(__file__).parent / "parity"


@functools.cache
def _weights() -> ModuleType:
    """The module that holds the rule of weights and inputs; tests/parity is data, not a package."""
    spec = importlib.util.spec_from_file_location("glide_fast_parity_weights", PARITY / "weights.py")
    if spec is None or spec.loader is None:
        raise ImportError(f"{PARITY / 'weights.py'} cannot be loaded")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def manifest() -> dict[str, Any]:
    """The whole manifest.json: format, versions, and the list `fixtures`."""
    return cast(dict[str, Any], json.loads((PARITY / "manifest.json").read_text(encoding="utf-8")))


@functools.cache
def _entries() -> dict[str, dict[str, Any]]:
    return {fixture["name"]: fixture for fixture in manifest()["fixtures"]}


def entry(name: str) -> dict[str, Any]:
    """The manifest's entry of one fixture: callable, kwargs, inputs, seeds, notes, arrays with tolerances."""
    if name not in _entries():
        raise KeyError(f"no fixture {name!r}; known: {', '.join(_entries())}")
    return _entries()[name]


@functools.cache
def data(name: str) -> Any:
    """The stored data of one fixture: a dict of arrays for .npz, the parsed JSON for .json."""
    path = PARITY / entry(name)["file"]
    if path.suffix == ".json":
        return json.loads(path.read_text(encoding="utf-8"))
    with np.load(path) as arrays:
        return {key: arrays[key] for key in arrays.files}


def normal(name: str, shape: Sequence[int], seed: int) -> torch.Tensor:
    """Float32 input {"rule": "normal(name, shape, seed)"} of the manifest."""
    values: npt.NDArray[np.float64] = _weights().normal(name, tuple(shape), seed)
    return torch.from_numpy(values.astype(np.float32))


def weight(name: str, shape: Sequence[int], seed: int) -> torch.Tensor:
    """Float32 value of the state-dict entry `name`."""
    return torch.from_numpy(_weights().weight(name, tuple(shape), seed))


def fill(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Overwrite every floating entry of the model's state dict by the rule; returns the model."""
    _weights().fill_(model.state_dict(), seed)
    return model


def assert_close(actual: torch.Tensor | npt.ArrayLike, name: str, key: str) -> None:
    """Compare with the stored array `key` of fixture `name` within its tolerances; exact if it has none."""
    values = actual.detach().cpu().numpy() if isinstance(actual, torch.Tensor) else np.asarray(actual)
    expected = data(name)[key]
    tolerance = entry(name)["arrays"][key]
    assert values.shape == expected.shape, f"{name}/{key}: shape {values.shape} instead of {expected.shape}"
    np.testing.assert_allclose(
        values,
        expected,
        rtol=tolerance.get("rtol", 0.0),
        atol=tolerance.get("atol", 0.0),
        err_msg=f"{name}/{key}",
    )


def state_dict_shapes(name: str) -> list[tuple[str, list[int]]]:
    """The original's state dict: (name, shape) in its order."""
    stored = json.loads((PARITY / "state_dicts.json").read_text(encoding="utf-8"))
    return [(key, shape) for key, shape, _ in stored[name]]


def input_of(name: str, key: str) -> torch.Tensor:
    """One input of a fixture: stored, or made by its rule "normal('key', shape, seed)"."""
    source = entry(name)["inputs"][key]
    if "stored" in source:
        return torch.from_numpy(data(name)[source["stored"]])
    rule_key, shape, seed = ast.literal_eval(source["rule"].removeprefix("normal"))
    return normal(rule_key, shape, seed)
