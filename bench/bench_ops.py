"""Single ops and single blocks at the shapes of GLIDE's base model, against eager PyTorch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from bench import blocks, ops
from bench.conftest import Compare, Contest, Measure
from bench.parity import ParityError
from bench.place import Place
from bench.rows import Labels, Record
from bench.suite import Case, Function, gate
from bench.timing import Call

cases = blocks.cases
QUICK_CASES = 4


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test for each case of the ops; the blocks are parametrised as networks are."""
    if "op" in metafunc.fixturenames:
        chosen = list(ops.cases())
        if metafunc.config.getoption("--quick"):
            chosen = chosen[-QUICK_CASES:]
        metafunc.parametrize("op", chosen, ids=[case.name for case in chosen])


def test_op(op: Case, place: Place, record: Record, suite: str, measure: Measure) -> None:
    """Forward, or forward and backward."""
    try:
        error = gate(op, place)
    except ParityError as red:
        record.red.append(str(red))
        raise
    labels = Labels(
        suite=suite, case=op.name, peer="upstream", work=op.work, unit=op.unit, intensity=op.intensity
    )
    ours = _call(op, op.ours, place, op.layout)
    measure(labels, ours, _call(op, op.peer, place, torch.clone), (error, 0.0))


def test_block(contest: Contest, peer: str, compare: Compare) -> None:
    """A block of a network, inference."""
    compare(contest, peer)


def _call(op: Case, function: Function, place: Place, layout: Callable[[torch.Tensor], torch.Tensor]) -> Call:
    inputs = op.leaves(place, place.dtype, layout)
    return lambda: op.call(function, inputs)
