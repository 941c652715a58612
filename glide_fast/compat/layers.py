"""The small functions and layers that every original project keeps in its ``nn`` module."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import SiLU
from torch.utils.checkpoint import checkpoint as recompute

from glide_fast import ops
from glide_fast.models import layers
from glide_fast.models.layers import zeroed as zero_module

__all__ = [
    "GroupNorm32",
    "SiLU",
    "avg_pool_nd",
    "checkpoint",
    "conv_nd",
    "linear",
    "mean_flat",
    "normalization",
    "scale_module",
    "timestep_embedding",
    "update_ema",
    "zero_module",
]

Module = TypeVar("Module", bound=nn.Module)


class GroupNorm32(nn.GroupNorm):
    """GroupNorm with float32 statistics whatever the dtype of its input."""

    def forward(self, x: Tensor) -> Tensor:  # [B, C, *space]
        return ops.group_norm(x, self.weight, self.bias, groups=self.num_groups, eps=self.eps)


def normalization(channels: int) -> nn.Module:
    """The family's norm: 32 groups."""
    return GroupNorm32(32, channels)


def conv_nd(dims: int, *args: Any, **kwargs: Any) -> nn.Module:
    """A convolution over ``dims`` dimensions of space, 1 to 3; other arguments as torch's.

    Raises:
        ValueError: another number of dimensions.
    """
    _check_dims(dims)
    return layers.CONVOLUTIONS[dims](*args, **kwargs)


def avg_pool_nd(dims: int, *args: Any, **kwargs: Any) -> nn.Module:
    """An average pool over ``dims`` dimensions of space, 1 to 3; other arguments as torch's.

    Raises:
        ValueError: another number of dimensions.
    """
    _check_dims(dims)
    pools: tuple[type[nn.Module], ...] = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)
    return pools[dims - 1](*args, **kwargs)


def linear(*args: Any, **kwargs: Any) -> nn.Module:
    """A linear layer; arguments as torch's."""
    return layers.Linear(*args, **kwargs)


@torch.no_grad()
def update_ema(target_params: Iterable[Tensor], source_params: Iterable[Tensor], rate: float = 0.99) -> None:
    """Move each target towards its source: ``rate`` target + (1 - ``rate``) source."""
    targets = [target.detach() for target in target_params]
    torch._foreach_mul_(targets, rate)
    torch._foreach_add_(targets, [source.detach() for source in source_params], alpha=1 - rate)


def scale_module(module: Module, scale: float) -> Module:
    """The module with every parameter multiplied by ``scale``."""
    for parameter in module.parameters():
        parameter.detach().mul_(scale)
    return module


def mean_flat(tensor: Tensor) -> Tensor:
    """The mean of each row: [B, ...] -> [B]."""
    return tensor.flatten(1).mean(1)


def timestep_embedding(timesteps: Tensor, dim: int, max_period: float = 10000) -> Tensor:
    """Sinusoids of timesteps, cosines first: [B] -> [B, dim] float32."""
    return layers.timestep_embedding(timesteps, dim, max_period)


def checkpoint(func: Callable[..., Any], inputs: Sequence[Any], params: Iterable[Tensor], flag: bool) -> Any:
    """``func(*inputs)``, its activations computed again in the backward pass if ``flag``.

    ``params`` are what ``func`` reads besides its inputs; autograd finds them by itself.
    """
    del params
    return recompute(func, *inputs, use_reentrant=False) if flag else func(*inputs)


def _check_dims(dims: int) -> None:
    if dims not in layers.CONVOLUTIONS:
        raise ValueError(f"unsupported dimensions: {dims}; use 1, 2 or 3")
