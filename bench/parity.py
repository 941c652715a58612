"""How exact is exact enough: errors against float64, in units of plain PyTorch's own error.

The tests of the ops use the same rule, so that what is timed is what is tested.
"""

from __future__ import annotations

import torch
from torch import Tensor

FACTOR = 4.0


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
