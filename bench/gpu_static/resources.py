"""Compiled: what each kernel needs on each target, read from the machine code that Triton makes.

Every module of `glide_fast.kernels` that has a function `cases` takes part. Compilers run two at a time,
each in a process of its own; Triton keeps what it has compiled, so that a second run takes seconds.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import glide_fast.kernels

PROCESSES = 2
SECONDS = 900  # for one module and target
Row = dict[str, Any]


@dataclass
class Resources:
    """Rows as :mod:`glide_fast.kernels.compilation` prints them, with their module; and what failed."""

    rows: list[Row] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def add(self, module: str, target: str, lines: list[str], error: str) -> None:
        """Keep the rows of one compiler's process, and its last words if it failed."""
        self.rows += [{"module": module, **json.loads(line)} for line in lines if line.startswith("{")]
        if error:
            self.failures.append(f"{module} for {target}: {error}")


def families() -> list[str]:
    """The kernel modules that list cases."""
    folder = Path(glide_fast.kernels.__path__[0])
    return sorted(
        path.stem for path in folder.glob("*.py") if "\ndef cases(" in path.read_text(encoding="utf-8")
    )


def compiled(modules: list[str], targets: tuple[str, ...]) -> Resources:
    """Compile every case of the modules for every target."""
    jobs = [(module, target) for module in modules for target in targets]
    found = Resources()
    with ThreadPoolExecutor(PROCESSES) as pool:
        for job, result in zip(jobs, pool.map(_compile, jobs), strict=True):
            found.add(*job, *result)
    return found


def _compile(job: tuple[str, str]) -> tuple[list[str], str]:
    """The lines that a compiler's process prints, and why it failed or nothing."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "glide_fast.kernels.compilation", *job]
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=SECONDS, check=False
        )
    except subprocess.TimeoutExpired as late:
        printed = late.stdout.decode() if isinstance(late.stdout, bytes) else late.stdout or ""
        return printed.splitlines(), f"not finished after {SECONDS} s"
    words = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
    return done.stdout.splitlines(), words[0] if done.returncode else ""
