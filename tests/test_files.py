"""Files that are replaced whole or not at all."""

from __future__ import annotations

import hashlib
import os
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from glide_fast.files import appending_alone, replacing, sha256_of


@pytest.fixture
def umask() -> Iterator[None]:
    """Put the process's umask back."""
    mask = os.umask(0o022)
    os.umask(mask)
    yield
    os.umask(mask)


def write_and_fail(path: Path, error: BaseException) -> None:
    with replacing(path) as temporary:
        temporary.write_text("ne")
        raise error


def test_the_content_is_there_only_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with replacing(path) as temporary:
        assert temporary.parent == path.parent
        assert temporary != path
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt):
        write_and_fail(path, KeyboardInterrupt())
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_failure_leaves_no_file_where_there_was_none(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        write_and_fail(tmp_path / "a.txt", ZeroDivisionError())
    assert list(tmp_path.iterdir()) == []


def test_a_rename_that_fails_leaves_no_temporary_file(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="folder"), replacing(tmp_path / "folder") as temporary:
        temporary.write_text("new")
    assert [file.name for file in tmp_path.iterdir()] == ["folder"]


def test_the_content_is_on_disk_before_it_gets_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, calls = tmp_path / "a.txt", []
    monkeypatch.setattr(os, "fsync", lambda _descriptor: calls.append(path.exists()))
    with replacing(path) as temporary:
        temporary.write_text("new")
    assert calls == [False]
    assert path.exists()


def test_missing_folders_are_made(tmp_path: Path) -> None:
    with replacing(tmp_path / "a" / "b" / "c.txt") as temporary:
        temporary.write_text("new")
    assert (tmp_path / "a" / "b" / "c.txt").read_text() == "new"


def test_the_suffix_is_kept_for_writers_that_look_at_it(tmp_path: Path) -> None:
    with replacing(tmp_path / "a.png") as temporary:
        assert temporary.suffix == ".png"
        assert temporary.name.startswith(".")


@pytest.mark.usefixtures("umask")
@pytest.mark.parametrize(("mask", "permissions"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_permissions_follow_the_umask(tmp_path: Path, mask: int, permissions: int) -> None:
    os.umask(mask)
    with replacing(tmp_path / "a.txt") as temporary:
        temporary.write_text("new")
    assert stat.S_IMODE((tmp_path / "a.txt").stat().st_mode) == permissions
    assert os.umask(mask) == mask


def test_a_kill_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    code = (
        "import os, pathlib, signal\n"
        "from glide_fast.files import replacing\n"
        f"with replacing(pathlib.Path({str(path)!r})) as temporary:\n"
        "    temporary.write_text('ne')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -9
    assert path.read_text() == "old"


def test_appending_goes_on_at_the_end_and_one_after_the_other(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"one ")

    def append() -> None:
        with appending_alone(path) as second:
            assert second.tell() == len(b"one two ")
            second.write(b"three")

    with appending_alone(path) as first:
        waiting = threading.Thread(target=append)
        waiting.start()
        waiting.join(0.2)
        assert waiting.is_alive()
        assert first.tell() == len(b"one ")
        first.write(b"two ")
    waiting.join()
    assert path.read_bytes() == b"one two three"


@pytest.mark.parametrize("size", [0, 3, (1 << 20) + 7])
def test_the_hash_is_that_of_the_whole_content(tmp_path: Path, size: int) -> None:
    content = bytes(index % 251 for index in range(size))
    (tmp_path / "a").write_bytes(content)
    assert sha256_of(tmp_path / "a") == hashlib.sha256(content).hexdigest()


def test_a_file_is_hashed_once_until_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"one")
    first = sha256_of(path)
    path.write_bytes(b"three")
    assert sha256_of(path) == hashlib.sha256(b"three").hexdigest() != first
    monkeypatch.setattr(hashlib, "sha256", None)
    assert sha256_of(path) != first
