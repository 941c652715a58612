"""The Inception network of FID against another implementation of the same graph, and its file."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from glide_fast.evaluation import fid, inception
from glide_fast.evaluation.extractors import inception_extractor
from glide_fast.evaluation.inception import Inception, load_inception
from tests import golden

# Outputs of torch-fidelity 0.4.0's feature extractor, weights by the rule of tests/parity with seed 7: every
# 128th pooled feature, the first 7 channels of the maps at (5, 9), every 100th probability.
GOLDEN = json.loads(Path(__file__).with_name("inception.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file as the published one, its values by the rule."""
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(golden.fill(Inception(), 7).state_dict(), path)
    return path


def pictures(size: int, count: int = 1) -> np.ndarray:
    """Noise; drawn as [N, 3, H, W], as the golden inputs were."""
    drawn = np.random.default_rng(size).integers(0, 256, (count, 3, size, size), dtype=np.uint8)
    return np.ascontiguousarray(np.moveaxis(drawn, 1, 3))


@pytest.mark.parametrize("size", GOLDEN)
def test_features_are_those_of_the_graph(weights: Path, size: str) -> None:
    network = load_inception(weights)
    with torch.no_grad():
        found = network(torch.from_numpy(np.moveaxis(pictures(int(size)), 3, 1).copy()))
    np.testing.assert_allclose(found.pooled[0, ::128], GOLDEN[size]["pooled"], rtol=1e-4, atol=2e-6)
    np.testing.assert_allclose(found.maps[0, :7, 5, 9], GOLDEN[size]["maps"], rtol=1e-4, atol=2e-6)
    np.testing.assert_allclose(found.probabilities[0, ::100], GOLDEN[size]["probabilities"], rtol=1e-5)
    assert found.maps.shape == (1, 768, 17, 17)


def test_the_network_has_the_published_size() -> None:
    assert sum(parameter.numel() for parameter in Inception().parameters()) == 23_850_960


def test_the_extractor_gives_what_openais_statistics_are_of(weights: Path) -> None:
    shown = pictures(32, 3)
    found = inception_extractor(weights).extract(shown)
    assert found.spatial is not None
    assert found.probabilities is not None
    assert (found.pooled.shape, found.spatial.shape) == ((3, 2048), (3, 17 * 17 * 7))
    np.testing.assert_allclose(found.probabilities.sum(1), 1, rtol=1e-5)
    with torch.no_grad():
        maps = load_inception(weights)(torch.from_numpy(np.moveaxis(shown, 3, 1).copy())).maps
    np.testing.assert_allclose(found.spatial[1, 7 * 5 : 7 * 6], maps[1, :7, 0, 5], rtol=1e-4, atol=1e-6)
    assert fid(found.pooled, found.pooled) == pytest.approx(0, abs=1e-8)


def test_resizing_is_bilinear_without_the_half_pixel() -> None:
    """Against a loop over pixels; an even row doubles pixels as i * H / 299 says."""
    line = torch.rand(1, 1, 5, 7)
    found = inception._resized(line)
    for i, j in ((0, 0), (100, 31), (298, 298), (150, 299 * 6 // 7 + 1)):
        y, x = i * 5 / 299, j * 7 / 299
        top, left = int(y), int(x)
        bottom, right = min(top + 1, 4), min(left + 1, 6)
        above = line[0, 0, top, left] * (1 - x + left) + line[0, 0, top, right] * (x - left)
        below = line[0, 0, bottom, left] * (1 - x + left) + line[0, 0, bottom, right] * (x - left)
        assert found[0, 0, i, j].item() == pytest.approx(
            (above * (1 - y + top) + below * (y - top)).item(), abs=1e-5
        )
    same = torch.rand(2, 3, 299, 299)
    torch.testing.assert_close(inception._resized(same), same, rtol=0, atol=1e-6)


def test_older_files_without_counters_are_read_and_other_networks_refused(
    weights: Path, tmp_path: Path
) -> None:
    state = torch.load(weights, weights_only=True)
    older = {name: tensor for name, tensor in state.items() if "num_batches" not in name}
    torch.save(older, tmp_path / "older.pth")
    torch.testing.assert_close(load_inception(tmp_path / "older.pth").fc.weight, state["fc.weight"])
    del older["Mixed_6a.branch3x3.bn.running_var"]
    torch.save(older, tmp_path / "broken.pth")
    with pytest.raises(ValueError, match=r"broken\.pth does not hold the Inception network of FID: Mixed_6a"):
        load_inception(tmp_path / "broken.pth")


def test_the_published_file_is_checked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GLIDE_FAST_CACHE", str(tmp_path))
    from glide_fast.download import cached_path

    path = cached_path(inception.WEIGHTS.url)
    path.parent.mkdir(parents=True)
    path.write_bytes(b"something else")
    with pytest.raises(
        ValueError, match="not 6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
    ):
        load_inception()
