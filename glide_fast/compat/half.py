"""Half-precision training as the original projects do it: float32 master weights and a dynamic loss scale.

Master weights are flat vectors, one a group of parameters: ``(group, shape)`` with ``group`` a list of
(name, parameter) and ``shape`` that of the vector.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor, nn

from glide_fast.compat import logger
from glide_fast.models.layers import PointwiseConv

__all__ = [
    "INITIAL_LOG_LOSS_SCALE",
    "MixedPrecisionTrainer",
    "check_overflow",
    "convert_module_to_f16",
    "convert_module_to_f32",
    "get_param_groups_and_shapes",
    "make_master_params",
    "master_params_to_model_params",
    "master_params_to_state_dict",
    "model_grads_to_master_grads",
    "param_grad_or_zeros",
    "state_dict_to_master_params",
    "unflatten_master_params",
    "zero_grad",
    "zero_master_grads",
]

INITIAL_LOG_LOSS_SCALE = 20.0
Group: TypeAlias = tuple[list[tuple[str, Tensor]], tuple[int, ...]]

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, PointwiseConv)


def convert_module_to_f16(l: nn.Module) -> None:  # noqa: E741
    """Make a convolution's weights float16; other modules stay. For ``module.apply``."""
    _convert(l, torch.float16)


def convert_module_to_f32(l: nn.Module) -> None:  # noqa: E741
    """Make a convolution's weights float32; other modules stay. For ``module.apply``."""
    _convert(l, torch.float32)


def get_param_groups_and_shapes(named_model_params: Iterable[tuple[str, Tensor]]) -> list[Group]:
    """Two groups: vectors and scalars, flat; everything else, as one row."""
    named = list(named_model_params)
    vectors = [(name, parameter) for name, parameter in named if parameter.ndim <= 1]
    matrices = [(name, parameter) for name, parameter in named if parameter.ndim > 1]
    return [(vectors, (-1,)), (matrices, (1, -1))]


def one_group(model_params: Iterable[Tensor]) -> list[Group]:
    """A single flat group of unnamed parameters."""
    return [([("", parameter) for parameter in model_params], (-1,))]


def make_master_params(param_groups_and_shapes: Iterable[Group]) -> list[nn.Parameter]:
    """Float32 copies of the groups' parameters, one vector a group."""
    return [
        nn.Parameter(_flat(parameter.detach() for _, parameter in group).view(shape))
        for group, shape in param_groups_and_shapes
    ]


def model_grads_to_master_grads(
    param_groups_and_shapes: Iterable[Group], master_params: Iterable[Tensor]
) -> None:
    """Copy the model's gradients, zero where there is none, to the master weights."""
    for master, (group, shape) in zip(master_params, param_groups_and_shapes, strict=True):
        master.grad = _flat(param_grad_or_zeros(parameter) for _, parameter in group).view(shape)


def master_params_to_model_params(
    param_groups_and_shapes: Iterable[Group], master_params: Iterable[Tensor]
) -> None:
    """Copy the master weights to the model."""
    for master, (group, _) in zip(master_params, param_groups_and_shapes, strict=True):
        for (_, parameter), values in zip(group, unflatten_master_params(group, master), strict=True):
            parameter.detach().copy_(values)


def unflatten_master_params(param_group: Sequence[tuple[str, Tensor]], master_param: Tensor) -> list[Tensor]:
    """The parameters of a group as views of its vector, in the group's order."""
    parts = torch.split(master_param.detach().view(-1), [parameter.numel() for _, parameter in param_group])
    return [part.view_as(parameter) for part, (_, parameter) in zip(parts, param_group, strict=True)]


def master_params_to_state_dict(
    model: nn.Module,
    param_groups_and_shapes: Iterable[Group] | None,
    master_params: Sequence[Tensor],
    use_fp16: bool,
) -> dict[str, Tensor]:
    """The model's state dict with its parameters taken from the master weights."""
    state = model.state_dict()
    if not use_fp16:
        names = [name for name, _ in model.named_parameters()]
        return {**state, **dict(zip(names, master_params, strict=True))}
    for master, (group, _) in zip(master_params, param_groups_and_shapes or [], strict=True):
        for (name, _), values in zip(group, unflatten_master_params(group, master), strict=True):
            state[name] = values
    return state


def state_dict_to_master_params(
    model: nn.Module, state_dict: Mapping[str, Tensor], use_fp16: bool
) -> list[Tensor]:
    """Master weights with the values of a state dict."""
    named = [(name, state_dict[name]) for name, _ in model.named_parameters()]
    if use_fp16:
        return list(make_master_params(get_param_groups_and_shapes(named)))
    return [values for _, values in named]


def param_grad_or_zeros(param: Tensor) -> Tensor:
    """The parameter's gradient, or zeros."""
    return torch.zeros_like(param) if param.grad is None else param.grad.detach()


def zero_master_grads(master_params: Iterable[Tensor]) -> None:
    """Forget the gradients."""
    for parameter in master_params:
        parameter.grad = None


def zero_grad(model_params: Iterable[Tensor]) -> None:
    """Set gradients that exist to zero, in place."""
    for parameter in model_params:
        if parameter.grad is not None:
            parameter.grad.detach_().zero_()


def check_overflow(value: float) -> bool:
    """Whether a number is infinite or not a number."""
    return not math.isfinite(value)


class MixedPrecisionTrainer:
    """Steps an optimiser over ``master_params``; with ``use_fp16`` these are copies and losses are scaled.

    The scale is 2**``lg_loss_scale``: it grows a little with every step and halves when gradients overflow.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        use_fp16: bool = False,
        fp16_scale_growth: float = 1e-3,
        initial_lg_loss_scale: float = INITIAL_LOG_LOSS_SCALE,
    ) -> None:
        self.model = model
        self.use_fp16 = use_fp16
        self.fp16_scale_growth = fp16_scale_growth
        self.lg_loss_scale = initial_lg_loss_scale
        self.model_params = list(model.parameters())
        self.master_params = self.model_params
        self.param_groups_and_shapes: list[Group] | None = None
        if use_fp16:
            self.param_groups_and_shapes = self.groups(model.named_parameters())
            self.master_params = make_master_params(self.param_groups_and_shapes)
            convert: Callable[[], None] = model.convert_to_fp16  # type: ignore[assignment]
            convert()

    def groups(self, named_model_params: Iterable[tuple[str, Tensor]]) -> list[Group]:
        """How parameters are gathered into flat master weights."""
        return get_param_groups_and_shapes(named_model_params)

    def zero_grad(self) -> None:
        """Set the model's gradients to zero."""
        zero_grad(self.model_params)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of the (scaled) loss."""
        (loss * 2**self.lg_loss_scale if self.use_fp16 else loss).backward()  # type: ignore[no-untyped-call]

    def optimize(self, opt: torch.optim.Optimizer) -> bool:
        """One step; false where gradients overflowed and nothing but the scale has changed."""
        if not self.use_fp16:
            self._log_norms()
            opt.step()
            return True
        groups = self.param_groups_and_shapes or []
        logger.logkv_mean("lg_loss_scale", self.lg_loss_scale)
        model_grads_to_master_grads(groups, self.master_params)
        if self._log_norms(2**self.lg_loss_scale):
            self.lg_loss_scale -= 1
            logger.log(f"Found NaN, decreased lg_loss_scale to {self.lg_loss_scale}")
            zero_master_grads(self.master_params)
            return False
        for parameter in self.master_params:
            if parameter.grad is not None:
                parameter.grad.mul_(1.0 / 2**self.lg_loss_scale)
        opt.step()
        zero_master_grads(self.master_params)
        master_params_to_model_params(groups, self.master_params)
        self.lg_loss_scale += self.fp16_scale_growth
        return True

    def master_params_to_state_dict(self, master_params: Sequence[Tensor]) -> dict[str, Tensor]:
        """The model's state dict with its parameters taken from ``master_params``, or averages of them."""
        return master_params_to_state_dict(
            self.model, self.param_groups_and_shapes, master_params, self.use_fp16
        )

    def state_dict_to_master_params(self, state_dict: Mapping[str, Tensor]) -> list[Tensor]:
        """Master weights with the values of a state dict."""
        named = [(name, state_dict[name]) for name, _ in self.model.named_parameters()]
        return list(make_master_params(self.groups(named))) if self.use_fp16 else [part for _, part in named]

    def _log_norms(self, scale: float = 1.0) -> bool:
        """Log the norms of gradients and weights, and say whether the gradients overflowed."""
        gradients = [each.grad for each in self.master_params if each.grad is not None]
        grad_norm = nn.utils.get_total_norm(gradients).item() / scale
        if check_overflow(grad_norm):
            return True
        logger.logkv_mean("grad_norm", grad_norm)
        logger.logkv_mean(
            "param_norm", nn.utils.get_total_norm([each.detach() for each in self.master_params]).item()
        )
        return False


class SingleGroupTrainer(MixedPrecisionTrainer):
    """A trainer whose master weights are one flat vector, as improved-diffusion's."""

    def groups(self, named_model_params: Iterable[tuple[str, Tensor]]) -> list[Group]:
        """One group of all parameters."""
        return [(list(named_model_params), (-1,))]


def _convert(module: nn.Module, dtype: torch.dtype) -> None:
    if isinstance(module, _CONVOLUTIONS):
        module.weight.data = module.weight.data.to(dtype)
        if module.bias is not None:
            module.bias.data = module.bias.data.to(dtype)


def _flat(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([tensor.float().flatten() for tensor in tensors])
