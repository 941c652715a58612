"""Attention over projections that hold queries, keys and values, whose gradients lie beside each other too.

    y = attention(query, key, value, text_key, text_value)

with [query, key, value] one tensor and [text_key, text_value] another. Nothing is copied forward; backward,
gradients of views would be put together by a copy, which a kernel that writes them in place does without.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from glide_fast.ops import column_sums, reference
from glide_fast.ops.attention import BACKWARD as BACKWARD_OF_PARTS
from glide_fast.ops.attention import FORWARD, attention, check
from glide_fast.ops.dispatch import define, needs_gradient

AttentionOrder = Literal["by_head", "by_role"]


def parts_of(projection: Tensor, parts: int, heads: int, by_head: bool) -> tuple[Tensor, ...]:
    """[B, T, parts·N·D] -> ``parts`` views [B, T, N, D], which lie a head or a part at a time."""
    if by_head:
        return torch.unflatten(projection, 2, (heads, parts, -1)).unbind(3)
    return torch.unflatten(projection, 2, (parts, heads, -1)).unbind(2)


Views = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]


def views_of(projection: Tensor, text: Tensor | None, heads: int, by_head: bool) -> Views:
    """Query, key, value, and the text's key and value or twice None."""
    query, key, value = parts_of(projection, 3, heads, by_head)
    if text is None:
        return query, key, value, None, None
    text_key, text_value = parts_of(text, 2, heads, by_head)
    return query, key, value, text_key, text_value


def _together(gradients: tuple[Tensor, ...], by_head: bool) -> Tensor:
    return torch.stack(gradients, dim=3 if by_head else 2).flatten(2)


def _by_parts(backward: Callable[..., Any]) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """The op by a backward pass of attention, whose gradients are put together."""

    def projected_attention_backward(
        grad: Tensor,
        projection: Tensor,
        text: Tensor | None,
        output: Tensor,
        log_sum: Tensor,
        heads: int,
        by_head: bool,
        sums: int = 0,
    ) -> tuple[Tensor, Tensor, Tensor]:
        found = backward(grad, *views_of(projection, text, heads, by_head), output, log_sum)
        gradients = _gradients(found, projection, text, by_head)
        return *gradients, reference.column_sums(gradients[0], -1, sums)

    return projected_attention_backward


def _gradients(
    found: tuple[Tensor, ...], projection: Tensor, text: Tensor | None, by_head: bool
) -> tuple[Tensor, Tensor]:
    of_text = reference.nothing(projection) if text is None else _together(found[3:], by_head)
    return _together(found[:3], by_head), of_text


def _fake_backward(
    grad: Tensor,  # noqa: ARG001 (a fake has the op's signature)
    projection: Tensor,
    text: Tensor | None,
    output: Tensor,  # noqa: ARG001
    log_sum: Tensor,  # noqa: ARG001
    heads: int,  # noqa: ARG001
    by_head: bool,  # noqa: ARG001
    sums: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    of_text = projection.new_empty(0 if text is None else text.shape)
    columns = reference.empty_sums(projection, projection.shape[2], sums)
    return projection.new_empty(projection.shape), of_text, columns


BACKWARD = define(
    "projected_attention_backward",
    "(Tensor grad, Tensor projection, Tensor? text, Tensor output, Tensor log_sum, int heads, bool by_head,"
    " int sums=0) -> (Tensor, Tensor, Tensor)",
    _by_parts(reference.attention_backward),
    _fake_backward,
    default=_by_parts(BACKWARD_OF_PARTS),
)


class _ProjectedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, projection: Tensor, text: Tensor | None, heads: int, by_head: bool) -> Tensor:
        output: Tensor
        output, log_sum = FORWARD(*views_of(projection, text, heads, by_head))
        ctx.save_for_backward(projection, text, output, log_sum)
        ctx.layout = heads, by_head
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # read once: recomputed activations can be unpacked no more than that
        sums = min(1, column_sums.wanted("projected_attention_backward", saved[0], learning=True))
        gradients = BACKWARD(grad, *saved, *ctx.layout, sums)
        column_sums.remember(gradients[0], -1, gradients[2])
        return gradients[0], None if saved[1] is None else gradients[1], None, None


def projected_attention(
    projection: Tensor, heads: int, *, text: Tensor | None = None, order: AttentionOrder = "by_head"
) -> Tensor:
    """:func:`glide_fast.ops.attention` of the parts of projections.

    Args:
        projection: [B, T, 3·N·D], queries, keys and values.
        heads: N.
        text: [B, S, 2·N·D], keys and values of the text, or None.
        order: whether a head's parts lie side by side, or a part's heads.

    Returns:
        [B, T, N, D], contiguous, in the dtype of the projection. Differentiable once.

    Raises:
        ValueError: shapes or dtypes that do not fit each other, or an unknown order.
    """
    if order not in ("by_head", "by_role"):
        raise ValueError(f"unknown order {order!r}; use by_head or by_role")
    for name, each, parts in (("projection", projection, 3), ("text", text, 2)):
        if each is not None and (each.ndim != 3 or each.shape[2] % (parts * heads)):
            raise ValueError(
                f"{name} has shape {tuple(each.shape)}; with {heads} heads it must be "
                f"[B, length, {parts}·{heads}·D]"
            )
    by_head = order == "by_head"
    query, key, value, text_key, text_value = views_of(projection, text, heads, by_head)
    if needs_gradient((projection, text)) and not torch.compiler.is_compiling():
        check(query, key, value, text_key, text_value)
        attended: Tensor = _ProjectedAttention.apply(  # type: ignore[no-untyped-call]
            projection, text, heads, by_head
        )
        return attended
    return attention(query, key, value, text_key=text_key, text_value=text_value)
