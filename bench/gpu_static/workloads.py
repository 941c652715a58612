"""What is counted: a step of each published network, by us and as the original code computes it.

Inference is float16: ours with the timestep's layers, norms and the output in float32; the original's
plain form with nothing but norms in float32, which saves it casts. Training is bfloat16 (the original:
float16) with float32 weights: the loss, its gradients, AdamW and the moving average.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from bench.peers.clip import PlainNoisyPictures
from bench.peers.unet import PlainUNet
from glide_fast import ops
from glide_fast.compat.half import (
    get_param_groups_and_shapes,
    make_master_params,
    master_params_to_model_params,
    model_grads_to_master_grads,
)
from glide_fast.diffusion import GaussianDiffusion, Schedule
from glide_fast.diffusion.losses import hybrid_loss
from glide_fast.models import ModelConfig, NoisyCLIP, NoisyCLIPConfig, UNet, UNetConfig
from glide_fast.models.layers import PointwiseConv
from glide_fast.models.presets import preset
from glide_fast.ops import StepNumbers
from glide_fast.sampling import noisy_clip_gradient
from glide_fast.training.config import OptimizerConfig
from glide_fast.training.optimizer import OneLaunchAdamW, clip_gradients
from glide_fast.training.working_weights import WorkingWeights, converted_names

Call = Callable[[], object]
Build = Callable[[], Call]
Network = TypeVar("Network", bound=nn.Module)
Prepare = Callable[[nn.Module], nn.Module]
_HALVED = (nn.Conv1d, nn.Conv2d, PointwiseConv)
_BLOCKS = ("input_blocks", "middle_block", "output_blocks")


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A step, and the launches and bytes that ours may take."""

    name: str
    ours: Build
    upstream: Build
    compiled: Build | None = None  # upstream's by torch.compile
    most_launches: int | None = None
    most_bytes: float | None = None


def halved(network: Network, chosen: Callable[[str, nn.Module], bool]) -> Network:
    """The network for inference, the parameters of the chosen modules in float16."""

    def value(name: str, module: nn.Module, parameter: Tensor) -> Tensor:
        return parameter.half() if chosen(name, module) else parameter

    return _remade(network, value).requires_grad_(False).eval()


def channels_last(network: Network) -> Network:
    """The network laid out as the trainer has it; tensors without memory cannot be so by ``to``."""

    def value(_name: str, _module: nn.Module, parameter: Tensor) -> Tensor:
        layout = torch.channels_last if parameter.ndim == 4 else torch.contiguous_format
        return parameter.contiguous(memory_format=layout)

    return _remade(network, value)


def _remade(network: Network, value: Callable[[str, nn.Module, Tensor], Tensor]) -> Network:
    """The network with other parameters in place of its own."""
    for name, module in network.named_modules():
        for key, parameter in list(module._parameters.items()):
            if parameter is not None:
                made = value(name, module, parameter.detach())
                module._parameters[key] = nn.Parameter(made, requires_grad=parameter.requires_grad)
    return network


def as_it_is(network: nn.Module) -> nn.Module:
    """The original's network as PyTorch runs it without being asked for more."""
    return network


def compiled(network: nn.Module) -> nn.Module:
    """The network by torch.compile, its weights as cuDNN likes them, or each call would convert them."""
    return torch.compile(channels_last(network))  # type: ignore[return-value]


def in_blocks(name: str, module: nn.Module) -> bool:
    """What :func:`glide_fast.models.placement.placed` keeps in the dtype of the activations."""
    return name.split(".")[0] in _BLOCKS and isinstance(module, _HALVED)


def _but_norms(_name: str, module: nn.Module) -> bool:
    return not isinstance(module, nn.GroupNorm | nn.LayerNorm)


def _pictures(config: UNetConfig, batch: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    x = torch.empty(batch, config.image_channels, config.image_size, config.image_size)
    small = config.image_size // 4
    given = {"low_res": torch.empty(batch, 3, small, small)} if config.low_res else {}
    return x, torch.empty(batch, dtype=torch.int64), given


def _words(config: UNetConfig, batch: int) -> tuple[Tensor, Tensor]:
    if config.text is None:
        raise ValueError("the counted U-Nets have text")
    shape = batch, config.text.context
    return torch.zeros(shape, dtype=torch.int64), torch.ones(shape, dtype=torch.bool)


def our_step(config: UNetConfig, batch: int) -> Build:
    """One evaluation of a U-Net, its text encoded before."""

    def build() -> Call:
        with torch.device("cuda"), torch.no_grad():
            network = halved(UNet(config, compute_dtype=torch.float16), in_blocks)
            x, timesteps, given = _pictures(config, batch)
            text = network.text(*_words(config, batch))

        def call() -> Tensor:
            with torch.no_grad():
                return network(x, timesteps, text=text, **given)  # type: ignore[no-any-return]

        return call

    return build


def upstream_step(
    config: UNetConfig, batch: int, *, text_once: bool = True, prepare: Prepare = as_it_is
) -> Build:
    """The same as the original code computes it, which encodes the text each time unless told otherwise."""

    def build() -> Call:
        with torch.device("cuda"), torch.no_grad():
            plain = halved(PlainUNet(config), _but_norms)
            x, timesteps, given = _pictures(config, batch)
            x, given = x.half(), {name: each.half() for name, each in given.items()}
            words = _words(config, batch)
            if text_once:
                pooled, sequence = plain.encode_text(*words)
                given |= {"pooled": pooled, "sequence": sequence.permute(0, 2, 1).contiguous()}
            else:
                given |= {"tokens": words[0], "mask": words[1]}
            network = prepare(plain)

        def call() -> Tensor:
            with torch.no_grad():
                return network(x, timesteps, **given)  # type: ignore[no-any-return]

        return call

    return build


def our_clip(config: NoisyCLIPConfig, batch: int) -> Build:
    """The gradient of the noise-aware CLIP, which guides a sampler."""

    def build() -> Call:
        with torch.device("cuda"):
            network = halved(NoisyCLIP(config), lambda _name, _module: False)
            x, timesteps = torch.empty(batch, 3, config.image_size, config.image_size), _times(batch)
            texts = torch.empty(batch, config.embedding)
        gradient = noisy_clip_gradient(network, texts, scale=1.0)
        return lambda: gradient(x, timesteps)

    return build


def upstream_clip(config: NoisyCLIPConfig, batch: int, *, prepare: Prepare = as_it_is) -> Build:
    """The same as the original code computes it."""

    def build() -> Call:
        with torch.device("cuda"):
            plain = halved(PlainNoisyPictures(config), lambda _name, _module: False)
            x, timesteps = torch.empty(batch, 3, config.image_size, config.image_size), _times(batch)
            texts = torch.empty(batch, config.embedding)
        network = prepare(plain.to("cuda"))

        def call() -> Tensor:
            pictures = x.detach().requires_grad_()
            return torch.autograd.grad(network(pictures, timesteps, texts).sum(), pictures)[0]

        return call

    return build


def _times(batch: int) -> Tensor:
    return torch.empty(batch, dtype=torch.int64)


class _Lesson:
    """What a training step learns from, and its losses."""

    def __init__(self, config: UNetConfig, batch: int, answer: Callable[..., Tensor]) -> None:
        self.answer = answer
        self.diffusion = GaussianDiffusion(schedule=Schedule.create("cosine", 1000, ""))
        self.pictures, self.steps, _ = _pictures(config, batch)
        self.noise = torch.empty_like(self.pictures)
        self.tokens, self.mask = _words(config, batch)
        self.weights = torch.empty(batch)  # of the steps

    def losses(self) -> Tensor:
        """The hybrid loss of each picture."""
        x = self.diffusion.q_sample(self.pictures, self.steps, self.noise)
        output = self.answer(
            x, self.diffusion.model_timesteps(self.steps), tokens=self.tokens, mask=self.mask
        )
        return hybrid_loss(self.diffusion, output, self.pictures, x, self.steps, self.noise).loss


def _optimizer(parameters: Sequence[Tensor]) -> torch.optim.Optimizer:
    """PyTorch's AdamW that has its state already."""
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, foreach=True)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return optimizer


class _Learner:
    """The parameters of a network that have 16-bit copies, or those that have none, and their moments."""

    def __init__(self, network: nn.Module, copies: Mapping[Tensor, Tensor], *, copied: bool) -> None:
        self.parameters = [each for each in network.parameters() if (each in copies) is copied]
        self.copies = [copies[each] for each in self.parameters if copied]
        self.first, self.second, self.average = (
            [torch.zeros_like(each) for each in self.parameters] for _ in range(3)
        )

    @torch.no_grad()
    def step(self, settings: OptimizerConfig, factor: Tensor | None) -> None:
        """What the optimiser does, whose numbers of steps would be tensors without values here."""
        numbers = StepNumbers.of(
            1, rate=1e-4, betas=settings.betas, eps=1e-8, decay=settings.weight_decay, share=1e-4
        )
        ops.adamw(
            self.parameters,
            [each.grad for each in self.parameters if each.grad is not None],
            self.first,
            self.second,
            [numbers] * len(self.parameters),
            average=self.average,
            copies=self.copies,
            factor=factor,
        )


def our_training(config: UNetConfig, batch: int) -> Build:
    """Bfloat16 activations and copies of float32 weights, AdamW and the average as the trainer has them."""

    names = converted_names(ModelConfig(unet=config), torch.bfloat16)

    def build() -> Call:
        with torch.device("cuda"):
            network = channels_last(UNet(config, compute_dtype=torch.bfloat16).train())
            lesson = _Lesson(config, batch, network)
        settings = OptimizerConfig()
        optimizer = OneLaunchAdamW(network, settings)
        working = WorkingWeights(network, names, torch.bfloat16)
        learners = [_Learner(network, working.copies, copied=copied) for copied in (True, False)]

        def call() -> None:
            network.zero_grad(set_to_none=True)
            with working.lent():
                torch.autograd.backward(lesson.losses(), lesson.weights * (1 / batch))
            _, factor = clip_gradients(optimizer, network, settings.clip)
            for each in learners:
                each.step(settings, factor)
            working.written()

        return call

    return build


def upstream_training(config: UNetConfig, batch: int, *, prepare: Prepare = as_it_is) -> Build:
    """The original's mixed precision: its master weights are two vectors, copied from and to the network."""

    def build() -> Call:
        with torch.device("cuda"):
            network = prepare(halved(PlainUNet(config), _but_norms).requires_grad_(True).train())

            def answer(x: Tensor, timesteps: Tensor, **given: Tensor) -> Tensor:
                output: Tensor = network(x.half(), timesteps, **given)
                return output.float()

            lesson = _Lesson(config, batch, answer)
        groups = get_param_groups_and_shapes(network.named_parameters())
        masters = make_master_params(groups)
        optimizer = _optimizer(masters)
        averages = [master.detach().clone() for master in masters]

        def call() -> None:
            network.zero_grad(set_to_none=True)
            (lesson.losses().mean() * 2.0**20).backward()  # type: ignore[no-untyped-call]
            model_grads_to_master_grads(groups, masters)
            for master in masters:
                if master.grad is not None:
                    master.grad.mul_(2.0**-20)
            optimizer.step()
            master_params_to_model_params(groups, masters)
            for average, master in zip(averages, masters, strict=True):
                average.mul_(0.9999).add_(master.detach(), alpha=1e-4)

        return call

    return build


def workloads() -> list[Workload]:
    """The published networks, with the goals that are set for them."""
    base, upsampler = preset("glide-base").unet, preset("glide-upsample").unet
    clip = preset("glide-clip", NoisyCLIPConfig)
    return [
        Workload(
            name="base 64 px, batch 2",
            ours=our_step(base, 2),
            upstream=upstream_step(base, 2),
            compiled=upstream_step(base, 2, prepare=compiled),
            most_launches=340,
            most_bytes=1.6e9,
        ),
        Workload(
            name="base 64 px, batch 2, the original's text in each step",
            ours=our_step(base, 2),
            upstream=upstream_step(base, 2, text_once=False),
        ),
        Workload(
            name="upsampler 256 px, batch 1",
            ours=our_step(upsampler, 1),
            upstream=upstream_step(upsampler, 1),
        ),
        Workload(
            name="upsampler 256 px, batch 2",
            ours=our_step(upsampler, 2),
            upstream=upstream_step(upsampler, 2),
            compiled=upstream_step(upsampler, 2, prepare=compiled),
            most_launches=350,
            most_bytes=8.0e9,
        ),
        Workload(
            name="noise-aware CLIP, gradient, batch 4",
            ours=our_clip(clip, 4),
            upstream=upstream_clip(clip, 4),
            compiled=upstream_clip(clip, 4, prepare=compiled),
        ),
        Workload(
            name="base 64 px, training, batch 64",
            ours=our_training(base, 64),
            upstream=upstream_training(base, 64),
            compiled=upstream_training(base, 64, prepare=compiled),
            most_launches=1250,
            most_bytes=120e9,
        ),
    ]
