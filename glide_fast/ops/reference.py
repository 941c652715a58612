"""Every op in plain PyTorch: the definition of correct, and the implementation where nothing faster exists.

Arithmetic is float64 for float64 inputs and float32 for all others; results are rounded once, at the end.
Shapes: B batch, C channels, H W space, P pixels, T queries, S text positions, N heads, D head dim, G groups.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

RESAMPLE_NONE, RESAMPLE_UP, RESAMPLE_DOWN = 0, 1, 2
ACTIVATION_NONE, ACTIVATION_GELU, ACTIVATION_QUICK_GELU = 0, 1, 2
QUICK_GELU_SLOPE = 1.702
_AVERAGE_POOL: dict[int, Callable[[Tensor, int], Tensor]] = {
    3: F.avg_pool1d,
    4: F.avg_pool2d,
    5: F.avg_pool3d,
}
_SUM_POOL: dict[int, Callable[[Tensor], Tensor]] = {
    3: lambda grad: 2 * F.avg_pool1d(grad, 2),  # which knows no divisor
    4: lambda grad: F.avg_pool2d(grad, 2, divisor_override=1),
    5: lambda grad: F.avg_pool3d(grad, 2, divisor_override=1),
}
_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def memory_format(x: Tensor) -> torch.memory_format:
    """The memory format of an op's output for input x: channels-last if x is that and not also contiguous."""
    last = _CHANNELS_LAST.get(x.ndim)
    if last is None or x.is_contiguous() or not x.is_contiguous(memory_format=last):
        return torch.contiguous_format
    return last


def channels_last(x: Tensor) -> torch.memory_format:
    """Channels-last for maps and volumes; what has no such format is contiguous."""
    return _CHANNELS_LAST.get(x.ndim, torch.contiguous_format)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the arithmetic and of saved statistics for tensors of `dtype`."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def nothing(x: Tensor) -> Tensor:
    """What stands for a gradient that is not there: an op's outputs must not share memory."""
    return x.new_empty(0)


def four_nothings(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four gradients that are not there."""
    return nothing(x), nothing(x), nothing(x), nothing(x)


def per_channel(values: Tensor, ndim: int) -> Tensor:
    """[C] or [B, C] -> the same with trailing ones, so that it broadcasts over [B, C, *space]."""
    batch = values.shape[0] if values.ndim == 2 else 1
    return values.reshape(batch, values.shape[-1], *[1] * (ndim - 2))


def resample(y: Tensor, mode: int) -> Tensor:
    """2x nearest up, 2x mean down (an odd last row or column is dropped), or y itself."""
    if mode == RESAMPLE_UP:
        for dim in range(2, y.ndim):
            y = y.repeat_interleave(2, dim=dim)
        return y
    return _AVERAGE_POOL[y.ndim](y, 2) if mode == RESAMPLE_DOWN else y


def resample_backward(grad: Tensor, mode: int, space: torch.Size) -> Tensor:
    """Adjoint of `resample` for an input whose space is `space`."""
    if mode == RESAMPLE_UP:
        grad = _SUM_POOL[grad.ndim](grad)
    if mode == RESAMPLE_DOWN:
        for dim, size in enumerate(space, start=2):
            grad = grad.repeat_interleave(2, dim=dim)
            if size % 2:
                last = list(grad.shape)
                last[dim] = 1
                grad = torch.cat([grad, grad.new_zeros(last)], dim=dim)
        grad = grad / 2 ** len(space)
    return grad


def group_norm(
    x: Tensor,  # [B, C, *space]
    weight: Tensor,  # [C]
    bias: Tensor,  # [C]
    scale: Tensor | None,  # [B, C]
    shift: Tensor | None,  # [B, C]
    groups: int,
    eps: float,
    silu: bool,
    mode: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """resample(silu((normalise(x) * weight + bias) * (1 + scale) + shift)), mean and 1/deviation [B, G]."""
    dtype = compute_dtype(x.dtype)
    wide = x.to(dtype)
    grouped = wide.reshape(x.shape[0], groups, x.shape[1] // groups * math.prod(x.shape[2:]))
    mean = grouped.mean(2)
    centred = grouped - mean.unsqueeze(2)
    rstd = (centred.square().mean(2) + eps).rsqrt()
    normal = (centred * rstd.unsqueeze(2)).reshape(x.shape)
    y = normal * per_channel(weight.to(dtype), x.ndim) + per_channel(bias.to(dtype), x.ndim)
    if scale is not None and shift is not None:
        y = y * per_channel(1 + scale.to(dtype), x.ndim) + per_channel(shift.to(dtype), x.ndim)
    y = resample(F.silu(y) if silu else y, mode)
    return y.to(x.dtype).contiguous(memory_format=memory_format(x)), mean, rstd


def group_norm_backward(
    grad: Tensor,  # like y
    x: Tensor,  # [B, C, *space]
    weight: Tensor,  # [C]
    bias: Tensor,  # [C]
    scale: Tensor | None,  # [B, C]
    shift: Tensor | None,  # [B, C]
    mean: Tensor,  # [B, G]
    rstd: Tensor,  # [B, G]
    silu: bool,
    mode: int,
    summand: Tensor | None = None,  # like x
    sums: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x (plus ``summand``), weight, bias, scale, shift; and copies of the first's sums [n, C].

    Those of scale and shift are empty without FiLM.
    """
    dtype = compute_dtype(x.dtype)
    batch, channels, groups = x.shape[0], x.shape[1], mean.shape[1]
    wide_weight, wide_bias = weight.to(dtype), bias.to(dtype)
    pixels = math.prod(x.shape[2:])
    elements = channels // groups * pixels
    grouped = x.to(dtype).reshape(batch, groups, elements)
    normal = ((grouped - mean.unsqueeze(2)) * rstd.unsqueeze(2)).reshape(batch, channels, pixels)
    gain = wide_weight.expand(batch, channels)
    offset = wide_bias.expand(batch, channels)
    film = None if scale is None or shift is None else 1 + scale.to(dtype)
    if film is not None and shift is not None:
        gain, offset = gain * film, offset * film + shift.to(dtype)

    flat = resample_backward(grad.to(dtype), mode, x.shape[2:]).reshape(normal.shape)
    if silu:
        z = normal * gain.unsqueeze(2) + offset.unsqueeze(2)
        sigmoid = torch.sigmoid(z)
        flat = flat * (sigmoid * (1 + z * (1 - sigmoid)))

    # Every gradient but x's is made of these two sums over the pixels, [B, C].
    grad_sum, grad_normal_sum = flat.sum(2), (flat * normal).sum(2)
    grad_scale, grad_shift = x.new_empty(0), x.new_empty(0)
    weight_terms, bias_terms = grad_normal_sum, grad_sum
    if film is not None and scale is not None and shift is not None:
        grad_scale = (grad_normal_sum * wide_weight + grad_sum * wide_bias).to(scale.dtype)
        grad_shift = grad_sum.to(shift.dtype)
        weight_terms, bias_terms = grad_normal_sum * film, grad_sum * film

    by_group = (batch, groups, channels // groups)
    group_mean = (grad_sum * gain).reshape(by_group).sum(2) / elements
    group_normal_mean = (grad_normal_sum * gain).reshape(by_group).sum(2) / elements
    inner = (flat * gain.unsqueeze(2)).reshape(grouped.shape)
    inner = inner - group_mean.unsqueeze(2) - normal.reshape(grouped.shape) * group_normal_mean.unsqueeze(2)
    grad_x = plus((inner * rstd.unsqueeze(2)).reshape(x.shape), summand).to(x.dtype)
    return (
        grad_x.contiguous(memory_format=memory_format(x)),
        weight_terms.sum(0).to(weight.dtype),
        bias_terms.sum(0).to(bias.dtype),
        grad_scale,
        grad_shift,
        column_sums(grad_x, 1, sums),
    )


def norm_convolution(
    x: Tensor,  # [B, C, *space]
    skip: Tensor | None,  # [B, S, *space]
    norm_weight: Tensor | None,  # [C + S]
    norm_bias: Tensor | None,  # [C + S]
    scale: Tensor | None,  # [B, C + S]
    shift: Tensor | None,  # [B, C + S]
    groups: int,
    eps: float,
    mode: int,
    weight: Tensor,  # [K, C + S, *odd sizes]
    bias: Tensor | None,  # [K] or [B, K]
    residual: Tensor | None,  # [B, K, *space], or half as large along each side, doubled then
) -> tuple[Tensor, Tensor, Tensor]:
    """conv(resample(silu(norm([x, skip])))) + bias + residual, and the norm's mean and 1/deviation [B, G].

    The output has the weight's dtype.
    """
    dtype = compute_dtype(x.dtype)
    x = (x if skip is None else torch.cat([x, skip], dim=1)).to(dtype)
    mean = rstd = x.new_empty(0)
    if norm_weight is None or norm_bias is None:
        x = resample(x, mode)
    else:
        x, mean, rstd = group_norm(x, norm_weight, norm_bias, scale, shift, groups, eps, True, mode)
    y = convolve(x, weight.to(dtype))
    y = y if bias is None else y + per_channel(bias.to(dtype), x.ndim)
    y = y if residual is None else y + matched(residual, y).to(dtype)
    return y.to(weight.dtype).contiguous(memory_format=channels_last(x)), mean, rstd


def matched(residual: Tensor, y: Tensor) -> Tensor:
    """A residual in y's size: itself, or doubled."""
    return residual if residual.shape == y.shape else resample(residual, RESAMPLE_UP)


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A convolution with padding that keeps the size."""
    convolution: Any = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}[x.ndim]
    return convolution(x, weight, bias, padding=_padding(weight))  # type: ignore[no-any-return]


def convolve_backward(
    grad: Tensor, x: Tensor, weight: Tensor, needs_x: bool, needs_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of x and weight of such a convolution, the latter laid out like it; None where not needed."""
    ones, zeros = [1] * (x.ndim - 2), [0] * (x.ndim - 2)
    needs = [needs_x, needs_weight, False]
    gradients: tuple[Tensor | None, ...] = torch.ops.aten.convolution_backward(
        grad, x, weight, None, ones, _padding(weight), ones, False, zeros, 1, needs
    )
    grad_weight = gradients[1]
    return gradients[0], None if grad_weight is None else grad_weight.contiguous(
        memory_format=memory_format(weight)
    )


def bias_gradient(grad: Tensor, bias: Tensor) -> Tensor:
    """The sum of grad [B, K, *space] over space, and over the batch if all pictures share the bias."""
    return grad.sum([dim for dim in range(grad.ndim) if dim != 1 and (dim > 1 or bias.ndim == 1)])


def empty_sums(x: Tensor, channels: int, copies: int) -> Tensor:
    """The memory of a gradient's sums [copies, C]; [0] without copies."""
    return x.new_empty((copies, channels) if copies else 0)


def column_sums(gradient: Tensor, dim: int, copies: int) -> Tensor:
    """[copies, C], each the sum over all dimensions but ``dim``; [0] without copies."""
    if not copies:
        return nothing(gradient)
    others = [each for each in range(gradient.ndim) if each != dim % gradient.ndim]
    wide = gradient.to(compute_dtype(gradient.dtype))
    total = wide.sum(others) if others else wide  # no dimensions would stand for all
    return total.to(gradient.dtype).repeat(copies, 1)


def plus(tensor: Tensor, summand: Tensor | None) -> Tensor:
    """tensor, or its sum with ``summand`` in tensor's dtype."""
    return tensor if summand is None else tensor + summand.to(tensor.dtype)


def sum_of(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    """Their sum in the dtype of the first, or the one that is there."""
    return second if first is None else plus(first, second)


def _padding(weight: Tensor) -> list[int]:
    return [size // 2 for size in weight.shape[2:]]


def norm_convolution_backward(
    grad: Tensor,  # [B, K, *space]
    x: Tensor,  # [B, C, *space]
    skip: Tensor | None,  # [B, S, *space]
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    groups: int,
    eps: float,
    mode: int,
    weight: Tensor,
    bias: Tensor | None,
    needs_x: bool,
    needs_weight: bool,
    summand: Tensor | None = None,  # [B, C + S, *space]
    second: Tensor | None = None,  # likewise
    sums: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of [x, skip] plus summands, of norm_weight, norm_bias, scale, shift, weight and bias.

    Those that are not needed are empty. Behind them are copies of the first's sums [n, C + S].
    """
    x = x if skip is None else torch.cat([x, skip], dim=1)
    dtype = compute_dtype(x.dtype)
    wide = x.to(dtype)
    if norm_weight is None or norm_bias is None:
        activated = resample(wide, mode)
    else:
        activated = group_norm(wide, norm_weight, norm_bias, scale, shift, groups, eps, True, mode)[0]
    grad_activated, grad_weight = convolve_backward(
        grad.to(dtype), activated, weight.to(dtype), needs_x, needs_weight
    )
    inner: tuple[Tensor, ...] = nothing(x), *four_nothings(x)
    if second is not None:
        summand = second if summand is None else summand.to(dtype) + second.to(dtype)
    if grad_activated is not None and norm_weight is not None and norm_bias is not None:
        inner = group_norm_backward(
            grad_activated, wide, norm_weight, norm_bias, scale, shift, mean, rstd, True, mode, summand
        )[:5]
    elif grad_activated is not None:
        inner = (plus(resample_backward(grad_activated, mode, x.shape[2:]), summand), *inner[1:])
    grad_bias = nothing(grad) if bias is None else bias_gradient(grad.to(dtype), bias).to(bias.dtype)
    grad_x = inner[0].to(x.dtype).contiguous(memory_format=memory_format(x)) if needs_x else nothing(x)
    grad_weight = nothing(x) if grad_weight is None else grad_weight.to(weight.dtype)
    found = column_sums(grad_x, 1, sums if needs_x else 0)
    return grad_x, inner[1], inner[2], inner[3], inner[4], grad_weight, grad_bias, found


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """normalise(x [..., C]) * weight [C] + bias [C], and its mean and 1/deviation [...]."""
    dtype = torch.promote_types(compute_dtype(x.dtype), compute_dtype(weight.dtype))
    wide = x.to(dtype)
    mean = wide.mean(-1)
    centred = wide - mean.unsqueeze(-1)
    rstd = (centred.square().mean(-1) + eps).rsqrt()
    y = centred * rstd.unsqueeze(-1) * weight.to(dtype) + bias.to(dtype)
    return y.to(x.dtype).contiguous(), mean, rstd


def layer_norm_backward(
    grad: Tensor,  # [..., C]
    x: Tensor,  # [..., C]
    weight: Tensor,  # [C]
    mean: Tensor,  # [...]
    rstd: Tensor,  # [...]
    needs_x: bool,
    needs_weight: bool,
    summand: Tensor | None = None,  # like x
    sums: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x (plus ``summand``), weight and bias, and ``sums`` copies of the first one's column sums.

    Those that are not needed are empty.
    """
    dtype = mean.dtype
    wide = grad.to(dtype)
    normal = (x.to(dtype) - mean.unsqueeze(-1)) * rstd.unsqueeze(-1)
    grad_x, grad_weight, grad_bias, columns = nothing(x), nothing(weight), nothing(weight), nothing(x)
    if needs_x:
        inner = wide * weight.to(dtype)
        inner = inner - inner.mean(-1, keepdim=True) - normal * (inner * normal).mean(-1, keepdim=True)
        grad_x = plus(inner * rstd.unsqueeze(-1), summand).to(x.dtype).contiguous()
        columns = column_sums(grad_x, -1, sums)
    if needs_weight:
        channels = len(weight)
        grad_weight = (wide * normal).reshape(-1, channels).sum(0).to(weight.dtype)
        grad_bias = wide.reshape(-1, channels).sum(0).to(weight.dtype)
    return grad_x, grad_weight, grad_bias, columns


def activation(x: Tensor, kind: int) -> Tensor:
    """GELU or QuickGELU of x."""
    wide = x.to(compute_dtype(x.dtype))
    y = F.gelu(wide) if kind == ACTIVATION_GELU else wide * torch.sigmoid(QUICK_GELU_SLOPE * wide)
    return y.to(x.dtype).contiguous()


def activation_backward(grad: Tensor, x: Tensor, kind: int, sums: int = 0) -> tuple[Tensor, Tensor]:
    """The gradient of the activation's input [..., C], and copies of its sums [n, C]."""
    dtype = compute_dtype(x.dtype)
    wide = x.to(dtype)
    if kind == ACTIVATION_GELU:
        density = (-0.5 * wide.square()).exp() / math.sqrt(2 * math.pi)
        slope: Tensor = 0.5 * torch.special.erfc(wide * -math.sqrt(0.5)) + wide * density
    else:
        sigmoid = torch.sigmoid(QUICK_GELU_SLOPE * wide)
        slope = sigmoid * (1 + QUICK_GELU_SLOPE * wide * (1 - sigmoid))
    grad_x = (grad.to(dtype) * slope).to(x.dtype).contiguous()
    return grad_x, column_sums(grad_x, -1, sums)


def linear(
    x: Tensor,  # [..., C]
    second: Tensor | None,  # [..., S]
    weight: Tensor,  # [K, C + S, *ones]
    bias: Tensor | None,  # [K]
    residual: Tensor | None,  # [..., K]
    kind: int,
) -> Tensor:
    """activation([x, second] weight^T + bias) + residual, [..., K]."""
    dtype = compute_dtype(x.dtype)
    y = (x if second is None else torch.cat([x, second], dim=-1)).to(dtype) @ weight.flatten(1).to(dtype).t()
    y = y if bias is None else y + bias.to(dtype)
    if kind != ACTIVATION_NONE:
        y = activation(y, kind)
    y = y if residual is None else y + residual.to(dtype)
    return y.to(x.dtype)


def linear_backward(
    grad: Tensor,  # [..., K]
    x: Tensor,  # [..., C]
    second: Tensor | None,  # [..., S]
    weight: Tensor,  # [K, C + S, *ones]
    needs_x: bool,
    needs_weight: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of [x, second] and weight; empty where not needed."""
    x = x if second is None else torch.cat([x, second], dim=-1)
    dtype = compute_dtype(x.dtype)
    flat = grad.to(dtype).reshape(-1, grad.shape[-1])
    grad_x = (grad.to(dtype) @ weight.flatten(1).to(dtype)).to(x.dtype) if needs_x else nothing(x)
    grad_weight = nothing(x)
    if needs_weight:
        grad_weight = flat.t() @ x.to(dtype).reshape(-1, x.shape[-1])
        grad_weight = grad_weight.to(weight.dtype).view(weight.shape)
    return grad_x, grad_weight


def _attention_inputs(
    query: Tensor, key: Tensor, value: Tensor, text_key: Tensor | None, text_value: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Scaled query [B, N, T, D], scaled key [B, N, S+T, D], value [B, N, S+T, D] in the compute dtype."""
    dtype = compute_dtype(query.dtype)
    if text_key is not None and text_value is not None:
        key, value = torch.cat([text_key, key], dim=1), torch.cat([text_value, value], dim=1)
    root = query.shape[3] ** -0.25
    query, key, value = (tensor.transpose(1, 2).to(dtype) for tensor in (query, key, value))
    return query * root, key * root, value


def attention(
    query: Tensor,  # [B, T, N, D]
    key: Tensor,  # [B, T, N, D]
    value: Tensor,  # [B, T, N, D]
    text_key: Tensor | None,  # [B, S, N, D]
    text_value: Tensor | None,  # [B, S, N, D]
) -> tuple[Tensor, Tensor]:
    """softmax(query [text_key, key]^T / sqrt(D)) [text_value, value], and the log of its sum [B, N, T]."""
    wide_query, wide_key, wide_value = _attention_inputs(query, key, value, text_key, text_value)
    scores = wide_query @ wide_key.transpose(2, 3)
    log_sum = scores.logsumexp(dim=3)
    output = (scores - log_sum.unsqueeze(3)).exp() @ wide_value
    return output.transpose(1, 2).to(query.dtype).contiguous(), log_sum


def causal_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """softmax(query key^T / sqrt(D), over the keys up to the query's place) value, of [B, T, N, D] each."""
    query, wide_key, wide_value = _attention_inputs(query, key, value, None, None)
    scores = query @ wide_key.transpose(2, 3)
    hidden = torch.ones_like(scores, dtype=torch.bool).triu(1)
    output = scores.masked_fill(hidden, -math.inf).softmax(dim=3) @ wide_value
    return output.transpose(1, 2).to(value.dtype).contiguous()


def attention_backward(
    grad: Tensor,  # [B, T, N, D]
    query: Tensor,
    key: Tensor,
    value: Tensor,
    text_key: Tensor | None,
    text_value: Tensor | None,
    output: Tensor,  # [B, T, N, D]
    log_sum: Tensor,  # [B, N, T]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value, text_key, text_value; the last two are empty where text is absent."""
    dtype = compute_dtype(query.dtype)
    root = query.shape[3] ** -0.25
    wide_query, wide_key, wide_value = _attention_inputs(query, key, value, text_key, text_value)
    wide_grad = grad.transpose(1, 2).to(dtype)
    probabilities = (wide_query @ wide_key.transpose(2, 3) - log_sum.unsqueeze(3)).exp()
    grad_value = probabilities.transpose(2, 3) @ wide_grad
    inner = (wide_grad * output.transpose(1, 2).to(dtype)).sum(3, keepdim=True)
    grad_scores = probabilities * (wide_grad @ wide_value.transpose(2, 3) - inner)
    grad_query = grad_scores @ wide_key * root
    grad_key = grad_scores.transpose(2, 3) @ wide_query * root

    grad_query, grad_key, grad_value = (
        tensor.transpose(1, 2).to(query.dtype).contiguous() for tensor in (grad_query, grad_key, grad_value)
    )
    if text_key is None:
        return grad_query, grad_key, grad_value, query.new_empty(0), query.new_empty(0)
    text = text_key.shape[1]
    return (
        grad_query,
        grad_key[:, text:].contiguous(),
        grad_value[:, text:].contiguous(),
        grad_key[:, :text].contiguous(),
        grad_value[:, :text].contiguous(),
    )
