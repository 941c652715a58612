"""The networks that are measured: published shapes, random weights, inputs, and their plain twins."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

import glide_fast
from bench.peers.plain import Positional, plain_clip, plain_noisy_pictures, plain_unet
from bench.peers.runtimes import SDPA
from bench.place import CPU, Place
from bench.subject import Outputs, Plain, Subject
from glide_fast.models import CLIP, CLIPConfig, NoisyCLIP, NoisyCLIPConfig, UNet, UNetConfig
from glide_fast.models.clip import VisionTransformerConfig
from glide_fast.models.placement import placed
from glide_fast.models.presets import preset
from glide_fast.sampling import noisy_clip_gradient
from glide_fast.text.tokenizer import get_tokenizer

INFERENCE_PEERS = ("upstream", "compile", "openvino", "onnxruntime")
TEXT_PEERS = ("upstream", "upstream, text once", "compile", "openvino", "onnxruntime")
Memory = Literal["full", "low"]
PROMPT = "an oil painting of a corgi"


@dataclass(frozen=True, kw_only=True)
class Case:
    """A named subject that is built when its turn comes, and whom it is compared with."""

    name: str
    build: Callable[[], Subject]
    peers: tuple[str, ...] = INFERENCE_PEERS


def randomised(network: nn.Module, seed: int = 0) -> nn.Module:
    """The network, ready for inference, where nothing is zero or one any more.

    Published weights are not needed to measure; but zeroed branches and neutral norms would hide errors.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim > 1 and not parameter.any():
                fan_in = parameter[0].numel()
                parameter.normal_(std=fan_in**-0.5, generator=generator)
            elif parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return network.eval().requires_grad_(False)


def seeded(build: Callable[[], nn.Module]) -> nn.Module:
    """A network from seed 0; the state of torch's generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return randomised(build())


def noise(*shape: int, seed: int = 0) -> Tensor:
    """Standard normals from a seed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def small(config: UNetConfig, *, channels: int = 64, size: int, levels: int = 2) -> UNetConfig:
    """A narrower form with fewer levels, one block each, and two layers of text, for quick runs."""
    text = None if config.text is None else replace(config.text, width=64, layers=2, heads=2)
    return replace(
        config,
        channels=channels,
        channel_mult=config.channel_mult[:levels],
        image_size=size,
        res_blocks=1,
        head_channels=None if config.head_channels is None else 32,
        text=text,
    )


def built(config: UNetConfig, memory: Memory = "full", place: Place = CPU) -> UNet:
    """A U-Net of this shape, placed and accelerated as a user would, with as much memory as is said."""
    network = seeded(lambda: UNet(config))
    if not isinstance(network, UNet):
        raise TypeError(f"a U-Net was built, and became a {type(network).__name__}")
    glide_fast.accelerate(place.moved(network), memory=memory)
    return placed(network, place.device, place.dtype) if place.gpu else network


def step(config: UNetConfig, batch: int, place: Place = CPU) -> Subject:
    """One step of a U-Net without text: class labels where it has them."""
    network = built(config, place=place)
    x = place.put(noise(batch, config.image_channels, config.image_size, config.image_size))
    timesteps = place.put(torch.linspace(900, 100, batch).long())
    given = {} if config.classes is None else {"labels": place.put(torch.arange(batch) % config.classes)}
    twin = Positional(place.plain(plain_unet(network)), ("x", "timesteps", *given))

    def ours() -> Outputs:
        with torch.inference_mode():
            return (network(x, timesteps, **given),)

    return Subject(ours=ours, plain=Plain(module=twin, inputs=place.inputs((x, timesteps, *given.values()))))


class TextStep:
    """A U-Net with text and what it is given: prompts in the first half of the batch, none in the second."""

    def __init__(self, config: UNetConfig, batch: int, memory: Memory = "full", place: Place = CPU) -> None:
        """Raise ValueError if the U-Net has no text."""
        if config.text is None:
            raise ValueError("this U-Net has no text; use step()")
        self.network = built(config, memory, place)
        prompts = [PROMPT] * (batch - batch // 2) + [""] * (batch // 2)
        words = get_tokenizer(config.text.tokenizer).batch(prompts, config.text.context)
        self.words = place.put(words.tokens), place.put(words.mask)
        with torch.no_grad():
            self.text = self.network.text(*self.words)
        self.x = place.put(noise(batch, config.image_channels, config.image_size, config.image_size))
        self.timesteps = place.put(torch.full((batch,), 500))
        self.timetable = None
        if place is CPU:
            with torch.inference_mode():
                self.timetable = self.network.timetable(self.timesteps[:1], text=self.text)
        side = config.image_size // 4
        self.given = {"low_res": place.put(noise(batch, 3, side, side, seed=1))} if config.low_res else {}

    def ours(self) -> Outputs:
        """One step as a sampler takes it: what only text and timesteps decide was computed beforehand."""
        with torch.inference_mode():
            output = self.network(
                self.x, self.timesteps, text=self.text, timetable=self.timetable, **self.given
            )
        return (output,)


def text_step(config: UNetConfig, batch: int, memory: Memory = "full", place: Place = CPU) -> Subject:
    """One step of a U-Net with text.

    The original encodes the text in every step unless told to keep it; we and the others do so beforehand,
    and on a CPU we project the timestep beforehand too.
    """
    step = TextStep(config, batch, memory, place)
    twin = place.plain(plain_unet(step.network))
    # without views of one another, which exporters do not like
    pooled, sequence = step.text.pooled.clone(), step.text.sequence.contiguous().clone()

    def plain(names: tuple[str, str], values: tuple[Tensor, Tensor]) -> Plain:
        module = Positional(twin, ("x", "timesteps", *names, *step.given))
        given = (step.x, step.timesteps, *values, *step.given.values())
        return Plain(module=module, inputs=place.inputs(given))

    return Subject(
        ours=step.ours,
        plain=plain(("tokens", "mask"), step.words),
        once=plain(("pooled", "sequence"), (pooled, sequence)),
    )


def noisy_clip_guidance(config: NoisyCLIPConfig, batch: int, place: Place = CPU) -> Subject:
    """The gradient of the likeness of noised pictures and their texts, which guides a sampler: in float32."""
    place = place.single
    network = seeded(lambda: NoisyCLIP(config))
    if not isinstance(network, NoisyCLIP):
        raise TypeError(f"a CLIP was built, and became a {type(network).__name__}")
    glide_fast.accelerate(place.moved(network))
    x = place.put(noise(batch, 3, config.image_size, config.image_size))
    timesteps = place.put(torch.full((batch,), 500))
    texts = place.put(nn.functional.normalize(noise(batch, config.embedding, seed=1), dim=1))
    gradient = noisy_clip_gradient(network, texts, scale=1.0)
    twin = plain_noisy_pictures(network).requires_grad_(False)
    plain = Plain(module=twin, inputs=(x, timesteps, texts), gradient=True)
    return Subject(ours=lambda: (gradient(x, timesteps),), plain=plain)


def clip_embeddings(config: CLIPConfig, batch: int, place: Place = CPU) -> Subject:
    """OpenAI's CLIP on as many pictures as texts."""
    network = seeded(lambda: CLIP(config))
    if not isinstance(network, CLIP):
        raise TypeError(f"a CLIP was built, and became a {type(network).__name__}")
    glide_fast.accelerate(place.narrowed(place.moved(network)))
    network.compute_dtype = place.dtype
    image = place.put(noise(batch, 3, config.image_size, config.image_size))
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, config.vocabulary - 1, (batch, config.context), generator=generator)
    tokens[torch.arange(batch), torch.arange(batch) % config.context] = config.vocabulary - 1
    tokens = place.put(tokens)

    def ours() -> Outputs:
        with torch.inference_mode():
            return network.encode_image(image), network.encode_text(tokens)

    twin = place.plain(plain_clip(network))
    return Subject(ours=ours, plain=Plain(module=twin, inputs=place.inputs((image, tokens))))


def cases(*, quick: bool, place: Place = CPU) -> list[Case]:
    """The published networks; when quick, narrow forms of them, the other runtimes on the first alone."""
    base, upsampler = preset("glide-base").unet, preset("glide-upsample").unet
    adm = preset("guided-64x64-diffusion").unet
    noisy, clip = preset("glide-clip", NoisyCLIPConfig), preset("clip-vit-b-32", CLIPConfig)
    if quick:
        base, upsampler, adm = small(base, size=32), small(upsampler, size=64, levels=5), small(adm, size=32)
        noisy = replace(noisy, image_heads=4, image_layers=2, text_layers=1, image_size=32)
        vision = VisionTransformerConfig(width=128, layers=2, patch_size=32)
        clip = replace(clip, vision=vision, width=128, layers=2, heads=2)
    named = "small " if quick else ""
    rows = [
        Case(
            name=f"{named}GLIDE {base.image_size} px base, CFG batch 2, one step",
            build=lambda: text_step(base, 2, place=place),
            peers=TEXT_PEERS,
        ),
        Case(
            name=f"{named}GLIDE {base.image_size} px base, CFG batch 2, one step, low memory",
            build=lambda: text_step(base, 2, "low", place),
            peers=("upstream",),
        ),
        Case(
            name=f"{named}GLIDE {upsampler.image_size} px upsampler, batch 1, one step",
            build=lambda: text_step(upsampler, 1, place=place),
            peers=TEXT_PEERS,
        ),
        Case(
            name=f"{named}ADM {adm.image_size} px class-conditional, batch 4, one step",
            build=lambda: step(adm, 4, place),
        ),
        Case(
            name=f"{named}noise-aware CLIP, gradient for guidance, batch 4",
            build=lambda: noisy_clip_guidance(noisy, 4, place),
        ),
        Case(
            name=f"{named}CLIP {'ViT' if quick else 'ViT-B/32'}, pictures and texts, batch 8",
            build=lambda: clip_embeddings(clip, 8, place),
        ),
    ]
    if place.gpu:  # where weights have one form, so that there is nothing to save
        rows = [replace(row, peers=gpu_peers(row)) for row in rows if "low memory" not in row.name]
    if not quick:
        return rows
    return [rows[0], *(replace(row, peers=("upstream",)) for row in rows[1:])]


def gpu_peers(case: Case) -> tuple[str, ...]:
    """Whom a case is compared with on a GPU; PyTorch's attention serves the original's U-Nets alone."""
    once = ("upstream, text once",) if "upstream, text once" in case.peers else ()
    return ("upstream", *once, *(() if "CLIP" in case.name else SDPA), "compile, CUDA graphs")
