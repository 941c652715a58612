"""AdamW over all parameters at once, with the average of the weights and a copy of them in the same pass.

    m      = beta1 m + (1 - beta1) g                  v = beta2 v + (1 - beta2) g^2
    weight = weight - rate decay weight - rate / (1 - beta1^n) m / (sqrt(v / (1 - beta2^n)) + eps)
    average = average + share (weight - average)

Loshchilov & Hutter, "Decoupled Weight Decay Regularization" (2019), https://arxiv.org/abs/1711.05101; the
average as in Nichol & Dhariwal, "Improved Denoising Diffusion Probabilistic Models" (2021), section 2.5.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from glide_fast.ops import reference_elements as reference
from glide_fast.ops.dispatch import define, implement


class StepNumbers(NamedTuple):
    """What one tensor's step is made with; n is the number of its steps, this one included."""

    first_share: float  # 1 - beta1
    beta2: float
    second_share: float  # 1 - beta2
    eps: float
    decay: float  # rate times weight decay
    step_size: float  # rate / (1 - beta1^n)
    root: float  # sqrt(1 - beta2^n)
    share: float  # of the new weights in the average

    @classmethod
    def of(
        cls,
        step: float,
        *,
        rate: float,
        betas: tuple[float, float],
        eps: float,
        decay: float,
        share: float = 0.0,
    ) -> StepNumbers:
        """The numbers of step n from 1, for a learning rate and a weight decay."""
        beta1, beta2 = betas
        return cls(
            first_share=1 - beta1,
            beta2=beta2,
            second_share=1 - beta2,
            eps=eps,
            decay=rate * decay,
            step_size=rate / (1 - beta1**step),
            root=(1 - beta2**step) ** 0.5,
            share=share,
        )


def _fake(
    parameters: list[Tensor],
    gradients: list[Tensor],
    first: list[Tensor],
    second: list[Tensor],
    average: list[Tensor],
    copies: list[Tensor],
    numbers: Tensor,
    factor: Tensor | None,
) -> None:
    """Nothing is made."""


STEP = define(
    "adamw",
    "(Tensor(a!)[] parameters, Tensor[] gradients, Tensor(b!)[] first, Tensor(c!)[] second,"
    " Tensor(d!)[] average, Tensor(e!)[] copies, Tensor numbers, Tensor? factor) -> ()",
    reference.adamw,
    _fake,
)
implement("adamw", "CPU", reference.adamw, name="ATen foreach", reason="all tensors in ten operators")


@torch.no_grad()
def adamw(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    first: Sequence[Tensor],
    second: Sequence[Tensor],
    numbers: Sequence[StepNumbers],
    *,
    average: Sequence[Tensor] = (),
    copies: Sequence[Tensor] = (),
    factor: Tensor | None = None,
) -> None:
    """One step of AdamW on N tensors, in place.

    Args:
        parameters: the weights, any shapes.
        gradients: theirs, of any dtype; untouched.
        first, second: the moments m and v.
        numbers: of each tensor.
        average: the averages of the weights; or none.
        copies: get the new weights in their own dtype; or none.
        factor: one number on the weights' device that every gradient is multiplied by: what clips their norm,
            or undoes a loss scale; None for 1.

    Raises:
        ValueError: lists of different lengths, or tensors whose shapes differ from their parameters'.
    """
    lists = {"gradients": gradients, "first": first, "second": second, "average": average, "copies": copies}
    for name, tensors in {**lists, "numbers": numbers}.items():
        wanted = len(parameters)
        if len(tensors) != wanted and not (name in ("average", "copies") and not tensors):
            raise ValueError(f"{len(tensors)} {name} for {wanted} parameters; give one each")
    shapes = [parameter.shape for parameter in parameters]
    for name, tensors in lists.items():
        given = [tensor.shape for tensor in tensors]
        if given and given != shapes:
            index = next(index for index, shape in enumerate(given) if shape != shapes[index])
            told = f"{tuple(given[index])} but its parameter {tuple(shapes[index])}"
            raise ValueError(f"{name}[{index}] has shape {told}")
    if not parameters:
        return
    table = torch.from_numpy(np.array(numbers, dtype=np.float64))
    written = list(parameters), list(first), list(second), list(average), list(copies)
    STEP(written[0], list(gradients), *written[1:], table, factor)
    # A kernel writes behind autograd's back: what was computed from the old weights must be known to be old.
    torch.autograd.graph.increment_version([*parameters, *average, *copies])
