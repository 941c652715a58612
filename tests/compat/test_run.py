"""``glide-fast run``: unmodified programs of the original projects, their pictures, errors, exit status."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from glide_fast import cli
from glide_fast.compat import aliases
from glide_fast.compat.clip.clip import Preprocess, tokenize
from glide_fast.compat.clip.model import CLIP
from glide_fast.compat.glide_text2im.clip.model_creation import create_clip_model
from glide_fast.compat.glide_text2im.download import MODEL_PATHS, load_checkpoint
from glide_fast.compat.glide_text2im.model_creation import create_model_and_diffusion
from tests.compat import programs
from tests.golden import data, entry, fill


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["glide-fast", "run", *map(str, arguments)])
    cli.main()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """The fixtures were computed with one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder whose files a server on this machine publishes as the models' checkpoints."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            pass

    folder = tmp_path / "server"
    folder.mkdir()
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("GLIDE_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "*")
    for name, address in MODEL_PATHS.items():
        file = address.rpartition("/")[2]
        monkeypatch.setitem(MODEL_PATHS, name, f"http://127.0.0.1:{server.server_port}/{file}")
    yield folder
    server.shutdown()
    server.server_close()


def publish(name: str, folder: Path, files: dict[str, str], beside: Path) -> None:
    """The fixture's models as checkpoints, and its options beside the notebook."""
    given = entry(name)
    for stage, file in files.items():
        model, _ = create_model_and_diffusion(**given[f"{stage}_options"])
        torch.save(fill(model, given[f"{stage}_seed"]).state_dict(), folder / file)
    options = {stage: given[f"{stage}_options"] for stage in files}
    (beside / "options.json").write_text(json.dumps(options), encoding="utf-8")


def assert_painted(path: Path, name: str) -> None:
    """The picture is the one that the original painted, within a level."""
    levels = np.asarray(Image.open(path)).astype(int) - data(name)["uint8"][0].transpose(1, 2, 0)
    assert np.abs(levels).max() <= 1
    assert np.abs(levels).mean() < 0.01


@pytest.mark.usefixtures("one_thread")
def test_the_text2im_notebook_paints_the_originals_picture(
    tmp_path: Path, published: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    publish("picture_text2im", published, {"base": "base.pt", "up": "upsample.pt"}, tmp_path)
    notebook = programs.write_notebook(tmp_path / "text2im.ipynb", programs.TEXT2IM)
    run(monkeypatch, "--out", tmp_path / "pictures", notebook)
    printed = capsys.readouterr()
    assert "skipped !pip install" in printed.err
    assert "skipped %matplotlib inline" in printed.err
    assert "total base parameters" in printed.out
    assert printed.out.splitlines()[-2:] == [str(tmp_path / "pictures" / "text2im-2.png"), "1"]
    assert Image.open(tmp_path / "pictures" / "text2im-1.png").size == (16, 16)
    assert_painted(tmp_path / "pictures" / "text2im-2.png", "picture_text2im")
    assert "IPython" not in sys.modules
    assert not any(name.split(".")[0] in aliases.PROJECTS for name in sys.modules)


@pytest.mark.usefixtures("one_thread")
def test_the_inpainting_notebook_paints_the_originals_picture(
    tmp_path: Path, published: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "picture_inpaint"
    publish(name, published, {"base": "base_inpaint.pt", "up": "upsample_inpaint.pt"}, tmp_path)
    np.savez(
        tmp_path / "known.npz",
        **{key[3:]: value for key, value in data(name).items() if key.startswith(("in.image", "in.mask"))},
    )
    monkeypatch.chdir(tmp_path)
    run(monkeypatch, programs.write_notebook(tmp_path / "inpaint.ipynb", programs.INPAINT))
    assert_painted(tmp_path / "inpaint-2.png", name)


@pytest.mark.usefixtures("one_thread")
def test_the_clip_guided_notebook_paints_the_originals_picture(
    tmp_path: Path, published: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "picture_clip_guided"
    publish(name, published, {"base": "base.pt"}, tmp_path)
    path = tmp_path / "clip.yaml"
    path.write_text(yaml.safe_dump(entry(name)["clip_config"]), encoding="utf-8")
    clip = create_clip_model(str(path), device="cpu")
    for tower, file in (("image_encoder", "clip_image_enc.pt"), ("text_encoder", "clip_text_enc.pt")):
        model = fill(getattr(clip, tower), entry(name)["clip_seeds"][tower])
        torch.save(model.state_dict(), published / file)
    monkeypatch.chdir(tmp_path)
    run(monkeypatch, programs.write_notebook(tmp_path / "clip_guided.ipynb", programs.CLIP_GUIDED))
    assert_painted(tmp_path / "clip_guided-1.png", name)


def test_a_readme_of_clip(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = CLIP(**entry("clip_vit")["kwargs"])
    fill(model, 1)
    torch.save(model.state_dict(), tmp_path / "tiny.pt")
    picture = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    Image.fromarray(picture).save(tmp_path / "CLIP.png")
    (tmp_path / "readme.py").write_text(programs.CLIP_README, encoding="utf-8")
    run(monkeypatch, tmp_path / "readme.py", tmp_path / "tiny.pt", tmp_path / "CLIP.png")
    label, _, numbers = capsys.readouterr().out.partition(":")
    assert label == "Label probs"
    half = {key: value.half().float() for key, value in model.state_dict().items()}
    model.load_state_dict(half)  # nearly all of what the published files keep
    with torch.no_grad():
        image = Preprocess(32)(Image.fromarray(picture))[None]
        expected = model(image, tokenize(["a diagram", "a dog", "a cat"]))[0].softmax(-1)[0]
    actual = [float(number) for number in numbers.strip(" []\n").split()]
    np.testing.assert_allclose(actual, expected, rtol=0.02, atol=1e-3)


def test_names_arguments_and_folder_of_a_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "scripts" / "observe.py"
    script.parent.mkdir()
    script.write_text(programs.OBSERVER, encoding="utf-8")
    (script.parent / "helper_beside.py").write_text("VALUE = 3", encoding="utf-8")
    before = list(sys.path), list(sys.meta_path)
    run(monkeypatch, script, "--help", "--out", "x", "--", "-n", 3)
    seen = json.loads((script.parent / "seen.json").read_text(encoding="utf-8"))
    assert seen == {
        "argv": ["--help", "--out", "x", "--", "-n", "3"],
        "same": True,
        "nested": "glide_fast.compat.glide_text2im.clip.encoders",
        "spec": "glide_fast.compat.guided_diffusion.unet",
        "clip": "glide_fast.compat.clip.model",
        "steps": [0, 9],
        "beside": 3,
        "folder": str(Path.cwd()),
    }
    assert (sys.path, sys.meta_path) == before
    assert "blobfile" not in sys.modules


def test_a_scripts_errors_and_exit_status_are_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "script.py"
    script.write_text("import sys\nsys.exit(7)", encoding="utf-8")
    with pytest.raises(SystemExit) as stopped:
        run(monkeypatch, script)
    assert stopped.value.code == 7
    script.write_text("raise ValueError('of the script')", encoding="utf-8")
    with pytest.raises(ValueError, match="of the script"):
        run(monkeypatch, script)
    script.write_text("import guided_diffusion.no_such_module", encoding="utf-8")
    with pytest.raises(ModuleNotFoundError, match=r"guided_diffusion\.no_such_module"):
        run(monkeypatch, script)
    process = subprocess.run(
        [sys.executable, "-m", "glide_fast.compat", str(script), "--flag"], capture_output=True, text=True
    )
    assert process.returncode == 1
    assert f'File "{script}", line 1' in process.stderr


def test_a_script_that_is_not_there(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments in (["missing.py"], []):
        with pytest.raises(SystemExit) as stopped:
            run(monkeypatch, *arguments)
        assert stopped.value.code == 2
    assert "no script missing.py" in capsys.readouterr().err


def test_cells_that_fail_or_are_no_python(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cells = [
        "%%bash\nexit 1",
        "if True:\n    !ls\nform = '''\n%d\n'''",
        "def f(x: int): ...\ndisplay(form % 3, f.__annotations__['x'] is int)\n__name__",
        "import IPython\nfrom IPython.display import clear_output\nclear_output(wait=True)\n"
        "IPython.get_ipython()",
        "1 / 0  # here",
    ]
    folder = Path.cwd()
    notebook = programs.write_notebook(tmp_path / "cells.ipynb", cells)
    with pytest.raises(ZeroDivisionError) as failed:
        run(monkeypatch, notebook)
    assert str(failed.traceback[-1].path).endswith("cells.ipynb, code cell 5")
    assert str(failed.traceback[-1].statement) == "1 / 0  # here"
    assert Path.cwd() == folder
    printed = capsys.readouterr()
    assert printed.out.split() == ["3", "True", "__main__"]
    assert "code cell 2: skipped !ls" in printed.err
    assert "code cell 1: skipped, as it begins with %%bash" in printed.err
    broken = programs.write_notebook(tmp_path / "broken.ipynb", ["x = (1,\n"])
    with pytest.raises(SyntaxError):
        run(monkeypatch, broken)
    (tmp_path / "other.ipynb").write_text("[]", encoding="utf-8")
    with pytest.raises(SystemExit):
        run(monkeypatch, tmp_path / "other.ipynb")
    assert "other.ipynb is not a Jupyter notebook" in capsys.readouterr().err


def test_names_that_are_taken_are_not_taken_over(monkeypatch: pytest.MonkeyPatch) -> None:
    with aliases.projects():
        import clip  # type: ignore[import-not-found]

        assert clip.tokenize is tokenize
    monkeypatch.setitem(sys.modules, "clip", json)
    with pytest.raises(RuntimeError, match=r"clip is imported already"):
        aliases.install()


def test_local_files_under_the_name_of_another_package(tmp_path: Path) -> None:
    from glide_fast.compat import blobfile

    folder = blobfile.join(str(tmp_path), "a", "b")
    blobfile.makedirs(folder)
    blobfile.makedirs(folder)
    with blobfile.BlobFile(blobfile.join(folder, "x.txt"), "wb", streaming=False) as file:
        file.write(b"one")
    blobfile.copy(blobfile.join(folder, "x.txt"), blobfile.join(folder, "y.txt"))
    with pytest.raises(FileExistsError, match=r"overwrite=True"):
        blobfile.copy(blobfile.join(folder, "x.txt"), blobfile.join(folder, "y.txt"))
    assert list(blobfile.listdir(folder)) == ["x.txt", "y.txt"]
    assert sorted(blobfile.glob(folder + "/*.txt")) == [folder + "/x.txt", folder + "/y.txt"]
    blobfile.remove(blobfile.join(folder, "x.txt"))
    assert not blobfile.exists(blobfile.join(folder, "x.txt"))
    assert blobfile.isdir(folder)
    with pytest.raises(ValueError, match=r"gs://bucket/x is not a local path; install the package blobfile"):
        blobfile.BlobFile("gs://bucket/x")


def test_published_names(published: Path, tmp_path: Path) -> None:
    torch.save({"weight": torch.ones(2)}, published / "base.pt")
    assert load_checkpoint("base", torch.device("cpu"), False)["weight"].tolist() == [1, 1]
    kept = tmp_path / "mine"
    assert load_checkpoint("base", "cpu", progress=False, cache_dir=str(kept), chunk_size=1)
    assert (kept / "base.pt").is_file()
    with pytest.raises(ValueError, match=r"Unknown checkpoint name huge.*base, upsample"):
        load_checkpoint("huge", "cpu")
