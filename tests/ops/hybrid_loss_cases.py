"""Inputs of the losses of a diffusion that learns its variance, and its formulas one by one."""

from __future__ import annotations

import torch
from torch import Tensor

from glide_fast.diffusion import GaussianDiffusion, Schedule, simple_loss, vlb_term
from glide_fast.diffusion.rules import ddpm_rule

Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]  # the op's
STEPS = (0, 999, 1, 400, 0, 50)


def diffusion_of(schedule: str) -> GaussianDiffusion:
    return GaussianDiffusion(schedule=Schedule.create(schedule, 1000))


def draw(
    shape: tuple[int, ...] = (6, 3, 5, 7),
    *,
    schedule: str = "cosine",
    error: float = 0.3,
    device: str = "cpu",
) -> Inputs:
    """A model that misses the noise by `error`; many of the pictures' elements are black or white."""
    generator = torch.Generator().manual_seed(sum(shape))

    def normal() -> Tensor:
        return torch.randn(shape, generator=generator)

    diffusion = diffusion_of(schedule)
    x_start, noise = normal().clamp(-1, 1), normal()
    t = torch.tensor((STEPS * shape[0])[: shape[0]], dtype=torch.int64)
    output = torch.cat([noise + error * normal(), normal()], dim=1)
    table = ddpm_rule(diffusion, clip=False, device=torch.device("cpu")).table
    inputs = output, x_start, diffusion.q_sample(x_start, t, noise), noise, t, table
    return tuple(each.to(device) for each in inputs)  # type: ignore[return-value]


def wide(inputs: Inputs) -> Inputs:
    """The same pictures in float64."""
    *pictures, t, table = inputs
    return (*(each.double() for each in pictures), t, table)  # type: ignore[return-value]


def weights(batch: int) -> tuple[Tensor, Tensor]:
    """Gradients of both losses."""
    return torch.linspace(0.5, 2, batch), torch.linspace(3, 1, batch)


def one_by_one(inputs: Inputs, schedule: str) -> tuple[Tensor, Tensor, Tensor]:
    """Both losses by the methods of the diffusion, and the gradient that autograd finds of their sum."""
    given, x_start, x_t, noise, t, _ = (each.cpu() for each in inputs)
    output = given.detach().requires_grad_()
    mean, variance = output.chunk(2, dim=1)
    diffusion = diffusion_of(schedule)
    mse = simple_loss(diffusion, output, x_start, x_t, t, noise)
    frozen = torch.cat([mean.detach(), variance], dim=1)
    vlb = vlb_term(diffusion, frozen, x_start, x_t, t)
    grads = [each.to(loss.dtype) for each, loss in zip(weights(len(t)), (mse, vlb), strict=True)]
    (grad,) = torch.autograd.grad((mse, vlb), output, grads)
    return mse.detach(), vlb.detach(), grad
