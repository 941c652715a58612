"""Files of tensors from elsewhere: PyTorch's, trainers' checkpoints, TorchScript; and what is refused."""

from __future__ import annotations

import os
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from glide_fast.models.state_files import read_state, unwrap
from glide_fast.models.torchscript import is_torchscript, read_torchscript

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
STATE = {"a.weight": torch.arange(6.0).view(2, 3), "a.bias": torch.ones(2, dtype=torch.float16)}


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 4).half()
        self.norm = nn.BatchNorm2d(4)
        self.layers = nn.ModuleList([nn.Linear(2, 2)])
        self.sizes = [1, 2]
        self.nothing = None
        self.mask = torch.ones(2, 2)
        self.register_buffer("input_resolution", torch.tensor(224))

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)  # type: ignore[no-any-return]


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.visual = Inner()
        self.logit_scale = nn.Parameter(torch.tensor(2.0))
        self.turned = nn.Parameter(torch.randn(5, 7).t())
        self.part = nn.Parameter(torch.randn(10)[3:5])
        self.empty = nn.Parameter(torch.empty(0, 3))
        self.names = {"k": 1}

    def forward(self, x: Tensor) -> Tensor:
        return self.visual(x)  # type: ignore[no-any-return]


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return list(first) == list(second) and all(
        first[name].dtype == second[name].dtype and torch.equal(first[name], second[name]) for name in first
    )


def archive(path: Path) -> Outer:
    torch.manual_seed(0)
    module = Outer()
    torch.jit.save(torch.jit.script(module), str(path))  # type: ignore[no-untyped-call]
    return module


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".ckpt", ".bin", ".PT"])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_state_dict_of_pytorch_is_read(tmp_path: Path, suffix: str, zipped: bool) -> None:
    path = tmp_path / f"a{suffix}"
    torch.save(OrderedDict(STATE), path, _use_new_zipfile_serialization=zipped)
    state, metadata = read_state(path)
    assert same(state, STATE)
    assert metadata == {}


@pytest.mark.parametrize(
    "wrapped",
    [
        {"state_dict": STATE, "epoch": 3},
        {"model": STATE, "optimizer": {"lr": 1}},
        {"model": {"state_dict": STATE}, "step": 1},
        {f"module.{name}": tensor for name, tensor in STATE.items()},
        {"model_state_dict": {f"module.{name}": tensor for name, tensor in STATE.items()}},
    ],
)
def test_what_trainers_wrap_is_unwrapped(tmp_path: Path, wrapped: Any) -> None:
    torch.save(wrapped, tmp_path / "a.pt")
    assert same(read_state(tmp_path / "a.pt").state, STATE)


@pytest.mark.parametrize(
    ("values", "what"),
    [
        ({"epoch": 3, "weights": STATE}, "entries epoch, weights"),
        ({}, "dict"),
        ([torch.ones(1)], "list"),
        (torch.ones(1), "Tensor"),
        ({"model": 3}, "entries model"),
        ({**STATE, "epoch": 3}, r"entries a\.weight, a\.bias, epoch"),
    ],
)
def test_what_holds_no_state_dict_is_refused(values: Any, what: str) -> None:
    with pytest.raises(
        ValueError, match=rf"a\.pt holds no state dict but {what}; save model\.state_dict\(\)"
    ):
        unwrap(values, "a.pt")


def test_names_that_begin_alike_by_chance_are_kept() -> None:
    state = {"module.weight": torch.ones(1), "bias": torch.ones(1)}
    assert list(unwrap(state, "a.pt")) == ["module.weight", "bias"]


class Dangerous:
    """Would create a file when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_file_is_not_run(tmp_path: Path, zipped: bool) -> None:
    path = tmp_path / "a.pt"
    torch.save({**STATE, "x": Dangerous(tmp_path / "made")}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(
        ValueError, match=r"a\.pt is damaged or holds more than tensors, which could run code"
    ):
        read_state(path)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 a zip", bytes(range(256)) * 9, b"\x80\x02}q\x00."])
def test_what_is_no_file_of_pytorch_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.pt").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.pt (is|holds)"):
        read_state(tmp_path / "a.pt")


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    torch.save(STATE, path)
    path.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(ValueError, match=r"a\.pt is "):
        read_state(path)


def test_a_torchscript_archive_gives_its_state_dict(tmp_path: Path) -> None:
    module = archive(tmp_path / "a.pt")
    assert is_torchscript(tmp_path / "a.pt")
    assert same(read_torchscript(tmp_path / "a.pt"), module.state_dict())
    assert same(read_state(tmp_path / "a.pt").state, module.state_dict())


def test_tensors_that_are_no_weights_are_told_apart_by_the_code_alone(tmp_path: Path) -> None:
    module = archive(tmp_path / "a.pt")
    assert "visual.mask" not in read_torchscript(tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "a.pt") as file:
        sources = [name for name in file.namelist() if name.endswith(".py")]
    for name in sources:
        replace_entry(tmp_path / "a.pt", name, None)
    everything = read_torchscript(tmp_path / "a.pt")
    assert everything.keys() == {*module.state_dict(), "visual.mask"}


def test_a_plain_file_is_no_torchscript_archive(tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "a.pt")
    torch.save(STATE, tmp_path / "b.pt", _use_new_zipfile_serialization=False)
    assert not is_torchscript(tmp_path / "a.pt")
    assert not is_torchscript(tmp_path / "b.pt")


def replace_entry(path: Path, name: str, content: bytes | None) -> None:
    """Rewrite one record of a zip; None leaves it out."""
    with zipfile.ZipFile(path) as archive:
        records = {entry: archive.read(entry) for entry in archive.namelist()}
    entry = next(entry for entry in records if entry.endswith(name))
    del records[entry]
    with zipfile.ZipFile(path, "w") as archive:
        for other, record in records.items():
            archive.writestr(other, record)
        if content is not None:
            archive.writestr(entry, content)


def test_code_in_a_torchscript_archive_is_not_run(tmp_path: Path) -> None:
    archive(tmp_path / "a.pt")
    replace_entry(tmp_path / "a.pt", "/data.pkl", pickle.dumps(Dangerous(tmp_path / "made")))
    with pytest.raises(ValueError, match=r"is not a readable TorchScript archive: \w+ it names posix\.mkdir"):
        read_torchscript(tmp_path / "a.pt")
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("/data.pkl", None),
        ("/data.pkl", b""),
        ("/data.pkl", b"\x80\x02]q\x00(K\x01"),
        ("/data/0", None),
        ("/data/1", b"\x00\x00"),
    ],
)
def test_a_damaged_torchscript_archive_is_refused(tmp_path: Path, name: str, content: bytes | None) -> None:
    archive(tmp_path / "a.pt")
    replace_entry(tmp_path / "a.pt", name, content)
    with pytest.raises(ValueError, match=r"a\.pt is not a readable TorchScript archive"):
        read_torchscript(tmp_path / "a.pt")
