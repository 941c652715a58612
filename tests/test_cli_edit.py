"""``inpaint``, ``vary`` and ``upscale`` as a person uses them, with tiny random models."""

from __future__ import annotations

import hashlib
import json
import shlex
from pathlib import Path

import numpy as np
import pytest

from glide_fast.data.images import center_square, load_image, save_png
from glide_fast.models import save_model
from tests import tiny
from tests.test_cli import fail, run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models (base, inpaint, upsampler), a picture of their size, a small one and masks."""
    folder = tmp_path_factory.mktemp("editing")
    tiny.save(folder)
    network, config = tiny.model(tiny.config(inpaint=True), seed=3)
    save_model(folder / "inpaint.safetensors", config, network.state_dict())
    random = np.random.default_rng(0)
    for name, shape in (("picture", (16, 16)), ("small", (8, 8)), ("wide", (20, 30))):
        save_png(folder / f"{name}.png", random.integers(0, 256, (*shape, 3), dtype=np.uint8))
        mask = np.zeros((*shape, 3), dtype=np.uint8)
        mask[: shape[0] // 2] = 255
        save_png(folder / f"{name}-mask.png", mask)
    save_png(folder / "white.png", np.full((16, 16, 3), 255, dtype=np.uint8))
    save_png(folder / "black.png", np.zeros((16, 16, 3), dtype=np.uint8))
    (folder / "broken.png").write_bytes(b"no picture")
    return folder


def options(folder: Path, base: str = "inpaint") -> list[str]:
    models = [f"--model={folder / base}.safetensors", f"--upsampler={folder / 'upsampler'}.safetensors"]
    return [*models, "--steps=4", "--upsampler-steps=2"]


def upsampler(folder: Path) -> list[str]:
    return [f"--model={folder / 'upsampler'}.safetensors", "--steps=2"]


@pytest.mark.parametrize("base", ["base", "inpaint"])
def test_inpaint_keeps_known_pixels_exactly(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, folder: Path, base: str
) -> None:
    picture, mask = folder / "picture.png", folder / "picture-mask.png"
    chosen = ["-n", 3, "--batch", 2, "--seed", 5, "--out", tmp_path, *options(folder, base)]
    run(monkeypatch, "inpaint", picture, "--mask", mask, "red apple", *chosen)
    sidecar = json.loads((tmp_path / "inpaint.json").read_text())
    assert [row["seed"] for row in sidecar["pictures"]] == [5, 6, 7]
    assert sidecar["input_sha256"] == {
        str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in (picture, mask)
    }
    assert set(sidecar["model_sha256"]) == {f"{base}.safetensors", "upsampler.safetensors"}
    painted = [load_image(tmp_path / row["file"]) for row in sidecar["pictures"]]
    for each in painted:
        np.testing.assert_array_equal(each[:8], load_image(picture)[:8])
    assert (painted[0][8:] != painted[1][8:]).any()
    assert load_image(tmp_path / "grid.png").shape == (20, 56, 3)


def test_inpaint_fits_picture_and_mask_alike(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, folder: Path
) -> None:
    wide, mask = folder / "wide.png", folder / "wide-mask.png"
    run(monkeypatch, "inpaint", wide, "--mask", mask, "--fit", "--out", tmp_path, *options(folder))
    fitted = center_square(load_image(wide), 16)
    painted = load_image(tmp_path / "0000-unconditional-0.png")
    np.testing.assert_array_equal(painted[:7], fitted[:7])
    assert (painted[9:] != fitted[9:]).any()


def test_vary_paints_as_strongly_as_it_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, folder: Path
) -> None:
    varied = []
    for strength in (0.5, 1.0):
        out = tmp_path / str(strength)
        chosen = ["--strength", strength, "--out", out, *options(folder, "base")]
        run(monkeypatch, "vary", folder / "picture.png", "key", *chosen)
        sidecar = json.loads((out / "vary.json").read_text())
        assert sidecar["options"]["strength"] == strength
        varied.append(load_image(out / "0000-key-0.png"))
    assert (varied[0] != varied[1]).any()


def test_upscale_enlarges(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, folder: Path) -> None:
    run(monkeypatch, "upscale", folder / "small.png", "--out", tmp_path, "-n", 2, *upsampler(folder))
    sidecar = json.loads((tmp_path / "upscale.json").read_text())
    first, second = (load_image(tmp_path / row["file"]) for row in sidecar["pictures"])
    assert first.shape == (16, 16, 3)
    assert (first != second).any()
    assert sidecar["options"]["steps"] == 2


@pytest.mark.parametrize("verb", ["inpaint", "vary", "upscale"])
def test_the_sidecars_command_gives_the_same_pictures(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, folder: Path, verb: str
) -> None:
    inputs = {
        "inpaint": ["picture.png", "--mask", folder / "picture-mask.png"],
        "vary": ["picture.png"],
        "upscale": ["small.png"],
    }[verb]
    chosen = upsampler(folder) if verb == "upscale" else options(folder)
    first = [verb, folder / inputs[0], "a key's ring", *inputs[1:], "-n", 2, "--out", tmp_path, *chosen]
    run(monkeypatch, *first)
    before = {path.name: path.read_bytes() for path in tmp_path.glob("*.png")}
    command = json.loads((tmp_path / f"{verb}.json").read_text())["command"]
    for path in tmp_path.glob("*.png"):
        path.unlink()
    run(monkeypatch, *shlex.split(command)[1:])
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.png")} == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("inpaint picture.png key", "--mask"),
        ("inpaint picture.png key --mask none.png", "none.png' does not exist"),
        ("inpaint none.png key --mask black.png", "none.png' does not exist"),
        ("inpaint picture.png key --mask broken.png", "cannot read picture"),
        ("inpaint picture.png --mask white.png", "everything is known by the mask, so there is nothing to"),
        ("inpaint picture.png --mask black.png", "nothing is known by the mask, so there is no picture to"),
        ("inpaint picture.png --mask wide-mask.png", "is 30 x 20 px and "),
        ("inpaint wide.png --mask wide-mask.png", "picture is 30 x 20 px, this model paints 16 x 16; crop"),
        ("inpaint picture.png --mask picture-mask.png -n 0", "number 0 must lie in 1 .. 10000"),
        ("vary small.png key", "picture is 8 x 8 px, this model paints 16 x 16; crop and resize it"),
        ("vary picture.png key --strength 0.3", "strength 0.3 must lie in 0.5 .. 1, so that 2 to all of the"),
        ("vary picture.png key --strength 1.5", "strength 1.5 must lie in 0.5 .. 1"),
        ("upscale wide.png", "picture is 30 x 20 px; this upsampler enlarges squares to 16 px whose side"),
        ("upscale picture.png", "crop and resize the picture to 8 x 8"),
        ("upscale small.png --guidance 200", "guidance scale 200.0 must lie in 0 .. 100"),
        ("upscale small.png --model glide-base", "is none that enlarges a picture of a text; choose one of"),
    ],
)
def test_a_mistake_is_explained(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    folder: Path,
    words: str,
    message: str,
) -> None:
    arguments = [folder / word if word.endswith(".png") else word for word in words.split()]
    if "--model" not in words:
        arguments += upsampler(folder) if words.startswith("upscale") else options(folder)
    out = tmp_path / "out"
    printed = fail(monkeypatch, capsys, *arguments, "--out", out)
    assert message in printed
    assert not out.exists()


def test_a_base_model_enlarges_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    base = folder / "base.safetensors"
    message = fail(monkeypatch, capsys, "upscale", folder / "small.png", "--model", base)
    assert "this model enlarges nothing; choose an upsampler" in message
