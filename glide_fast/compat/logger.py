"""The original projects' logger: values gathered under keys, written out row by row as text, CSV or JSON.

There is one current logger a process; it begins when something is first logged, or with :func:`configure`.
"""

from __future__ import annotations

import csv
import datetime
import json
import os
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TextIO

__all__ = [
    "DEBUG",
    "DISABLED",
    "ERROR",
    "INFO",
    "WARN",
    "CSVOutputFormat",
    "HumanOutputFormat",
    "JSONOutputFormat",
    "KVWriter",
    "Logger",
    "configure",
    "debug",
    "dump_tabular",
    "dumpkvs",
    "error",
    "get_current",
    "get_dir",
    "getkvs",
    "info",
    "log",
    "logkv",
    "logkv_mean",
    "logkvs",
    "make_output_format",
    "profile",
    "profile_kv",
    "record_tabular",
    "reset",
    "scoped_configure",
    "set_level",
    "warn",
]

DEBUG, INFO, WARN, ERROR, DISABLED = 10, 20, 30, 40, 50
_WIDEST = 30


class KVWriter:
    """Something that rows of values are written to."""

    def writekvs(self, kvs: Mapping[str, Any]) -> None:
        """Write one row."""
        raise NotImplementedError

    def close(self) -> None:
        """Release what is held open."""


class HumanOutputFormat(KVWriter):
    """A table a row, and messages, on a stream or in a file."""

    def __init__(self, filename_or_file: str | os.PathLike[str] | TextIO) -> None:
        self.file: TextIO
        if isinstance(filename_or_file, (str, os.PathLike)):
            self.file, self.own_file = _created(filename_or_file), True
        else:
            self.file, self.own_file = filename_or_file, False

    def writekvs(self, kvs: Mapping[str, Any]) -> None:
        """Write the values as a table, sorted by key."""
        if not kvs:
            return
        rows = {
            _short(key): _short(f"{value:<8.3g}" if hasattr(value, "__float__") else str(value))
            for key, value in sorted(kvs.items(), key=lambda pair: pair[0].lower())
        }
        left, right = max(map(len, rows)), max(map(len, rows.values()))
        line = "-" * (left + right + 7)
        table = [f"| {key:<{left}} | {value:<{right}} |" for key, value in rows.items()]
        print(line, *table, line, sep="\n", file=self.file, flush=True)

    def writeseq(self, seq: Sequence[Any]) -> None:
        """Write a message's parts on one line."""
        print(*seq, file=self.file, flush=True)

    def close(self) -> None:
        """Close the file if this opened it."""
        if self.own_file:
            self.file.close()


class JSONOutputFormat(KVWriter):
    """One JSON object a line."""

    def __init__(self, filename: str | os.PathLike[str]) -> None:
        self.file = _created(filename)

    def writekvs(self, kvs: Mapping[str, Any]) -> None:
        """Write the values, numbers of every kind as floats."""
        values = {key: float(value) if hasattr(value, "dtype") else value for key, value in kvs.items()}
        print(json.dumps(values), file=self.file, flush=True)

    def close(self) -> None:
        """Close the file."""
        self.file.close()


class CSVOutputFormat(KVWriter):
    """A table with a column a key; new keys become new columns of the whole file."""

    def __init__(self, filename: str | os.PathLike[str]) -> None:
        self.path = Path(filename)
        self.keys: list[str] = []
        self.path.write_text("", encoding="utf-8")

    def writekvs(self, kvs: Mapping[str, Any]) -> None:
        """Append a row."""
        new = sorted(kvs.keys() - set(self.keys))
        if new:
            with self.path.open(newline="", encoding="utf-8") as file:
                rows = list(csv.DictReader(file))
            self.keys += new
            self._write(rows, "w", header=True)
        self._write([kvs], "a")

    def _write(self, rows: Sequence[Mapping[str, Any]], mode: str, *, header: bool = False) -> None:
        with self.path.open(mode, newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self.keys, restval="", lineterminator="\n")
            if header:
                writer.writeheader()
            writer.writerows(rows)


def make_output_format(format: str, ev_dir: str | os.PathLike[str], log_suffix: str = "") -> KVWriter:
    """The writer "stdout", "log", "json" or "csv" in a folder, which is made.

    Raises:
        ValueError: another format.
    """
    folder = Path(ev_dir)
    folder.mkdir(parents=True, exist_ok=True)
    if format == "stdout":
        return HumanOutputFormat(sys.stdout)
    if format == "log":
        return HumanOutputFormat(folder / f"log{log_suffix}.txt")
    if format == "json":
        return JSONOutputFormat(folder / f"progress{log_suffix}.json")
    if format == "csv":
        return CSVOutputFormat(folder / f"progress{log_suffix}.csv")
    raise ValueError(f"unknown log format {format!r}; known: stdout, log, json, csv")


class Logger:
    """Values since the last dump, and where they are written; ``CURRENT`` is the process's.

    ``comm`` is kept for callers: values are of this process.
    """

    CURRENT: Logger | None = None

    def __init__(self, dir: str | None, output_formats: Sequence[KVWriter], comm: Any = None) -> None:
        self.name2val: defaultdict[str, Any] = defaultdict(float)
        self.name2cnt: defaultdict[str, int] = defaultdict(int)
        self.level = INFO
        self.dir = dir
        self.output_formats = list(output_formats)
        self.comm = comm

    def logkv(self, key: str, val: Any) -> None:
        """Set a value of the next row."""
        self.name2val[key] = val

    def logkv_mean(self, key: str, val: Any) -> None:
        """Average a value over all calls until the next row."""
        count = self.name2cnt[key]
        self.name2val[key] = self.name2val[key] * count / (count + 1) + val / (count + 1)
        self.name2cnt[key] = count + 1

    def dumpkvs(self) -> dict[str, Any]:
        """Write the row, and begin the next."""
        row = dict(self.name2val)
        if self.level != DISABLED:
            for writer in self.output_formats:
                writer.writekvs(row)
        self.name2val.clear()
        self.name2cnt.clear()
        return row

    def log(self, *args: Any, level: int = INFO) -> None:
        """Write a message, unless the logger's level is above the message's."""
        if self.level > level:
            return
        for writer in self.output_formats:
            if hasattr(writer, "writeseq"):
                writer.writeseq(args)

    def close(self) -> None:
        """Release the files."""
        for writer in self.output_formats:
            writer.close()


def configure(
    dir: str | os.PathLike[str] | None = None,
    format_strs: Sequence[str] | None = None,
    comm: Any = None,
    log_suffix: str = "",
) -> None:
    """Begin a run's log in ``dir``, else $OPENAI_LOGDIR, else a new temporary folder.

    ``format_strs``, else $OPENAI_LOG_FORMAT, are the formats; processes after the first write "log" only.
    """
    rank = int(os.environ.get("RANK", "0"))
    folder = dir or os.environ.get("OPENAI_LOGDIR")
    if not folder:
        stamp = datetime.datetime.now().strftime("openai-%Y-%m-%d-%H-%M-%S-%f")
        folder = os.path.join(tempfile.gettempdir(), stamp)
    path = os.path.expanduser(os.fspath(folder))
    os.makedirs(path, exist_ok=True)
    if rank > 0:
        log_suffix = f"{log_suffix}-rank{rank:03d}"
    if format_strs is None:
        known = ("OPENAI_LOG_FORMAT", "stdout,log,csv") if rank == 0 else ("OPENAI_LOG_FORMAT_MPI", "log")
        format_strs = os.environ.get(*known).split(",")
    writers = [make_output_format(each, path, log_suffix) for each in format_strs if each]
    Logger.CURRENT = Logger(path, writers, comm)
    if writers:
        log(f"Logging to {path}")


def reset() -> None:
    """End the current log; the next message begins a new one."""
    if Logger.CURRENT is not None:
        Logger.CURRENT.close()
        Logger.CURRENT = None


@contextmanager
def scoped_configure(
    dir: str | os.PathLike[str] | None = None, format_strs: Sequence[str] | None = None, comm: Any = None
) -> Iterator[None]:
    """A log of its own inside a ``with`` block."""
    before = Logger.CURRENT
    configure(dir=dir, format_strs=format_strs, comm=comm)
    try:
        yield
    finally:
        get_current().close()
        Logger.CURRENT = before


def get_current() -> Logger:
    """The process's logger."""
    if Logger.CURRENT is None:
        configure()
    return Logger.CURRENT  # type: ignore[return-value]  # configure has set it


def logkv(key: str, val: Any) -> None:
    """Set a value of the next row."""
    get_current().logkv(key, val)


def logkv_mean(key: str, val: Any) -> None:
    """Average a value over all calls until the next row."""
    get_current().logkv_mean(key, val)


def logkvs(d: Mapping[str, Any]) -> None:
    """Set several values of the next row."""
    for key, val in d.items():
        logkv(key, val)


def dumpkvs() -> dict[str, Any]:
    """Write the row, and begin the next."""
    return get_current().dumpkvs()


def getkvs() -> dict[str, Any]:
    """The values of the next row so far."""
    return get_current().name2val


def log(*args: Any, level: int = INFO) -> None:
    """Write a message."""
    get_current().log(*args, level=level)


def set_level(level: int) -> None:
    """The lowest level of messages that are written."""
    get_current().level = level


def get_dir() -> str | None:
    """The folder of the run."""
    return get_current().dir


@contextmanager
def profile_kv(scopename: str) -> Iterator[None]:
    """Add the seconds that a ``with`` block, or a function decorated, takes to "wait_``scopename``"."""
    start = time.time()
    try:
        yield
    finally:
        get_current().name2val[f"wait_{scopename}"] += time.time() - start


debug, info, warn, error = (partial(log, level=level) for level in (DEBUG, INFO, WARN, ERROR))
profile = profile_kv
record_tabular, dump_tabular = logkv, dumpkvs


def _created(path: str | os.PathLike[str]) -> TextIO:
    return Path(path).open("w", encoding="utf-8")


def _short(text: str) -> str:
    return text if len(text) <= _WIDEST else f"{text[: _WIDEST - 3]}..."
