"""The residual block: two GroupNorm-SiLU-convolution layers around the timestep (ADM, arXiv 2105.05233)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from glide_fast import ops
from glide_fast.accelerate.plan import (
    Noise,
    Plan,
    group_norm,
    is_function,
    is_group_norm,
    is_image,
    parts,
    types_of,
)

_FUSED: dict[str, ops.Resample] = {"none": "none", "own": "none", "up": "up", "down": "down"}
_SPACES = {1: (8,), 2: (4, 6), 3: (2, 4, 6)}  # small, with sides that can be told apart


@dataclass(frozen=True, kw_only=True)
class ResidualPlan(Plan):
    """``in_layers``, ``emb_layers``, ``out_layers`` and ``skip_connection`` around fused norms.

    ``film``: the embedding scales and shifts the second norm, else it is added before it. ``resample``: what
    ``h_upd`` and ``x_upd`` do; "own" leaves that to themselves, as a volume needs, whose depth stays.
    ``fused``: each convolution is computed together with the norm in front of it.
    """

    film: bool
    fused: bool
    resample: Literal["none", "up", "down", "own"]

    @property
    def title(self) -> str:
        film = ", FiLM" if self.film else ""
        resampling = f" and 2x {self.resample}" if self.resample in ("up", "down") else ""
        convolution = ", convolution" if self.fused else ""
        return f"residual block: GroupNorm{film}, SiLU{resampling}{convolution} in one pass"

    @property
    def arity(self) -> int:
        return 2

    def inner(self, module: Any) -> tuple[nn.Module, ...]:
        skipped = None if self.fused else 2
        layers = [module.in_layers, *parts(module.in_layers)[:skipped]]
        layers += [module.out_layers, *parts(module.out_layers)[:skipped]]
        return (*layers, module.h_upd) if self.resample in ("up", "down") else tuple(layers)

    def examples(self, module: Any, noise: Noise) -> list[tuple[Tensor, ...]]:
        norm, _, convolution = parts(module.in_layers)
        dims = max(parameter.ndim for parameter in convolution.parameters()) - 2
        x = noise(2, len(norm.weight), *_SPACES[dims])  # type: ignore[arg-type]
        return [(x, noise(batch, _linear(module).weight.shape[1])) for batch in (2, 1)]

    def fits(self, inputs: Sequence[Any]) -> bool:
        x, embedding = inputs
        return is_image(x) and embedding.ndim == 2 and len(embedding) in (1, len(x))

    def products(self, module: Any) -> list[Tensor]:
        layers = _convolutions(module) if self.fused else ()
        return [layer.weight for layer in layers if isinstance(layer, nn.Conv2d)]

    def serve(self, module: Any, inputs: Sequence[Any]) -> Tensor:
        x, embedding = inputs  # [B, C, *space], [B or 1, E]
        modulation = module.emb_layers(embedding).expand(len(x), -1)
        if self.fused and _may_fuse(module, x):
            return self._serve_fused(module, x, modulation.to(x.dtype))
        norm, _, convolution = parts(module.in_layers)
        h = group_norm(norm, x, resample=_FUSED[self.resample])
        if self.resample == "own":
            h = module.h_upd(h)
        if self.resample != "none":
            x = module.x_upd(x)
        h = convolution(h)
        modulation = modulation.to(h.dtype)
        norm, _, *rest = parts(module.out_layers)
        if self.film:
            scale, shift = modulation.chunk(2, dim=1)
            h = group_norm(norm, h, scale=scale, shift=shift)
        else:
            h = group_norm(norm, h + modulation.view(*modulation.shape, *[1] * (h.ndim - 2)))
        for layer in rest:
            h = layer(h)
        return module.skip_connection(x) + h  # type: ignore[no-any-return]

    def _serve_fused(self, module: Any, x: Tensor, modulation: Tensor) -> Tensor:
        norm, _, convolution = parts(module.in_layers)
        shift = None if self.film else modulation
        h = _norm_convolution(norm, convolution, x, shift=shift, resample=_FUSED[self.resample])
        skip = module.skip_connection(x if self.resample == "none" else module.x_upd(x))
        norm, convolution = parts(module.out_layers)[0], parts(module.out_layers)[-1]
        film = modulation.chunk(2, dim=1) if self.film else None
        y = _norm_convolution(norm, convolution, h, film=film, residual=skip)
        return y.contiguous() if x.is_contiguous() else y  # code behind may rely on the layout


def _convolutions(module: Any) -> tuple[Any, Any]:
    return parts(module.in_layers)[-1], parts(module.out_layers)[-1]


def _may_fuse(module: Any, x: Tensor) -> bool:
    """Whether this call is one of maps, in the weights' dtype, and without dropout."""
    dropouts = (part for part in parts(module.out_layers)[2:-1] if getattr(part, "p", 0))
    same = all(convolution.weight.dtype is x.dtype for convolution in _convolutions(module))
    return x.ndim == 4 and same and not (module.training and any(True for _ in dropouts))


def _norm_convolution(
    norm: Any,
    convolution: Any,
    x: Tensor,
    *,
    shift: Tensor | None = None,
    film: Sequence[Tensor] | None = None,
    resample: ops.Resample = "none",
    residual: Tensor | None = None,
) -> Tensor:
    """The op on the parameters that ``norm`` and ``convolution`` have now."""
    scale, offset = (None, None) if film is None else film
    bias = convolution.bias
    if shift is not None:
        bias = shift if bias is None else bias + shift
    return ops.norm_convolution(
        x,
        convolution.weight,
        bias,
        norm_weight=norm.weight,
        norm_bias=norm.bias,
        groups=norm.num_groups,
        eps=norm.eps,
        scale=scale,
        shift=offset,
        resample=resample,
        residual=residual,
    )


def _is_plain(convolution: nn.Module) -> bool:
    """Whether a layer is PyTorch's own 3x3 convolution of maps that keeps their size."""
    return type(convolution) is nn.Conv2d and (
        convolution.kernel_size == (3, 3)
        and convolution.stride == convolution.padding == convolution.dilation == (1, 1)
        and convolution.groups == 1
        and convolution.padding_mode == "zeros"
    )


def propose_residual(module: nn.Module) -> list[Plan]:
    """Plans for a module with the parts of a residual block, most fused first."""
    if not looks_like_residual(module):
        return []
    first, last = parts(module.in_layers), parts(module.out_layers)
    heads = (first[:2], last[:2])
    if len(first) != 3 or len(last) < 3 or _linear(module) is None:
        return []
    if not all(is_group_norm(norm) and is_function(activation) for norm, activation in heads):
        return []
    if not any(parameter.ndim - 2 in _SPACES for parameter in first[2].parameters()):
        return []
    resampler = getattr(module, "h_upd", None)
    resamples: tuple[Literal["none", "up", "down", "own"], ...] = ("up", "down", "own")
    if resampler is None or isinstance(resampler, nn.Identity):
        resamples = ("none",)
    film = _linear(module).weight.shape[0] == 2 * len(last[0].weight)  # type: ignore[arg-type]
    method = "_forward" if callable(getattr(module, "_forward", None)) else "forward"
    plain = _is_plain(first[-1]) and _is_plain(last[-1]) and all(is_function(part) for part in last[2:-1])
    plans = (
        ResidualPlan(method=method, film=film, fused=fused and resample != "own", resample=resample)
        for resample in resamples
        for fused in (True, False)
        if plain or not fused
    )
    return [plan.watching(types_of(plan.inner(module))) for plan in plans]


def looks_like_residual(module: Any) -> bool:
    """Whether the module has the four parts of the family's residual block."""
    names = ("in_layers", "emb_layers", "out_layers", "skip_connection")
    return all(isinstance(getattr(module, name, None), nn.Module) for name in names)


def _linear(module: Any) -> Any:
    """The projection of the embedding, or None."""
    projections = [layer for layer in parts(module.emb_layers) if isinstance(layer, nn.Linear)]
    return projections[0] if len(projections) == 1 else None
