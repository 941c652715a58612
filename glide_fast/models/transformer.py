"""GLIDE's text transformer: pre-norm blocks, full attention, exact GELU (GLIDE, section 3.1)."""

from __future__ import annotations

from torch import Tensor, nn

from glide_fast import ops
from glide_fast.models.branch import Branch, beside, through
from glide_fast.models.layer_norm import LayerNorm, normed
from glide_fast.models.layers import Linear


def self_attention(query: Tensor, key: Tensor, value: Tensor, *, causal: bool = False) -> Tensor:
    """[B, T, N, D] each -> [B, T, N·D]; ``causal`` hides from each token those behind it."""
    if not causal:
        return ops.attention(query, key, value).flatten(2)
    return ops.causal_attention(query, key, value).flatten(2)


class SelfAttention(Branch):
    """Multi-head self-attention over tokens; queries, keys and values interleaved a head."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.c_qkv = Linear(width, 3 * width)
        self.c_proj = Linear(width, width)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:  # [B, T, C] -> [B, T, C]
        attended = ops.projected_attention(self.c_qkv(x), self.heads).flatten(2)
        return through(self.c_proj, attended, residual=residual)


class Perceptron(Branch):
    """The block's two-layer perceptron, four times as wide inside."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.c_fc = Linear(width, 4 * width)
        self.c_proj = Linear(4 * width, width)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:  # [B, T, C] -> [B, T, C]
        return through(self.c_proj, through(self.c_fc, x, activation="gelu"), residual=residual)


class TransformerBlock(nn.Module):
    """x + attention(norm(x)), then x + perceptron(norm(x))."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attn = SelfAttention(width, heads)
        self.ln_1 = LayerNorm(width)
        self.mlp = Perceptron(width)
        self.ln_2 = LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:  # [B, T, C] -> [B, T, C]
        inner, x = normed(self.ln_1, x)
        x = beside(x, self.attn, inner)
        inner, x = normed(self.ln_2, x)
        return beside(x, self.mlp, inner)


class Transformer(nn.Module):
    """A stack of transformer blocks: [B, T, width] -> [B, T, width]."""

    def __init__(self, width: int, layers: int, heads: int) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(
                f"text width {width} is not divisible by {heads} heads; use a divisor of {width}"
            )
        self.resblocks = nn.ModuleList(TransformerBlock(width, heads) for _ in range(layers))
        self._initialise(layers)

    def _initialise(self, layers: int) -> None:
        """Normal weights of variance 1/fan-in; a branch's last is smaller, so that depth keeps the scale."""
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                residual = (2 * layers) ** -0.5 if "c_proj" in name else 1.0
                nn.init.normal_(parameter, std=residual * parameter.shape[1] ** -0.5)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.resblocks:
            x = block(x)
        return x
