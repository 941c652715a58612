"""Starts Triton's interpreter before any kernel is imported; without Triton there is nothing to test here."""

from __future__ import annotations

import importlib.util

from tests.kernels import interpreter

collect_ignore_glob = []
if importlib.util.find_spec("triton") is None:
    collect_ignore_glob.append("test_*.py")
else:
    interpreter.start()
