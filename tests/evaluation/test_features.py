"""CLIP's embeddings as features, their moments in pieces, and the files of reference statistics."""

from __future__ import annotations

from functools import reduce
from operator import add
from pathlib import Path

import numpy as np
import pytest
import torch

from glide_fast.data.images import to_tensor
from glide_fast.evaluation import (
    Gaussian,
    Moments,
    Reference,
    clip_features,
    fid,
    frechet_distance,
    read_reference,
    spatial_features,
    write_reference,
)
from glide_fast.models.clip import CLIP, CLIPConfig, VisionTransformerConfig
from glide_fast.models.resnet import ResNetConfig
from glide_fast.sampling.gradients import clip_pixels

VISION = VisionTransformerConfig(width=64, layers=1, patch_size=8)


def tiny_clip(vision: VisionTransformerConfig | ResNetConfig = VISION, size: int = 16) -> CLIP:
    torch.manual_seed(0)
    config = CLIPConfig(
        embedding=6, image_size=size, vision=vision, width=8, layers=1, heads=1, context=4, vocabulary=10
    )
    return CLIP(config)


def pictures(count: int, height: int = 12, width: int = 12) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def gaussian(seed: int, width: int = 4) -> Gaussian:
    return Moments.of(np.random.default_rng(seed).standard_normal((9, width))).gaussian


class TestClipFeatures:
    def test_are_the_embeddings_of_clips_pixels(self) -> None:
        clip, shown = tiny_clip(), pictures(5)
        with torch.no_grad():
            expected = clip.encode_image(clip_pixels(to_tensor(shown), 16))
        found = clip_features(clip, batch=2)(shown)
        assert (found.dtype, found.shape) == (np.float32, (5, 6))
        np.testing.assert_allclose(found, expected.numpy(), rtol=1e-5, atol=1e-6)

    def test_leave_the_model_as_it_was(self) -> None:
        """A ResNet's batch norms neither learn from the pictures judged nor depend on the batch."""
        clip = tiny_clip(ResNetConfig(width=4, layers=(1, 1, 1, 1)), size=32).train()
        before = {name: value.clone() for name, value in clip.state_dict().items()}
        shown = pictures(3)
        together, alone = (clip_features(clip, batch=batch)(shown) for batch in (3, 1))
        np.testing.assert_allclose(together, alone, rtol=1e-4, atol=1e-6)
        assert clip.training
        assert all(torch.equal(value, before[name]) for name, value in clip.state_dict().items())

    def test_of_no_pictures(self) -> None:
        assert clip_features(tiny_clip())(pictures(0)).shape == (0, 6)

    def test_show_their_progress(self, capsys: pytest.CaptureFixture[str]) -> None:
        clip_features(tiny_clip(), batch=2, progress=True)(pictures(3))
        assert "features: 100%" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("shown", "message"),
        [
            (pictures(2, 12, 16), "pictures are 12 x 16; CLIP reads squares: crop them"),
            (pictures(2).astype(np.float32), r"pictures are float32 \[2, 12, 12, 3\]; use uint8"),
            (pictures(2)[0], r"pictures are uint8 \[12, 12, 3\]"),
        ],
    )
    def test_errors(self, shown: np.ndarray, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            clip_features(tiny_clip())(shown)

    def test_batch_must_be_positive(self) -> None:
        with pytest.raises(ValueError, match="batch 0 must be at least 1 picture"):
            clip_features(tiny_clip(), batch=0)


class TestSpatialFeatures:
    def test_are_rows_columns_channels(self) -> None:
        maps = np.random.default_rng(0).standard_normal((3, 9, 2, 4))
        found = spatial_features(maps)
        expected = [[maps[1, c, h, w] for h in range(2) for w in range(4) for c in range(7)]]
        assert found.shape == (3, 56)
        np.testing.assert_array_equal(found[1:2], expected)

    def test_see_where_things_are(self) -> None:
        """Mirrored maps have the same averages, but another sFID."""
        maps = np.random.default_rng(1).standard_normal((20, 2, 3, 3)) + np.arange(3)
        mirrored = maps[..., ::-1]
        assert fid(mirrored.mean(axis=(2, 3)), maps.mean(axis=(2, 3))) == pytest.approx(0, abs=1e-10)
        assert fid(spatial_features(mirrored, channels=2), spatial_features(maps, channels=2)) > 40

    @pytest.mark.parametrize("shape", [(3, 6, 2, 2), (3, 9, 4)])
    def test_errors(self, shape: tuple[int, ...]) -> None:
        with pytest.raises(ValueError, match=r"they must be \[N, C >= 7, H, W\]"):
            spatial_features(np.zeros(shape))


class TestMoments:
    def test_are_numpys(self) -> None:
        features = np.random.default_rng(0).standard_normal((20, 5)).astype(np.float32)
        found = Moments.of(features).gaussian
        np.testing.assert_allclose(found.mean, features.mean(axis=0, dtype=float), rtol=1e-12)
        np.testing.assert_allclose(found.covariance, np.cov(features.T.astype(float)), rtol=1e-12)

    def test_pieces_equal_the_whole(self) -> None:
        """Ranks with a batch, with many, with one picture, with none; far from zero, where squares cancel."""
        features = 1e6 + np.random.default_rng(1).standard_normal((40, 5))
        whole = Moments.of(features)
        first = reduce(add, map(Moments.of, np.split(features[:30], 6)), Moments.empty(5))
        merged = first + Moments.empty(5) + (Moments.of(features[30:39]) + Moments.of(features[39:]))
        assert merged.count == whole.count == 40
        np.testing.assert_allclose(merged.mean, whole.mean, rtol=1e-14)
        np.testing.assert_allclose(merged.gaussian.covariance, np.cov(features.T), rtol=1e-7)
        assert frechet_distance(merged.gaussian, whole.gaussian) == pytest.approx(0, abs=1e-8)

    def test_nothing_and_nothing_is_nothing(self) -> None:
        assert (Moments.empty(3) + Moments.empty(3)).count == 0

    def test_errors(self) -> None:
        with pytest.raises(ValueError, match="a covariance of 1 features is undefined; give at least 2"):
            _ = Moments.of(np.ones((1, 3))).gaussian
        with pytest.raises(ValueError, match="the first moments have 3 features and the second 2"):
            _ = Moments.empty(3) + Moments.empty(2)
        with pytest.raises(ValueError, match="features have 0 rows"):
            Moments.of(np.ones((0, 3)))


class TestReference:
    @pytest.mark.parametrize("spatial", [None, gaussian(1, 6)])
    def test_comes_back_from_the_file(self, tmp_path: Path, spatial: Gaussian | None) -> None:
        path = tmp_path / "folder" / "emoji.npz"
        written = Reference(pooled=gaussian(0), spatial=spatial)
        write_reference(path, written)
        found = read_reference(path)
        assert [each.name for each in path.parent.iterdir()] == ["emoji.npz"]
        np.testing.assert_array_equal(found.pooled.mean, written.pooled.mean)
        np.testing.assert_array_equal(found.pooled.covariance, written.pooled.covariance)
        assert (found.spatial is None) == (spatial is None)
        if found.spatial and spatial:
            np.testing.assert_array_equal(found.spatial.covariance, spatial.covariance)

    def test_has_openais_names(self, tmp_path: Path) -> None:
        write_reference(tmp_path / "a.npz", Reference(pooled=gaussian(0), spatial=gaussian(1, 6)))
        with np.load(tmp_path / "a.npz") as stored:
            assert {name: stored[name].shape for name in stored} == {
                "mu": (4,),
                "sigma": (4, 4),
                "mu_s": (6,),
                "sigma_s": (6, 6),
            }

    def test_openais_file_is_read_beside_its_pictures(self, tmp_path: Path) -> None:
        a, b = gaussian(0), gaussian(1, 6)
        np.savez(
            tmp_path / "a.npz",
            arr_0=pictures(2),
            mu=a.mean.astype(np.float32),
            sigma=a.covariance.astype(np.float32),
            mu_s=b.mean,
            sigma_s=b.covariance,
        )
        found = read_reference(tmp_path / "a.npz")
        assert found.pooled.mean.dtype == np.float64
        assert frechet_distance(found.pooled, a) == pytest.approx(0, abs=1e-6)

    @pytest.mark.parametrize(
        ("arrays", "message"),
        [
            ({"arr_0": pictures(1)}, r"but not \['mu', 'sigma'\]; compute the features of its pictures"),
            ({"mu": np.zeros(2)}, r"it holds \['mu'\] but not \['sigma'\]$"),
            ({"mu": np.zeros(2), "sigma": np.eye(3)}, r"mu is \[2\] and sigma \[3, 3\]; they must be"),
            ({"mu": np.zeros(2), "sigma": np.eye(2) * np.nan}, "mu or sigma is not finite"),
            ({"mu": np.zeros(2), "sigma": np.array([[1.0, 1], [0, 1]])}, "sigma is not symmetric"),
            (
                {"mu": np.zeros(2), "sigma": np.eye(2), "sigma_s": np.eye(2)},
                r"but not \['mu_s'\]",
            ),
        ],
    )
    def test_wrong_content_is_named(
        self, tmp_path: Path, arrays: dict[str, np.ndarray], message: str
    ) -> None:
        np.savez(tmp_path / "a.npz", **arrays)
        with pytest.raises(ValueError, match=rf"cannot read reference statistics .*a\.npz.*{message}"):
            read_reference(tmp_path / "a.npz")

    def test_files_that_are_no_npz(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"reference statistics .*a\.npz' do not exist"):
            read_reference(tmp_path / "a.npz")
        path = tmp_path / "b.npz"
        write_reference(path, Reference(pooled=gaussian(0)))
        whole = path.read_bytes()
        flipped = bytearray(whole)
        flipped[100] ^= 255
        for content in (b"", b"no archive", whole[:200], bytes(flipped)):
            path.write_bytes(content)
            with pytest.raises(ValueError, match="cannot read reference statistics"):
                read_reference(path)
        np.save(tmp_path / "c.npy", np.zeros(3))
        with pytest.raises(ValueError, match="it is a single array, not an npz"):
            read_reference(tmp_path / "c.npy")

    def test_a_place_that_cannot_be_written(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(OSError, match="file"):
            write_reference(tmp_path / "file" / "a.npz", Reference(pooled=gaussian(0)))
