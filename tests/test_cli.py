"""The command line as a person uses it: files that come out, and one clear line for each mistake."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from glide_fast import cli
from glide_fast.data.images import load_image, save_png
from tests import tiny


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The options that choose two tiny random models."""
    base, upsampler = tiny.save(tmp_path_factory.mktemp("models"))
    return [f"--model={base}", f"--upsampler={upsampler}", "--steps=4", "--upsampler-steps=2"]


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["glide-fast", *map(str, arguments)])
    cli.main()


def fail(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The message of a command that must fail, without a traceback and with a status that is not 0."""
    with pytest.raises(SystemExit) as stopped:
        run(monkeypatch, *arguments)
    assert stopped.value.code not in (0, None)
    printed = capsys.readouterr()
    message = printed.out + printed.err
    return message + stopped.value.code if isinstance(stopped.value.code, str) else message


def test_sample_writes_pictures_a_grid_and_a_sidecar(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, models: list[str]
) -> None:
    run(monkeypatch, "sample", "red apple", "", "-n", 2, "--seed", 7, "--out", tmp_path / "out", *models)
    sidecar = json.loads((tmp_path / "out" / "sample.json").read_text())
    assert [(row["prompt"], row["seed"]) for row in sidecar["pictures"]] == [
        ("red apple", 7),
        ("red apple", 8),
        ("", 7),
        ("", 8),
    ]
    assert sidecar["pictures"][2]["file"] == "0002-unconditional-7.png"
    for row in sidecar["pictures"]:
        assert Image.open(tmp_path / "out" / row["file"]).size == (tiny.SIZE, tiny.SIZE)
    assert Image.open(tmp_path / "out" / "grid.png").size == (2 * tiny.SIZE + 6, 2 * tiny.SIZE + 6)
    assert set(sidecar["versions"]) == {"glide_fast", "torch", "python", "machine"}
    assert all(len(digest) == 64 for digest in sidecar["model_sha256"].values())


def test_the_sidecars_command_paints_the_same_pictures_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, models: list[str]
) -> None:
    run(monkeypatch, "sample", "rocket's fire", "-n", 3, "--out", tmp_path / "a", *models)
    first = {path.name: path.read_bytes() for path in (tmp_path / "a").glob("*.png")}
    command = json.loads((tmp_path / "a" / "sample.json").read_text())["command"]
    again = shlex.split(command)[1:]
    for path in first:
        (tmp_path / "a" / path).unlink()
    run(monkeypatch, *again)
    assert {path.name: path.read_bytes() for path in (tmp_path / "a").glob("*.png")} == first


def test_picture_k_does_not_depend_on_number_or_batch(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, models: list[str]
) -> None:
    run(monkeypatch, "sample", "key", "-n", 5, "--batch", 2, "--out", tmp_path / "five", *models)
    run(monkeypatch, "sample", "key", "--seed", 4, "--out", tmp_path / "one", *models)
    fifth = load_image(tmp_path / "five" / "0004-key-4.png").astype(int)
    assert np.abs(fifth - load_image(tmp_path / "one" / "0000-key-4.png")).max() <= 1


def test_models_paint_in_the_dtype_that_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, models: list[str]
) -> None:
    pictures = []
    for dtype in ("float32", "bfloat16"):
        run(monkeypatch, "sample", "key", "--dtype", dtype, "--out", tmp_path / dtype, *models)
        pictures.append(load_image(tmp_path / dtype / "0000-key-0.png").astype(int))
    assert 0 < np.abs(pictures[0] - pictures[1]).mean() < 8


def test_a_gpu_that_is_not_there_is_not_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, models: list[str]
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    message = fail(monkeypatch, capsys, "sample", "key", "--device", "cuda", "--out", tmp_path, *models)
    assert "this torch can use no GPU, so --device cuda is not possible; leave it out" in message


def test_the_base_models_size_leaves_the_upsampler_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, models: list[str]
) -> None:
    run(monkeypatch, "sample", "key", "--size", tiny.BASE_SIZE, "--out", tmp_path, *models)
    assert load_image(tmp_path / "0000-key-0.png").shape == (tiny.BASE_SIZE, tiny.BASE_SIZE, 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], 'no prompt; give at least one, or "" to paint without'),
        (["key", "-n", "0"], "number 0 must lie in 1 .. 10000"),
        (["key", "--seed", "-1"], "seed -1 must lie in 0 .. 2^63"),
        (["key", "--batch", "0"], "batch 0 must be at least 1"),
        (["key", "--size", "48"], "size 48 is not one this model paints; choose 8 or 16"),
        (["key", "--guidance", "101"], "guidance scale 101.0 must lie in 0 .. 100"),
        (["key", "--steps", "1"], "steps 1 must lie in 2 .. 1000"),
        (["key", "--upsampler-steps", "2000"], "steps 2000 must lie in 2 .. 1000"),
        (["key", "--sampler", "euler_a"], "unknown sampler 'euler_a'; known: ddpm, ddim, plms"),
        (["key", "--gudance", "3"], "--gudance"),
        (["key", "-n", "many"], "many"),
    ],
)
def test_a_mistake_in_sampling_is_explained(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    models: list[str],
    options: list[str],
    message: str,
) -> None:
    out = tmp_path / "out"
    assert message in fail(monkeypatch, capsys, "sample", *models, *options, "--out", out)
    assert not out.exists()


def test_an_unknown_model_lists_the_known_ones(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    message = fail(monkeypatch, capsys, "sample", "key", "--model", "dalle")
    assert "model 'dalle' is neither a known model (emoji, glide-base, glide-base-inpaint, " in message


def test_a_model_that_does_not_fit_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "broken.safetensors").write_bytes(b"no model")
    message = fail(monkeypatch, capsys, "sample", "key", "--model", tmp_path / "broken.safetensors")
    assert "broken.safetensors is not a readable safetensors file" in message


def test_an_over_long_prompt_is_a_warning_of_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, models: list[str]
) -> None:
    run(monkeypatch, "sample", " ".join(["red apple"] * 8), "--out", tmp_path, *models)
    warning = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert len(warning) == 1
    assert "prompt of 16 tokens was cut to the model's 8; kept: 'red apple" in warning[0]


def test_train_evaluate_and_sample_follow_on_each_other(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    pictures = tmp_path / "pictures"
    for name, level in (("black", 0), ("white", 255)):
        save_png(pictures / f"{name}.png", np.full((8, 8, 3), level, dtype=np.uint8))
        (pictures / f"{name}.txt").write_text(name)
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(RECIPE.format(folder=pictures.as_posix()))
    run(monkeypatch, "data", "check", pictures, "--size", 8)
    assert "ready for training" in capsys.readouterr().out
    run(monkeypatch, "train", recipe, "--out", tmp_path / "run")
    run(monkeypatch, "train", recipe, "--out", tmp_path / "run")
    assert "going on with the run" in capsys.readouterr().out
    model = tmp_path / "run" / "model.safetensors"
    run(monkeypatch, "sample", "white", "--model", model, "--steps", 2, "--out", tmp_path / "out")
    assert load_image(tmp_path / "out" / "grid.png").shape == (12, 12, 3)


RECIPE = """
task = "base"
steps = 2
batch = 2
[data]
source = "{folder}"
[model]
schedule = "cosine"
[model.unet]
image_size = 8
channels = 32
channel_mult = [1]
res_blocks = 1
attention_strides = []
head_channels = 32
[model.unet.text]
tokenizer = "embedded"
vocabulary = 3938
context = 4
width = 16
layers = 1
heads = 1
"""


def test_a_wrong_recipe_is_refused_by_field(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(RECIPE.replace("batch = 2", 'batch = "two"\nbathc = 3').format(folder="emoji"))
    message = fail(monkeypatch, capsys, "train", recipe, "--out", tmp_path / "run")
    assert "bathc: no such field" in message
    assert "batch: " in message
    assert "'two'" in message
    assert "no config file" in fail(monkeypatch, capsys, "train", tmp_path / "none.toml", "--out", tmp_path)


def test_data_check_names_a_broken_picture_and_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "cat.png").write_bytes(b"no picture")
    (tmp_path / "cat.txt").write_text("a cat")
    assert "cat.png" in fail(monkeypatch, capsys, "data", "check", tmp_path)
    assert "is not a folder" in fail(monkeypatch, capsys, "data", "check", tmp_path / "none")
    message = fail(monkeypatch, capsys, "data", "check", tmp_path, "--tokenizer", "clip")
    assert "tokenizer 'clip' is unknown; choose one of glide, embedded" in message


def test_doctor_says_who_serves_each_op_and_why(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(monkeypatch, "doctor")
    printed = capsys.readouterr().out
    for word in (
        "group_norm_backward",
        "attention",
        "CPU",
        "CUDA",
        "torch threads",
        "emoji_base.safetensors",
    ):
        assert word in printed


def test_the_installed_command_answers() -> None:
    command = Path(sys.executable).parent / "glide-fast"
    done = subprocess.run(
        [command, "sample", "--model", "none", "x"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr.startswith("glide-fast: model 'none' is neither")
    assert "Traceback" not in done.stderr
