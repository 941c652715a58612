"""Which weights of a model are kept in packed form for inference on CPU, and whether there is room."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor, nn

from glide_fast.models.branch import Projection
from glide_fast.models.clip import ClipAttention
from glide_fast.models.layers import Conv2d, Linear, PointwiseConv
from glide_fast.models.noisy_clip import PictureInput
from glide_fast.ops import packed

_LARGEST_GROWTH = 4  # of a 3x3 weight in Winograd's domain
_SPARE = 0.1  # of the available memory, for everything else


def product_weights(modules: Iterable[nn.Module]) -> list[Tensor]:
    """The weights of this package's convolutions and linear layers."""
    weights = []
    for module in modules:
        if isinstance(module, Conv2d | Linear | PointwiseConv):
            weights.append(module.weight)
        elif isinstance(module, Projection):
            weights.append(module.w)
        elif isinstance(module, ClipAttention):
            weights.append(module.in_proj_weight)
        elif isinstance(module, PictureInput):
            weights.append(module.patch_proj)
    return weights


def weights_to_pack(modules: Iterable[nn.Module]) -> list[Tensor]:
    """Those of them that are on the CPU."""
    return [weight for weight in product_weights(modules) if weight.device.type == "cpu"]


def packed_bytes(weights: Iterable[Tensor]) -> int:
    """What the packed forms take at most."""
    return sum(weight.nbytes * (_LARGEST_GROWTH if weight.shape[2:] == (3, 3) else 1) for weight in weights)


def available_bytes() -> int | None:
    """Memory that the system can still give, or None where it does not say."""
    facts = Path("/proc/meminfo")
    if facts.exists():
        for line in facts.read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    if "SC_AVPHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def fits(weights: Iterable[Tensor]) -> bool:
    """Whether there is memory for the packed forms."""
    available = available_bytes()
    return available is None or packed_bytes(weights) <= (1 - _SPARE) * available


def keep_if_it_fits(model: nn.Module) -> None:
    """Keep the packed weights of a model of this package, unless memory would run short."""
    weights = weights_to_pack(model.modules())
    if fits(weights):
        packed.keep(weights)
