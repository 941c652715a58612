"""Notebooks without Jupyter: their code cells in order; pictures that they display become files."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import json
import linecache
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from PIL import Image

__all__ = ["code_cells", "run_notebook"]

COMMAND = re.compile(r"(\s*)[!%]")


def run_notebook(path: Path, out: Path) -> None:
    """Run the code cells of ``path``; pictures are written to the folder ``out``.

    Lines for the shell or IPython ("!pip ...", "%matplotlib ...") are skipped with a notice.

    Raises:
        ValueError: the file is not a notebook.
    """
    cells = code_cells(path)
    display = _display_into(out, path.stem)
    module = ModuleType("__main__")
    module.__dict__.update(__file__=str(path), display=display)
    before = Path.cwd()
    with _ipython(display), _replaced(sys.modules, "__main__", module):
        os.chdir(path.resolve().parent)
        try:
            for index, source in enumerate(cells, 1):
                _run_cell(source, f"{path.name}, code cell {index}", module, display)
        finally:
            os.chdir(before)


def code_cells(path: Path) -> list[str]:
    """The code of a notebook, cell by cell; ValueError where the file is none."""
    try:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a Jupyter notebook: {error!r}") from None


def _run_cell(source: str, name: str, module: ModuleType, display: Callable[..., None]) -> None:
    """Run one cell, and display the value of its last line as Jupyter does."""
    source = _python_only(source, name)
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    body = ast.parse(source, name).body
    last = body[-1] if body else None
    rest = body[:-1] if isinstance(last, ast.Expr) else body
    exec(compile(ast.Module(rest, []), name, "exec", dont_inherit=True), module.__dict__)
    if isinstance(last, ast.Expr):
        expression = compile(ast.Expression(last.value), name, "eval", dont_inherit=True)
        value = eval(expression, module.__dict__)
        if value is not None:
            display(value)


def _python_only(source: str, name: str) -> str:
    """The cell without what is no Python; a cell that is all Python stays as it is."""
    if source.startswith("%%"):
        print(f"{name}: skipped, as it begins with {source.split()[0]}", file=sys.stderr)
        return ""
    lines = source.splitlines(keepends=True)
    while True:
        try:
            ast.parse("".join(lines), name)
        except SyntaxError as error:
            index = (error.lineno or 1) - 1
            command = COMMAND.match(lines[index]) if index < len(lines) else None
            if command is None:
                raise
            print(f"{name}: skipped {lines[index].strip()}", file=sys.stderr)
            lines[index] = f"{command[1]}pass\n"
        else:
            return "".join(lines)


def _display_into(out: Path, stem: str) -> Callable[..., None]:
    """A ``display`` that writes pictures as PNG files and prints everything else."""
    count = 0

    def display(*objects: Any, **_options: Any) -> None:
        nonlocal count
        for each in objects:
            if isinstance(each, Image.Image):
                count += 1
                out.mkdir(parents=True, exist_ok=True)
                each.save(out / f"{stem}-{count}.png")
                print(out / f"{stem}-{count}.png")
            else:
                print(each)

    return display


@contextmanager
def _ipython(display: Callable[..., None]) -> Iterator[None]:
    """``IPython.display.display`` is ours; where IPython is not installed, so is the package around it."""
    if importlib.util.find_spec("IPython") is not None:
        with _replaced(vars(importlib.import_module("IPython.display")), "display", display):
            yield
        return
    package, module = ModuleType("IPython"), ModuleType("IPython.display")
    package.__dict__.update(display=module, get_ipython=lambda: None)
    module.__dict__.update(display=display, clear_output=lambda *_arguments, **_options: None)
    with (
        _replaced(sys.modules, package.__name__, package),
        _replaced(sys.modules, module.__name__, module),
    ):
        yield


@contextmanager
def _replaced(table: dict[str, Any], name: str, value: Any) -> Iterator[None]:
    """``table[name]`` is ``value`` inside the block."""
    missing = name not in table
    before = table.get(name)
    table[name] = value
    try:
        yield
    finally:
        if missing:
            del table[name]
        else:
            table[name] = before
