"""Resources of kernels that a child process compiles: this one interprets them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from tests.kernels.interpreter import environment

PROGRAM = """
import dataclasses, importlib, json, sys
from glide_fast.kernels import compilation
for module, target, name in json.loads(sys.argv[1]):
    cases = importlib.import_module(f"glide_fast.kernels.{module}").cases(target)
    (case,) = [case for case in cases if case.name == name]
    resources = compilation.compile_case(case, target)
    print(json.dumps({**dataclasses.asdict(resources), "blocks": resources.blocks,
                      "occupancy": resources.occupancy}))
"""


def compile_cases(wanted: Sequence[tuple[str, str, str]]) -> list[dict[str, Any]]:
    """The resources of cases given by module, target and name, with `blocks` and `occupancy`."""
    return _rows(PROGRAM, json.dumps(wanted))


def _rows(program: str, *arguments: str) -> list[dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        check=False,
        capture_output=True,
        text=True,
        env=environment(),
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


REHEARSAL = """
import dataclasses, json, sys
import torch
from glide_fast.kernels.rehearsal import rehearsal
target, program = sys.argv[1:]
with rehearsal(target) as launches:
    exec(program)
for resources in launches:
    print(json.dumps({**dataclasses.asdict(resources), "blocks": resources.blocks,
                      "occupancy": resources.occupancy}))
"""


def rehearse(target: str, program: str) -> list[dict[str, Any]]:
    """Run a program whose launches on CPU tensors are compiled for a target only; the resources of each."""
    return _rows(REHEARSAL, target, program)
