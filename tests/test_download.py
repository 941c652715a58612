"""Downloads against a server on this machine that stalls, cuts, corrupts, and changes its mind."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import random
import re
import shutil
import subprocess
import sys
import threading
import time
from collections import namedtuple
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from glide_fast import download
from glide_fast.download import cache_folder, cached_path, fetch

CONTENT = random.Random(0).randbytes(300_000)
OTHER = random.Random(1).randbytes(300_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()
SOME = 100_000
STALL = 60.0  # seconds


class Server(ThreadingHTTPServer):
    """Serves ``content`` at every address; each request meets the next of ``faults``."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.content = CONTENT
        self.version: str | None = '"1"'
        self.date: str | None = None
        self.knows_ranges = True
        self.heeds_if_range = True
        self.tells_length = True
        self.faults: list[str | int | Callable[[], None]] = []
        self.requests: list[tuple[str | None, str | None]] = []
        self.released = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/models/a.pt"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        server = self.server
        asked, condition = self.headers["Range"], self.headers["If-Range"]
        server.requests.append((asked, condition))
        fault = server.faults.pop(0) if server.faults else None
        if callable(fault):
            fault()
        if isinstance(fault, int):
            self.send_error(fault)
            return
        body, start = server.content, 0
        matches = not server.heeds_if_range or condition in (None, server.version, server.date)
        if asked and server.knows_ranges and matches:
            start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1])  # type: ignore[index]
            self.send_response(206 if start < len(body) else 416)
            shown = f"bytes {start}-{len(body) - 1}" if start < len(body) else "bytes *"
            self.send_header("Content-Range", f"{shown}/{len(body)}")
        else:
            self.send_response(200)
        body = body[start:]
        if server.tells_length:
            self.send_header("Content-Length", str(len(body)))
        for name, value in (("ETag", server.version), ("Last-Modified", server.date)):
            if value is not None:
                self.send_header(name, value)
        self.end_headers()
        if fault == "corrupt":
            body = body[:10] + b"?" + body[11:]
        self.wfile.write(body[:SOME] if fault in ("cut", "stall") else body)
        self.wfile.flush()
        if fault == "stall":
            server.released.wait(STALL)

    def log_message(self, *_arguments: Any) -> None:
        """Say nothing."""


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as running:
        threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
        yield running
        running.released.set()
        running.shutdown()


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "FIRST_DELAY", 0.001)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def get(server: Server, tmp_path: Path) -> Callable[..., Path]:
    def get(sha256: str | None = None) -> Path:
        return fetch(server.url, sha256=sha256, folder=tmp_path, progress=False)

    return get


def record(folder: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((folder / "a.pt.json").read_text())
    return values


@pytest.mark.parametrize("sha256", [None, SHA256, SHA256.upper()])
def test_a_file_is_fetched_once_and_remembered(
    server: Server, get: Callable[..., Path], tmp_path: Path, sha256: str | None
) -> None:
    assert get(sha256) == tmp_path / "a.pt"
    assert get(sha256).read_bytes() == CONTENT
    assert server.requests == [(None, None)]
    assert record(tmp_path) == {"url": server.url, "version": '"1"', "sha256": SHA256}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pt", "a.pt.json"]


def test_what_has_arrived_is_not_asked_for_again(server: Server, get: Callable[..., Path]) -> None:
    server.faults = ["cut", "cut"]
    assert get().read_bytes() == CONTENT
    assert server.requests == [(None, None), ("bytes=100000-", '"1"'), ("bytes=200000-", '"1"')]


def test_a_stalled_connection_is_given_up_and_gone_on_with(
    server: Server, get: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "STALL_SECONDS", 0.5)
    server.faults = ["stall"]
    start = time.monotonic()
    assert get().read_bytes() == CONTENT
    assert time.monotonic() - start < STALL / 2
    assert server.requests[:2] == [(None, None), ("bytes=100000-", '"1"')]


@pytest.mark.parametrize("answer", [500, 503, 429])
def test_a_busy_server_is_asked_again(server: Server, get: Callable[..., Path], answer: int) -> None:
    server.faults = ["cut", answer, answer]
    assert get().read_bytes() == CONTENT
    assert [asked for asked, _ in server.requests] == [None, *["bytes=100000-"] * 3]


def test_a_server_that_goes_on_failing_is_given_up_and_the_part_kept(
    server: Server, get: Callable[..., Path], tmp_path: Path
) -> None:
    server.faults = ["cut", *[500] * 5]
    with pytest.raises(ConnectionError, match=r"500.*100000 bytes are kept in .*a\.pt\.part, the next call"):
        get()
    assert len(server.requests) == 1 + 4
    assert not (tmp_path / "a.pt").exists()
    server.faults = []
    assert get().read_bytes() == CONTENT
    assert server.requests[-1] == ("bytes=100000-", '"1"')


@pytest.mark.parametrize("answer", [404, 403])
def test_a_refusal_is_told_at_once(server: Server, get: Callable[..., Path], answer: int) -> None:
    server.faults = [answer]
    with pytest.raises(OSError, match=rf"a\.pt: the server answers {answer} .*; check the address"):
        get()
    assert len(server.requests) == 1


def test_a_server_without_ranges_starts_over(server: Server, get: Callable[..., Path]) -> None:
    server.knows_ranges = False
    server.faults = ["cut", "cut"]
    assert get().read_bytes() == CONTENT
    assert len(server.requests) == 3


def test_a_server_without_ranges_that_always_cuts_is_given_up(
    server: Server, get: Callable[..., Path]
) -> None:
    server.knows_ranges = False
    server.faults = ["cut"] * 20
    with pytest.raises(ConnectionError, match="cut after 100000 of 300000 bytes"):
        get()
    assert len(server.requests) == 5


@pytest.mark.parametrize("heeds_if_range", [True, False])
@pytest.mark.parametrize("marked_by", ["version", "date"])
def test_a_file_that_changes_between_attempts_is_never_mixed(
    server: Server, get: Callable[..., Path], heeds_if_range: bool, marked_by: str
) -> None:
    def change() -> None:
        server.content = OTHER
        setattr(server, marked_by, '"2"' if marked_by == "version" else "Tue, 04 Jan 2022 00:00:00 GMT")

    if marked_by == "date":
        server.version, server.date = 'W/"weak"', "Mon, 03 Jan 2022 00:00:00 GMT"
    server.heeds_if_range = heeds_if_range
    server.faults = ["cut", change]
    assert get().read_bytes() == OTHER


def test_a_file_that_shrinks_between_attempts_starts_over(server: Server, get: Callable[..., Path]) -> None:
    def shrink() -> None:
        server.content = b"short"

    server.heeds_if_range = False
    server.faults = ["cut", shrink]
    assert get().read_bytes() == b"short"


@pytest.mark.parametrize(("sha256", "again"), [(SHA256, "bytes=100000-"), (None, None)])
def test_without_a_mark_of_the_version_a_part_is_used_only_if_the_hash_is_published(
    server: Server, get: Callable[..., Path], sha256: str | None, again: str | None
) -> None:
    server.version = None
    server.faults = ["cut", *[500] * 5]
    with pytest.raises(ConnectionError):
        get(sha256)
    server.faults = []
    assert get(sha256).read_bytes() == CONTENT
    assert server.requests[-1] == (again, None)


def test_a_part_that_was_whole_is_finished_without_its_bytes(
    server: Server, get: Callable[..., Path], tmp_path: Path
) -> None:
    get()
    (tmp_path / "a.pt").rename(tmp_path / "a.pt.part")
    assert get().read_bytes() == CONTENT
    assert server.requests[-1] == ("bytes=300000-", '"1"')


def test_a_length_that_is_not_told_is_no_obstacle(server: Server, get: Callable[..., Path]) -> None:
    server.tells_length = False
    assert get().read_bytes() == CONTENT


def test_corrupt_content_is_told_from_the_published_hash_and_nothing_is_removed(
    server: Server, get: Callable[..., Path], tmp_path: Path
) -> None:
    server.faults = ["corrupt"]
    with pytest.raises(
        ValueError,
        match=rf"a\.pt has SHA-256 [0-9a-f]{{64}}, not {SHA256} as published; delete .*a\.pt\.part and fetch",
    ):
        get(SHA256)
    assert not (tmp_path / "a.pt").exists()
    assert (tmp_path / "a.pt.part").stat().st_size == len(CONTENT)
    (tmp_path / "a.pt.part").unlink()
    assert get(SHA256).read_bytes() == CONTENT


@pytest.mark.parametrize(("sha256", "since"), [(SHA256, "as published"), (None, "as at first")])
def test_a_file_that_is_damaged_later_is_told(
    get: Callable[..., Path], tmp_path: Path, sha256: str | None, since: str
) -> None:
    get()
    (tmp_path / "a.pt").write_bytes(OTHER)
    with pytest.raises(
        ValueError, match=rf"a\.pt has SHA-256 .*, not {SHA256} {since}: .*delete it and fetch"
    ):
        get(sha256)
    assert (tmp_path / "a.pt").read_bytes() == OTHER
    (tmp_path / "a.pt").unlink()
    assert get(sha256).read_bytes() == CONTENT


def test_the_first_hash_holds_for_a_second_download(
    server: Server, get: Callable[..., Path], tmp_path: Path
) -> None:
    get().unlink()
    server.content, server.version = OTHER, '"2"'
    with pytest.raises(ValueError, match=r"delete .*a\.pt\.part .*another version, delete .*a\.pt\.json as"):
        get()
    (tmp_path / "a.pt.part").unlink()
    (tmp_path / "a.pt.json").unlink()
    assert get().read_bytes() == OTHER


def test_a_file_put_there_by_hand_is_used_and_remembered(
    server: Server, get: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "a.pt").write_bytes(CONTENT)
    assert get().read_bytes() == CONTENT
    assert server.requests == []
    assert record(tmp_path)["sha256"] == SHA256


def test_two_addresses_of_one_name_are_not_confused(
    server: Server, get: Callable[..., Path], tmp_path: Path
) -> None:
    get()
    other = server.url.replace("models", "others")
    with pytest.raises(ValueError, match=r"a\.pt comes from .*models/a\.pt, not from .*others/a\.pt; delete"):
        fetch(other, folder=tmp_path, progress=False)
    assert fetch(other, sha256=SHA256, folder=tmp_path, progress=False).read_bytes() == CONTENT


def test_a_full_disk_is_named_before_the_download(
    server: Server, get: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _folder: usage(299_999))
    with pytest.raises(OSError, match=r"too full for a\.pt \(300000 more bytes are needed, 299999 are free"):
        get()
    assert len(server.requests) == 1


class FullDisk(io.FileIO):
    """A file on a disk that has room for 100,000 bytes of it."""

    def write(self, block: Any, /) -> int:
        room = SOME - self.tell()
        if room == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(block[:room])


def test_a_disk_that_fills_up_is_named_and_the_part_kept(
    get: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(download, "appending_alone", lambda path: FullDisk(path, "ab"))
        with pytest.raises(OSError, match=r"too full for a\.pt \(No space left") as info:
            get()
    assert info.value.errno == errno.ENOSPC
    assert (tmp_path / "a.pt.part").read_bytes() == CONTENT[:SOME]
    assert get().read_bytes() == CONTENT


def test_a_kill_leaves_a_part_that_is_gone_on_with(
    server: Server, get: Callable[..., Path], tmp_path: Path
) -> None:
    server.faults = ["stall"]
    process = start(server, tmp_path)
    part = tmp_path / "a.pt.part"
    while not part.exists() or part.stat().st_size < SOME:
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert not (tmp_path / "a.pt").exists()
    assert get().read_bytes() == CONTENT
    assert server.requests[-1] == ("bytes=100000-", '"1"')


def test_two_processes_at_once_download_it_once(
    server: Server, get: Callable[..., Path], tmp_path: Path
) -> None:
    server.faults = ["stall", lambda: time.sleep(0.2)]
    process = start(server, tmp_path)
    part = tmp_path / "a.pt.part"
    while not part.exists() or part.stat().st_size < SOME:
        assert process.poll() is None
        time.sleep(0.01)
    waiting = threading.Thread(target=get)
    waiting.start()
    server.released.set()
    waiting.join()
    assert process.wait() == 0
    assert (tmp_path / "a.pt").read_bytes() == CONTENT
    assert [asked for asked, _ in server.requests] == [None, "bytes=100000-"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pt", "a.pt.json"]


def start(server: Server, folder: Path) -> subprocess.Popen[bytes]:
    """Another process that fetches the same file into ``folder``."""
    code = (
        "import pathlib\nfrom glide_fast.download import fetch\n"
        f"fetch({server.url!r}, folder=pathlib.Path({str(folder)!r}), progress=False)\n"
    )
    return subprocess.Popen([sys.executable, "-c", code])


def test_the_cache_is_one_directory_that_can_be_chosen(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("GLIDE_FAST_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder() == tmp_path / "home" / ".cache" / "glide_fast"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "glide_fast"
    monkeypatch.setenv("GLIDE_FAST_CACHE", str(tmp_path / "cache"))
    expected = tmp_path / "cache" / server.url.split("/")[2].replace(":", "_") / "models" / "a.pt"
    assert fetch(server.url, progress=False) == expected
    assert expected.read_bytes() == CONTENT


@pytest.mark.parametrize("url", ["file:///etc/passwd", "a.pt", "https://host", "https:///a.pt", "ftp://h/a"])
def test_an_address_of_no_file_is_refused(url: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not the address of a file; give one such as https://host/"):
        fetch(url, folder=tmp_path)


def test_an_address_cannot_leave_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GLIDE_FAST_CACHE", str(tmp_path))
    assert cached_path("https://host/../../b//a.pt?x=../y") == tmp_path / "host" / "b" / "a.pt"
    assert cached_path("https://host/b/../a.pt", tmp_path / "c") == tmp_path / "c" / "a.pt"


def test_a_hash_that_is_none_is_refused(get: Callable[..., Path]) -> None:
    with pytest.raises(ValueError, match="SHA-256 'abc' is not 64 hexadecimal digits"):
        get("abc")


def test_progress_is_shown_on_request(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fetch(server.url, folder=tmp_path)
    assert "a.pt" in capsys.readouterr().err
    fetch(server.url, folder=tmp_path / "b", progress=False)
    assert capsys.readouterr().err == ""
