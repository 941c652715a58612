"""The study of guidance: comparison at equal diversity, sweep, report; on numbers and models made for it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats

from glide_fast.data.dataset import CaptionedPictures
from glide_fast.data.emoji import find_font
from glide_fast.data.images import to_tensor
from glide_fast.evaluation import (
    clip_captions,
    clip_features,
    fid,
    nearest_rank,
    precision_recall,
    r_precision,
    squared_distances,
    study,
)
from glide_fast.evaluation.drawing import read_drawing
from glide_fast.evaluation.equal_diversity import Interval, advantage, frontier
from glide_fast.evaluation.study import Measurement, Models, StudySettings, clip_guided, measure, sweep
from glide_fast.evaluation.study_report import answer, leads, tabulate, write_report
from glide_fast.models import NoisyCLIP, load_model, load_network, save_model
from glide_fast.sampling import PerImageNoise
from glide_fast.sampling.pipeline import StageOptions, sample_stage
from glide_fast.text.framing import framed
from glide_fast.training.distributed import World
from tests import tiny
from tests.evaluation.test_cache import tiny_judge
from tests.test_cli import fail, run

CAPTIONS = ["red apple", "key", "sun", "dog face", "rocket", "house", "bell", "cat", "pizza", "baby"]
SETTINGS = StudySettings(
    captions=6, seeds=3, steps=3, batch=4, classifier_free=(2.0, 3.0), clip=(5.0,), neighbours=2
)


class TestEqualDiversity:
    def test_the_frontier_is_the_best_that_keeps_so_much(self) -> None:
        points = [(0.8, 0.2), (0.6, 0.6), (0.7, 0.4), (0.2, 0.5)]
        found = frontier(points, np.array([0.9, 0.8, 0.75, 0.65, 0.6, 0.5, 0.2, 0.1]))
        np.testing.assert_allclose(found, [-np.inf, 0.2, 0.3, 0.5, 0.6, 0.6, 0.6, 0.6], rtol=1e-12)

    def test_a_line_that_rises_with_recall_keeps_its_end(self) -> None:
        found = frontier([(0.3, 0.1), (0.5, 0.9)], np.array([0.3, 0.4, 0.5]))
        np.testing.assert_allclose(found, [0.9, 0.9, 0.9])

    def test_a_constant_lead_is_found_where_both_reach(self) -> None:
        low = [(0.9, 0.1), (0.5, 0.5), (0.3, 0.7)]
        high = [(0.9, 0.3), (0.1, 1.1)]
        assert advantage(high, low) == pytest.approx(0.2)
        assert advantage(low, high) == pytest.approx(-0.2)

    def test_lines_that_share_one_point_are_compared_there(self) -> None:
        assert advantage([(0.5, 0.5), (0.7, 0.9)], [(0.5, 0.5), (0.3, 0.6)]) == pytest.approx(0.4)
        with pytest.raises(ValueError, match=r"one line ends at diversity 0\.2, the other begins at 0\.3"):
            advantage([(0.1, 1), (0.2, 1)], [(0.3, 1), (0.4, 1)])

    @pytest.mark.parametrize("count", [2, 3, 4, 10, 11, 40])
    def test_the_interval_is_students(self, count: int) -> None:
        values = np.random.default_rng(count).standard_normal(count)
        found = Interval.of(values)
        low, high = stats.t.interval(0.95, count - 1, values.mean(), stats.sem(values))
        assert found.mean == pytest.approx(values.mean())
        assert found.low == pytest.approx(low, rel=1e-2)
        assert found.high == pytest.approx(high, rel=1e-2)

    def test_one_value_has_no_interval(self) -> None:
        with pytest.raises(ValueError, match="give at least 2"):
            Interval.of([1.0])


def measured(difference: float, noise: float = 0.0) -> list[Measurement]:
    """Lines on which classifier-free guidance is better by ``difference`` at equal recall, in everything."""
    chance = np.random.default_rng(0)
    rows = []
    for seed in range(4):
        shift = noise * chance.standard_normal()
        for kind, scale in (("data", 0.0), *SETTINGS.cells):
            recall = 0.9 - 0.1 * scale if kind == "classifier-free" else 0.9 - 0.05 * scale
            lead = difference + shift if kind == "classifier-free" else 0.0
            recall = {"plain": 0.9, "data": 0.95}.get(kind, recall)
            rows.append(
                Measurement(
                    kind=kind,
                    scale=scale,
                    seed=seed,
                    distance=5 - (0.9 - recall) - lead,
                    precision=0.4 + (0.9 - recall) + lead,
                    recall=recall,
                    r_precision=0.5 + (0.9 - recall) + lead,
                    nearest=0.3 + (0.9 - recall) + lead,
                )
            )
    return rows


class TestReport:
    @pytest.mark.parametrize(
        ("difference", "noise", "beginning"),
        [
            (
                0.2,
                0.0,
                "Yes: at equal recall, classifier-free guidance is better in precision, R-precision",
            ),
            (-0.2, 0.0, "No: at equal recall, CLIP guidance is better in precision, R-precision"),
            (0.0, 0.3, "Undecided: at equal recall no metric tells the two apart"),
        ],
    )
    def test_the_answer_follows_from_the_numbers(
        self, difference: float, noise: float, beginning: str
    ) -> None:
        found = leads(measured(difference, noise))
        assert answer(found).startswith(beginning)
        assert [lead.metric for lead in found] == ["precision", "r_precision", "nearest", "distance"]
        if not noise:
            assert all(np.sign(lead.over_seeds.mean) == np.sign(difference) for lead in found)
            assert abs(found[0].over_seeds.mean) < 0.2 + 1e-9

    def test_a_mixed_answer_says_what_is_what(self) -> None:
        rows = [
            Measurement(
                **{**row.__dict__, "precision": 0.4 + (0.9 - row.recall), "distance": 5.0, "nearest": 0.3}
            )
            for row in measured(0.2)
        ]
        worse = [
            Measurement(**{**row.__dict__, "r_precision": 0.5 + 0.1 * (row.kind == "clip")})
            for row in measured(0.2)
        ]
        assert answer(leads(rows)) == (
            "In part: at equal recall, classifier-free guidance is better in R-precision; "
            "precision, nearest by pixels and Fréchet distance are undecided"
        )
        assert answer(leads(worse)) == (
            "It depends on the metric: at equal recall, classifier-free guidance is better in precision, "
            "nearest by pixels and Fréchet distance; CLIP guidance is better in R-precision"
        )
        assert leads(worse)[1].sentence().startswith("R-precision: CLIP guidance is better by 0.")

    def test_table_text_plot_and_numbers_are_written(self, tmp_path: Path, models: Models) -> None:
        rows = measured(0.2, noise=0.01)
        found = write_report(rows, SETTINGS, models, tmp_path)
        text = (tmp_path / "study.md").read_text(encoding="utf-8")
        assert f"**{found}.**" in text
        recall = tabulate(rows)["classifier-free", 2.0]["recall"]
        assert (recall.mean, recall.half) == (pytest.approx(0.7), pytest.approx(0, abs=1e-9))
        assert "| none | 5 ± 0 | 0.4 ± 0 | 0.9 ± 0 | 0.5 ± 0 | 0.3 ± 0 |" in text
        assert "| clip, 5 | " in text
        assert "6 captions of the training set" in text
        numbers = json.loads((tmp_path / "study.json").read_text())
        assert numbers["answer"] == found
        assert len(numbers["measurements"]) == 4 * 5
        assert numbers["leads"][0]["half"] > 0
        assert numbers["model_sha256"] == models.hashes()
        with Image.open(tmp_path / "study.png") as picture:
            assert picture.size[0] > 1000


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    folder = tmp_path_factory.mktemp("study")
    base, _ = tiny.save(folder)
    for seed, name in enumerate(("guide", "judge")):
        network = tiny_judge(seed, timesteps=1000)
        save_model(folder / f"{name}.safetensors", network.config, network.state_dict())
    return Models(base=base, guide=folder / "guide.safetensors", judge=folder / "judge.safetensors")


@pytest.fixture(scope="module")
def data() -> CaptionedPictures:
    images = np.random.default_rng(0).integers(0, 256, (len(CAPTIONS), 8, 8, 3), dtype=np.uint8)
    return CaptionedPictures(images=images, captions=CAPTIONS, names=CAPTIONS)


@pytest.fixture(scope="module")
def swept(models: Models, data: CaptionedPictures, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cells")
    sweep(SETTINGS, models, data, folder, World())
    return folder


class TestSweep:
    def test_each_cell_has_its_seeds_captions_and_noise(self, swept: Path, models: Models) -> None:
        assert len(list(swept.iterdir())) == 3 * 4
        shards = list(read_drawing(swept / "seed1-classifier-free-2"))
        captions = [caption for shard in shards for caption in shard.captions]
        for cell in ("seed1-plain-1", "seed1-clip-5"):
            assert [each for shard in read_drawing(swept / cell) for each in shard.captions] == captions
        assert len(set(captions)) == 6
        options = StageOptions(sampler="dpm++2m", steps=3, guidance=2.0)
        noise = PerImageNoise([study.SEED_STRIDE + k for k in range(4)])
        expected = sample_stage(load_model(models.base), captions[:4], noise=noise, options=options)
        found = to_tensor(shards[0].pictures[:4])
        assert (found - expected.clamp(-1, 1)).abs().max() < 1.1 / 127.5

    def test_nothing_is_painted_twice(
        self, swept: Path, models: Models, data: CaptionedPictures, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def never(*_arguments: object, **_more: object) -> None:
            raise AssertionError("painted again")

        monkeypatch.setattr(study, "_paint", never)
        sweep(SETTINGS, models, data, swept, World())

    def test_the_judge_measures_what_the_metrics_say(
        self, swept: Path, models: Models, data: CaptionedPictures
    ) -> None:
        rows = measure(SETTINGS, models, data, swept, World())
        assert len(rows) == 3 * 5
        judge = load_network(models.judge, NoisyCLIP)
        look, texts = clip_features(judge), clip_captions(judge, data.captions)
        for row in rows:
            own = np.array([CAPTIONS.index(c) for c in captions_of(swept, row.seed)])
            pictures = data.images[own]
            if row.kind != "data":
                shards = read_drawing(swept / f"seed{row.seed}-{row.kind}-{row.scale:g}")
                pictures = np.concatenate([shard.pictures for shard in shards])
            samples, references = look(pictures), look(data.images)
            overlap = precision_recall(samples, references, neighbours=2)
            right = r_precision(samples, texts, own, distractors=9, seed=row.seed)
            assert row.distance == pytest.approx(fid(samples, references), rel=1e-6, abs=1e-9)
            assert (row.precision, row.recall) == (overlap.precision, overlap.recall)
            assert row.r_precision == right.share
            ranks = nearest_rank(squared_distances(pictures, data.images), own)
            assert row.nearest == (ranks < 5).mean()
            if row.kind == "data":
                assert row.precision == row.nearest == 1

    def test_clip_guidance_raises_what_the_guide_sees(self, models: Models) -> None:
        base, guide = load_model(models.base), load_network(models.guide, NoisyCLIP)
        prompts, texts = CAPTIONS[:4], framed("embedded", CAPTIONS[:4], 6)

        def painted(scale: float) -> torch.Tensor:
            options = StageOptions(sampler="ddim", steps=10, guidance=scale)
            return clip_guided(base, guide, prompts, noise=PerImageNoise(range(4)), options=options)

        def liked(pictures: torch.Tensor) -> torch.Tensor:
            clean = torch.zeros(4, dtype=torch.int64)
            return guide.similarity(pictures, clean, guide.text_embeddings(*texts))

        plain = sample_stage(
            base,
            prompts,
            noise=PerImageNoise(range(4)),
            options=StageOptions(sampler="ddim", steps=10, guidance=1.0),
        )
        torch.testing.assert_close(painted(0.0), plain, rtol=0, atol=1e-4)
        gain = [(liked(painted(scale)) - liked(plain)).mean().item() for scale in (0.3, 1.0)]
        assert 0 < gain[0] < gain[1]


def captions_of(folder: Path, seed: int) -> list[str]:
    return [each for shard in read_drawing(folder / f"seed{seed}-plain-1") for each in shard.captions]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seeds": 2}, "seeds 2 must be at least 3, or the intervals say nothing"),
        ({"captions": 3}, "captions 3 must be more than neighbours 3"),
        (
            {"classifier_free": (1.0, 2.0)},
            r"classifier_free \(1\.0, 2\.0\) must be scales above 1 that",
        ),
        ({"clip": (2.0, 2.0)}, r"clip \(2\.0, 2\.0\) must be scales above 0 that increase"),
        ({"clip": ()}, "must be scales above 0"),
    ],
)
def test_settings_that_say_nothing_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StudySettings(**change)  # type: ignore[arg-type]


def test_a_judge_that_guided_is_refused(models: Models, data: CaptionedPictures, tmp_path: Path) -> None:
    biased = Models(base=models.base, guide=models.guide, judge=models.guide)
    with pytest.raises(ValueError, match="is what guides; a judge must have been trained apart"):
        sweep(SETTINGS, biased, data, tmp_path, World())
    missing = Models(base=models.base, guide=models.guide, judge=tmp_path / "none.safetensors")
    with pytest.raises(FileNotFoundError, match=r"none\.safetensors does not exist"):
        sweep(SETTINGS, missing, data, tmp_path, World())
    more = StudySettings(captions=11, neighbours=2)
    with pytest.raises(ValueError, match="captions 11 must be at most the 10 of the data"):
        sweep(more, models, data, tmp_path, World())


def test_the_command_studies_the_embedded_model(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    pytest.importorskip("emoji", reason="the package emoji (extra 'train') is not installed")
    try:
        find_font()
    except FileNotFoundError as error:
        pytest.skip(f"the emoji font is not installed: {error}")
    clips = []
    for seed, name in enumerate(("guide", "judge")):
        network = tiny_judge(seed, timesteps=1000, size=32, context=20)
        path = tmp_path / f"{name}.safetensors"
        save_model(path, network.config, network.state_dict())
        clips.append(f"--models.{name}={path}")
    scales = ["--classifier-free", 2, "--clip", 1]
    places = ["--out", tmp_path / "docs", "--work", tmp_path / "work"]
    options = ["--captions", 4, "--seeds", 3, "--steps", 2, *scales, *places, *clips]
    run(monkeypatch, "study", *options)
    found = json.loads((tmp_path / "docs" / "study.json").read_text())
    assert found["answer"] in capsys.readouterr().out
    assert len(found["measurements"]) == 3 * 4
    own = [row for row in found["measurements"] if row["kind"] == "data"]
    assert all(row["precision"] == row["nearest"] == 1 for row in own)
    assert (tmp_path / "docs" / "study.md").is_file()
    message = fail(monkeypatch, capsys, "study", *options, "--steps", 3)
    assert "holds a drawing with steps 2, not 3; choose another folder" in message
