"""All metrics of a set of pictures at once, and the sets: drawings, npz files, folders."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from glide_fast.data.images import save_png
from glide_fast.evaluation import (
    Moments,
    Reference,
    clip_captions,
    clip_score,
    fid,
    inception_score,
    kid,
    precision_recall,
    r_precision,
    spatial_features,
    write_reference,
)
from glide_fast.evaluation.drawing import DrawingPlan, draw
from glide_fast.evaluation.extractors import Extractor, PictureFeatures, find_extractor
from glide_fast.evaluation.judgement import Judgement, judge
from glide_fast.evaluation.pictures import read_pictures
from glide_fast.models import save_model
from glide_fast.training.distributed import World
from tests.evaluation.test_cache import tiny_judge
from tests.test_cli import fail, run

CAPTIONS = ["red apple", "key", "sun", "dog face"]


def pictures(count: int, seed: int = 0, size: int = 8) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def looking(found: np.ndarray) -> PictureFeatures:
    """As Inception: pooled, spatial and probabilities."""
    maps = np.moveaxis(found[:, ::4, ::4].astype(np.float32), 3, 1)
    pooled = maps.mean(axis=(2, 3)) / 255
    spatial = spatial_features(maps, channels=2).astype(np.float32)
    return PictureFeatures(pooled, spatial, pooled / pooled.sum(axis=1, keepdims=True))


LOOKING = Extractor(name="means", identity="means", extract=looking)


def npz(path: Path, found: np.ndarray, **more: np.ndarray) -> str:
    np.savez(path, arr_0=found, **more)
    return str(path)


@pytest.fixture
def clip_file(tmp_path: Path) -> Path:
    network = tiny_judge()
    path = tmp_path / "judge.safetensors"
    save_model(path, network.config, network.state_dict(), torch.float32)
    return path


def test_every_metric_is_that_of_the_features(tmp_path: Path) -> None:
    a, b = pictures(40), pictures(30, 1)
    samples, reference = (read_pictures(npz(tmp_path / f"{n}.npz", each)) for n, each in enumerate((a, b)))
    found = judge(samples, reference, LOOKING, seed=5)
    (x, x_maps, p), (y, y_maps, _) = looking(a), looking(b)
    assert found.fid == pytest.approx(fid(x, y))
    assert found.sfid == pytest.approx(fid(x_maps, y_maps))
    assert found.inception_score == inception_score(p, splits=1)
    assert found.kid == kid(x, y, subset_size=30, seed=5)
    assert found.overlap == precision_recall(x, y)
    assert found.clip is found.clip_score is found.r_precision is None
    assert "40 pictures against 30 references, features of means" in str(found)


def test_published_statistics_stand_for_their_pictures(tmp_path: Path) -> None:
    """Those beside the pictures are preferred; alone they give the two distances and nothing else."""
    a, b, c = pictures(20), pictures(25, 1), pictures(25, 2)
    mean, maps, _ = looking(c)
    gaussians = Reference(pooled=Moments.of(mean).gaussian, spatial=Moments.of(maps).gaussian)
    write_reference(tmp_path / "c.npz", gaussians)
    with np.load(tmp_path / "c.npz") as stored:
        both = npz(tmp_path / "both.npz", b, **stored)
    samples = read_pictures(npz(tmp_path / "a.npz", a))
    alone, beside = (judge(samples, read_pictures(name), LOOKING) for name in (str(tmp_path / "c.npz"), both))
    for found in (alone, beside):
        assert found.fid == pytest.approx(fid(looking(a).pooled, mean))
        assert found.sfid == pytest.approx(fid(looking(a).spatial, maps))
    assert alone.kid is alone.overlap is None
    assert beside.kid == kid(looking(a).pooled, looking(b).pooled, subset_size=20)
    assert "against published statistics" in str(alone)


def test_statistics_of_other_features_are_refused_or_left_for_the_pictures(tmp_path: Path) -> None:
    wide = Moments.of(np.random.default_rng(0).standard_normal((9, 5))).gaussian
    write_reference(tmp_path / "wide.npz", Reference(pooled=wide))
    samples = read_pictures(npz(tmp_path / "a.npz", pictures(20)))
    with pytest.raises(ValueError, match=r"statistics of 5 features, means gives 3; OpenAI's are of"):
        judge(samples, read_pictures(str(tmp_path / "wide.npz")), LOOKING)
    with np.load(tmp_path / "wide.npz") as stored:
        both = npz(tmp_path / "both.npz", pictures(9, 1), **stored)
    expected = fid(looking(pictures(20)).pooled, looking(pictures(9, 1)).pooled)
    assert judge(samples, read_pictures(both), LOOKING).fid == pytest.approx(expected)


def test_captions_are_judged_by_the_clip(tmp_path: Path, clip_file: Path) -> None:
    shown = pictures(10)
    plan = DrawingPlan(number=10, captions=CAPTIONS, shard=4, made_by={})
    draw(lambda _prompts, seeds: shown[list(seeds)], plan, tmp_path / "drawn", World())
    samples = read_pictures(str(tmp_path / "drawn"))
    extractor = find_extractor(str(clip_file))
    assert extractor.clip is not None
    assert samples.captions == plan.captions_of(range(10))
    reference = read_pictures(npz(tmp_path / "b.npz", pictures(9, 1)))
    for found in (
        judge(samples, reference, extractor),
        judge(samples, reference, LOOKING, clip=extractor),
    ):
        texts = clip_captions(extractor.clip, samples.captions)
        features = extractor.extract(shown).pooled
        assert found.clip_score == pytest.approx(clip_score(features, texts))
        names = sorted(CAPTIONS)
        own = np.array([names.index(caption) for caption in samples.captions])
        distinct = clip_captions(extractor.clip, names)
        assert found.r_precision == r_precision(features, distinct, own, distractors=3)
    assert "captions, by judge.safetensors" in str(found)
    assert json.loads(json.dumps(found.as_json()))["r_precision"]["count"] == 10


def test_a_folder_of_pictures_is_a_set(tmp_path: Path) -> None:
    shown = pictures(3)
    for index, picture in enumerate(shown):
        save_png(tmp_path / "set" / f"{index}.png", picture)
    found = read_pictures(str(tmp_path / "set"))
    assert (found.count, found.size, found.captions) == (3, 8, None)
    for _ in range(2):
        np.testing.assert_array_equal(np.concatenate(list(found.chunks())), shown)
    for index, caption in enumerate(CAPTIONS[:3]):
        (tmp_path / "set" / f"{index}.txt").write_text(caption)
    assert read_pictures(str(tmp_path / "set")).captions == CAPTIONS[:3]
    save_png(tmp_path / "set" / "9.png", pictures(1, size=9)[0])
    with pytest.raises(ValueError, match=r"9\.png is 9 x 9 px and 0\.png 8 x 8; keep pictures of one size"):
        list(read_pictures(str(tmp_path / "set")).chunks())


def test_what_is_no_set_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"is neither a folder, an \.npz file nor 'emoji'"):
        read_pictures(str(tmp_path / "none"))
    with pytest.raises(FileNotFoundError, match="does not exist or is not a file"):
        read_pictures(str(tmp_path / "none.npz"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty holds no pictures"):
        read_pictures(str(tmp_path / "empty"))
    with pytest.raises(ValueError, match=r"arr_0 of .* is float64 \[2, 8, 8, 3\]; it must be uint8"):
        read_pictures(npz(tmp_path / "a.npz", pictures(2) / 255))
    np.savez(tmp_path / "b.npz", other=np.zeros(3))
    with pytest.raises(ValueError, match="cannot read reference statistics"):
        read_pictures(str(tmp_path / "b.npz"))
    (tmp_path / "c.npz").write_bytes(b"no archive")
    with pytest.raises(ValueError, match="cannot read pictures from"):
        read_pictures(str(tmp_path / "c.npz"))
    one = read_pictures(npz(tmp_path / "d.npz", pictures(1)))
    with pytest.raises(ValueError, match="holds 1 pictures; a distribution needs more"):
        judge(one, one, LOOKING)


def test_the_command_prints_and_writes_what_was_found(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    clip_file: Path,
) -> None:
    monkeypatch.setenv("GLIDE_FAST_CACHE", str(tmp_path / "cache"))
    a, b = (npz(tmp_path / f"{seed}.npz", pictures(12, seed)) for seed in (0, 1))
    options = ["--features", clip_file, "--out", tmp_path / "found.json"]
    for _ in range(2):  # the second time from the cache
        run(monkeypatch, "judge", a, "--reference", b, *options)
    printed = capsys.readouterr().out
    first, second = printed[: len(printed) // 2], printed[len(printed) // 2 :]
    assert first == second
    extractor = find_extractor(str(clip_file))
    expected = judge(read_pictures(a), read_pictures(b), extractor)
    assert first.strip() == str(expected)
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["overlap"]["precision"] == expected.overlap.precision if expected.overlap else None
    assert len(list((tmp_path / "cache" / "features").rglob("*.npz"))) == 2
    message = fail(monkeypatch, capsys, "judge", a, "--reference", b, "--features", "vgg")
    assert "features 'vgg' are neither emoji, inception" in message
    message = fail(monkeypatch, capsys, "judge", tmp_path / "none", "--reference", b)
    assert "is neither a folder, an .npz file nor 'emoji'" in message


def test_a_judgement_reads_well() -> None:
    text = str(Judgement(samples=2, references=3, features="f", fid=12.3456))
    assert text == "2 pictures against 3 references, features of f\n  Fréchet distance   12.35"
