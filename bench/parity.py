"""How exact is exact enough: errors against float64, in units of plain PyTorch's own error.

The tests of the ops use the same rule, so that what is timed is what is tested.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

FACTOR = 4.0  # for an op or a layer
NETWORK_FACTOR = 10.0  # for a whole network; the recorded parity numbers allow the same
PEER_FACTOR = 100.0  # for a peer, only to see that it computes in float32: bfloat16 has ten thousand
PICTURE_DECIBELS = 60.0  # for whole pictures from the same seed


class ParityError(Exception):
    """An implementation is further from the truth than the gate allows: there is nothing to time."""


def excess(actual: Tensor, plain: Tensor, exact: Tensor, *, factor: float = FACTOR) -> float:
    """Largest error of `actual`, divided by the error that is allowed: up to 1 is good, NaN becomes infinity.

    Allowed is `factor` times the largest error of `plain`, plus one rounding of float32 at the largest value,
    for where plain PyTorch happens to be exact.
    """
    if exact.numel() == 0:
        return 0.0
    allowed = factor * (plain.double() - exact).abs().max()
    allowed += torch.finfo(torch.float32).eps * exact.abs().max()
    error = (actual.double() - exact).abs().max()
    ratio = 0.0 if error == 0 else float(error / allowed)
    return ratio if ratio == ratio else float("inf")


def worst_excess(
    actual: Iterable[Tensor], plain: Iterable[Tensor], exact: Iterable[Tensor], *, factor: float
) -> float:
    """The largest `excess` of several outputs."""
    triples = zip(actual, plain, exact, strict=True)
    return max(excess(*triple, factor=factor) for triple in triples)


def picture_excess(actual: Tensor, expected: Tensor, decibels: float = PICTURE_DECIBELS) -> float:
    """The root mean square difference of pictures in [-1, 1], divided by that at the PSNR allowed."""
    difference = (actual.double() - expected.double()).square().mean().sqrt().item()
    allowed = 2 * 10 ** (-decibels / 20)
    return difference / allowed if math.isfinite(difference) else math.inf


def require(case: str, who: str, part: float) -> float:
    """The part of the allowed error that is used up, if that is not more than all of it.

    Raises:
        ParityError: the part is above 1.
    """
    if part > 1:
        raise ParityError(f"{case}: the error of {who} is {part:.3g} times what is allowed; nothing is timed")
    return part
