"""The Inception network that FID is defined by, from its published weights, and the features taken from it.

It is the ImageNet network of 2015 (Szegedy et al. 2016, arXiv 1512.00567), with the quirks of its graph: 1008
classes, pictures resized without half a pixel's shift, averages that leave the padding out, a maximum in the
last block. OpenAI's reference statistics and Inception Scores are of this network.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glide_fast.download import fetch
from glide_fast.models.presets import WeightFile
from glide_fast.models.state_files import read_state

WEIGHTS = WeightFile(
    url="https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
    "weights-inception-2015-12-05-6726825d.pth",
    sha256="6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
)
SIZE = 299
FEATURES, CLASSES = 2048, 1008

Kernel = tuple[int, int]
ONE, THREE, FIVE, WIDE, HIGH = (1, 1), (3, 3), (5, 5), (1, 7), (7, 1)


class Outputs(NamedTuple):
    """Pooled features [B, 2048], maps in the middle [B, 768, 17, 17], and probabilities [B, 1008]."""

    pooled: Tensor
    maps: Tensor
    probabilities: Tensor


class Convolution(nn.Module):
    """Convolution, batch norm of fixed statistics, ReLU."""

    def __init__(self, channels: int, out: int, kernel: Kernel, *, stride: int, padding: Kernel) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, out, kernel, stride=stride, padding=padding, bias=False)
        self.bn = nn.BatchNorm2d(out, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)


class Branch(NamedTuple):
    """Convolutions one after the other: their output channels and kernels.

    One alone is called ``name``, several ``name_1``, ``name_2`` … With ``forks`` the last is two side by
    side, 1 x 3 and 3 x 1, called a and b.
    """

    name: str
    layers: Sequence[tuple[int, Kernel]]
    forks: bool = False


class Mixed(nn.Module):
    """Branches side by side over one input, and a pool; their outputs are concatenated.

    With stride 2, for the last convolution of each branch and for the pool, nothing is padded there.
    """

    def __init__(
        self,
        channels: int,
        branches: Sequence[Branch],
        *,
        pooled: int = 0,
        stride: int = 1,
        pool: Literal["average", "maximum"] = "average",
    ) -> None:
        super().__init__()
        self.stride, self.pool, self.projects = stride, pool, pooled > 0
        self.paths: list[list[tuple[str, ...]]] = []
        for branch in branches:
            path, width = [], channels
            for index, (out, kernel) in enumerate(branch.layers, start=1):
                last = index == len(branch.layers)
                name = branch.name if len(branch.layers) == 1 else f"{branch.name}_{index}"
                kernels = {name: kernel}
                if last and branch.forks:
                    kernels = {name + "a": (1, 3), name + "b": (3, 1)}
                for each, its_kernel in kernels.items():
                    self.add_module(each, _convolution(width, out, its_kernel, stride if last else 1))
                path.append(tuple(kernels))
                width = out
            self.paths.append(path)
        if self.projects:
            self.branch_pool = _convolution(channels, pooled, ONE, 1)

    def forward(self, x: Tensor) -> Tensor:
        outputs = []
        for path in self.paths:
            h = x
            for names in path:
                h = torch.cat([self.get_submodule(name)(h) for name in names], dim=1)
            outputs.append(h)
        if self.stride == 2:
            pooled = F.max_pool2d(x, 3, stride=2)
        elif self.pool == "average":
            pooled = F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)
        else:
            pooled = F.max_pool2d(x, 3, stride=1, padding=1)
        outputs.append(self.branch_pool(pooled) if self.projects else pooled)
        return torch.cat(outputs, dim=1)


class Inception(nn.Module):
    """Pictures to features; the names of the weights are those of the published file."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = Convolution(3, 32, THREE, stride=2, padding=(0, 0))
        self.Conv2d_2a_3x3 = Convolution(32, 32, THREE, stride=1, padding=(0, 0))
        self.Conv2d_2b_3x3 = Convolution(32, 64, THREE, stride=1, padding=(1, 1))
        self.Conv2d_3b_1x1 = Convolution(64, 80, ONE, stride=1, padding=(0, 0))
        self.Conv2d_4a_3x3 = Convolution(80, 192, THREE, stride=1, padding=(0, 0))
        self.Mixed_5b = _squares(192, pooled=32)
        self.Mixed_5c = _squares(256, pooled=64)
        self.Mixed_5d = _squares(288, pooled=64)
        self.Mixed_6a = Mixed(
            288,
            [
                Branch("branch3x3", [(384, THREE)]),
                Branch("branch3x3dbl", [(64, ONE), (96, THREE), (96, THREE)]),
            ],
            stride=2,
        )
        self.Mixed_6b = _strips(128)
        self.Mixed_6c = _strips(160)
        self.Mixed_6d = _strips(160)
        self.Mixed_6e = _strips(192)
        self.Mixed_7a = Mixed(
            768,
            [
                Branch("branch3x3", [(192, ONE), (320, THREE)]),
                Branch("branch7x7x3", [(192, ONE), (192, WIDE), (192, HIGH), (192, THREE)]),
            ],
            stride=2,
        )
        self.Mixed_7b = _forks(1280, pool="average")
        self.Mixed_7c = _forks(2048, pool="maximum")
        self.fc = nn.Linear(FEATURES, CLASSES)

    def forward(self, pictures: Tensor) -> Outputs:
        """Pictures [B, 3, H, W] in 0 .. 255, of any size."""
        x = (_resized(pictures.float()) - 128) / 128
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, stride=2)))
        x = F.max_pool2d(x, 3, stride=2)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))
        maps = self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x))))
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(self.Mixed_6e(maps))))
        pooled = x.mean(dim=(2, 3))
        logits = pooled @ self.fc.weight.T  # the Inception Score leaves the bias out
        return Outputs(pooled, maps, logits.softmax(dim=1))


def load_inception(path: Path | None = None) -> Inception:
    """The network in eval mode, from ``path``, or from the published file, downloaded unless it is there.

    Raises:
        ConnectionError, OSError: the download fails.
        ValueError: the file is damaged, or holds another network.
    """
    if path is None:
        path = fetch(WEIGHTS.url, sha256=WEIGHTS.sha256)
    counters = "num_batches_tracked"  # of batch norms; older files have none
    state = {name: tensor for name, tensor in read_state(path).state.items() if not name.endswith(counters)}
    network = Inception()
    expected = {name: tensor for name, tensor in network.state_dict().items() if not name.endswith(counters)}
    for name in expected.keys() | state.keys():
        if name not in state or name not in expected or state[name].shape != expected[name].shape:
            raise ValueError(f"{path} does not hold the Inception network of FID: {name} differs")
    network.load_state_dict({name: tensor.float() for name, tensor in state.items()}, strict=False)
    return network.eval().requires_grad_(False)


def _convolution(channels: int, out: int, kernel: Kernel, stride: int) -> Convolution:
    padding = (0, 0) if stride == 2 else (kernel[0] // 2, kernel[1] // 2)
    return Convolution(channels, out, kernel, stride=stride, padding=padding)


def _squares(channels: int, *, pooled: int) -> Mixed:
    branches = [
        Branch("branch1x1", [(64, ONE)]),
        Branch("branch5x5", [(48, ONE), (64, FIVE)]),
        Branch("branch3x3dbl", [(64, ONE), (96, THREE), (96, THREE)]),
    ]
    return Mixed(channels, branches, pooled=pooled)


def _strips(width: int) -> Mixed:
    branches = [
        Branch("branch1x1", [(192, ONE)]),
        Branch("branch7x7", [(width, ONE), (width, WIDE), (192, HIGH)]),
        Branch("branch7x7dbl", [(width, ONE), (width, HIGH), (width, WIDE), (width, HIGH), (192, WIDE)]),
    ]
    return Mixed(768, branches, pooled=192)


def _forks(channels: int, *, pool: Literal["average", "maximum"]) -> Mixed:
    branches = [
        Branch("branch1x1", [(320, ONE)]),
        Branch("branch3x3", [(384, ONE), (384, THREE)], forks=True),
        Branch("branch3x3dbl", [(448, ONE), (384, THREE), (384, THREE)], forks=True),
    ]
    return Mixed(channels, branches, pooled=192, pool=pool)


def _resized(pictures: Tensor) -> Tensor:
    """Bilinear to 299 x 299 as the graph does it: pixel i looks at i * H / 299, and nothing is averaged."""
    rows, columns = (_weights(length).to(pictures.device) for length in pictures.shape[2:])
    return rows @ pictures @ columns.T


def _weights(length: int) -> Tensor:
    """The matrix [299, length] that resizes a line of pixels."""
    places = torch.arange(SIZE, dtype=torch.float32) * (length / SIZE)
    first = places.floor().long()
    second = (first + 1).clamp(max=length - 1)
    share = places - first
    weights = torch.zeros(SIZE, length)
    row = torch.arange(SIZE)
    weights.index_put_((row, first), 1 - share, accumulate=True)
    weights.index_put_((row, second), share, accumulate=True)
    return weights
