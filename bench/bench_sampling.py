"""Text to pictures with the embedded models: 20 steps of each stage, four pictures at once.

The gate: whole pictures from the same seeds, at 60 dB or more to the original computation's.
"""

from __future__ import annotations

import pytest
from torch import Tensor

from bench import pictures
from bench.conftest import Measure
from bench.networks import TEXT_PEERS
from bench.parity import ParityError, picture_excess, require
from bench.peers.runtimes import SDPA, Unavailable
from bench.place import Place
from bench.rows import Labels, Record
from glide_fast.sampling.pipeline import TextToImage

STEPS, BATCH = 20, 4
QUICK_STEPS, QUICK_BATCH = 2, 2


@pytest.fixture(scope="module")
def models(place: Place) -> TextToImage:
    """Our pipeline."""
    return pictures.ours(place)


@pytest.fixture(scope="module")
def size(request: pytest.FixtureRequest) -> tuple[int, int]:
    """Pictures and steps."""
    quick = request.config.getoption("--quick")
    return (QUICK_BATCH, QUICK_STEPS) if quick else (BATCH, STEPS)


@pytest.fixture(scope="module")
def expected(models: TextToImage, size: tuple[int, int]) -> Tensor:
    """The pictures of the original computation."""
    batch, steps = size
    return pictures.sampling(pictures.of_peer(models, "upstream", batch), batch, steps)()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test a peer; when quick, eager ones alone."""
    on_gpu = Place.of(metafunc.config.getoption("--device")).gpu
    peers = ("upstream", "upstream, text once", *SDPA, "compile, CUDA graphs") if on_gpu else TEXT_PEERS
    chosen = peers[:2] if metafunc.config.getoption("--quick") else peers
    metafunc.parametrize("peer", chosen)


def test_text_to_picture(
    peer: str, models: TextToImage, size: tuple[int, int], expected: Tensor, record: Record, measure: Measure
) -> None:
    """Both stages of the sampler."""
    batch, steps = size
    name = f"embedded text → 64 px, {steps} steps, batch {batch}, sampling"
    ours = pictures.sampling(models, batch, steps)
    try:
        error = require(name, "ours", picture_excess(ours(), expected))
    except ParityError as red:
        record.red.append(str(red))
        raise
    try:
        theirs = pictures.sampling(pictures.of_peer(models, peer, batch), batch, steps)
        peer_error = require(name, peer, picture_excess(theirs(), expected))
    except (Unavailable, ParityError) as reason:
        record.absent.append((name, peer, str(reason)))
        pytest.skip(str(reason))
    labels = Labels(suite="sampling", case=name, peer=peer, work=pictures.flops(models, batch, steps))
    measure(labels, ours, theirs, (error, peer_error))
