"""Dataclasses from TOML and JSON, and back: every wrong field is named at once, before any work starts."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Config = TypeVar("Config")


def _adapter(kind: type[Any]) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def from_dict(kind: type[Config], values: dict[str, Any], source: str) -> Config:
    """Build the dataclass ``kind`` from nested values; ``source`` is named in errors.

    Raises:
        ValueError: lists every unknown, missing or ill-typed field with its path and value.
    """
    if not isinstance(values, dict):
        raise ValueError(
            f"{source} does not describe a {kind.__name__}: it is no table of fields but {values!r}"
        )
    problems = _unknown_fields(kind, values)
    try:
        config: Config = _adapter(kind).validate_python(values)
    except ValidationError as error:
        problems += [_explain(problem) for problem in error.errors()]
    if problems:
        raise ValueError("\n  ".join([f"{source} does not describe a {kind.__name__}:", *problems])) from None
    return config


def _explain(problem: ErrorDetails) -> str:
    """A line for one of pydantic's errors; a rule of the dataclass itself speaks for itself."""
    where = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "value_error":
        reason = str(problem["ctx"]["error"])
        return f"{where}: {reason}" if where else reason
    if problem["type"] == "missing":
        return f"{where}: is missing"
    return f"{where}: {problem['msg']} (got {problem['input']!r})"


def _unknown_fields(kind: type[Any], values: dict[str, Any], path: str = "") -> list[str]:
    """A line for each key of ``values`` that the dataclass (or one nested in it) does not have."""
    known = {field.name: field for field in dataclasses.fields(kind)}
    lines = []
    for name, value in values.items():
        if name not in known:
            lines.append(f"{path}{name}: no such field; the fields are {', '.join(known)}")
        elif isinstance(value, dict):
            options = _nested_dataclasses(kind, name)
            problems = [_unknown_fields(option, value, f"{path}{name}.") for option in options]
            fewest = min(problems, key=len) if problems else []
            lines += fewest
    return lines


def _nested_dataclasses(kind: type[Any], name: str) -> list[type[Any]]:
    hint = get_type_hints(kind)[name]
    options = get_args(hint) or (hint,)
    return [option for option in options if dataclasses.is_dataclass(option) and isinstance(option, type)]


def to_dict(config: Any) -> dict[str, Any]:
    """The plain nested values of a dataclass, ready for JSON."""
    values: dict[str, Any] = _adapter(type(config)).dump_python(config, mode="json")
    return values


def from_json(kind: type[Config], text: str, source: str) -> Config:
    """Build the dataclass ``kind`` from a JSON object; errors as :func:`from_dict`."""
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{source} is not valid JSON: {error}") from None
    return from_dict(kind, values, source)


def to_json(config: Any) -> str:
    """A dataclass as a JSON object."""
    return json.dumps(to_dict(config))


def load_toml(kind: type[Config], path: Path) -> Config:
    """Read a dataclass from a TOML file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not TOML, or does not describe a ``kind``.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no config file {path}; the recipes that ship are in configs/")
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid TOML: {error}") from None
    return from_dict(kind, values, str(path))
