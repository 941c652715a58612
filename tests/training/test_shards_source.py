"""Runs on shards: resumed in the middle of an epoch, the same for any number of processes, faults by name."""

from __future__ import annotations

import io
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from glide_fast.data.folder import load_folder
from glide_fast.training.config import DataConfig, SampleConfig, TrainConfig
from glide_fast.training.log import read_log
from glide_fast.training.loop import Trainer, train
from glide_fast.training.sources import Shards, merged, open_source
from tests.training.test_distributed import assert_close, config_for, losses, weights
from tests.training.tiny import (
    CAPTIONS,
    CLASSES,
    SIZE,
    assert_identical,
    snapshot,
    tiny_config,
    tiny_network,
)
from tests.training.worlds import train_together

pytest.importorskip("webdataset")
EACH = 5


@pytest.fixture(scope="module")
def folder(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four shards of five samples, made of the ten pictures."""
    path = tmp_path_factory.mktemp("shards")
    data = load_folder(pictures, SIZE)
    for number in range(4):
        with tarfile.open(path / f"{number}.tar", "w") as archive:
            for index in range(EACH):
                row = (number * EACH + index) % len(data)
                caption = data.captions[row]
                png = (pictures / data.names[row]).read_bytes()
                label = b"%d" % (CAPTIONS.index(caption) % CLASSES)
                for suffix, content in {"png": png, "txt": caption.encode(), "cls": label}.items():
                    info = tarfile.TarInfo(f"{number}-{index}.{suffix}")
                    info.size = len(content)
                    archive.addfile(info, io.BytesIO(content))
    return path


def shards_config(folder: Path, **changes: Any) -> TrainConfig:
    config = config_for(folder, **changes)
    data = DataConfig(source=f"{folder}/{{0..3}}.tar", window=3)
    return replace(config, data=data)


def taken(source: Any, steps: range, parts: list[slice]) -> list[list[str]]:
    return [[name for part in parts for name in source.take(step, part).names] for step in steps]


def test_a_batch_is_the_same_for_any_number_of_processes(folder: Path) -> None:
    config = shards_config(folder)
    one = taken(open_source(config), range(6), [slice(0, 8)])
    for size in (2, 4, 8):
        share = 8 // size
        ranks = [
            taken(open_source(config), range(6), [slice(rank * share, (rank + 1) * share)])
            for rank in range(size)
        ]
        together = [[name for rank in ranks for name in rank[step]] for step in range(6)]
        assert together == one
    assert len({name for names in one for name in names}) == 20


def test_processes_of_their_own_lanes_read_no_others(folder: Path) -> None:
    source = open_source(shards_config(folder))
    assert isinstance(source, Shards)
    source.take(0, slice(4, 8))
    assert sorted(source.state_dict()) == ["2", "3"]


def test_positions_are_merged_to_the_furthest() -> None:
    states = [{"0": [1, 0, 3, 2], "1": [0, 0, 0, 0]}, {"0": [0, 1, 9, 9], "1": [0, 0, 0, 5]}]
    assert merged(states) == {"0": [1, 0, 3, 2], "1": [0, 0, 0, 5]}
    assert merged([{}, {}]) == {}


@pytest.mark.parametrize("stop", [1, 5, 7])
def test_a_resumed_run_equals_the_unbroken_run(folder: Path, tmp_path: Path, stop: int) -> None:
    config = shards_config(folder)
    train(config, tmp_path / "unbroken")
    train(replace(config, steps=stop), tmp_path / "stopped")
    train(config, tmp_path / "stopped")
    ended, unbroken = Trainer(config, tmp_path / "stopped"), Trainer(config, tmp_path / "unbroken")
    assert_identical(snapshot(ended), snapshot(unbroken))
    assert read_log(tmp_path / "stopped" / "log.jsonl")[0]["loss"] == losses(tmp_path / "unbroken")[0]


def test_two_processes_train_as_one_and_either_goes_on(folder: Path, tmp_path: Path) -> None:
    config = shards_config(folder)
    train(config, tmp_path / "one")
    assert train_together(2, replace(config, sharding="fsdp", steps=5), tmp_path / "two") == []
    train(replace(config, steps=8), tmp_path / "two")
    assert train_together(2, config, tmp_path / "two") == []
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-3)
    assert_close(weights(config, tmp_path / "two"), weights(config, tmp_path / "one"), 2e-3)


@pytest.mark.parametrize("task", ["clip", "classifier", "adm"])
def test_captions_and_classes_come_from_the_shards(folder: Path, tmp_path: Path, task: str) -> None:
    changes: dict[str, Any] = {"task": task, "steps": 2}
    if task != "clip":
        changes["model"] = None
    if task == "adm":
        changes["model"] = tiny_network("adm")["model"]
    config = shards_config(folder, **changes)
    trainer = Trainer(config, tmp_path)
    found = trainer.source.take(0, slice(0, 8))
    assert found.labels is not None
    expected = [CAPTIONS.index(caption) % CLASSES for caption in found.captions]
    assert found.labels.tolist() == expected
    assert np.isfinite(Trainer(config, tmp_path / "again").step()["loss"])


def test_a_broken_picture_is_named_and_another_is_taken(folder: Path, tmp_path: Path) -> None:
    broken = tmp_path / "shards"
    broken.mkdir()
    for number in range(4):
        content = (folder / f"{number}.tar").read_bytes()
        (broken / f"{number}.tar").write_bytes(content)
    with tarfile.open(broken / "2.tar") as archive:
        member = archive.getmember("2-3.png")
        offset = member.offset_data
    content_2 = bytearray((broken / "2.tar").read_bytes())
    content_2[offset : offset + 40] = b"x" * 40
    (broken / "2.tar").write_bytes(content_2)
    config = shards_config(broken)
    with pytest.warns(UserWarning, match=r"cannot read picture '2-3\.png': .*; left out"):
        seen = taken(open_source(config), range(8), [slice(0, 8)])
    names = [name for step in seen for name in step]
    assert len(names) == 64
    assert "2-3" not in names
    assert len(set(names)) == 19


def test_a_class_that_the_model_does_not_have_is_named(folder: Path) -> None:
    config = shards_config(folder, task="classifier", model=None)
    assert config.classifier is not None
    trunk = replace(config.classifier.trunk, out_channels=2)
    config = replace(config, classifier=replace(config.classifier, trunk=trunk))
    source = open_source(config)
    with pytest.warns(UserWarning, match=r"class 2 of sample '\d-\d' is none of the model's 2; left out"):
        labels = [source.take(step, slice(0, 8)).label_tensor() for step in range(4)]
    assert {int(label) for each in labels for label in each} == {0, 1}


def test_a_shard_that_cannot_be_read_stops_the_run_and_nothing_is_lost(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "shards"
    path.mkdir()
    for number in range(4):
        (path / f"{number}.tar").write_bytes((folder / f"{number}.tar").read_bytes())
    config = shards_config(path)
    train(replace(config, steps=2), tmp_path / "run")
    good = (path / "3.tar").read_bytes()
    (path / "3.tar").write_bytes(b"gone")
    with pytest.raises(OSError, match=r"shard .*/3\.tar cannot be read"):
        train(config, tmp_path / "run")
    (path / "3.tar").write_bytes(good)
    train(config, tmp_path / "run")
    train(config, tmp_path / "unbroken")
    ended, unbroken = Trainer(config, tmp_path / "run"), Trainer(config, tmp_path / "unbroken")
    assert_identical(snapshot(ended), snapshot(unbroken))


def test_samples_that_start_from_pictures_are_refused(folder: Path, tmp_path: Path) -> None:
    base = tiny_config(folder, task="inpaint", samples=SampleConfig(prompts=("cat",), steps=2))
    config = replace(base, data=DataConfig(source=f"{folder}/{{0..3}}.tar"))
    with pytest.raises(ValueError, match=r"task 'inpaint' starts its samples from pictures .* in memory"):
        Trainer(config, tmp_path)
