"""The commands about model files: ``models``, ``convert``, and ``sample`` with presets."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from glide_fast.download import cached_path
from glide_fast.models import PRESETS, load_model
from glide_fast.models.catalogue import catalogue
from glide_fast.models.presets import PUBLISHED, Published, WeightFile
from tests import tiny
from tests.test_cli import fail, run


@pytest.fixture
def presets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """Presets "tiny-base" and "tiny-upsample", whose .pt files are in the cache: name → file."""
    monkeypatch.setenv("GLIDE_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    paths = {}
    for name, upsampler in (("tiny-base", False), ("tiny-upsample", True)):
        config = tiny.config(upsampler=upsampler)
        url = f"https://host.invalid/{name}.pt"
        paths[name] = cached_path(url)
        paths[name].parent.mkdir(parents=True, exist_ok=True)
        torch.save(tiny.model(config).network.state_dict(), paths[name])
        digest = hashlib.sha256(paths[name].read_bytes()).hexdigest()
        monkeypatch.setitem(PUBLISHED, name, Published(config, (WeightFile(url, digest),)))
        monkeypatch.setitem(PRESETS, name, config)
    return paths


def test_sample_paints_with_presets_as_with_their_files(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, presets: dict[str, Path]
) -> None:
    steps = ["--steps=2", "--upsampler-steps=2"]
    chosen = ["--model", "tiny-base", "--upsampler", "tiny-upsample"]
    run(monkeypatch, "sample", "key", *chosen, *steps, "--out", tmp_path / "a")
    files = []
    for option, name in (("--model", "tiny-base"), ("--upsampler", "tiny-upsample")):
        converted = tmp_path / f"{name}.safetensors"
        run(monkeypatch, "convert", presets[name], converted, "--model", name)
        files += [option, converted]
    run(monkeypatch, "sample", "key", *files, *steps, "--out", tmp_path / "b")
    first, second = (tmp_path / folder / "0000-key-0.png" for folder in "ab")
    assert first.read_bytes() == second.read_bytes()


def test_a_preset_that_does_not_paint_from_text_is_refused_before_it_is_downloaded(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    message = fail(monkeypatch, capsys, "sample", "key", "--model", "glide-upsample")
    assert (
        "'glide-upsample' is none that paints a picture from a text alone; choose one of glide-b" in message
    )
    message = fail(monkeypatch, capsys, "sample", "key", "--model", "clip-rn50")
    assert "'clip-rn50' is none that paints" in message
    message = fail(monkeypatch, capsys, "sample", "key", "--model", "glide-base", "--upsampler", "glide-base")
    assert "'glide-base' is none that enlarges a picture of a text; choose one of glide-upsample" in message


def test_a_preset_without_weights_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    message = fail(monkeypatch, capsys, "sample", "key", "--model", "glide-3.5b-base")
    assert "the weights of glide-3.5b-base were never published" in message


def test_models_lists_every_preset(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], presets: dict[str, Path]
) -> None:
    few = {name: PUBLISHED[name] for name in ("glide-3.5b-base", "clip-rn50", "glide-clip", *presets)}
    few["tiny-classifier"] = PUBLISHED["guided-64x64-classifier"]
    upsampler = PUBLISHED["glide-upsample-inpaint"]
    few["plain"] = Published(replace(tiny.config(), unet=replace(tiny.config().unet, text=None)))
    few["both"] = upsampler
    monkeypatch.setattr("glide_fast.models.catalogue.PUBLISHED", few)
    run(monkeypatch, "models")
    heading, *lines = capsys.readouterr().out.splitlines()
    assert heading.split() == ["name", "task", "parameters", "pixels", "weights"]
    assert [" ".join(line.split()) for line in lines] == [
        "glide-3.5b-base text → picture 3,554.4 M 64 never published",
        "clip-rn50 picture, text → likeness 102.0 M 224 to download",
        "glide-clip noised picture, text → likeness 158.1 M 64 to download",
        "tiny-base text → picture 0.4 M 8 in the cache",
        "tiny-upsample text, small picture → picture 0.4 M 16 in the cache",
        "tiny-classifier noised picture → class 65.4 M 64 to download",
        "plain noise → picture 0.4 M 8 never published",
        "both text, small picture, part → picture 398.4 M 256 to download",
    ]
    ends = {line.rindex(" M ") for line in lines}
    assert len(ends) == 1, "numbers stand under each other"


def test_the_readme_lists_them_as_the_command_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLIDE_FAST_CACHE", str(tmp_path))
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    assert f"```\n{catalogue()}\n```" in readme


def test_convert_keeps_or_changes_the_dtype_and_says_what_it_wrote(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    presets: dict[str, Path],
) -> None:
    out = tmp_path / "a.safetensors"
    run(monkeypatch, "convert", "tiny-base", out)
    printed = capsys.readouterr().out
    assert printed == f"{out}: ModelConfig, {out.stat().st_size / 1e6:,.1f} MB\n"
    loaded = load_model(out)
    expected = tiny.model(tiny.config()).network.state_dict()
    assert loaded.config == tiny.config()
    assert all(torch.equal(value, expected[name]) for name, value in loaded.network.state_dict().items())
    run(monkeypatch, "convert", presets["tiny-base"], out, "--model", "tiny-base", "--dtype", "float16")
    with safe_open(out, framework="pt") as file:
        values = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert values.keys() == expected.keys()
    assert all(torch.equal(value, expected[name].half()) for name, value in values.items())


def test_convert_says_what_it_assumed(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    torch.save(tiny.model(tiny.config()).network.state_dict(), tmp_path / "a.pt")
    run(monkeypatch, "convert", tmp_path / "a.pt", tmp_path / "a.safetensors")
    error = capsys.readouterr().err
    assert error.startswith("glide-fast: warning: ")
    assert "shapes do not tell everything; assumed image_size" in error


def test_mistakes_in_converting_are_explained(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    presets: dict[str, Path],
) -> None:
    base, out = presets["tiny-base"], tmp_path / "a.safetensors"
    assert "no model file none.pt" in fail(monkeypatch, capsys, "convert", "none.pt", out)
    assert "give it that suffix" in fail(monkeypatch, capsys, "convert", base, tmp_path / "a.pt")
    message = fail(monkeypatch, capsys, "convert", base, out, "--model", "tiny-upsample")
    assert "tiny-base.pt does not fit the model: " in message
    message = fail(monkeypatch, capsys, "convert", base, out, "--model", "tiny-bas")
    assert "unknown model 'tiny-bas'; `glide-fast models` lists the known ones, such as tiny-base" in message
    assert "unknown model 'tiny-bas'" in fail(monkeypatch, capsys, "convert", "tiny-bas", out)
    assert not out.exists()
