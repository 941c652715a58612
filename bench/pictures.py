"""The embedded text-to-picture pipeline, with our networks or with a peer's in their place.

The loop, its noise and its equations are the same for both, and cost next to nothing: what is compared is the
networks as a sampler uses them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

import glide_fast
from bench.networks import noise
from bench.peers.plain import Positional, plain_unet
from bench.peers.runtimes import Function, prepare
from bench.place import CPU, Place
from bench.subject import Plain
from glide_fast.models import LoadedModel, MaskedImage, TextEncoding, UNet
from glide_fast.sampling.denoiser import PerImageNoise
from glide_fast.sampling.pipeline import StageOptions, TextToImage, quantise, sample_stage

PROMPTS = ("red apple", "grinning face", "red heart", "evergreen tree")
GUIDANCE = 1.25


class Tokens(NamedTuple):
    """What the original hands to its network in every step."""

    tokens: Tensor
    mask: Tensor


class Stand(nn.Module):
    """A peer where the pipeline expects a U-Net of ours; it encodes the text as the peer is said to do."""

    def __init__(self, network: UNet, peer: str, batch: int) -> None:
        super().__init__()
        self.twin, self.config = plain_unet(network), network.config
        self.once = peer != "upstream"
        unet, text = network.config, network.config.text
        if text is None:
            raise ValueError("the pipeline's networks have text")
        device = next(network.parameters()).device
        x = noise(batch, unet.image_channels, unet.image_size, unet.image_size).to(device)
        inputs: list[Tensor] = [x, torch.full((batch,), 500, device=device)]
        shape = batch, text.context
        words = torch.zeros(shape, dtype=torch.int64, device=device), torch.ones(shape, device=device).bool()
        if self.once:
            with torch.no_grad():
                pooled, sequence = self.twin.encode_text(*words)
            inputs += [pooled, sequence.permute(0, 2, 1).contiguous()]
        else:
            inputs += words
        names = ["x", "timesteps", *(["pooled", "sequence"] if self.once else ["tokens", "mask"])]
        if unet.low_res:
            names.append("low_res")
            inputs.append(noise(batch, 3, unet.image_size // 2, unet.image_size // 2).to(device))
        plain = Plain(module=Positional(self.twin, tuple(names)), inputs=tuple(inputs))
        self.function: Function = prepare(peer, plain)

    def text(self, tokens: Tensor, mask: Tensor) -> Tokens | TextEncoding:
        """What each step is given: the tokens themselves, or the text encoded."""
        if not self.once:
            return Tokens(tokens, mask)
        pooled, sequence = self.twin.encode_text(tokens, mask)
        return TextEncoding(pooled, sequence.permute(0, 2, 1).contiguous())

    def timetable(self, _timesteps: Tensor, *, text: object = None) -> None:
        """Nothing: the original projects the timestep in every step."""

    def forward(
        self,
        x: Tensor,
        timesteps: Tensor,
        *,
        text: tuple[Tensor, Tensor],
        low_res: Tensor | None = None,
        known: MaskedImage | None = None,
        timetable: None = None,  # noqa: ARG002 (a network of ours is given one)
    ) -> Tensor:
        """As :meth:`glide_fast.models.UNet.forward`, for batches of the size that was prepared."""
        if known is not None:
            raise ValueError("a peer paints whole pictures; leave known out")
        given = (x, timesteps, *text[:2]) if low_res is None else (x, timesteps, *text[:2], low_res)
        return self.function(*given)[0]


def ours(place: Place = CPU) -> TextToImage:
    """The embedded models in float32, accelerated as a user would."""
    models = TextToImage.embedded()
    if place.gpu:
        models.to(place.device, torch.float32)
    for stage in (models.base, models.upsampler):
        if stage is not None:
            glide_fast.accelerate(stage.network)
    return models


def of_peer(models: TextToImage, peer: str, batch: int) -> TextToImage:
    """The same pipeline with a peer's networks.

    Raises:
        Unavailable: the peer cannot compute them.
    """

    def stand(stage: LoadedModel, rows: int) -> LoadedModel:
        return stage._replace(network=cast(UNet, Stand(stage.network, peer, rows)))

    if models.upsampler is None:
        raise ValueError("the embedded pipeline has an upsampler")
    return TextToImage(base=stand(models.base, 2 * batch), upsampler=stand(models.upsampler, batch))


def sampling(models: TextToImage, batch: int, steps: int) -> Callable[[], Tensor]:
    """Both stages, from the prompts to pictures in [-1, 1]: the same ones at each call."""
    if models.upsampler is None:
        raise ValueError("the embedded pipeline has an upsampler")
    upsampler = models.upsampler
    prompts = [PROMPTS[index % len(PROMPTS)] for index in range(batch)]

    def paint() -> Tensor:
        source = PerImageNoise(range(batch))
        options = StageOptions(steps=steps, guidance=GUIDANCE)
        low_res = sample_stage(models.base, prompts, noise=source, options=options)
        options = StageOptions(steps=steps, guidance=1.0, temperature=0.997)
        return sample_stage(upsampler, prompts, noise=source, options=options, low_res=quantise(low_res))

    return paint


def flops(models: TextToImage, batch: int, steps: int) -> float:
    """FLOPs of all evaluations of both networks, the text encoded once."""
    total = 0.0
    stages = ((models.base, 2 * batch), (models.upsampler, batch))
    for stage, rows in stages:
        if stage is not None:
            total += steps * _step_flops(stage.network, rows)
    return total


def _step_flops(network: UNet, rows: int) -> float:
    unet, text = network.config, network.config.text
    if text is None:
        raise ValueError("the pipeline's networks have text")
    x = noise(rows, unet.image_channels, unet.image_size, unet.image_size)
    pooled, sequence = torch.zeros(rows, 4 * unet.channels), torch.zeros(rows, text.context, text.width)
    names: tuple[str, ...] = ("x", "timesteps", "pooled", "sequence")
    device = next(network.parameters()).device
    inputs = tuple(each.to(device) for each in (x, torch.full((rows,), 500), pooled, sequence))
    if unet.low_res:
        names, inputs = (*names, "low_res"), (*inputs, inputs[0][:, :3, ::2, ::2])
    return Plain(module=Positional(plain_unet(network), names), inputs=inputs).flops()
