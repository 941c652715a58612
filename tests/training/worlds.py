"""Runs of several processes in a test: forks of a server that imported torch once, joined by gloo."""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from glide_fast.training.config import TrainConfig
from glide_fast.training.loop import train

PATIENCE = 120  # seconds
SLOW_TO_IMPORT = ["torch._dynamo", "torch.onnx", "matplotlib.figure"]  # what training imports at first use


def context() -> ForkServerContext:
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload([__name__, *SLOW_TO_IMPORT])
    return found


class World:
    """``size`` processes that each call ``work(*arguments)``; what they raise is collected as text."""

    def __init__(self, size: int, work: Callable[..., None], *arguments: Any) -> None:
        found = context()
        self.errors: Any = found.Queue()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.processes: list[BaseProcess] = [
            found.Process(target=_start, args=(rank, size, port, self.errors, work, arguments))
            for rank in range(size)
        ]
        for process in self.processes:
            process.start()

    def wait(self) -> list[str]:
        """The messages of the processes that failed, in order of rank; everybody has ended."""
        messages = {}
        for process in self.processes:
            process.join(PATIENCE)
            assert process.exitcode is not None, "a process hangs"
        while not self.errors.empty():
            rank, message = self.errors.get()
            messages[rank] = message
        return [messages[rank] for rank in sorted(messages)]


def _start(
    rank: int, size: int, port: int, errors: Any, work: Callable[..., None], arguments: tuple[Any, ...]
) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    try:
        work(*arguments)
    except BaseException as error:
        errors.put((rank, f"{type(error).__name__}: {error}"))
        errors.close()
        errors.join_thread()
        os._exit(1)


def train_together(size: int, config: TrainConfig, directory: Path, initial: Path | None = None) -> list[str]:
    """Train with ``size`` processes to the end; the messages of those that failed."""
    return World(size, train, config, directory, initial).wait()
