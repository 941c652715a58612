"""Many pictures, by any number of processes, killed at any moment: always the same ones."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from glide_fast import cli
from glide_fast.evaluation import drawing
from glide_fast.evaluation.drawing import DrawingPlan, Shard, draw, read_drawing
from glide_fast.training.distributed import World as Process
from glide_fast.training.distributed import joined
from tests import tiny
from tests.training.worlds import World

CAPTIONS = ["red apple", "key", "sun", "dog face", "rocket", "house", "bell"]


def plan(**changes: object) -> DrawingPlan:
    usual = {"number": 50, "captions": CAPTIONS, "seed": 3, "batch": 3, "shard": 8, "made_by": {"steps": 4}}
    return DrawingPlan(**{**usual, **changes})


def paint(prompts: Sequence[str], seeds: Sequence[int]) -> np.ndarray:
    """Pictures that tell prompt, seed and batch."""
    size = len(seeds)
    return np.stack(
        [
            np.random.default_rng([seed, size, *prompt.encode()]).integers(0, 256, (4, 4, 3), dtype=np.uint8)
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]
    )


def slow_paint(prompts: Sequence[str], seeds: Sequence[int]) -> np.ndarray:
    time.sleep(0.01)
    return paint(prompts, seeds)


def work(folder: Path) -> None:
    with joined() as world:
        draw(slow_paint, plan(), folder, world)


def drawn(folder: Path) -> Shard:
    shards = list(read_drawing(folder))
    captions = [caption for shard in shards for caption in shard.captions]
    return Shard(np.concatenate([shard.pictures for shard in shards]), captions)


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Shard:
    """What one process draws undisturbed."""
    folder = tmp_path_factory.mktemp("drawing")
    draw(paint, plan(), folder, Process())
    return drawn(folder)


def same(found: Shard, expected: Shard) -> None:
    np.testing.assert_array_equal(found.pictures, expected.pictures)
    assert found.captions == expected.captions


def test_picture_k_has_seed_k_and_its_caption_in_batches_of_the_shard(expected: Shard) -> None:
    members = plan().members(5)
    assert members == range(40, 48)
    captions = plan().captions_of(members)
    np.testing.assert_array_equal(expected.pictures[46:48], paint(captions[6:], [49, 50]))
    assert expected.captions[40:48] == captions
    assert len(expected.pictures) == 50


def test_every_caption_comes_before_any_comes_again(expected: Shard) -> None:
    assert sorted(expected.captions[:7]) == sorted(CAPTIONS)
    assert set(Counter(expected.captions[:49]).values()) == {7}
    assert expected.captions[:7] != expected.captions[7:14]
    assert plan(seed=4).captions_of(range(7)) != expected.captions[:7]


@pytest.mark.parametrize("size", [2, 3])
def test_any_number_of_processes_draws_the_same(tmp_path: Path, expected: Shard, size: int) -> None:
    assert World(size, work, tmp_path).wait() == []
    same(drawn(tmp_path), expected)
    assert len(list(tmp_path.iterdir())) == 1 + 7


def test_processes_killed_at_any_moment_go_on_in_any_number(tmp_path: Path, expected: Shard) -> None:
    chance, kills = random.Random(0), 0
    while True:
        world = World(chance.choice([1, 2]), work, tmp_path)
        time.sleep(chance.uniform(0.05, 0.2) * (1 + kills))
        alive = [process for process in world.processes if process.is_alive()]
        for process in alive:
            os.kill(process.pid or 0, signal.SIGKILL)
        for process in world.processes:
            process.join()
        kills += bool(alive)
        if not alive:
            break
    assert kills >= 2
    assert World(1, work, tmp_path).wait() == []
    same(drawn(tmp_path), expected)
    assert len(list(tmp_path.iterdir())) == 1 + 7  # what killed writers left is gone


def test_what_is_there_is_not_drawn_again_and_what_is_damaged_is(tmp_path: Path, expected: Shard) -> None:
    draw(paint, plan(), tmp_path, Process())
    calls: list[int] = []

    def counting(prompts: Sequence[str], seeds: Sequence[int]) -> np.ndarray:
        calls.extend(seeds)
        return paint(prompts, seeds)

    draw(counting, plan(), tmp_path, Process())
    assert calls == []
    path = drawing._path(tmp_path, 2)
    path.write_bytes(path.read_bytes()[:300])
    with (
        pytest.warns(UserWarning, match=r"shard-000002\.npz is damaged"),
        pytest.raises(ValueError, match="same"),
    ):
        drawn(tmp_path)
    with pytest.warns(UserWarning, match=r"shard-000002\.npz is damaged"):
        draw(counting, plan(), tmp_path, Process())
    assert calls == list(range(3 + 16, 3 + 24))
    drawing._path(tmp_path, 6).unlink()
    with pytest.raises(ValueError, match=r"shard-000006\.npz is missing or damaged; the same"):
        drawn(tmp_path)
    draw(paint, plan(), tmp_path, Process())
    same(drawn(tmp_path), expected)


def test_another_drawing_in_the_folder_is_named_by_its_fields(tmp_path: Path) -> None:
    draw(paint, plan(), tmp_path, Process())
    with pytest.raises(ValueError, match=r"holds a drawing with seed 3, not 4, steps 4, not 5; "):
        draw(paint, plan(seed=4, made_by={"steps": 5}), tmp_path, Process())
    with pytest.raises(ValueError, match="captions_sha256"):
        draw(paint, plan(captions=CAPTIONS[1:]), tmp_path, Process())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"number": 0}, "number 0, batch 3 and shard 8 must be at least 1"),
        ({"batch": 0}, "batch 0"),
        ({"seed": -1}, r"seed -1 must lie in 0 \.\. 2\^63 - 50"),
        ({"captions": []}, "no captions; give at least one"),
    ],
)
def test_an_impossible_plan_is_refused(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw(paint, plan(**changes), tmp_path / "out", Process())
    assert not (tmp_path / "out").exists()


def command(folder: Path, out: Path) -> None:
    """`glide-fast draw` with tiny models, as one of the processes of torchrun."""
    torch.set_num_threads(1)
    models = [f"--model={folder / 'base'}.safetensors", f"--upsampler={folder / 'upsampler'}.safetensors"]
    options = ["--steps=2", "--upsampler-steps=2", "--batch=4", f"--captions={folder / 'captions.txt'}"]
    sys.argv = ["glide-fast", "draw", "70", f"--out={out}", *models, *options]
    cli.main()


def test_the_command_draws_the_same_under_torchrun(tmp_path: Path) -> None:
    tiny.save(tmp_path)
    (tmp_path / "captions.txt").write_text("\n".join(CAPTIONS) + "\n\n")
    assert World(1, command, tmp_path, tmp_path / "one").wait() == []
    assert World(2, command, tmp_path, tmp_path / "two").wait() == []
    one = drawn(tmp_path / "one")
    same(drawn(tmp_path / "two"), one)
    assert one.pictures.shape == (70, tiny.SIZE, tiny.SIZE, 3)
    manifest = json.loads((tmp_path / "two" / "draw.json").read_text())
    assert manifest["guidance"] == 3.0
    assert [len(digest) for digest in manifest["model_sha256"]] == [64, 64]
