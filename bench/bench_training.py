"""A training step of a small ADM: its time against eager and compiled PyTorch, and what it keeps in memory.

The gate: the loss and the gradient of every parameter.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench import learning
from bench.conftest import Measure
from bench.learning import Example, Learner
from bench.networks import INFERENCE_PEERS
from bench.parity import NETWORK_FACTOR, PEER_FACTOR, ParityError, require, worst_excess
from bench.peers.runtimes import Unavailable, forget
from bench.place import Place
from bench.rows import MEBI, Labels, MemoryRow, Record
from bench.subject import Outputs
from glide_fast.models import UNet

BATCH, QUICK_BATCH = 8, 2
TRAINING_PEERS = ("upstream", "compile")  # on a GPU, where others do not train


@dataclass(frozen=True, kw_only=True)
class Lesson:
    """The network to start from, what it learns from, and the true gradients."""

    name: str
    start: UNet
    example: Example
    plain: Outputs
    exact: Outputs
    flops: float

    def gate(self, who: str, learner: Learner, factor: float = NETWORK_FACTOR) -> float:
        """The worst gradient's error as a part of what is allowed."""
        found = learner.gradients(self.example)
        return require(self.name, who, worst_excess(found, self.plain, self.exact, factor=factor))


@pytest.fixture(scope="module")
def lesson(request: pytest.FixtureRequest, place: Place) -> Lesson:
    """A small ADM with all that its peers share."""
    quick = request.config.getoption("--quick")
    config = learning.small_adm(quick=quick)
    batch = QUICK_BATCH if quick else BATCH
    start, example = learning.network(config), Example.of(config, batch).at(place)
    with FlopCounterMode(display=False) as counter:
        learning.plain_learner(start, recompute_attention=False, place=place).gradients(example)
    return Lesson(
        name=f"training step, ADM {config.image_size} px, {config.channels} channels, batch {batch}",
        start=start,
        example=example,
        plain=learning.plain_learner(start, place=place).gradients(example),
        exact=learning.plain_learner(start, dtype=torch.float64, place=place).gradients(example.double()),
        flops=float(counter.get_total_flops()),
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test a peer; when quick, the original alone."""
    if "peer" in metafunc.fixturenames:
        quick = metafunc.config.getoption("--quick")
        on_gpu = Place.of(metafunc.config.getoption("--device")).gpu
        peers = TRAINING_PEERS if on_gpu else INFERENCE_PEERS
        metafunc.parametrize("peer", peers[:1] if quick else peers)


def test_step(peer: str, lesson: Lesson, record: Record, measure: Measure, place: Place) -> None:
    """Forward, backward, AdamW."""
    ours = learning.our_learner(lesson.start, place)
    try:
        error = lesson.gate("ours", ours)
    except ParityError as red:
        record.red.append(str(red))
        raise
    try:
        theirs = learning.learner(peer, lesson.start, place)
        peer_error = lesson.gate(peer, theirs, PEER_FACTOR)
    except (Unavailable, ParityError) as reason:
        record.absent.append((lesson.name, peer, str(reason)))
        pytest.skip(str(reason))
    labels = Labels(suite="training", case=lesson.name, peer=peer, work=lesson.flops)
    measure(
        labels,
        lambda: ours.step(lesson.example),
        lambda: theirs.step(lesson.example),
        (error, peer_error),
    )
    forget()


def test_saved_activations(lesson: Lesson, record: Record, place: Place) -> None:
    """What the forward pass keeps for the backward pass."""
    ours, theirs = (
        learning.saved_bytes(learner, lesson.example) / MEBI
        for learner in (
            learning.our_learner(lesson.start, place),
            learning.plain_learner(lesson.start, place=place),
        )
    )
    case = f"activations saved by the {lesson.name}"
    record.memory.append(MemoryRow(case=case, peer="upstream", ours=ours, theirs=theirs, unit="MiB"))
