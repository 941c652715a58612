"""Starts Triton's interpreter before anything imports Triton; without Triton its kernels are not tested."""

from __future__ import annotations

import importlib.util

from tests.kernels import interpreter

if importlib.util.find_spec("triton") is not None:
    interpreter.start()
