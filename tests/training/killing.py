"""Trains one tiny run three times: undisturbed, killed at random moments, and killed at every kind of write.

    python -m tests.training.killing PICTURES DIRECTORY

One process imports torch and forks the runs, so that a run costs milliseconds to start; a killed one gets
SIGKILL and is started again in the same directory until it reaches its end. The number of kills of both kinds
is printed.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from glide_fast.training.config import SampleConfig, TrainConfig
from glide_fast.training.log import RunLog, plot_losses
from glide_fast.training.loop import Trainer, train
from tests.training.tiny import tiny_config

WRITES = 14  # what a resumed run writes, from its start to its first checkpoint


def killed_config(pictures: Path) -> TrainConfig:
    """A run that spends most of its time saving."""
    samples = SampleConfig(prompts=("cat",), every=5, steps=2)
    return tiny_config(pictures, steps=22, save_every=4, samples=samples)


def start(config: TrainConfig, directory: Path, prepare: Callable[[], None] = lambda: None) -> int:
    """Train in a fork of this process; its process id."""
    pid = os.fork()
    if pid == 0:
        try:
            tqdm.set_lock(threading.RLock())  # the usual one is shared, and a killed fork keeps it
            with open(os.devnull, "w") as silence:
                sys.stderr = silence
                prepare()
                train(config, directory)
            os._exit(0)
        except BaseException as error:
            os.write(1, f"{error!r}\n".encode())
            os._exit(1)
    return pid


def was_killed(pid: int) -> bool:
    """Wait for a run; whether SIGKILL ended it. A run that fails by itself ends everything."""
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return True
    if os.waitstatus_to_exitcode(status) != 0:
        sys.exit(f"a run failed with status {status}")
    return False


def die_at_write(number: int) -> None:
    """Make this process kill itself at its ``number``-th write, before, after or in the middle of it."""
    writes = 0

    def is_last() -> bool:
        nonlocal writes
        writes += 1
        return writes == number

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    fsync, replace, save, append = os.fsync, Path.replace, torch.save, RunLog.append

    def dying_fsync(descriptor: int) -> None:
        if is_last():
            die()
        fsync(descriptor)

    def dying_replace(source: Path, target: Path) -> Path:
        result = replace(source, target)
        if is_last():
            die()
        return result

    def dying_save(values: Any, path: Path) -> None:
        save(values, path)
        if is_last():
            os.truncate(path, path.stat().st_size // 2)
            die()

    def dying_append(log: RunLog, record: dict[str, Any]) -> None:
        append(log, record)
        if is_last():
            os.truncate(log.path, log.path.stat().st_size - 9)
            die()

    os.fsync, torch.save = dying_fsync, dying_save  # type: ignore[assignment]
    Path.replace, RunLog.append = dying_replace, dying_append  # type: ignore[method-assign, assignment]


def kill_at_random(config: TrainConfig, directory: Path, seconds: float, chance: random.Random) -> int:
    """The number of kills until the run, which needs ``seconds`` in one go, was through."""
    kills = 0
    while True:
        pid = start(config, directory)
        time.sleep(chance.uniform(0.03, 0.3) * seconds * (1 + kills / 10))  # grows, in case the machine slows
        os.kill(pid, signal.SIGKILL)
        if not was_killed(pid):
            return kills
        kills += 1


def kill_at_writes(config: TrainConfig, directory: Path, chance: random.Random) -> int:
    """The number of kills: one in the middle of the run, then one at each write of the run resumed there."""
    kills = 0
    for number in (3 * WRITES, *chance.sample(range(1, WRITES + 1), WRITES)):
        kills += was_killed(start(config, directory, partial(die_at_write, number)))
    while was_killed(start(config, directory)):
        pass
    return kills


def warm_up(config: TrainConfig, directory: Path) -> None:
    """Do once what is slow the first time, so that the forks need not."""
    trainer = Trainer(config, directory)
    trainer.step()
    trainer.draw_samples()
    trainer.save()
    plot_losses([{"step": 1, "mse": 1.0, "vlb": 1.0}], directory / "loss.png")


def main() -> None:
    pictures, directory = Path(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    config = killed_config(pictures)
    warm_up(config, directory / "warm-up")
    started = time.perf_counter()
    if was_killed(start(config, directory / "unbroken")):
        sys.exit("the undisturbed run was killed")
    seconds = time.perf_counter() - started
    random_kills = kill_at_random(config, directory / "random", seconds, random.Random(0))
    write_kills = kill_at_writes(config, directory / "writes", random.Random(1))
    print(random_kills, write_kills)


if __name__ == "__main__":
    main()
