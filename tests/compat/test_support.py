"""What surrounds training: the log, folders of pictures, several processes."""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from PIL import Image

from glide_fast.compat import distributed
from glide_fast.compat.guided_diffusion import dist_util, image_datasets, logger
from glide_fast.compat.improved_diffusion import image_datasets as improved_datasets
from glide_fast.compat.improved_diffusion import logger as improved_logger


@pytest.fixture(autouse=True)
def own_log(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("OPENAI_LOGDIR", raising=False)
    logger.reset()
    yield
    logger.reset()


def test_log_formats(tmp_path: Path) -> None:
    logger.configure(dir=str(tmp_path), format_strs=["log", "csv", "json"])
    logger.log("hello", 3)
    logger.debug("not shown")
    for value in (1.0, 3.0):
        improved_logger.logkv_mean("loss", value)
    logger.logkv("step", 7)
    assert logger.getkvs()["loss"] == 2.0
    assert logger.dumpkvs() == {"loss": 2.0, "step": 7}
    logger.logkvs({"step": 8, "late": np.float32(0.5)})
    logger.profile("work")(lambda: None)()
    assert logger.dumpkvs().keys() == {"step", "late", "wait_work"}
    text = (tmp_path / "log.txt").read_text()
    assert "hello 3" in text
    assert "not shown" not in text
    assert "| loss | 2 " in text
    first, second = (json.loads(line) for line in (tmp_path / "progress.json").read_text().splitlines())
    assert first == {"loss": 2.0, "step": 7}
    assert second["late"] == 0.5
    header, row1, row2 = (tmp_path / "progress.csv").read_text().splitlines()
    assert header == "loss,step,late,wait_work"
    assert row1 == "2.0,7,,"
    assert row2.startswith(",8,0.5,")
    assert logger.get_dir() == str(tmp_path)


def test_writers_of_ones_own(tmp_path: Path) -> None:
    class Kept(logger.KVWriter):
        rows: ClassVar[list[object]] = []

        def writekvs(self, kvs: Mapping[str, object]) -> None:
            self.rows.append(dict(kvs))

        def writeseq(self, seq: Sequence[object]) -> None:
            self.rows.append(list(seq))

    logger.configure(dir=str(tmp_path), format_strs=[])
    logger.get_current().output_formats.append(Kept())
    logger.warn("loss of", 3)
    logger.record_tabular("loss", 3)
    logger.dump_tabular()
    assert Kept.rows == [["loss of", 3], {"loss": 3}]


def test_log_scopes_and_defaults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logger.configure(dir=str(tmp_path / "outer"), format_strs=["log"])
    outer = logger.get_current()
    with logger.scoped_configure(dir=str(tmp_path / "inner"), format_strs=["log"]):
        assert logger.get_current() is not outer
        logger.info("inside")
    assert logger.get_current() is outer is improved_logger.get_current()
    assert "inside" in (tmp_path / "inner" / "log.txt").read_text()
    logger.set_level(logger.ERROR)
    logger.warn("silent")
    assert "silent" not in (tmp_path / "outer" / "log.txt").read_text()
    logger.reset()
    monkeypatch.setenv("OPENAI_LOGDIR", str(tmp_path / "given"))
    monkeypatch.setenv("OPENAI_LOG_FORMAT", "csv")
    logger.logkv("a", 1)
    logger.dumpkvs()
    assert {path.name for path in (tmp_path / "given").iterdir()} == {"progress.csv"}
    monkeypatch.setenv("RANK", "2")
    logger.configure(dir=str(tmp_path / "ranks"))
    assert {path.name for path in (tmp_path / "ranks").iterdir()} == {"log-rank002.txt"}
    with pytest.raises(ValueError, match="unknown log format 'xml'; known: stdout, log, json, csv"):
        logger.make_output_format("xml", tmp_path)


def folder(path: Path) -> Path:
    """Six pictures of two classes, in folders, and a file that is none."""
    for index in range(6):
        place = path / ("deep" if index % 2 else "")
        place.mkdir(parents=True, exist_ok=True)
        pixels = np.full((40, 50 + index, 3), 40 * index, dtype=np.uint8)
        pixels[:, 25:] = 255 - 40 * index
        Image.fromarray(pixels).save(place / f"{'dog' if index < 3 else 'cat'}_{index}.PNG")
    (path / "notes.txt").write_text("not a picture")
    return path


def test_pictures_in_order_with_their_classes(tmp_path: Path) -> None:
    data = image_datasets.load_data(
        data_dir=str(folder(tmp_path)),
        batch_size=3,
        image_size=16,
        class_cond=True,
        deterministic=True,
        random_flip=False,
    )
    batches = [next(data) for _ in range(3)]
    pictures, conditions = batches[0]
    assert pictures.shape == (3, 3, 16, 16)
    assert pictures.dtype == torch.float32
    assert conditions["y"].tolist() == [0, 0, 0]  # cat_4, and in the folder deep cat_3 and cat_5
    assert batches[1][1]["y"].tolist() == [1, 1, 1]
    torch.testing.assert_close(batches[2][0], pictures, rtol=0, atol=0)  # the second epoch
    assert pictures[0, 0, 8, 2].item() == pytest.approx(160 / 127.5 - 1)
    assert next(improved_datasets.load_data(data_dir=tmp_path, batch_size=2, image_size=8))[1] == {}


def test_crops_and_flips() -> None:
    values = np.arange(64 * 96, dtype=np.int64).reshape(64, 96) % 256
    picture = Image.fromarray(np.repeat(values.astype(np.uint8)[..., None], 3, axis=2))
    halved = picture.resize((48, 32), resample=Image.Resampling.BOX)
    middle = np.asarray(halved)[:, 8:40]
    np.testing.assert_array_equal(image_datasets.center_crop_arr(picture, 32), middle)
    random.seed(0)
    crops = [image_datasets.random_crop_arr(picture, 32) for _ in range(4)]
    assert all(crop.shape == (32, 32, 3) for crop in crops)
    assert not np.array_equal(crops[0], crops[1])


def test_flips_and_shards(tmp_path: Path) -> None:
    paths = image_datasets._list_image_files_recursively(folder(tmp_path))
    names = ["cat_4.PNG", "cat_3.PNG", "cat_5.PNG", "dog_1.PNG", "dog_0.PNG", "dog_2.PNG"]
    assert [Path(path).name for path in paths] == names
    shards = [image_datasets.ImageDataset(16, paths, shard=rank, num_shards=2) for rank in range(2)]
    assert [len(shard) for shard in shards] == [3, 3]
    assert sorted(shards[0].local_images + shards[1].local_images) == sorted(paths)
    random.seed(0)
    seen = {shards[0][0][0][0, 8, 0].item() for _ in range(20)}
    assert len(seen) == 2
    plain = improved_datasets.ImageDataset(16, paths, classes=[3] * 6)
    assert plain[5][1]["y"] == 3
    assert len({plain[0][0][0, 8, 0].item() for _ in range(20)}) == 1


def test_too_few_pictures_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"6 pictures of .* for a batch of 7; use a smaller batch"):
        image_datasets.load_data(data_dir=folder(tmp_path), batch_size=7, image_size=16)
    with pytest.raises(ValueError, match="unspecified data directory"):
        image_datasets.load_data(data_dir="", batch_size=1, image_size=16)


def test_one_process(tmp_path: Path) -> None:
    dist_util.setup_dist()
    try:
        dist_util.setup_dist()
        assert (distributed.rank(), distributed.world_size()) == (0, 1)
        assert torch.distributed.get_world_size() == 1
        assert dist_util.dev().type == ("cuda" if torch.cuda.is_available() else "cpu")
        torch.save({"a": torch.ones(2)}, tmp_path / "a.pt")
        assert dist_util.load_state_dict(str(tmp_path / "a.pt"), map_location="cpu")["a"].tolist() == [1, 1]
        dist_util.sync_params([torch.ones(1)])
    finally:
        torch.distributed.destroy_process_group()
    assert dist_util.GPUS_PER_NODE == 8


def test_processes_of_mpiexec_are_told_how_to_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    with pytest.raises(RuntimeError, match=r"OMPI_COMM_WORLD_SIZE is 2, .* start them with torchrun"):
        dist_util.setup_dist()
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "1")
    dist_util.setup_dist()
    torch.distributed.destroy_process_group()


WORKER = """
import sys
import torch
from pathlib import Path
from glide_fast.compat.guided_diffusion import dist_util, image_datasets, logger
from glide_fast.compat.guided_diffusion import resample, script_util, train_util
from glide_fast.compat.distributed import rank

torch.set_num_threads(1)
folder = Path(sys.argv[1])
dist_util.setup_dist()
logger.configure(dir=folder / f"log{rank()}", format_strs=[])
options = {**script_util.model_and_diffusion_defaults(), "image_size": 16, "channel_mult": "1,2",
           "num_channels": 32, "num_res_blocks": 1, "attention_resolutions": "8", "diffusion_steps": 20}
torch.manual_seed(rank())
model, diffusion = script_util.create_model_and_diffusion(**options)
sampler = resample.LossSecondMomentResampler(diffusion, history_per_term=1)
sampler.update_with_local_losses(torch.arange(20)[rank()::2], torch.ones(10) * (1 + rank()))
gathered = torch.from_numpy(sampler.weights())
data = image_datasets.load_data(data_dir=folder / "pictures", batch_size=2, image_size=16)
loop = train_util.TrainLoop(
    model=model, diffusion=diffusion, data=data, batch_size=2, microbatch=1, lr=1e-2, ema_rate="0.5",
    log_interval=10, save_interval=10, resume_checkpoint="", schedule_sampler=sampler, lr_anneal_steps=2)
loop.run_loop()
assert loop.global_batch == 4 and loop.use_ddp
learned = torch.from_numpy(sampler.weights())
state = {"model": model.state_dict(), "gathered": gathered, "learned": learned}
torch.save(state, folder / f"{rank()}.pt")
"""


def test_two_processes_train_one_model(tmp_path: Path) -> None:
    folder(tmp_path / "pictures")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = {
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "CUDA_VISIBLE_DEVICES": "",
    }
    command = [sys.executable, "-c", WORKER, str(tmp_path)]
    workers = [
        subprocess.Popen(
            command, env={**os.environ, **environment, "RANK": rank}, stderr=subprocess.PIPE, text=True
        )
        for rank in "01"
    ]
    errors = [worker.communicate(timeout=300)[1] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], errors
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in "01")
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    assert first["gathered"][1] > 1.9 * first["gathered"][0]  # losses of both processes: 1 and 2
    assert {path.name for path in (tmp_path / "log0").iterdir()} >= {"model000000.pt", "ema_0.5_000002.pt"}
    assert not list((tmp_path / "log1").iterdir())
