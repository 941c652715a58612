"""The plain twin of a network of ours: the same parameters, computed as the original code does."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn

from bench.peers.clip import PlainCLIP, PlainNoisyPictures
from bench.peers.unet import PlainUNet
from glide_fast.models import CLIP, NoisyCLIP, UNet

Twin = TypeVar("Twin", bound=nn.Module)


def plain_unet(network: UNet, *, recompute_attention: bool = False) -> PlainUNet:
    """The twin of a U-Net."""
    with torch.device("meta"):
        twin = PlainUNet(network.config, recompute_attention=recompute_attention)
    return _sharing(twin, network)


def plain_clip(network: CLIP) -> PlainCLIP:
    """The twin of OpenAI's CLIP."""
    with torch.device("meta"):
        twin = PlainCLIP(network.config)
    return _sharing(twin, network)


def plain_noisy_pictures(network: NoisyCLIP) -> PlainNoisyPictures:
    """The twin of the noise-aware CLIP's picture tower."""
    with torch.device("meta"):
        twin = PlainNoisyPictures(network.config)
    return _sharing(twin, network.image_encoder)


def _sharing(twin: Twin, network: nn.Module) -> Twin:
    """The twin on the network's own parameters, in the order in memory that the original code has.

    Raises:
        RuntimeError: names or shapes of the two differ.
    """
    state: dict[str, Tensor] = {name: each.contiguous() for name, each in network.state_dict().items()}
    twin.load_state_dict(state, assign=True)
    return twin.train(network.training)


class Positional(nn.Module):
    """A network whose keyword arguments are given by place, as exporters want them."""

    def __init__(self, network: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self.network = network
        self.names = names

    def forward(self, *values: Tensor) -> Tensor:
        """Call the network with each value under its name."""
        return self.network(**dict(zip(self.names, values, strict=True)))  # type: ignore[no-any-return]
