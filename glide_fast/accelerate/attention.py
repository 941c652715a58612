"""Attention over one projection of queries, keys and values: the stateless core of the family's blocks.

U-Nets hand it over channels first, [B, 3·N·D, T], GLIDE's with the text's keys and values beside it; text
transformers tokens first, [B, T, 3·N·D]. Within the projection a head's query, key and value lie together, or
all queries come first: classes of one name differ in that, and the proof decides. The block around the core,
with its norm, its projections and its checkpointing, stays as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from glide_fast import ops
from glide_fast.accelerate.plan import Noise, Plan, is_function, takes

_HEADS = ("n_heads", "num_heads", "heads")
_HEAD_CHANNELS = 16


@dataclass(frozen=True, kw_only=True)
class AttentionPlan(Plan):
    """A module without state that turns a projection into what was attended to.

    ``heads`` is the attribute that counts the heads; without one they are part of the batch already.
    """

    heads: str | None
    order: Literal["by_head", "by_role"]
    tokens_first: bool = False
    text: bool = False

    @property
    def title(self) -> str:
        order = "by head" if self.order == "by_head" else "queries before keys before values"
        return f"attention over image{' and text' if self.text else ''}, {order}" + (
            ", tokens first" if self.tokens_first else ""
        )

    @property
    def arity(self) -> int:
        return 2 if self.text else 1

    def examples(self, module: Any, noise: Noise) -> list[tuple[Tensor, ...]]:
        channels = self._count(module) * _HEAD_CHANNELS
        if self.tokens_first:
            return [(noise(2, 6, 3 * channels),)]
        image = noise(2, 3 * channels, 6)
        return [(image,), (image, noise(2, 2 * channels, 4))] if self.text else [(image,)]

    def fits(self, inputs: Sequence[Any]) -> bool:
        return all(
            each is None or (isinstance(each, Tensor) and each.ndim == 3 and each.is_floating_point())
            for each in inputs
        )

    def serve(self, module: Any, inputs: Sequence[Any]) -> Tensor:
        heads = self._count(module)
        if self.tokens_first:
            query, key, value = self._split(inputs[0], heads, 3)
            return ops.attention(query, key, value).flatten(2)
        query, key, value = self._split(inputs[0].transpose(1, 2), heads, 3)
        text_key = text_value = None
        if len(inputs) == 2 and inputs[1] is not None:
            text_key, text_value = self._split(inputs[1].transpose(1, 2), heads, 2)
        attended = ops.attention(query, key, value, text_key=text_key, text_value=text_value)
        return attended.flatten(2).transpose(1, 2).contiguous()

    def _count(self, module: Any) -> int:
        return 1 if self.heads is None else int(getattr(module, self.heads))

    def _split(self, projection: Tensor, heads: int, roles: int) -> tuple[Tensor, ...]:
        """[B, T, N·roles·D] -> as many views [B, T, N, D]."""
        if self.order == "by_head":
            return torch.unflatten(projection, 2, (heads, roles, -1)).unbind(3)
        return torch.unflatten(projection, 2, (roles, heads, -1)).unbind(2)


def propose_attention(module: nn.Module) -> list[Plan]:
    """Plans for a module without state that is called an attention: every layout of the projection."""
    if "attention" not in type(module).__name__.lower() or not is_function(module):
        return []
    heads = next((name for name in _HEADS if isinstance(getattr(module, name, None), int)), None)
    text = takes(type(module).forward) == 2
    plans: list[Plan] = [
        AttentionPlan(heads=heads, order="by_head", text=text),
        AttentionPlan(heads=heads, order="by_role", text=text),
    ]
    if not text:
        plans.append(AttentionPlan(heads=heads, order="by_head", tokens_first=True))
    return plans
