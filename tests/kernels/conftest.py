"""Without Triton there is nothing to test here; with it, kernels that tests call leave what they keep."""

from __future__ import annotations

import importlib
import importlib.util

import pytest

collect_ignore_glob = [] if importlib.util.find_spec("triton") is not None else ["test_*.py"]


@pytest.fixture(autouse=True)
def kernels_are_called_by_eager_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """As they are behind the public functions, of which these tests know nothing."""
    monkeypatch.setattr(importlib.import_module("glide_fast.kernels.moments"), "is_eager", lambda: True)
