"""Random masks: of the shares asked for, of every position and size, the same for the same generator."""

from __future__ import annotations

import numpy as np
import pytest

from glide_fast.data.masks import MaskConfig, box_mask, random_mask, stroke_mask

SIZE = 32


def masks(config: MaskConfig, count: int = 400) -> np.ndarray:
    return np.stack([random_mask(SIZE, config, np.random.default_rng(seed)) for seed in range(count)])


def test_nothing_is_known_as_often_as_asked() -> None:
    unknown = (masks(MaskConfig(nothing_known=0.3, boxes=0.0)) == 0).all((1, 2))
    assert unknown.mean() == pytest.approx(0.3, abs=0.1)
    assert (masks(MaskConfig(nothing_known=1.0, boxes=0.0)) == 0).all()


def test_a_box_is_one_rectangle_of_at_least_a_quarter_anywhere() -> None:
    tops, bottoms = set(), set()
    for seed in range(300):
        mask = box_mask(SIZE, np.random.default_rng(seed))
        rows, columns = np.flatnonzero((mask == 0).any(1)), np.flatnonzero((mask == 0).any(0))
        assert (mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] == 0).all()
        assert (mask == 0).sum() == len(rows) * len(columns)
        assert min(len(rows), len(columns)) >= SIZE // 4
        tops.add(int(rows[0]))
        bottoms.add(int(rows[-1]))
    assert 0 in tops
    assert max(tops) > SIZE // 2
    assert SIZE - 1 in bottoms


def test_strokes_erase_a_part_and_reach_everywhere() -> None:
    strokes = np.stack([stroke_mask(SIZE, np.random.default_rng(seed)) for seed in range(300)])
    erased = (strokes == 0).mean((1, 2))
    assert set(np.unique(strokes).tolist()) == {0, 1}
    assert erased.min() > 0
    assert 0.1 < erased.mean() < 0.6
    assert ((strokes == 0).mean(0) > 0.02).all()


@pytest.mark.parametrize("size", [1, 2, 7, 64])
@pytest.mark.parametrize("kind", [box_mask, stroke_mask])
def test_masks_of_any_size_follow_from_the_generator(size: int, kind: type) -> None:
    first, again = kind(size, np.random.default_rng(5)), kind(size, np.random.default_rng(5))
    assert first.shape == (size, size)
    assert first.dtype == np.uint8
    assert np.array_equal(first, again)


@pytest.mark.parametrize("shares", [(0.6, 0.6), (-0.1, 0.5), (0.5, -0.1)])
def test_shares_that_are_none_are_refused(shares: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="must be shares, both at most 1"):
        MaskConfig(nothing_known=shares[0], boxes=shares[1])
