"""Pictures in and out: every kind of file, exact rounding, grid layout, whole files or none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from glide_fast.data.images import center_square, grid, load_image, save_png, to_tensor, to_uint8


def save(path: Path, picture: Image.Image, **options: object) -> Path:
    picture.save(path, **options)
    return path


def test_transparent_parts_are_white(tmp_path: Path) -> None:
    picture = Image.new("RGBA", (2, 1), (255, 0, 0, 255))
    picture.putpixel((1, 0), (0, 0, 0, 0))
    assert load_image(save(tmp_path / "a.png", picture)).tolist() == [[[255, 0, 0], [255, 255, 255]]]


def test_half_transparent_grey_with_alpha(tmp_path: Path) -> None:
    values = load_image(save(tmp_path / "a.png", Image.new("LA", (1, 1), (0, 128))))
    assert values.tolist() == [[[127, 127, 127]]]


def test_palette_with_a_transparent_colour(tmp_path: Path) -> None:
    picture = Image.new("P", (2, 1))
    picture.putpalette([10, 20, 30, 200, 100, 50])
    picture.putpixel((1, 0), 1)
    assert load_image(save(tmp_path / "a.png", picture)).tolist() == [[[10, 20, 30], [200, 100, 50]]]
    transparent = save(tmp_path / "b.png", picture, transparency=0)
    assert load_image(transparent).tolist() == [[[255, 255, 255], [200, 100, 50]]]


def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path: Path) -> None:
    values = np.array([[0, 128, 129, 257, 32896, 65535]], dtype=np.uint16)
    loaded = load_image(save(tmp_path / "a.png", Image.fromarray(values)))
    assert loaded[0, :, 0].tolist() == [0, 0, 1, 1, 128, 255]
    assert (loaded[..., 0] == loaded[..., 2]).all()


@pytest.mark.parametrize("mode", ["1", "L", "CMYK", "YCbCr"])
def test_other_modes_become_rgb(tmp_path: Path, mode: str) -> None:
    loaded = load_image(save(tmp_path / "a.tif", Image.new("RGB", (5, 3), "white").convert(mode)))
    assert loaded.shape == (3, 5, 3)
    assert loaded.dtype == np.uint8
    assert (loaded >= 254).all()


def test_floating_point_pixels_are_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "a.tif", Image.new("F", (2, 2), 0.5))
    with pytest.raises(ValueError, match=r"a\.tif.*8 or 16 bits"):
        load_image(path)


def test_exif_orientation_turns_the_picture(tmp_path: Path) -> None:
    picture = Image.new("RGB", (4, 2), "white")
    exif = Image.Exif()
    exif[0x0112] = 6
    assert load_image(save(tmp_path / "a.jpg", picture, exif=exif)).shape == (4, 2, 3)


def test_broken_and_missing_files_are_named(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    whole = save(tmp_path / "whole.png", Image.fromarray(noise)).read_bytes()
    for name, content in {
        "cut.png": whole[: len(whole) // 2],
        "text.png": b"hello",
        "empty.png": b"",
    }.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=rf"cannot read picture .*{name}"):
            load_image(tmp_path / name)
    with pytest.raises(FileNotFoundError, match=r"none\.png.*does not exist"):
        load_image(tmp_path / "none.png")
    with pytest.raises(FileNotFoundError, match="not a file"):
        load_image(tmp_path)


def test_a_decompression_bomb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path / "bomb.png", Image.new("L", (100, 100)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 6000)
    with pytest.raises(ValueError, match=r"bomb\.png"):
        load_image(path)


@settings(max_examples=40, deadline=None)
@given(height=st.integers(1, 70), width=st.integers(1, 70), size=st.integers(1, 20))
def test_center_square_has_the_size_and_keeps_a_flat_colour(height: int, width: int, size: int) -> None:
    image = np.full((height, width, 3), (10, 120, 250), dtype=np.uint8)
    square = center_square(image, size)
    assert square.shape == (size, size, 3)
    assert (square == image[0, 0]).all()


def test_center_square_keeps_the_middle() -> None:
    image = np.zeros((8, 24, 3), dtype=np.uint8)
    image[:, 8:16] = 200
    assert (center_square(image, 8) == 200).all()
    assert (center_square(image.transpose(1, 0, 2), 4) == 200).all()
    same = np.random.default_rng(1).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    assert np.array_equal(center_square(same, 6), same)
    with pytest.raises(ValueError, match="size 0"):
        center_square(image, 0)


def test_tensors_run_from_minus_one_to_one() -> None:
    images = np.array([0, 51, 255], dtype=np.uint8).reshape(1, 1, 1, 3)
    tensor = to_tensor(images)
    assert tensor.shape == (1, 3, 1, 1)
    assert tensor.dtype == torch.float32
    torch.testing.assert_close(tensor.flatten(), torch.tensor([-1.0, -0.6, 1.0]))
    assert to_tensor(images[0]).shape == (3, 1, 1)
    with pytest.raises(ValueError, match=r"float64 \[1, 1, 1, 3\]"):
        to_tensor(images.astype(np.float64))


def test_every_level_survives_the_way_there_and_back() -> None:
    levels = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 16, 16, 3)
    assert np.array_equal(to_uint8(to_tensor(levels)), levels)
    assert np.array_equal(to_uint8(to_tensor(levels[0])), levels[0])


def test_rounding_is_to_the_nearest_even_and_clamped() -> None:
    values = torch.tensor([-2.0, 0.0, 2.0, -1.0 + 0.5 / 127.5, 1.0, 1.5 / 127.5 - 1.0])
    pixels = to_uint8(values.view(2, 3, 1, 1)).flatten().tolist()
    expected = ((values + 1) * 127.5).round().clamp(0, 255).int().tolist()
    assert pixels == expected
    assert pixels[:3] == [0, 128, 255]
    assert to_uint8(torch.zeros(1, 3, 2, 2, dtype=torch.bfloat16)).shape == (1, 2, 2, 3)
    with pytest.raises(ValueError, match=r"\[2, 6, 1, 1\]"):
        to_uint8(torch.zeros(2, 6, 1, 1))


def test_grid_layout() -> None:
    images = np.arange(3, dtype=np.uint8).repeat(2 * 3 * 3).reshape(3, 2, 3, 3)
    sheet = grid(images, 2, gap=1)
    assert sheet[..., 0].tolist() == [
        [255] * 9,
        [255, 0, 0, 0, 255, 1, 1, 1, 255],
        [255, 0, 0, 0, 255, 1, 1, 1, 255],
        [255] * 9,
        [255, 2, 2, 2, 255, 255, 255, 255, 255],
        [255, 2, 2, 2, 255, 255, 255, 255, 255],
        [255] * 9,
    ]
    assert grid(images, 10, gap=0).shape == (2, 9, 3)
    with pytest.raises(ValueError, match="columns 0"):
        grid(images, 0)
    with pytest.raises(ValueError, match="B >= 1"):
        grid(images[:0], 2)


def test_png_returns_what_was_saved(tmp_path: Path) -> None:
    image = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    save_png(tmp_path / "a.png", image)
    assert np.array_equal(load_image(tmp_path / "a.png"), image)
    with pytest.raises(ValueError, match="must be uint8"):
        save_png(tmp_path / "b.png", image.astype(np.float32))  # type: ignore[arg-type]


def test_a_failed_save_leaves_the_old_picture_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = np.zeros((4, 4, 3), dtype=np.uint8)
    save_png(tmp_path / "a.png", image)

    def half_written(_: Image.Image, path: Path, **__: object) -> None:
        Path(path).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", half_written)
    with pytest.raises(OSError, match="disk full"):
        save_png(tmp_path / "a.png", image + 1)
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
    assert np.array_equal(load_image(tmp_path / "a.png"), image)
