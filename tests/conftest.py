"""Starts Triton's interpreter before anything imports Triton, without which its kernels are not tested."""

from __future__ import annotations

import importlib.util
import runpy
from pathlib import Path
from typing import Any

import pytest
import setuptools

from tests.kernels import interpreter

if importlib.util.find_spec("triton") is not None:
    interpreter.start()


@pytest.fixture(scope="session")
def build() -> dict[str, Any]:
    """What setup.py defines."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setuptools, "setup", lambda **_: None)
        return runpy.run_path(str(Path(__file__).parents[1] / "setup.py"))
