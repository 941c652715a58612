"""The emoji data set: captions, held-out rules, drawing and its cache."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from glide_fast.data import emoji as emoji_data
from glide_fast.data.dataset import CaptionedPictures
from glide_fast.data.emoji import (
    SKIN_TONES,
    draw_emoji,
    find_font,
    held_out_captions,
    load_emoji,
    open_font,
    skin_tone,
    split,
    tone_siblings,
)
from glide_fast.data.emoji_captions import list_emoji
from glide_fast.data.folder import load_dataset

pytest.importorskip("emoji", reason="the package emoji (extra 'train') is not installed")


def font_or_skip() -> Path:
    try:
        return find_font()
    except FileNotFoundError as error:
        pytest.skip(f"the emoji font is not installed: {error}")


@pytest.fixture(scope="module")
def pictures() -> CaptionedPictures:
    font_or_skip()
    return load_emoji(32)


def test_captions_are_unique_english() -> None:
    captions = [item.caption for item in list_emoji()]
    assert len({caption.lower() for caption in captions}) == len(captions) >= 3700
    assert not any(set(caption) & set("_:’") for caption in captions)
    for expected in (
        "woman running, medium-dark skin tone",
        "flag of France",
        "flag of Scotland",
        "man with red hair, dark skin tone",
        "bald woman",
        "family, man, woman, girl and boy",
        "kiss, woman and man, light skin tone, dark skin tone",
        "three o'clock",
        "red apple",
    ):
        assert expected in captions


def test_names_are_unique_file_names() -> None:
    names = [item.name for item in list_emoji()]
    assert len(set(names)) == len(names)
    assert "1f34e" in names


def test_the_count_of_the_package() -> None:
    emoji = pytest.importorskip("emoji")
    if not emoji.__version__.startswith("2.16."):
        pytest.skip(f"the counts hold for emoji 2.16, not {emoji.__version__}")
    captions = [item.caption for item in list_emoji()]
    assert len(captions) == 3963
    assert sum("skin tone" not in caption for caption in captions) == 1923


@pytest.mark.parametrize(
    ("caption", "tone"),
    [
        ("woman running, medium-dark skin tone", "medium-dark"),
        ("woman, dark skin tone", "dark"),
        ("woman", None),
        ("kiss, woman and man, light skin tone, dark skin tone", None),
        ("dark skin tone", None),
    ],
)
def test_skin_tone_of_a_caption(caption: str, tone: str | None) -> None:
    assert skin_tone(caption) == tone


def test_tone_siblings_replace_the_tone_only() -> None:
    assert tone_siblings("waving hand, dark skin tone") == [
        f"waving hand, {tone} skin tone" for tone in SKIN_TONES
    ]
    with pytest.raises(ValueError, match="'red apple' does not end in one skin tone"):
        tone_siblings("red apple")


def test_held_out_captions_follow_their_rules() -> None:
    held_out = held_out_captions()
    listed = {item.caption for item in list_emoji()}
    bases = [caption.rsplit(", ", 1)[0] for caption in held_out]
    assert len(set(held_out)) == 100
    assert set(held_out) <= listed
    assert len(set(bases)) == 100
    assert Counter(skin_tone(caption) for caption in held_out) == dict.fromkeys(SKIN_TONES, 20)
    assert set().union(*(tone_siblings(caption) for caption in held_out)) <= listed
    assert not any(word in base for base in bases for word in ("kiss", "couple", " and ", "women", "people"))
    assert held_out[:2] == ["woman swimming, light skin tone", "deaf man, medium-light skin tone"]


def test_split_keeps_the_four_other_tones(pictures: CaptionedPictures) -> None:
    training, held_out = split(pictures)
    assert len(held_out) == 100
    assert len(training) + len(held_out) == len(pictures)
    seen = set(training.captions)
    for caption, image in zip(held_out.captions, held_out.images, strict=True):
        assert caption not in seen
        siblings = set(tone_siblings(caption))
        assert len(siblings & seen) == 4
        assert not any(
            np.array_equal(image, pictures.images[pictures.captions.index(other)])
            for other in siblings - {caption}
        )
    index = pictures.captions.index(held_out.captions[7])
    assert np.array_equal(held_out.images[7], pictures.images[index])
    assert held_out.names[7] == pictures.names[index]


def test_pictures_are_what_they_are_called(pictures: CaptionedPictures) -> None:
    assert pictures.images.shape[1:] == (32, 32, 3)
    assert len(pictures) >= 3700
    assert len(set(pictures.captions)) == len(pictures)
    apple = pictures.images[pictures.captions.index("red apple")].astype(int)
    assert (apple[0, 0] == 255).all()
    middle = apple[12:24, 10:22].mean((0, 1))
    assert middle[0] > middle[1] + 60
    france = pictures.images[pictures.captions.index("flag of France")].astype(int)
    assert france[16, 4, 2] > france[16, 4, 0] + 60
    assert france[16, 28, 0] > france[16, 28, 2] + 60


def test_small_pictures_are_the_average_of_larger_ones() -> None:
    font = open_font(font_or_skip())
    small, large = draw_emoji("🍎", font, 32), draw_emoji("🍎", font, 128)
    assert small is not None
    assert large is not None
    average = large.reshape(32, 4, 32, 4, 3).mean((1, 3))
    assert np.abs(average - small).max() <= 1.0
    assert draw_emoji("🍎", font, 200) is not None


def test_text_that_is_no_single_emoji_is_not_drawn() -> None:
    font = open_font(font_or_skip())
    assert draw_emoji("🍎🍎", font, 32) is None
    assert draw_emoji("\U0010ffff", font, 32) is None


def test_the_cache_is_used_and_a_damaged_one_is_drawn_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    font_or_skip()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    few = [item for item in list_emoji() if item.caption in ("red apple", "pizza", "flag of Japan")]
    monkeypatch.setattr(emoji_data, "list_emoji", lambda: few)
    first = load_emoji(16)
    (cache,) = (tmp_path / "glide_fast").iterdir()
    with monkeypatch.context() as patched:
        patched.setattr(emoji_data, "_draw_all", lambda *_: pytest.fail("drawn although stored"))
        second = load_emoji(16)
    assert np.array_equal(first.images, second.images)
    assert first.names == second.names
    assert sorted(first.captions) == ["flag of Japan", "pizza", "red apple"]
    cache.write_bytes(cache.read_bytes()[:100])
    with pytest.warns(UserWarning, match="is damaged"):
        third = load_emoji(16)
    assert np.array_equal(first.images, third.images)


def test_a_cache_that_cannot_be_written_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    font_or_skip()
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(emoji_data, "list_emoji", lambda: list_emoji()[1000:1002])
    with pytest.warns(UserWarning, match="cannot write the cache"):
        assert len(load_emoji(8)) == 2


def test_a_missing_font_names_the_package_and_the_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GLIDE_FAST_EMOJI_FONT", str(tmp_path / "none.ttf"))
    with pytest.raises(FileNotFoundError, match=r"GLIDE_FAST_EMOJI_FONT is .*fonts-noto-color-emoji"):
        find_font()
    monkeypatch.delenv("GLIDE_FAST_EMOJI_FONT")
    monkeypatch.setattr(emoji_data, "FONT_FILE", "NoSuchFont.ttf")
    with pytest.raises(
        FileNotFoundError, match=r"apt-get install fonts-noto-color-emoji.*GLIDE_FAST_EMOJI_FONT"
    ):
        find_font()


def test_another_font_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "font.ttf"
    path.write_bytes(b"no font")
    with pytest.raises(ValueError, match="has no 109 px bitmaps"):
        open_font(path)


@pytest.mark.parametrize("size", [0, -1, 5000])
def test_sizes_out_of_range(size: int) -> None:
    with pytest.raises(ValueError, match=rf"emoji size {size} is outside 1\.\.1024"):
        load_dataset("emoji", size)


def test_a_data_set_must_fit_together() -> None:
    images = np.zeros((2, 4, 4, 3), dtype=np.uint8)
    with pytest.raises(ValueError, match="2 images, 1 captions and 2 names"):
        CaptionedPictures(images=images, captions=["a"], names=["a", "b"])
    with pytest.raises(ValueError, match="must be uint8"):
        CaptionedPictures(images=images[0], captions=["a"], names=["a"])


def test_select_keeps_the_given_order() -> None:
    images = np.arange(3, dtype=np.uint8).repeat(12).reshape(3, 2, 2, 3)
    data = CaptionedPictures(images=images, captions=["a", "b", "c"], names=["x", "y", "z"])
    chosen = data.select(torch.tensor([2, 0]).tolist())
    assert (chosen.captions, chosen.names) == (["c", "a"], ["z", "x"])
    assert chosen.images[:, 0, 0, 0].tolist() == [2, 0]
    assert len(data.select([])) == 0
