"""Features kept on disk: found again, never mixed up, mended when damaged; and who looks, by name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from glide_fast.evaluation import cache, clip_captions, clip_features
from glide_fast.evaluation.cache import cached, feature_file
from glide_fast.evaluation.extractors import Extractor, PictureFeatures, find_extractor
from glide_fast.models import NoisyCLIP, NoisyCLIPConfig, save_model
from glide_fast.text.framing import framed
from glide_fast.text.tokenizer import embedded_tokenizer
from tests import tiny


class Counter:
    """Features that are means of pictures, and how many pictures were looked at."""

    def __init__(self) -> None:
        self.looked = 0

    def __call__(self, pictures: np.ndarray) -> PictureFeatures:
        self.looked += len(pictures)
        means = pictures.mean(axis=(1, 2), dtype=np.float32)
        return PictureFeatures(means, probabilities=means / means.sum(axis=1, keepdims=True))


def pictures(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, 256, (count, 4, 4, 3), dtype=np.uint8)


@pytest.fixture
def counter() -> Counter:
    return Counter()


def extractor(counter: Counter, folder: Path, identity: str = "a") -> Extractor:
    return cached(Extractor(name="means", identity=identity, extract=counter), folder)


def test_features_are_computed_once(
    tmp_path: Path, counter: Counter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "CHUNK", 4)
    shown = pictures(10)
    first, again = (extractor(counter, tmp_path).extract(shown) for _ in range(2))
    assert counter.looked == 10
    expected = Counter()(shown)
    for found in (first, again):
        np.testing.assert_array_equal(found.pooled, expected.pooled)
        np.testing.assert_array_equal(found.probabilities, expected.probabilities)
        assert found.spatial is None
    longer = np.concatenate([shown[:8], pictures(3, seed=1)])
    np.testing.assert_array_equal(
        extractor(counter, tmp_path).extract(longer).pooled, Counter()(longer).pooled
    )
    assert counter.looked == 13  # the first two chunks are known


def test_other_pictures_shapes_and_extractors_have_other_files(tmp_path: Path, counter: Counter) -> None:
    shown = pictures(2)
    other = shown.copy()
    other[1, 3, 3, 2] ^= 1
    places = {
        feature_file(identity, each, tmp_path)
        for identity, each in (("a", shown), ("b", shown), ("a", other), ("a", shown.reshape(2, 8, 2, 3)))
    }
    assert len(places) == 4
    extractor(counter, tmp_path).extract(shown)
    extractor(counter, tmp_path, "b").extract(shown)
    assert counter.looked == 4


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "other rows", "other names"])
def test_a_damaged_file_is_named_and_made_anew(tmp_path: Path, counter: Counter, damage: str) -> None:
    shown = pictures(3)
    expected = extractor(counter, tmp_path).extract(shown)
    path = feature_file("a", shown, tmp_path)
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 3] ^= 255
    if damage == "other rows":
        np.savez(path, pooled=expected.pooled[:2])
    elif damage == "other names":
        np.savez(path, features=expected.pooled)
    else:
        path.write_bytes({"cut": whole[: len(whole) // 2], "flipped": bytes(flipped), "empty": b""}[damage])
    with pytest.warns(UserWarning, match=rf"computed again, because .*{path.stem}\.npz is damaged"):
        found = extractor(counter, tmp_path).extract(shown)
    np.testing.assert_array_equal(found.pooled, expected.pooled)
    assert path.read_bytes() == whole
    assert [each.name for each in path.parent.iterdir()] == [path.name]


def test_a_place_that_cannot_be_written_is_a_warning(tmp_path: Path, counter: Counter) -> None:
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="features are computed again next time: cannot write"):
        found = extractor(counter, tmp_path / "file").extract(pictures(2))
    assert len(found.pooled) == 2


def tiny_judge(seed: int = 0, timesteps: int = 10, size: int = 8, context: int = 6) -> NoisyCLIP:
    torch.manual_seed(seed)
    config = NoisyCLIPConfig(
        embedding=8,
        image_size=size,
        patch_size=4,
        image_heads=2,
        image_head_channels=8,
        image_layers=1,
        text_heads=2,
        text_head_channels=8,
        text_layers=1,
        context=context,
        vocabulary=embedded_tokenizer().size,
        timesteps=timesteps,
        tokenizer="embedded",
    )
    return NoisyCLIP(config).eval()


@pytest.mark.parametrize("timesteps", [0, 10])
def test_a_noise_aware_clip_reads_clean_pictures_of_any_size_and_captions(timesteps: int) -> None:
    judge = tiny_judge(timesteps=timesteps)
    small = pictures(5).repeat(2, axis=1).repeat(2, axis=2)
    features = clip_features(judge, batch=2)
    x = torch.from_numpy(np.moveaxis(small, 3, 1).copy()).float() / 127.5 - 1
    clean = torch.zeros(5, dtype=torch.int64) if timesteps else None
    with torch.no_grad():
        expected = judge.image_encoder(x, clean)
    np.testing.assert_allclose(features(small), expected, rtol=1e-4, atol=1e-6)
    large = small.repeat(2, axis=1).repeat(2, axis=2)  # averages to the same
    np.testing.assert_allclose(features(large), expected, rtol=1e-4, atol=1e-6)
    assert features(pictures(2)).shape == (2, 8)  # enlarged
    captions = ["red apple", "key", "a rocket"]
    with torch.no_grad():
        texts = judge.text_encoder(*framed("embedded", captions, 6))
    np.testing.assert_allclose(clip_captions(judge, captions, batch=2), texts, rtol=1e-4, atol=1e-6)


def test_extractors_are_found_by_name_and_known_by_their_weights(tmp_path: Path) -> None:
    found = []
    for seed in (0, 1):
        judge = tiny_judge(seed)
        save_model(tmp_path / f"{seed}.safetensors", judge.config, judge.state_dict(), torch.float32)
        found.append(find_extractor(str(tmp_path / f"{seed}.safetensors")))
    assert found[0].identity != found[1].identity
    assert found[0].name == "0.safetensors"
    assert isinstance(found[0].clip, NoisyCLIP)
    shown = pictures(3)
    np.testing.assert_allclose(
        found[1].extract(shown).pooled, clip_features(tiny_judge(1))(shown), rtol=1e-5, atol=1e-6
    )


def test_what_looks_at_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="features 'vgg' are neither emoji, inception, one of glide-clip"):
        find_extractor("vgg")
    with pytest.raises(ValueError, match="features 'glide-base' are neither"):
        find_extractor("glide-base")
    base, _ = tiny.save(tmp_path)
    with pytest.raises(ValueError, match="holds a UNet, not a CLIP"):
        find_extractor(str(base))
    with pytest.raises(FileNotFoundError):
        find_extractor(str(tmp_path / "none.safetensors"))
