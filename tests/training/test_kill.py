"""A run that is killed again and again, also in the middle of its saves, ends as the unbroken run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from glide_fast.training.loop import Trainer
from tests.training.killing import killed_config
from tests.training.tiny import assert_identical, finished, log_without_speed, snapshot

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def killed(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[int]]:
    """The directory of the three runs, and how often two of them were killed."""
    directory = tmp_path_factory.mktemp("killed")
    command = [sys.executable, "-m", "tests.training.killing", str(pictures), str(directory)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return directory, [int(number) for number in result.stdout.split()]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the runs are forked")
@pytest.mark.parametrize("way", ["random", "writes"])
def test_a_killed_run_ends_as_the_unbroken_run(
    pictures: Path, killed: tuple[Path, list[int]], way: str
) -> None:
    directory, kills = killed
    assert kills[["random", "writes"].index(way)] >= 1
    config = killed_config(pictures)
    ended, unbroken = Trainer(config, directory / way), Trainer(config, directory / "unbroken")
    assert ended.state.step == unbroken.state.step == config.steps
    assert_identical(snapshot(ended), snapshot(unbroken))
    assert ended.state.unlogged == unbroken.state.unlogged
    assert log_without_speed(directory / way) == log_without_speed(directory / "unbroken")
    assert finished(directory / way) == finished(directory / "unbroken")
