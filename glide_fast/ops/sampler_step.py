"""A sampler's step in one pass over the pictures: guidance, the guess of x_0, its clip, and the move from it.

    epsilon = unconditional + guidance (conditional - unconditional)           (arXiv 2207.12598)
    x_0     = clip(guess_x x + guess_output epsilon)
    x'      = mean_start x_0 + mean_direction direction + deviation noise

DDPM's direction is x itself (arXiv 2006.11239, equation 7), DDIM's the noise in x if the clean picture is
x_0 (arXiv 2010.02502, equation 12). All coefficients are rows of a table on the pictures' device, chosen by
timesteps there, so that a CUDA graph of one step serves all; :mod:`glide_fast.diffusion.rules` makes tables.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor

from glide_fast.ops import reference_elements as reference
from glide_fast.ops.dispatch import define, needs_gradient

Deviation = Literal["table", "learned", "learned_range"]
Direction = Literal["x", "noise", "output"]
DEVIATIONS = {name: number for number, name in enumerate(get_args(Deviation))}
DIRECTIONS = {name: number for number, name in enumerate(get_args(Direction))}
# Columns of a table. The noise in x is (noise_x x - x_0) / noise_start. `low` is the deviation itself, or the
# lower end of a learned log-variance, of which `high` is the upper end.
COLUMNS = (
    "guess_x",
    "guess_output",
    "mean_start",
    "mean_direction",
    "noise_x",
    "noise_start",
    "low",
    "high",
)


@dataclass(frozen=True, kw_only=True)
class StepRule:
    """What a sampler does at each of T timesteps.

    `table` is float32 [T, 8] with `COLUMNS`. `deviation` is that of the noise which is added: from the table,
    or from C further channels of the output, which hold its log-variance ("learned") or where that lies
    between the table's two, from -1 to 1 ("learned_range"). `direction` is what the move from the guess of
    x_0 follows; "output" takes the output itself for the mean. `clip`: whether the guess is clipped to
    [-1, 1]. At timestep 0 no noise is added.

    Raises:
        ValueError: the table's shape or an unknown choice.
    """

    table: Tensor
    deviation: Deviation
    direction: Direction
    clip: bool

    def __post_init__(self) -> None:
        if self.table.ndim != 2 or self.table.shape[1] != len(COLUMNS):
            raise ValueError(
                f"the table has shape {tuple(self.table.shape)}; it must be [T, {len(COLUMNS)}] with columns "
                + ", ".join(COLUMNS)
            )
        if self.deviation not in DEVIATIONS:
            raise ValueError(f"unknown deviation {self.deviation!r}; use one of {', '.join(DEVIATIONS)}")
        if self.direction not in DIRECTIONS:
            raise ValueError(f"unknown direction {self.direction!r}; use one of {', '.join(DIRECTIONS)}")


def _fake(
    x: Tensor,
    output: Tensor,  # noqa: ARG001 (a fake has the op's signature)
    noise: Tensor | None,  # noqa: ARG001
    table: Tensor,  # noqa: ARG001
    t: Tensor,  # noqa: ARG001
    guidance: Tensor | None,  # noqa: ARG001
    deviation: int,  # noqa: ARG001
    direction: int,  # noqa: ARG001
    clip: bool,  # noqa: ARG001
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)


FORWARD = define(
    "sampler_step",
    "(Tensor x, Tensor output, Tensor? noise, Tensor table, Tensor t, Tensor? guidance, int deviation,"
    " int direction, bool clip) -> (Tensor next, Tensor x_start)",
    reference.sampler_step,
    _fake,
)


def sampler_step(
    x: Tensor,
    output: Tensor,
    t: Tensor,
    rule: StepRule,
    *,
    noise: Tensor | None = None,
    guidance: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The pictures of the next timestep, and the guess of the clean ones. Not differentiable.

    Args:
        x: [B, C, *space].
        output: the model's, [B, 2C, *space], or [B, C, *space] unless the deviation is learned; under
            guidance B conditional rows and then B unconditional ones, whose first C channels matter alone.
        t: int64 [B], rows of the rule's table; not checked on a GPU.
        noise: standard normals like x, or None for a step without.
        guidance: the scale of classifier-free guidance, one float32 number on the device of x; or None.

    Returns:
        x' and x_0, both [B, C, *space], contiguous, in the dtype of x; arithmetic in float32, or float64.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, or an input that needs a gradient.
    """
    batch, channels = x.shape[0], x.shape[1]
    rows = batch if guidance is None else 2 * batch
    wanted = (rows, 2 * channels, *x.shape[2:])
    fits = output.shape == wanted or (
        rule.deviation == "table" and output.shape == (rows, channels, *x.shape[2:])
    )
    if not fits:
        raise ValueError(
            f"the model's output has shape {tuple(output.shape)} but x {tuple(x.shape)} with deviation "
            f"{rule.deviation!r} {'and guidance ' if guidance is not None else ''}needs {wanted}"
        )
    if t.shape != (batch,) or t.is_floating_point():
        raise ValueError(f"t is {t.dtype} {tuple(t.shape)}; give int64 [{batch}], one step a picture")
    if noise is not None and (noise.shape != x.shape or noise.dtype is not x.dtype):
        raise ValueError(f"noise is {noise.dtype} {tuple(noise.shape)} but x is {x.dtype} {tuple(x.shape)}")
    if guidance is not None and guidance.numel() != 1:
        raise ValueError(f"guidance has shape {tuple(guidance.shape)}; give one number")
    if not x.is_floating_point() or not output.is_floating_point():
        raise ValueError(f"x is {x.dtype} and output {output.dtype}; give floating-point tensors")
    for name, tensor in (("output", output), ("t", t), ("the table", rule.table), ("guidance", guidance)):
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device} but x on {x.device}; move one of them")
    if needs_gradient((x, output, noise)):
        raise ValueError("a sampler's step has no gradient; use torch.inference_mode, or GaussianDiffusion")
    results: tuple[Tensor, Tensor] = FORWARD(
        x,
        output,
        noise,
        rule.table,
        t,
        guidance,
        DEVIATIONS[rule.deviation],
        DIRECTIONS[rule.direction],
        rule.clip,
    )
    return results
