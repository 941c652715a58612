"""The original projects' top-level names, served by this package: ``import guided_diffusion`` finds ours.

While the names are taken, ``guided_diffusion.unet`` and ``glide_fast.compat.guided_diffusion.unet`` are one
module object. ``blobfile``, which the originals read files with, gets a stand-in where it is not installed.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

__all__ = ["PROJECTS", "install", "projects", "uninstall"]

PROJECTS = ("clip", "glide_text2im", "guided_diffusion", "improved_diffusion")
STAND_INS = ("blobfile",)
HOME = "glide_fast.compat."


class _Loader(Loader):
    """Hands out a module that is imported under its real name."""

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = importlib.import_module(HOME + spec.name)
        self.real_spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self.real_spec  # the import machinery has replaced it by the alias's


class _Finder(MetaPathFinder):
    """Finds the modules of the packages ``names``."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None = None,
        target: ModuleType | None = None,
    ) -> ModuleSpec | None:
        del path, target
        if fullname.split(".")[0] not in self.names:
            return None
        found = importlib.util.find_spec(HOME + fullname)
        if found is None:
            return None
        return ModuleSpec(fullname, _Loader(), is_package=found.submodule_search_locations is not None)


_FINDERS = (_Finder(PROJECTS), _Finder(STAND_INS))


def install() -> None:
    """Serve the originals' names in this process, before installed packages of the same names.

    Raises:
        RuntimeError: one of them is imported already, and not from here.
    """
    foreign = [
        name
        for name in PROJECTS
        if name in sys.modules and sys.modules[name] is not sys.modules.get(HOME + name)
    ]
    if foreign:
        raise RuntimeError(f"{', '.join(foreign)} is imported already; install the names of ours before")
    if _FINDERS[0] not in sys.meta_path:
        sys.meta_path.insert(0, _FINDERS[0])
        sys.meta_path.append(_FINDERS[1])


def uninstall() -> None:
    """Give the names back; modules that were imported under them stay usable where they are held."""
    for finder in _FINDERS:
        if finder in sys.meta_path:
            sys.meta_path.remove(finder)
    for name in list(sys.modules):
        if name.split(".")[0] in (*PROJECTS, *STAND_INS) and sys.modules[name] is sys.modules.get(
            HOME + name
        ):
            del sys.modules[name]


@contextmanager
def projects() -> Iterator[None]:
    """Serve the originals' names inside a ``with`` block."""
    install()
    try:
        yield
    finally:
        uninstall()
