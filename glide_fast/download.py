"""Files from the network: resumed where they were cut, checked, and kept in one cache directory.

A download grows in ``NAME.part`` and gets its name when it is whole and its SHA-256 is right. ``NAME.json``
beside it remembers where it came from, the server's mark of that version, and its SHA-256, which every later
call checks. A cut connection, a kill or a full disk leaves a part that the next call goes on with.
"""

from __future__ import annotations

import errno
import http.client
import json
import os
import re
import shutil
import ssl
import time
from dataclasses import asdict, dataclass, replace
from email.message import Message
from pathlib import Path
from typing import BinaryIO
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from tqdm import tqdm

from glide_fast.files import appending_alone, replacing, sha256_of

CACHE_VARIABLE = "GLIDE_FAST_CACHE"
STALL_SECONDS = 30.0  # without a byte before a connection is given up
ATTEMPTS = 5  # in a row that bring nothing new
FIRST_DELAY = 1.0  # seconds before the second attempt; doubled from one to the next
BLOCK = 1 << 20

_BUSY = (408, 425, 429, 500, 502, 503, 504)
_TRANSIENT = (URLError, TimeoutError, ConnectionError, http.client.HTTPException, ssl.SSLError)


@dataclass(frozen=True, kw_only=True)
class _Record:
    """What is remembered about a file; ``sha256`` once it was whole, ``version`` is an ETag or a date."""

    url: str
    version: str | None = None
    sha256: str | None = None


def cache_folder() -> Path:
    """Where downloads are kept: $GLIDE_FAST_CACHE, else glide_fast in the user's cache directory."""
    if os.environ.get(CACHE_VARIABLE):
        return Path(os.environ[CACHE_VARIABLE]).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "glide_fast"


def cached_path(url: str, folder: Path | None = None) -> Path:
    """Where :func:`fetch` keeps the file of ``url``: in ``folder``, else under host and path in the cache.

    Raises:
        ValueError: the address is not http or https, or names no file.
    """
    address = urlsplit(url)
    parts = [part for part in address.path.split("/") if part not in ("", ".", "..")]
    if address.scheme not in ("http", "https") or not address.hostname or not parts:
        raise ValueError(f"{url!r} is not the address of a file; give one such as https://host/model.pt")
    if folder is not None:
        return folder / parts[-1]
    port = "" if address.port is None else f"_{address.port}"
    return cache_folder().joinpath(address.hostname + port, *parts)


def fetch(url: str, *, sha256: str | None = None, folder: Path | None = None, progress: bool = True) -> Path:
    """The local file of ``url``, downloaded unless it is there already, and checked either way.

    Args:
        sha256: the published SHA-256, 64 hexadecimal digits; without one, that of the first download holds.
        folder: where the file is kept, under its own name, instead of in the cache directory.

    Raises:
        ValueError: the address is none, or the content has another SHA-256; nothing is removed.
        ConnectionError: the server stalls or cuts too often; the part that has arrived is kept.
        OSError: the server refuses (404 …), or the disk is full.
    """
    if sha256 is not None and not re.fullmatch("[0-9a-fA-F]{64}", sha256):
        raise ValueError(f"SHA-256 {sha256!r} is not 64 hexadecimal digits; give the whole digest, or None")
    path = cached_path(url, folder)
    published = None if sha256 is None else sha256.lower()
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        with appending_alone(_beside(path, ".part")) as part:
            if path.is_file():  # another process was first
                Path(part.name).unlink(missing_ok=True)
            else:
                _download(url, path, part, published, progress)
                return path
    _check(path, url, published)
    return path


def _check(path: Path, url: str, published: str | None) -> None:
    """Raise unless the file is what was published, or what was first downloaded."""
    record = _read_record(path)
    if published is None and record is not None and record.url != url:
        raise ValueError(
            f"{path} comes from {record.url}, not from {url}; delete it or choose another folder"
        )
    actual = sha256_of(path)
    expected = published or (record and record.sha256)
    if expected is None:
        _write_record(path, _Record(url=url, sha256=actual))
    elif actual != expected:
        raise ValueError(
            f"{path} has SHA-256 {actual}, not {expected} as {'published' if published else 'at first'}: "
            "it is damaged or another file; delete it and fetch it again"
        )


def _download(url: str, path: Path, part: BinaryIO, published: str | None, progress: bool) -> None:
    """Fill ``part`` with what is missing, check the whole, and give it its name."""
    record = _read_record(path)
    if record is None or record.url != url:
        record = _Record(url=url)
        _empty(part)
    if record.version is None and published is None:
        _empty(part)  # nothing would tell whether the beginning belongs to the same version
    with tqdm(desc=path.name, unit="B", unit_scale=True, disable=not progress) as bar:
        _attempts(record, path, part, bar)
    actual = sha256_of(Path(part.name))
    expected = published or record.sha256
    if expected not in (None, actual):
        raise ValueError(
            f"{url} has SHA-256 {actual}, not {expected} as {'published' if published else 'at first'}; "
            f"delete {part.name} and fetch again"
            + ("" if published else f"; to accept another version, delete {_beside(path, '.json')} as well")
        )
    os.fsync(part.fileno())
    _write_record(path, replace(_read_record(path) or record, sha256=actual))
    Path(part.name).replace(path)


def _attempts(record: _Record, path: Path, part: BinaryIO, bar: tqdm[None]) -> None:
    """Try until all is there, with growing pauses while nothing comes."""
    failures = 0
    while True:
        before = part.tell()
        try:
            return _attempt(_read_record(path) or record, path, part, bar)
        except _TRANSIENT as error:
            if isinstance(error, HTTPError) and error.code not in _BUSY:
                raise OSError(
                    f"{record.url}: the server answers {error.code} {error.reason}; check the address"
                ) from None
            failures = 1 if part.tell() > before else failures + 1
            if failures >= ATTEMPTS:
                raise ConnectionError(
                    f"{record.url} could not be fetched: {error} ({failures} attempts brought nothing new); "
                    f"{part.tell()} bytes are kept in {part.name}, the next call goes on from there"
                ) from None
            time.sleep(FIRST_DELAY * 2 ** (failures - 1))
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise OSError(
                errno.ENOSPC,
                f"the disk of {path.parent} is too full for {path.name} ({error.strerror}); make room, or "
                f"point {CACHE_VARIABLE} at another disk",
            ) from None


def _attempt(record: _Record, path: Path, part: BinaryIO, bar: tqdm[None]) -> None:
    """One request for what is missing."""
    start = part.tell()
    headers = {"User-Agent": "glide_fast"}
    if start:
        headers["Range"] = f"bytes={start}-"
        if record.version is not None:
            headers["If-Range"] = record.version
    try:
        response = urlopen(Request(record.url, headers=headers), timeout=STALL_SECONDS)
    except HTTPError as error:
        if error.code == http.client.REQUESTED_RANGE_NOT_SATISFIABLE and start:
            if _content_range(error.headers) == (None, start):
                return
            _empty(part)
            raise ConnectionError("the file on the server has changed") from None
        raise
    with response:
        version = _version(response.headers)
        total: int | None = response.length
        if start and response.status == http.client.PARTIAL_CONTENT:
            first, total = _content_range(response.headers)
            if first != start or (version and record.version and version != record.version):
                _empty(part)
                raise ConnectionError("the file on the server has changed")
        else:
            _empty(part)
            _write_record(path, replace(record, version=version))
        bar.total, bar.n = total, part.tell()
        missing, free = (total or 0) - part.tell(), shutil.disk_usage(path.parent).free
        if missing > free:
            raise OSError(errno.ENOSPC, f"{missing} more bytes are needed, {free} are free")
        while block := response.read1(BLOCK):
            while block:
                written = part.write(block)
                block = block[written:]
                bar.update(written)
        if total is not None and part.tell() < total:
            raise ConnectionError(f"the connection was cut after {part.tell()} of {total} bytes")


def _version(headers: Message) -> str | None:
    """What marks one version of a file: its ETag, if that promises equal bytes, else its date."""
    tag: str | None = headers.get("ETag")
    return tag if tag is not None and tag.startswith('"') else headers.get("Last-Modified")


def _content_range(headers: Message) -> tuple[int | None, int | None]:
    """First byte and size of the whole of "bytes 5-9/10"; None for what is not told."""
    match = re.fullmatch(r"bytes (?:(\d+)-\d+|\*)/(?:(\d+)|\*)", headers.get("Content-Range", ""))
    first, total = match.groups() if match else (None, None)
    return None if first is None else int(first), None if total is None else int(total)


def _empty(part: BinaryIO) -> None:
    part.seek(0)
    part.truncate()


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)


def _read_record(path: Path) -> _Record | None:
    """What is remembered of the file; None where nothing is, or nothing readable."""
    try:
        return _Record(**json.loads(_beside(path, ".json").read_text(encoding="utf-8")))
    except (FileNotFoundError, json.JSONDecodeError, TypeError):
        return None


def _write_record(path: Path, record: _Record) -> None:
    with replacing(_beside(path, ".json")) as temporary:
        temporary.write_text(json.dumps(asdict(record), indent=2) + "\n", encoding="utf-8")
