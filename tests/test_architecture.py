"""The house plan holds: imports run downhill by floor, files stay small, every module says what it is for."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "glide_fast"
FLOORS = {
    "config": -1,
    "download": -1,
    "files": -1,
    "ops": 0,
    "kernels": 0,
    "text": 1,
    "models": 2,
    "diffusion": 2,
    "sampling": 3,
    "data": 3,
    "training": 4,
    "evaluation": 4,
    "compat": 5,
    "accelerate": 5,
    "export": 5,
    "doctor": 6,
    "cli": 6,
    "web": 6,
}
LONGEST_FILE = 500
SOURCES = ("glide_fast", "kernels", "csrc", "bench", "tests")


def modules() -> list[Path]:
    return sorted([*PACKAGE.rglob("*.py"), *(ROOT / "kernels").rglob("*.py")])


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def room_of(path: Path) -> str:
    """The part of the package that a file belongs to, as in ``FLOORS``."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[0] if parts[0] == "kernels" else parts[1]


def imported_rooms(tree: ast.Module) -> Iterator[str]:
    """The parts of the package that a module imports, at its top or inside a function."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are written in full"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            package, *rest = name.split(".")
            if package == "glide_fast" and rest and rest[0] in FLOORS:
                yield rest[0]


def test_imports_of_every_form_are_seen() -> None:
    code = (
        "import glide_fast.text.tokenizer\nfrom glide_fast import ops, __version__\nimport torch\n"
        "def f():\n    from glide_fast.models.unet import UNet\n"
    )
    assert sorted(imported_rooms(ast.parse(code))) == ["models", "ops", "text"]


def test_every_room_has_a_floor() -> None:
    rooms = {room_of(path) for path in modules()} - {"__init__"}
    assert rooms <= FLOORS.keys(), f"give {sorted(rooms - FLOORS.keys())} a floor"


@pytest.mark.parametrize("path", modules(), ids=name_of)
def test_imports_run_downhill(path: Path) -> None:
    room = room_of(path)
    uphill = [
        other
        for other in imported_rooms(ast.parse(path.read_text(encoding="utf-8")))
        if room == "__init__" or FLOORS[other] > FLOORS[room]
    ]
    assert not uphill, f"{name_of(path)} on floor {FLOORS.get(room)} imports {uphill} above it"


def test_rooms_do_not_import_in_circles() -> None:
    imports: dict[str, set[str]] = {}
    for path in modules():
        imported = set(imported_rooms(ast.parse(path.read_text(encoding="utf-8"))))
        imports.setdefault(room_of(path), set()).update(imported - {room_of(path), "kernels"})
    while imports:
        leaves = [room for room, below in imports.items() if not below & imports.keys()]
        assert leaves, f"these import one another: {sorted(imports)}"
        for room in leaves:
            del imports[room]


@pytest.mark.parametrize("path", modules(), ids=name_of)
def test_every_module_says_what_it_is_for(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))


def test_no_file_is_too_long_to_read() -> None:
    files = [
        path
        for folder in SOURCES
        for path in (ROOT / folder).rglob("*")
        if path.suffix in {".py", ".cpp", ".h", ".cu", ".cuh"}
    ]
    lengths = {name_of(path): len(path.read_text(encoding="utf-8").splitlines()) for path in files}
    assert len(lengths) > 50
    too_long = {name: length for name, length in lengths.items() if length > LONGEST_FILE}
    assert not too_long, f"more than {LONGEST_FILE} lines; split them: {too_long}"


def test_the_package_asserts_nothing() -> None:
    asserting = [
        f"{name_of(path)}:{node.lineno}"
        for path in modules()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Assert)
    ]
    assert not asserting, f"raise an error that says what to do: {asserting}"
