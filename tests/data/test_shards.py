"""Shards: every sample once an epoch, positions that say it all, and faults by name."""

from __future__ import annotations

import io
import subprocess
import sys
import tarfile
import threading
import warnings
from collections import Counter
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from glide_fast.data import shards
from glide_fast.data.shards import Lane, Position, decode, is_shards, list_shards, read_samples

pytest.importorskip("webdataset")
SHARDS, EACH = 5, 7


def write_shard(path: Path, number: int, samples: int = EACH, **files: bytes) -> None:
    with tarfile.open(path, "w") as archive:
        for index in range(samples):
            name = f"{number}-{index}"
            picture = io.BytesIO()
            Image.fromarray(np.full((10, 12, 3), 10 * number + index, dtype=np.uint8)).save(picture, "PNG")
            parts = {"png": picture.getvalue(), "txt": f"caption {name}".encode(), "cls": b"%d" % (index % 2)}
            for suffix, content in {**parts, **files}.items():
                info = tarfile.TarInfo(f"{name}.{suffix}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(SHARDS):
        write_shard(tmp_path / f"{number:02d}.tar", number)
    return tmp_path


def source(folder: Path) -> str:
    return f"{folder}/{{00..{SHARDS - 1:02d}}}.tar"


def lane(folder: Path, number: int = 0, lanes: int = 1, **changes: Any) -> Lane:
    values = {"shards": list_shards(source(folder)), "seed": 3, "window": 4} | changes
    return Lane(number=number, lanes=lanes, **values)


def names(lane: Lane, count: int) -> list[str]:
    return [lane.next()["__key__"] for _ in range(count)]


def test_sources_are_told_apart() -> None:
    for yes in ("a/{00..10}.tar", "https://host/a.tar?x=1", "pipe:cat a", "A.TAR"):
        assert is_shards(yes)
    for no in ("emoji", "folder", "folder.tar.d", "tar"):
        assert not is_shards(no)


def test_a_lane_reads_every_sample_once_an_epoch_in_a_new_order(folder: Path) -> None:
    everything = {f"{number}-{index}" for number in range(SHARDS) for index in range(EACH)}
    reader = lane(folder)
    first, second = names(reader, SHARDS * EACH), names(reader, SHARDS * EACH)
    assert set(first) == set(second) == everything
    assert first != second
    in_file_order = [
        name
        for shard in dict.fromkeys(each[0] for each in first)
        for name in sorted(everything)
        if name[0] == shard
    ]
    assert first != in_file_order
    assert names(lane(folder), 5) == first[:5]
    assert names(lane(folder, seed=4), SHARDS * EACH) != first


def test_lanes_share_an_epoch(folder: Path) -> None:
    sizes = [3, 2]  # shards
    seen = Counter(name for number in (0, 1) for name in names(lane(folder, number, 2), sizes[number] * EACH))
    assert set(seen.values()) == {1}
    assert len(seen) == SHARDS * EACH


@pytest.mark.parametrize("window", [1, 4, 7, 100])
def test_a_lane_goes_on_from_any_position(folder: Path, window: int) -> None:
    unbroken = lane(folder, window=window)
    expected, positions = [], []
    for _ in range(2 * SHARDS * EACH + 3):
        positions.append(unbroken.position)
        expected.append(unbroken.next()["__key__"])
    for step in range(0, len(positions), 5):
        resumed = lane(folder, window=window, position=Position(*list(positions[step])))
        assert (
            names(resumed, 12 if step + 12 <= len(expected) else 1)
            == expected[step : step + 12][: 12 if step + 12 <= len(expected) else 1]
        )


def test_a_sample_is_decoded_with_caption_and_class(folder: Path) -> None:
    sample = next(read_samples(str(folder / "02.tar")))
    example = decode(sample, 8, needed="cls")
    assert example.picture.shape == (8, 8, 3)
    assert (example.picture == 20).all()
    assert (example.caption, example.label, example.name) == ("caption 2-0", 0, "2-0")


@pytest.mark.parametrize(
    ("change", "needed", "message"),
    [
        ({"png": b"no picture"}, None, r"cannot read picture '2-0\.png'"),
        ({"txt": b"\xff\xfe\xff"}, None, "caption or class of sample '2-0' cannot be read"),
        ({"cls": b"cat"}, None, "caption or class of sample '2-0' cannot be read"),
        ({"txt": None}, "txt", r"sample '2-0' has no \.txt"),
        ({"png": None}, None, r"sample '2-0' has no picture; name it \.jpg"),
    ],
)
def test_a_broken_sample_is_named(
    folder: Path, change: dict[str, Any], needed: str | None, message: str
) -> None:
    sample = {**next(read_samples(str(folder / "02.tar"))), **change}
    sample = {name: value for name, value in sample.items() if value is not None}
    with pytest.raises(ValueError, match=message):
        decode(sample, 8, needed=needed)


def test_a_truncated_shard_is_named_and_gives_what_it_has(folder: Path) -> None:
    path = folder / "01.tar"
    path.write_bytes(path.read_bytes()[: 512 * 6 * 4 + 300])
    with pytest.warns(UserWarning, match=r"01\.tar cannot be read to its end: .*; it gave [34] samples"):
        found = [sample["__key__"] for sample in read_samples(str(path))]
    assert found == [f"1-{index}" for index in range(len(found))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        seen = Counter(names(lane(folder), (SHARDS - 1) * EACH + len(found)))
    assert set(seen.values()) == {1}


@pytest.mark.parametrize("content", [b"", b"no tar " * 300])
def test_a_shard_of_which_nothing_can_be_read_is_an_error(folder: Path, content: bytes) -> None:
    (folder / "01.tar").write_bytes(content)
    with pytest.raises(OSError, match=r"shard .*01\.tar cannot be read"):
        list(read_samples(str(folder / "01.tar")))


def test_empty_shards_are_passed_over_unless_all_are_empty(folder: Path) -> None:
    for number in range(SHARDS - 1):
        write_shard(folder / f"{number:02d}.tar", number, samples=0)
    assert {name[0] for name in names(lane(folder), 3 * EACH)} == {str(SHARDS - 1)}
    write_shard(folder / f"{SHARDS - 1:02d}.tar", 0, samples=0)
    with pytest.raises(ValueError, match="and all others of its lane hold no sample"):
        lane(folder).next()


def test_missing_shards_are_named_before_any_is_read(folder: Path) -> None:
    (folder / "03.tar").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of 5 shards .* the first is '.*03\.tar'"):
        list_shards(source(folder))


def test_the_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setitem(sys.modules, "webdataset", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'glide-fast\[shards\]'"):
        list_shards(source(folder))


def test_importing_does_not_need_the_package() -> None:
    code = "import sys; sys.modules['webdataset'] = None; import glide_fast.training"
    subprocess.run([sys.executable, "-c", code], check=True)


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def address(folder: Path) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_shards_at_a_url_are_read_as_local_ones(folder: Path, address: str) -> None:
    remote = lane(folder, shards=list_shards(address + "/{00..04}.tar"))
    assert names(remote, 40) == names(lane(folder), 40)


def test_a_url_that_is_not_there_is_named(address: str) -> None:
    with pytest.raises(OSError, match=r"shard http://.*/77\.tar cannot be read"):
        list(read_samples(address + "/77.tar"))


def test_pictures_are_read_from_where_decode_says(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setattr(shards, "PICTURES", ("gif",))
    with pytest.raises(ValueError, match="has no picture"):
        decode(next(read_samples(str(folder / "00.tar"))), 8, needed=None)
